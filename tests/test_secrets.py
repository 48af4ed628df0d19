"""Canaries sent through every method, good and failing, and looked for wherever something is written."""

from __future__ import annotations

import asyncio
import secrets
import string
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
from grpc_status import rpc_status

from keyturn.secret import Secret
from keyturn.v1 import key_service_pb2, routing_service_pb2_grpc
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.configuration import Provider
from keyturn_server.decide import Ask, KeyRoute, TicketRoute
from keyturn_server.keys.envelope import Unreadable, open_sealed, seal
from keyturn_server.keys.keyring import Keyring, KeyringError
from keyturn_server.keys.tokens import InvalidToken, TokenRoot, TokenSealer
from keyturn_server.profiles import StoredKey
from keyturn_server.settings import SettingsError, read_settings
from keyturn_server.store.embedded import EmbeddedPostgres
from tests.canaries import parts, remember
from tests.cli.command import embedded, free_port, inside
from tests.factories import KEYRING, Connection, Factory
from tests.providers import NOBODY, Providers
from tests.support import MASTER_KEY, make_settings, running_sidecar, temporary_directory

INLINE = pb.KEY_DELIVERY_INLINE
OUTCOMES = [number for number in pb.Outcome.values() if number]


def canary(prefix: str, length: int = 40) -> str:
    """A secret of nobody's, with digits and letters in both cases as real ones have."""
    alphabet = string.ascii_letters + string.digits
    value = f"{prefix}aA1{''.join(secrets.choice(alphabet) for _ in range(length))}"
    remember("canary", value)
    return value


class Gateway:
    """Calls methods, and keeps what comes back of those that fail."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)
        self.told: list[str] = []

    async def call(self, method: str, request: Any) -> Any:
        """The answer; None for a fault."""
        try:
            return await getattr(self.stub, method)(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)
            self.told += [str(error.details()), str(status), error.debug_error_string() or ""]
            for value in dict(error.trailing_metadata() or ()).values():
                self.told.append(value if isinstance(value, str) else value.decode("latin-1"))
            return None


async def drive(gateway: Gateway, make: Factory, canaries: dict[str, str]) -> None:
    """Every method, with every way to fail that a canary could come out of. Adds tokens to `canaries`."""
    owner, payer = await make.user(micros=10**9), await make.user(micros=10**9)
    for number, provider in enumerate(("openai", "anthropic", "mistral")):
        await make.key(owner, provider, secret=canaries[provider])
        for outcome in OUTCOMES:
            ask = pb.DecideRequest(user_id=owner, provider=provider, key_delivery=INLINE, cost_micros=1)
            decision = await gateway.call("Decide", ask)
            await gateway.call("Explain", pb.ExplainRequest(decide=ask))
            spoken = " ".join(f"{value}," for value in canaries.values())
            report: dict[str, Any] = {
                "outcome": outcome,
                "error_message": f"Incorrect API key provided: {spoken}",
            }
            if not decision.HasField("key"):
                canaries[f"ticket {number} {outcome}"] = decision.ticket.ticket
                settles = {"credit_ticket": decision.ticket.ticket}
            else:
                assert decision.key.secret == canaries[provider]
                handle = canaries[f"handle {number} {outcome}"] = decision.key.handle
                settles = {"key_handle": handle}
                for _ in range(2):
                    await gateway.call("Redeem", pb.RedeemRequest(key_handle=handle))
                ask.failed_key_handles.append(handle)
                await gateway.call("Decide", ask)
                ask.failed_key_handles[:] = [f"{handle}x"]
                await gateway.call("Decide", ask)
                await gateway.call(
                    "Decide", pb.DecideRequest(user_id=payer, provider=provider, failed_key_handles=[handle])
                )
            record = pb.RecordRequest(**report, **settles)
            conflict = pb.RecordRequest(**report, **settles, http_status=400)
            await gateway.call("Record", record)
            await gateway.call("Record", conflict)
            await gateway.call("BatchRecord", pb.BatchRecordRequest(requests=[record, conflict]))
            await make.connection.execute("UPDATE user_api_keys SET is_valid = true, cooldown_until = NULL")
    for wrong in canaries.values():
        await gateway.call("Redeem", pb.RedeemRequest(key_handle=wrong[:-2]))
        await gateway.call("Record", pb.RecordRequest(key_handle=wrong[:-2], outcome=pb.OUTCOME_SUCCESS))
        await gateway.call(
            "Record", pb.RecordRequest(credit_ticket=f"ktt1_{wrong}", outcome=pb.OUTCOME_SUCCESS)
        )


async def break_statements(gateway: Gateway, make: Factory, canaries: dict[str, str]) -> None:
    """Errors of the database that quote a row: a key's, and a usage's."""
    owner = await make.user()
    await make.key(owner, secret=canaries["openai"])
    for table, check, outcome in (
        ("user_api_keys", "last_error IS NULL", pb.OUTCOME_AUTH_REJECTED),
        ("api_key_usage", "outcome <> 'REFUSED'", pb.OUTCOME_REFUSED),
    ):
        await make.connection.execute(f"ALTER TABLE {table} ADD CONSTRAINT broken CHECK ({check}) NOT VALID")
        decision = await gateway.call("Decide", pb.DecideRequest(user_id=owner, provider="openai"))
        handle = canaries[f"handle for {table}"] = decision.key.handle
        assert handle
        said = f"Incorrect API key provided: {canaries['openai']}"
        record = pb.RecordRequest(key_handle=handle, outcome=outcome, error_message=said)
        assert await gateway.call("Record", record) is None
        await make.connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT broken")


async def tables(make: Factory) -> str:
    """Every table's rows as text, but for the one column that holds ciphertexts and the roots of tokens."""
    dumped = []
    for row in await make.connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        name = row["tablename"]
        rows = await make.connection.fetch(f"SELECT to_jsonb(t) - 'encrypted_key' AS row FROM {name} t")
        dumped += [each["row"] for each in rows]
    return "\n".join(dumped)


