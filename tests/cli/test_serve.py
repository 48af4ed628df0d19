"""`keyturn serve`: what it listens on, what it refuses to, and where its options come from."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import urllib.request
from typing import Any

import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import routing_service_pb2_grpc
from keyturn_server.access_file import parse_callers
from keyturn_server.serving import AddressError, Admission, claimed
from keyturn_server.tls import watched_tls
from keyturn_server.watched import Watched
from tests.cli.command import Finished, Served, free_port, keyturn, serving, sigint_ignored
from tests.factories import Factory
from tests.support import MASTER_KEY, temporary_directory
from tests.test_access import AUTHORITY, entry, files, spiffe_id, token_of, write


async def decide(served: Served, user: str, index: int = 0, **fields: Any) -> pb.DecideResponse:
    async with served.channel(index) as channel:
        stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)
        request = pb.DecideRequest(user_id=user, provider="openai", **fields)
        answer: pb.DecideResponse = await stub.Decide(request, timeout=30)
        return answer


async def refuse(database: str, *listen: str, **variables: str) -> Finished:
    """How `serve` refuses those addresses."""
    options = [part for address in listen for part in ("--listen", address)]
    finished = await keyturn("serve", *options, KEYTURN_DATABASE_URL=database, **variables)
    assert finished.code == 1
    assert "Traceback" not in finished.err
    assert finished.err.splitlines()[-1].startswith("keyturn: ")
    return finished


async def test_it_serves_on_several_addresses_at_once(database: str, make: Factory) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        path = directory / "made" / "for" / "it" / "s"
        listen = ("--listen", f"unix:{path}", "--listen", "127.0.0.1:0", "--listen", "[::1]:0")
        async with serving(
            directory, *listen, "--insecure-loopback", KEYTURN_DATABASE_URL=database
        ) as served:
            assert served.addresses[0] == f"unix:{path}"
            ports = [int(address.rpartition(":")[2]) for address in served.addresses[1:]]
            assert all(ports), "a port of 0 is logged as the one it became"
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            for index in range(3):
                assert (await decide(served, user, index, cost_micros=1)).HasField("ticket")


OFF_LIMITS = {
    "127.0.0.1:0": "--insecure-loopback",
    "127.0.0.1:1": "--access-file",
    "localhost:50051": "--insecure-loopback",
    "[::1]:50051": "--insecure-loopback",
    "0.0.0.0:50051": "TLS",
    "0.0.0.0:50052": "--access-file",
    "[::]:50051": "TLS",
    "192.0.2.1:50051": "TLS",
    "example.com:50051": "TLS",
    "localhost.example.com:50051": "TLS",
}
GARBAGE = ("", "nonsense", ":50051", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:http", "unix-abstract:x")


def refusal(address: str, **admission: Any) -> str:
    """Why an address is not listened on."""
    with pytest.raises(AddressError) as caught, claimed([address], Admission(**admission)):
        pass
    return str(caught.value)


async def test_addresses_that_others_could_call_are_refused(database: str) -> None:
    for address, reason in OFF_LIMITS.items():
        assert address in refusal(address)
        assert reason in refusal(address)
        if not address.startswith(("127", "localhost:", "[::1]")):
            assert reason in refusal(address, insecure_loopback=True), "that option is for loopback"
    finished = await refuse(database, "0.0.0.0:50051", KEYTURN_INSECURE_LOOPBACK="true")
    assert "0.0.0.0:50051: TCP off loopback needs TLS" in finished.err


async def test_tcp_is_for_tls_or_for_tokens_or_on_purpose_for_everybody() -> None:
    """What has to be there for an address to be listened on."""
    async with files() as directory:
        access = directory / "access.toml"
        tls = watched_tls(directory / "cert.pem", directory / "key.pem", None)
        tokens = Watched([access], lambda read: parse_callers(read[0]))
        write(access, entry("web", ["gateway"], certificates=["web.example.com"]))
        certificates = Watched([access], lambda read: parse_callers(read[0]))
        here, there = "127.0.0.1:50051", "0.0.0.0:50051"

        def taken(address: str, **admission: Any) -> bool:
            try:
                with claimed([address], Admission(**admission)):
                    return True
            except AddressError:
                return False

        assert taken(here, insecure_loopback=True)
        assert taken(here, callers=tokens)
        assert not taken(here)
        assert not taken(here, callers=certificates), "nobody could ever call"
        assert not taken(here, tls=tls), "nobody could ever call"
        for callers in (tokens, certificates):
            assert taken(here, tls=tls, callers=callers)
            assert taken(there, tls=tls, callers=callers)
            assert not taken(there, callers=callers)
            assert not taken(there, callers=callers, insecure_loopback=True)
            assert "--insecure-loopback" in refusal(here, tls=tls, callers=callers, insecure_loopback=True)
        assert not taken(there, tls=tls)
        assert "--access-file" in refusal(there, tls=tls)


async def test_files_that_are_wrong_are_named_at_the_start(database: str) -> None:
    async with files() as directory:
        access = str(write(directory / "access.toml", entry("web", ["king"])))
        cert, key = str(directory / "cert.pem"), str(directory / "ca.pem")
        socket = f"unix:{directory}/run/s"
        wrong, missing, tls, half, roles = await asyncio.gather(
            refuse(database, socket, KEYTURN_ACCESS_FILE=access),
            refuse(database, socket, KEYTURN_ACCESS_FILE=f"{directory}/none"),
            refuse(database, socket, KEYTURN_TLS_CERT=cert, KEYTURN_TLS_KEY=key),
            refuse(database, socket, KEYTURN_TLS_CERT=cert),
            refuse(database, socket, KEYTURN_SOCKET_ROLES="gateway,king"),
        )
        assert f"{access}: callers[1] (web).roles: a list of at least one of" in wrong.err
        assert f"{directory}/none: cannot be read" in missing.err
        assert f"{key}: is no private key" in tls.err
        assert "both --tls-cert and --tls-key" in half.err
        assert "KEYTURN_SOCKET_ROLES" in roles.err


async def test_it_serves_on_tcp_with_tls_and_an_access_file(database: str) -> None:
    async with files() as directory:
        tls = ("--tls-cert", f"{directory}/cert.pem", "--tls-key", f"{directory}/key.pem")
        mutual = ("--tls-client-ca", f"{directory}/ca.pem")
        access = ("--access-file", f"{directory}/access.toml")
        token = write(directory / "token", token_of("viewer") + "\n")
        ours = AUTHORITY.caller(spiffe_id("viewer"))
        write(directory / "caller.cert", ours.certificate)
        write(directory / "caller.key", ours.key)
        certificate = ("--cert", f"{directory}/caller.cert", "--key", f"{directory}/caller.key")
        trust = ("--ca", f"{directory}/ca.pem")
        listen = ("--listen", "0.0.0.0:0", "--listen", f"unix:{directory}/run/s")
        for more in ((), mutual):
            async with serving(
                directory, *listen, *tls, *access, *more, KEYTURN_DATABASE_URL=database
            ) as served:
                address = f"127.0.0.1:{served.addresses[0].rpartition(':')[2]}"
                where = {"KEYTURN_ADDRESS": address}
                plain, nobody, by_token, by_variable, by_certificate, elsewhere = await asyncio.gather(
                    keyturn("health", **where),
                    keyturn("health", *trust, **where),
                    keyturn("health", *trust, "--token-file", str(token), **where),
                    keyturn("health", KEYTURN_CA=trust[1], KEYTURN_TOKEN=token_of("viewer"), **where),
                    keyturn("health", *trust, *certificate, **where),
                    keyturn("health", "--address", f"unix:{directory}/run/s", **where),
                )
                assert (plain.code, nobody.code) == (1, 1)
                assert (by_token.code, by_variable.code) == ((1, 1) if more else (0, 0))
                assert by_certificate.code == (0 if more else 1)
                assert (elsewhere.code, elsewhere.out) == (0, "SERVING\n")
                if not more:
                    assert "UNAUTHENTICATED: This caller is not known here." in nobody.err
                served.signal(signal.SIGTERM)
                assert await served.end() == 0
                assert not served.strays


async def test_addresses_that_are_none_are_refused(database: str) -> None:
    for address in GARBAGE:
        assert f"{address!r} is no address: give unix:PATH or host:port." in refusal(address)
    assert "'nonsense' is no address" in (await refuse(database, "nonsense")).err


async def test_a_socket_where_others_can_enter_or_that_cannot_be_is_refused(database: str) -> None:
    async with temporary_directory() as directory:
        (directory / "open").mkdir()
        (directory / "open").chmod(0o755)
        (directory / "file").touch()
        (directory / "mine").mkdir(mode=0o700)
        (directory / "mine" / "taken").mkdir()
        (directory / "mine" / "s.lock").mkdir()
        cases = {
            directory / "open" / "s": f"Run: chmod 700 {directory}/open",
            directory / "file" / "s": "is no directory",
            directory / "file" / "deeper" / "s": "cannot be made",
            directory / "mine" / "s": "cannot be opened",
            directory / ("x" * 120): "at most 107 bytes",
        }
        if os.geteuid() == 0:
            theirs = directory / "theirs"
            theirs.mkdir(mode=0o700)
            os.chown(theirs, 65534, 65534)
            cases[theirs / "s"] = "belongs to somebody else"
        for path, reason in cases.items():
            said = refusal(f"unix:{path}")
            assert reason in said
            assert str(path) in said or str(path.parent) in said
        exposed, taken = await asyncio.gather(
            refuse(database, f"unix:{directory}/open/s"), refuse(database, f"unix:{directory}/mine/taken")
        )
        assert "chmod 700" in exposed.err
        assert "cannot be listened on" in taken.err
        assert not (directory / "open" / "s").exists()


async def test_a_second_server_is_turned_away_while_the_first_answers(database: str, make: Factory) -> None:
    user, port = await make.user(micros=1_000), free_port()
    async with temporary_directory() as directory:
        unix, tcp = f"unix:{directory}/run/s", f"127.0.0.1:{port}"
        variables = {
            "KEYTURN_DATABASE_URL": database,
            "KEYTURN_LISTEN": f"{unix}, {tcp}",
            "KEYTURN_INSECURE_LOOPBACK": "true",
        }
        async with serving(directory, **variables) as served:
            assert served.addresses == [unix, tcp]
            allow = {"KEYTURN_INSECURE_LOOPBACK": "true"}
            on_socket, on_port, twice = await asyncio.gather(
                refuse(database, unix), refuse(database, tcp, **allow), refuse(database, unix, unix)
            )
            assert f"{unix}: another server listens there." in on_socket.err
            assert f"{tcp}: cannot be listened on; is another server there?" in on_port.err
            assert "another server" in twice.err
            for index in range(2):
                assert (await decide(served, user, index, cost_micros=1)).HasField("ticket")


async def test_every_option_can_be_set_in_the_environment_and_is_overruled_by_an_option(
    database: str, make: Factory
) -> None:
    user, metrics = await make.user(micros=1_000), free_port()
    async with temporary_directory() as directory:
        variables = {
            "KEYTURN_DATABASE_URL": database,
            "KEYTURN_LISTEN": "0.0.0.0:1",
            "KEYTURN_REFLECTION": "true",
            "KEYTURN_METRICS": f"127.0.0.1:{metrics}",
            "KEYTURN_DEFAULT_HOLD_MICROS": "77",
            "KEYTURN_LOG_LEVEL": "warning",
            "KEYTURN_NO_SUCH_SETTING": "x",
        }
        async with serving(
            directory, "--listen", f"unix:{directory}/run/s", **variables | {"KEYTURN_LOG_LEVEL": "info"}
        ) as served:
            assert served.addresses == [f"unix:{directory}/run/s"]
            assert (await decide(served, user)).ticket.hold_micros == 77
            await list_services(served)
            page = await asyncio.to_thread(read, f"http://127.0.0.1:{metrics}/metrics")
            assert 'keyturn_calls_total{code="OK",method="Decide"} 1.0' in page
            for address, reason in (
                (variables["KEYTURN_METRICS"], "cannot be listened on"),
                ("x", "no address"),
            ):
                refused = await refuse(database, f"unix:{directory}/run/t", KEYTURN_METRICS=address)
                assert f"{reason} for metrics" in refused.err


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - ours
        return str(response.read().decode())


async def list_services(served: Served) -> None:
    """Raises AioRpcError unless reflection is served."""
    async with served.channel() as channel:
        call: Any = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        stream = call(iter([b"\x3a\x01*"]), timeout=30)
        assert b"keyturn.v1.RoutingService" in await stream.read()


async def test_durations_in_the_environment_are_seconds(database: str, make: Factory) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        variables = {"KEYTURN_HOLD_TTL": "2.5", "KEYTURN_DRAIN_TIMEOUT": "10"}
        listen = f"unix:{directory}/run/s"
        async with serving(
            directory, "--listen", listen, KEYTURN_DATABASE_URL=database, **variables
        ) as served:
            ticket = (await decide(served, user, cost_micros=1)).ticket
            assert ticket.expire_time.ToDatetime().microsecond


async def test_without_a_master_key_credits_work_and_own_keys_do_not(database: str, make: Factory) -> None:
    user, poor = await make.user(micros=1_000), await make.user()
    for each in (user, poor):
        await make.key(each)
    async with temporary_directory() as directory:
        listen = f"unix:{directory}/run/s"
        async with serving(directory, "--listen", listen, KEYTURN_DATABASE_URL=database) as served:
            assert (byok_off := served.event("byok_off")) is not None
            assert "ENCRYPTION_KEY" in byok_off["reason"]
            paid = await decide(served, user, cost_micros=1)
            assert paid.HasField("ticket")
            assert paid.reason == policy.REASON_BYOK_FIRST_KEY_FAILED
            only = await decide(served, poor, constraint=policy.CONSTRAINT_OWN_KEY_ONLY)
            assert only.denial.reason == policy.DENIAL_REASON_ENCRYPTION_NOT_CONFIGURED


async def test_a_master_key_is_told_by_its_id_alone(database: str) -> None:
    async with temporary_directory() as directory:
        listen = f"unix:{directory}/run/s"
        weak = "0123456789abcdef" * 4
        async with serving(
            directory, "--listen", listen, KEYTURN_DATABASE_URL=database, ENCRYPTION_KEY=weak
        ) as served:
            assert served.event("byok_on") is not None
            assert served.event("weak_master_key") is not None
            assert weak not in served.text
            assert MASTER_KEY not in served.text


async def test_the_log_is_json_lines_and_a_failed_call_is_no_exception_in_it(
    database: str, make: Factory
) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        listen = f"unix:{directory}/run/s"
        async with serving(directory, "--listen", listen, KEYTURN_DATABASE_URL=database) as served:
            await decide(served, user, cost_micros=1)
            with pytest.raises(grpc.aio.AioRpcError):
                await decide(served, "nobody")
            served.signal(signal.SIGINT)
            assert await served.end() == 0
            names = [event["event"] for event in served.events]
            assert names[-4:] == ["serving", "signalled", "draining", "stopped"]
            assert not served.strays
            assert not [event for event in served.events if event["level"] in {"error", "critical"}]
            assert {"event", "level", "timestamp"} <= set.intersection(*map(set, served.events))


async def test_a_sidecar_in_the_background_of_a_script_goes_on_when_that_is_interrupted(
    database: str, make: Factory
) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        listen = f"unix:{directory}/run/s"
        with sigint_ignored():
            async with serving(directory, "--listen", listen, KEYTURN_DATABASE_URL=database) as served:
                served.signal(signal.SIGINT)
                assert (await decide(served, user, cost_micros=1)).HasField("ticket")
                served.signal(signal.SIGTERM)
                assert await served.end() == 0
                assert [one["signal"] for one in served.events if one["event"] == "signalled"] == ["SIGTERM"]


async def test_what_grpc_itself_prints_is_kept_out_of_the_log(database: str) -> None:
    async with temporary_directory() as directory:
        (directory / "run").mkdir(mode=0o700)
        (directory / "run" / "taken").mkdir()
        finished = await refuse(database, f"unix:{directory}/run/taken")
    assert all(line.startswith("{") for line in finished.err.splitlines()[:-1])
