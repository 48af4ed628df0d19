"""Traces of libraries that would print secrets: which ones they are, and that no sidecar starts with them."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import routing_service_pb2_grpc
from keyturn_server.settings import PRINTING_TRACERS, printing_tracers
from tests.cli.command import Served, check_fault, environment_of, keyturn
from tests.factories import Factory
from tests.support import MASTER_KEY, eventually
from tests.test_access import bearer, files, plain_channel, secure_channel, token_of
from tests.test_secrets import canary

ALL_BUT_THOSE = ",".join(("all", *(f"-{tracer}" for tracer in PRINTING_TRACERS)))

# `keyturn serve` without its refusal.
_RECKLESS = """
from keyturn_server import settings
settings.refuse_leaks = lambda: None
from keyturn_server.__main__ import main
main()
"""


@asynccontextmanager
async def traced(directory: Path, database: str, trace: str) -> AsyncIterator[Served]:
    """A sidecar on TLS and on loopback that starts with whatever traces it is told to."""
    output = directory / "output"
    listen = ("--listen", "127.0.0.1:0", "--listen", f"unix:{directory}/run/s")
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _RECKLESS, "serve", *listen),
            *("--access-file", f"{directory}/access.toml"),
            *("--tls-cert", f"{directory}/cert.pem", "--tls-key", f"{directory}/key.pem"),
            stdout=file,
            stderr=file,
            env=environment_of(
                KEYTURN_DATABASE_URL=database,
                ENCRYPTION_KEY=MASTER_KEY,
                GRPC_TRACE=trace,
                GRPC_VERBOSITY="DEBUG",
            ),
        )
    try:
        served = Served(process=process, output=output, addresses=[])

        async def serves() -> dict[str, Any] | None:
            assert process.returncode is None, served.text
            return served.event("serving")

        served.addresses = (await eventually(serves, seconds=60))["addresses"]
        yield served
    finally:
        process.kill()
        await process.wait()


async def spoken(database: str, make: Factory, trace: str) -> tuple[str, dict[str, str]]:
    """What a sidecar prints with those traces, and the secrets that went through it meanwhile."""
    user, secret = await make.user(), canary("sk-proj-")
    await make.key(user, secret=secret)
    secrets = {"token": token_of("gateway"), "key": secret}
    async with files() as directory, traced(directory, database, trace) as served:
        encrypted, socket = served.addresses
        async with secure_channel(encrypted) as tls, plain_channel(socket) as plain:
            for number, channel in enumerate((tls, plain)):
                stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)
                for delivery in (pb.KEY_DELIVERY_INLINE, pb.KEY_DELIVERY_REDEEM):
                    ask = pb.DecideRequest(user_id=user, provider="openai", key_delivery=delivery)
                    metadata = bearer(secrets["token"])
                    key = (await stub.Decide(ask, metadata=metadata, timeout=60)).key
                    secrets[f"handle {number} {delivery}"] = key.handle
                redeem = pb.RedeemRequest(key_handle=key.handle)
                assert (await stub.Redeem(redeem, metadata=metadata, timeout=60)).secret == secret
        return served.text, secrets


def shown(text: str, secrets: dict[str, str]) -> set[str]:
    """Which of the secrets stand in a text, as they are or as the numbers of their bytes."""
    numbers = re.sub(r"[^0-9a-f]", "", re.sub(r"'.*?'", "", text.lower()))
    return {
        name
        for name, secret in secrets.items()
        if secret[8:24] in text or secret[8:24].encode().hex() in numbers
    }


async def test_all_other_traces_of_grpc_print_no_secret(database: str, make: Factory) -> None:
    text, secrets = await spoken(database, make, ALL_BUT_THOSE)
    assert text.count("\n") > 1_000, "they do print"
    assert shown(text, secrets) == set()


async def test_the_traces_that_are_refused_do_print_secrets(database: str, make: Factory) -> None:
    text, secrets = await spoken(database, make, ",".join(PRINTING_TRACERS))
    assert {"token", "key"} <= shown(text, secrets)


@pytest.mark.parametrize(
    ("trace", "verbosity"),
    [("all", "DEBUG"), ("secure_endpoint", "info"), ("api,chttp2*", "what?"), ("-all,tcp", "WARNING")],
)
async def test_serve_refuses_them_and_names_the_way_out(trace: str, verbosity: str) -> None:
    finished = await keyturn("serve", GRPC_TRACE=trace, GRPC_VERBOSITY=verbosity, ENCRYPTION_KEY=MASTER_KEY)
    # gRPC, which is imported first, prints its own lines.
    told = finished._replace(err=finished.err[finished.err.index("keyturn: ") :])
    check_fault(told, 1, "GRPC_TRACE: ", " would print callers' tokens", ALL_BUT_THOSE.partition(",")[2])


@pytest.mark.parametrize(
    ("trace", "verbosity", "printing"),
    [
        ("", "DEBUG", []),
        ("http,api,call,channel,http2_ping", "DEBUG", []),
        ("all", "NONE", []),
        ("all", "error", []),
        ("all", "", list(PRINTING_TRACERS)),
        ("secure_endpoint", "INFO", ["secure_endpoint"]),
        ("http, secure_endpoint", "INFO", ["secure_endpoint"]),
        ("secure_endpoint,-secure_endpoint", "INFO", []),
        ("-secure_endpoint,secure_*", "INFO", ["secure_endpoint"]),
        ("all,-*", "INFO", []),
        ("all,-chttp2_hpack_parser", "INFO", list(PRINTING_TRACERS[1:])),
        ("?cp", "INFO", ["tcp"]),
        (ALL_BUT_THOSE, "DEBUG", []),
    ],
)
def test_what_prints_is_told_as_grpc_tells_it(trace: str, verbosity: str, printing: list[str]) -> None:
    assert printing_tracers(trace, verbosity) == printing


async def test_serve_refuses_to_write_down_the_keys_of_tls() -> None:
    check_fault(await keyturn("serve", SSLKEYLOGFILE="/nonexistent/keys"), 1, "SSLKEYLOGFILE: ", "Unset it.")


async def test_grpc_is_silent_where_nobody_asks_it_to_speak() -> None:
    finished = await keyturn("serve", GRPC_TRACE="all")
    check_fault(finished, 1, "Say where the data lives")