async def test_no_secret_is_written_anywhere_by_any_method() -> None:
    canaries = {
        "openai": canary("sk-proj-"),
        "anthropic": canary("sk-ant-api03-"),
        "mistral": canary("", 29),
        "master key": MASTER_KEY,
        "bearer": f"Bearer {canary('')}",
    }
    async with temporary_directory() as directory:
        metrics = f"127.0.0.1:{free_port()}"
        settings = {"KEYTURN_LOG_LEVEL": "debug", "KEYTURN_METRICS": metrics}
        async with (
            embedded(directory, "--reflection", **settings) as (served, channel),
            inside(directory) as sql,
        ):
            gateway, make = Gateway(channel), Factory(sql)
            await drive(gateway, make, canaries)
            await break_statements(gateway, make, canaries)
            ciphertexts = await sql.fetch("SELECT encrypted_key FROM user_api_keys")
            canaries |= {f"ciphertext {index}": row["encrypted_key"] for index, row in enumerate(ciphertexts)}
            page = await asyncio.to_thread(urllib.request.urlopen, f"http://{metrics}/metrics", timeout=30)
            places = {
                "metrics": page.read().decode(),
                "tables": await tables(make),
                "faults": "\n".join(gateway.told),
            }
            page.close()
        places["log"] = served.text
        places["PostgreSQL's log"] = (directory / "pg" / "postgres.log").read_text()
    assert "***" in places["tables"], "error texts are kept, without their secrets"
    assert "internal_error" in places["log"], "the broken statements did break"
    assert places["faults"]
    for place, text in places.items():
        for name, value in canaries.items():
            assert not [part for part in parts(value) if part in text], f"{name} in {place}"


# All that PostgreSQL can be told to log of statements: their text, their parameters, also of those that
# fail, and how long they took. Of one database, and stronger than what the server was started with.
_TELL_ALL = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "log_min_error_statement": "debug5",
    "log_min_messages": "notice",
    "log_error_verbosity": "verbose",
}


async def test_a_database_that_logs_all_statements_logs_ciphertexts_and_no_secret(
    empty_database: str, cluster: EmbeddedPostgres
) -> None:
    sql: Connection = await asyncpg.connect(empty_database)
    name = await sql.fetchval("SELECT current_database()")
    for setting, value in _TELL_ALL.items():
        await sql.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
    await sql.close()
    log = cluster.socket_directory.parent / "postgres.log"
    start = log.stat().st_size
    canaries = {
        "openai": canary("sk-proj-"),
        "anthropic": canary("sk-ant-api03-"),
        "mistral": canary("", 29),
        "saved": canary("sk-proj-"),
    }
    async with running_sidecar(empty_database) as sidecar:
        sql = await asyncpg.connect(empty_database)
        try:
            await Providers().play(sql, at=NOBODY)
            make, gateway = Factory(sql), Gateway(sidecar.channel)
            user = await make.user()
            save = key_service_pb2.SaveKeyRequest(user_id=user, provider="openai", secret=canaries["saved"])
            await sidecar.call("SaveKey", save)
            await drive(gateway, make, canaries)
            await break_statements(gateway, make, canaries)
            roots = [row["secret"].hex() for row in await sql.fetch("SELECT secret FROM token_roots")]
            (saved,) = await sql.fetch("SELECT encrypted_key FROM user_api_keys WHERE user_id = $1", user)
        finally:
            await sql.close()
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode("latin-1")
    # It does log, down to the parameters.
    assert "INSERT INTO token_roots" in text
    assert user in text
    assert saved["encrypted_key"] in text
    assert roots
    for name, value in (canaries | {"root": roots[0], "master key": MASTER_KEY}).items():
        assert not [part for part in parts(value) if part in text], name


