"""The world of one scenario: a database with what is given, a sidecar on it, and what happens to them."""

from __future__ import annotations

import asyncio
import io
import json
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from keyturn.secret import Secret
from keyturn_server.app import sidecar
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import seal
from tests.certificates import Authority
from tests.cli.command import Served, free_port, serving
from tests.conformance.matching import Mismatch, check, filled
from tests.factories import KEYRING, Connection, Factory
from tests.gate import gate_before_holds
from tests.relay import Relay
from tests.sealing import sealer_of
from tests.support import MASTER_KEY, eventually, in_own_task, log_into, make_settings
from tests.test_access import AUTHORITY, entry, spiffe_id, write

_KEY_STATES: dict[str, dict[str, Any]] = {
    "unverified": {},
    "usable": {"verified_at": datetime(2026, 1, 1, tzinfo=UTC)},
    "inactive": {"is_active": False},
    "invalid": {"is_valid": False, "last_error": "Incorrect API key provided."},
    "cooling_down": {"cooldown_until": datetime(2200, 1, 1, tzinfo=UTC)},
    "unreadable": {},
}
_STRANGER = Authority("an authority that nobody trusts")
_FLAGS = ("byok_enabled", "byok_uses_internal_credits", "byok_only_mode")


class World:
    """What a scenario is given. `answers` has what steps may refer to."""

    def __init__(self, sql: Connection, dsn: str, directory: Path, given: dict[str, Any]) -> None:
        self.sql = sql
        self.answers: dict[str, Any] = {"keys": {}}
        self.secrets: list[str] = [MASTER_KEY]
        """What nothing may print."""
        self.log = io.StringIO()
        self._dsn = dsn
        self._directory = directory
        self._given = given
        self._about = given.get("sidecar", {})
        self._running = AsyncExitStack()
        self._for_good = AsyncExitStack()
        self._faults = AsyncExitStack()
        self._served: Served | None = None
        self._relay = Relay(self._socket)
        self._port = free_port()

    @property
    def _socket(self) -> Path:
        return self._directory / "run" / "k.sock"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[World]:
        """The rows, and a sidecar that runs."""
        await self._make_rows()
        self._write_files()
        async with self._for_good, self._running, self._faults:
            behind = self._directory / "relay.sock"
            server = await asyncio.start_unix_server(self._relay.accept, behind)
            self._for_good.push_async_callback(self._relay.close)
            self._for_good.callback(server.close)
            await self._start()
            yield self

    def client_options(self, about: dict[str, Any]) -> dict[str, Any]:
        """The options with which a scenario's client is opened."""
        options = {"timeout_ms": 20_000, **about}
        to = options.pop("to", "socket")
        own = {
            "socket": {"target": f"unix:{self._socket}"},
            "relay": {"target": f"unix:{self._directory}/relay.sock"},
            "nowhere": {"target": f"unix:{self._directory}/nobody.sock"},
            "tcp": {"target": f"127.0.0.1:{self._port}"},
            "tls": {"target": f"localhost:{self._port}", "root_certificates": AUTHORITY.certificate.decode()},
        }
        own["mutual_tls"] = {**own["tls"], **_identity(AUTHORITY.caller(spiffe_id("gateway")))}
        own["foreign_tls"] = {**own["tls"], "root_certificates": _STRANGER.certificate.decode()}
        if token := options.get("token"):
            self.secrets.append(token)
        return {**own[to], **options}

    async def happen(self, step: dict[str, Any]) -> None:
        """One step of the host: see clients/conformance/README.md."""
        step = filled(step, self.answers)
        match step["host"]:
            case "start":
                await self._start()
            case "stop":
                await self._stop()
            case "restart":
                await self._stop()
                await self._start()
            case "kill":
                assert self._served is not None, "only a sidecar with `process` can be killed"
                self._served.signal(signal.SIGKILL)
                await self._served.end()
                await self._running.aclose()
            case "freeze":
                self._relay.freeze()
            case "thaw":
                self._relay.thaw()
            case "cut":
                self._relay.cut(self._relay.links)
            case "wait":
                await asyncio.sleep(step["ms"] / 1000)
            case "sql":
                await self.sql.execute(step["run"], *step.get("with", ()))
            case "lock":
                await self._lock(step["sql"], step.get("with", ()))
            case "close_gate":
                await self._faults.enter_async_context(gate_before_holds(self.sql))
            case "mend":
                await self.mend()
            case "rows":
                await self.rows(step["sql"], step.get("with", ()), step["are"])
            case "age":
                self.answers[step["as"]] = await self._aged(step["token"], step["seconds"])
            case unknown:
                raise AssertionError(f"there is no step {unknown!r} of the host")

    async def mend(self) -> None:
        """Ends what was made to hold things up."""
        self._relay.thaw()
        await self._faults.aclose()

    async def rows(self, query: str, values: Sequence[Any], expected: Any) -> None:
        """Raises `Mismatch` unless the rows become as expected within the limit."""
        found: list[Any] = []

        async def as_expected() -> bool:
            rows = await self.sql.fetch(query, *values)
            found[:] = [[_plain(value) for value in row.values()] for row in rows]
            try:
                check(expected, found, self.answers, where=query)
            except Mismatch:
                return False
            return True

        try:
            await eventually(as_expected)
        except AssertionError:
            check(expected, found, self.answers, where=query)

    def logged(self) -> str:
        """All that sidecars of this world wrote."""
        return self.log.getvalue() + (self._served.text if self._served else "")

    # ------------------------------------------------------------------------------------ given

    async def _make_rows(self) -> None:
        make = Factory(self.sql)
        for user in self._given.get("users", []):
            await make.user(
                user.get("tier", "premium"), name=filled(user["id"], {}), micros=user.get("credits_micros", 0)
            )
        for number, key in enumerate(self._given.get("keys", [])):
            label = key.get("label", f"key{number + 1}")
            secret = key.get("secret") or f"sk-canary-{label}-{number}0123456789abcdef"
            self.secrets.append(secret)
            state = key.get("state", "usable")
            columns = {**_KEY_STATES[state], "label": label}
            if state == "unreadable":  # as when a row was copied from another
                elsewhere = seal(KEYRING, Secret(secret), user_id="other", provider="openai", row_id=new_id())
                columns["encrypted_key"] = elsewhere
            key_id = await make.key(
                filled(key["user"], {}),
                key.get("provider", "openai"),
                secret=secret,
                **columns,
                priority=key.get("priority", 0),
            )
            self.answers["keys"][label] = {"id": str(key_id), "secret": secret}
        flags = self._given.get("flags", {})
        assert set(flags) <= set(_FLAGS)
        await make.flags(**flags)
        for statement in self._given.get("sql", []):
            await self.sql.execute(statement)

    def _write_files(self) -> None:
        server = AUTHORITY.server()
        roles = self._about.get("callers", {})
        tokens = {name: f"kta_canary-token-of-{name}-0123456789abcdef" for name in roles}
        self.answers["tokens"] = tokens
        self.secrets += tokens.values()
        write(
            self._directory / "access.toml",
            "".join(
                entry(name, roles[name], tokens=[tokens[name]], certificates=[spiffe_id(name)])
                for name in roles
            ),
        )
        write(self._directory / "cert.pem", server.certificate)
        write(self._directory / "key.pem", server.key)
        write(self._directory / "ca.pem", AUTHORITY.certificate)

    # ---------------------------------------------------------------------------------- sidecar

    async def _start(self) -> None:
        tcp = self._about.get("tcp")
        listen = [f"unix:{self._socket}"] + ([f"127.0.0.1:{self._port}"] if tcp else [])
        if self._about.get("process"):
            self._served = await self._running.enter_async_context(
                serving(
                    self._directory,
                    *(argument for address in listen for argument in ("--listen", address)),
                    KEYTURN_DATABASE_URL=self._dsn,
                    ENCRYPTION_KEY=MASTER_KEY,
                )
            )
            return
        changes: dict[str, Any] = dict(self._about.get("settings", {}))
        if self._about.get("encryption") is False:
            changes["encryption_key"] = None
        if self._about.get("callers"):
            changes["access_file"] = self._directory / "access.toml"
        elif tcp:
            changes["insecure_loopback"] = True
        if tcp in {"tls", "mutual_tls"}:
            changes |= {"tls_cert": self._directory / "cert.pem", "tls_key": self._directory / "key.pem"}
        if tcp == "mutual_tls":
            changes["tls_client_ca"] = self._directory / "ca.pem"
        settings = make_settings(self._dsn, listen[0], **{"listen": tuple(listen), **changes})
        # In a task of its own, so that a scenario may end and begin it as it likes.
        await self._running.enter_async_context(
            in_own_task(sidecar(settings, log=log_into(self.log), audit=self.log))
        )

    async def _stop(self) -> None:
        if self._served is not None and self._served.process.returncode is None:
            self._served.signal(signal.SIGTERM)
            assert await self._served.end() == 0
        await self._running.aclose()

    # ----------------------------------------------------------------------------------- faults

    async def _lock(self, query: str, values: Sequence[Any]) -> None:
        other: Connection = await asyncpg.connect(self._dsn)
        self._faults.push_async_callback(other.close)
        transaction = other.transaction()
        await transaction.start()
        self._faults.push_async_callback(transaction.rollback)
        await other.fetch(query, *values)

    async def _aged(self, token: str, seconds: int) -> str:
        """The same handle or ticket, which expired so long ago."""
        sealer = await sealer_of(self.sql)
        expired = datetime.now(UTC) - timedelta(seconds=seconds)
        if token.startswith("kth"):
            return sealer.seal_handle(replace(sealer.open_handle(token), expires_at=expired))
        return sealer.seal_ticket(replace(sealer.open_ticket(token), expires_at=expired))


def _identity(identity: Any) -> dict[str, str]:
    return {
        "certificate_chain": identity.certificate.decode(),
        "private_key": identity.key.decode(),
    }


def _plain(value: Any) -> Any:
    """A column as JSON has it."""
    match value:
        case UUID():
            return str(value)
        case datetime():
            return value.isoformat()
        case Decimal():
            return float(value)
        case str() if value[:1] in "{[":
            return json.loads(value)
    return value