async def test_postgres_does_not_inherit_the_master_key() -> None:
    async with temporary_directory() as directory, embedded(directory):
        postmaster = (directory / "pg/data/postmaster.pid").read_text().split()[0]
        for file in ("environ", "cmdline"):
            assert MASTER_KEY.encode() not in Path(f"/proc/{postmaster}/{file}").read_bytes()


# -- values and exceptions ----------------------------------------------------------------------------

SECRET = canary("sk-")
TOKEN = canary("kth1_")
ROW = UUID("0192f3a4-5b6c-7d8e-9f01-23456789abcd")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
CIPHERTEXT = seal(KEYRING, Secret(SECRET), user_id="u", provider="openai", row_id=ROW)
PROVIDER = Provider(
    id="openai", name="", is_enabled=True, base_url="", auth_header="", auth_prefix="", key_pattern="",
    check_path=None, check_headers={}, check_refusal=None,
)  # fmt: skip


def shown(value: object) -> str:
    """All the ways in which a value is printed by accident."""
    return f"{value} {value!r} {[value]} {{{value!r}: 1}}" + "".join(
        traceback.format_exception_only(ValueError(value))
    )


VALUES: dict[str, object] = {
    "secret": Secret(SECRET),
    "question": Ask(user_id="u", provider="openai", failed_key_handles=(TOKEN,)),
    "key route": KeyRoute(
        handle=TOKEN, key_id=ROW, hint="hint", secret=Secret(SECRET), provider=PROVIDER, expires_at=NOW
    ),
    "ticket route": TicketRoute(ticket=TOKEN, hold_micros=1, available_micros=1, expires_at=NOW),
    "stored key": StoredKey(
        id=ROW, provider="openai", label="", priority=0, ciphertext=CIPHERTEXT, hint="hint", revision=1,
        is_active=True, is_valid=True, is_verified=True, cooldown_until=None,
    ),
    "settings": make_settings(f"postgresql://u:{SECRET}@h/d", "unix:/x/s"),
    "keyring": KEYRING,
    "master key": KEYRING.current,
    "token root": TokenRoot(b"abcd", SECRET.encode()[:32]),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_holds_a_secret_does_not_show_it(name: str) -> None:
    text = shown(VALUES[name])
    for value in (SECRET, TOKEN, CIPHERTEXT, MASTER_KEY):
        assert not [part for part in parts(value) if part in text]


@contextmanager
def trace_of(kind: type[Exception]) -> Iterator[list[str]]:
    """The whole trace, with locals, as an error tracker would take it."""
    text: list[str] = []
    try:
        yield text
    except kind as error:
        text.append("".join(traceback.TracebackException.from_exception(error, compact=False).format()))
    else:
        raise AssertionError(f"no {kind.__name__}")


def test_an_exception_about_a_secret_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    with trace_of(InvalidToken) as text:
        TokenSealer([TokenRoot(b"abcd", b"x" * 32)]).open_handle(TOKEN)
    traces += text
    with trace_of(Unreadable) as text:
        open_sealed(KEYRING, CIPHERTEXT, user_id="another", provider="openai", row_id=ROW)
    traces += text
    with trace_of(Unreadable) as text:
        other = Keyring.from_settings("9" * 63 + "8", [])
        assert other is not None
        open_sealed(other, CIPHERTEXT, user_id="u", provider="openai", row_id=ROW)
    traces += text
    for key in (MASTER_KEY[:-1], f"{MASTER_KEY}x", f"0x{MASTER_KEY}"):
        with trace_of(KeyringError) as text:
            Keyring.from_settings(key, [])
        traces += text
    monkeypatch.setenv("KEYTURN_DEFAULT_HOLD_MICROS", SECRET)
    monkeypatch.setenv("KEYTURN_LOG_LEVEL", MASTER_KEY)
    with trace_of(SettingsError) as text:
        read_settings()
    traces += text
    assert len(traces) == 7
    for value in (SECRET, TOKEN, CIPHERTEXT, MASTER_KEY):
        for trace in traces:
            assert not [part for part in parts(value) if part in trace]
