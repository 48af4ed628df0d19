"""`keyturn demo`: the main job, on real gRPC and a real PostgreSQL, with made-up data."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from keyturn import AsyncClient, Decision, Mode, Outcome, Usage
from keyturn.secret import Secret
from keyturn_server.app import sidecar
from keyturn_server.errors import KeyturnFault
from keyturn_server.keys.keyring import Keyring
from keyturn_server.logs import configure_logs, get_log
from keyturn_server.routing.model import Mode as PolicyMode
from keyturn_server.routing.model import flags_of
from keyturn_server.serving import until_signalled
from keyturn_server.settings import Settings
from keyturn_server.store.database import Database, open_database
from keyturn_server.store.demo import landed, make_user, set_flags
from keyturn_server.store.embedded import EmbeddedPostgres

_PORT = 50551
_MODEL = "gpt-4o-mini"
_CREDITS_MICROS = 2_000_000
_LIMIT = timedelta(seconds=10)

_DEFAULTS = {"byok_enabled": True, "byok_only_mode": False, "byok_uses_internal_credits": False}
# tier, has a key, has credits
_USERS = {
    "key-only": ("premium", True, False),
    "credits-only": ("premium", False, True),
    "key-and-credits": ("premium", True, True),
    "neither": ("premium", False, False),
    "free-tier": ("free", True, True),
}


def demo(*, once: bool = False) -> None:
    """Show the main job: a sidecar on an embedded PostgreSQL, driven over gRPC as a gateway would.

    Everything is made up and goes away at the end; nothing leaves this machine.

    Parameters
    ----------
    once
        Show it and stop, instead of staying up to be tried by hand.
    """
    configure_logs("warning")
    uvloop.run(_demo(once=once))


async def _demo(*, once: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    if once:
        async with _shown(console):
            return
    await until_signalled(_shown(console, stays=True), log=get_log())


@asynccontextmanager
async def _shown(console: Console, *, stays: bool = False) -> AsyncIterator[None]:
    """A sidecar with made-up data, after it has been driven through the four modes."""
    master_key = secrets.token_hex(32)
    keyring = Keyring.from_settings(master_key, [])
    log = get_log()
    async with AsyncExitStack() as stack:
        # Under /tmp whatever TMPDIR says: a Unix socket's path is short.
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="keyturn-", dir="/tmp")))
        # Where we are root, PostgreSQL runs as another user, who must come by here.
        os.chmod(directory, 0o711)  # noqa: S103, PTH101 - Path.chmod would block no less
        console.print("Starting PostgreSQL and the sidecar …", style="dim")
        postgres = await stack.enter_async_context(EmbeddedPostgres(directory / "pg", log=log))
        settings = Settings(
            database_url=SecretStr(postgres.dsn),
            embedded=None,
            spool=directory / "spool",
            listen=(f"127.0.0.1:{_free_port()}",),
            reflection=True,
            insecure_loopback=True,
            metrics=None,
            encryption_key=SecretStr(master_key),
            encryption_keys_retired=None,
        )
        (address,) = await stack.enter_async_context(sidecar(settings, log=log, audit=_Unheard()))
        database = await stack.enter_async_context(
            open_database(postgres.dsn, connections=2, connect_timeout=_LIMIT, statement_timeout=_LIMIT)
        )
        client = await stack.enter_async_context(AsyncClient(address))
        await _make_users(database, keyring)
        decisions = await _decide_in_every_mode(console, database, client)
        await _record(console, client, decisions)
        await _show_rows(console, database)
        if stays:
            _say_what_to_try(console, address, postgres.socket_directory)
        yield


class _Unheard:
    """The demo's screen is for its tables."""

    def write(self, text: str) -> int:
        return len(text)


def _free_port() -> int:
    """The demo's usual port, or any other when that is taken."""
    for port in (_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise KeyturnFault("There is no free port on 127.0.0.1.")


async def _make_users(database: Database, keyring: Keyring | None) -> None:
    if keyring is None:
        raise RuntimeError("the demo makes its own master key")
    for user_id, (tier, has_key, has_credits) in _USERS.items():
        await make_user(
            database,
            keyring,
            user_id=user_id,
            tier=tier,
            secret=Secret(f"sk-demo-{secrets.token_hex(20)}") if has_key else None,
            micros=_CREDITS_MICROS if has_credits else 0,
        )


async def _decide_in_every_mode(console: Console, database: Database, client: AsyncClient) -> list[Decision]:
    """Flips the flags with plain SQL, and asks for every user in every mode."""
    decisions = []
    for mode in (Mode.BYOK_FIRST, Mode.CREDIT_FIRST, Mode.BYOK_ONLY, Mode.INTERNAL_ONLY):
        flags = {**_DEFAULTS, **flags_of(PolicyMode[mode.name])}
        await set_flags(database, flags)
        await _until_in_force(client, mode)
        table = Table(
            title=f"{mode.name}   " + "  ".join(f"{key}={str(on).lower()}" for key, on in flags.items()),
            title_justify="left",
            title_style="bold",
        )
        for heading in ("user", "tier", "who pays", "reason", "in words"):
            table.add_column(heading)
        for user_id, (tier, _, _) in _USERS.items():
            decision = await client.decide(
                user_id=user_id,
                provider="openai",
                model=_MODEL,
                service_type="demo",
                input_tokens=1_200,
                max_output_tokens=400,
            )
            table.add_row(user_id, tier, *_in_words(decision))
            if decision.allowed:
                decisions.append(decision)
        console.print(table)
    await set_flags(database, _DEFAULTS)
    return decisions


async def _until_in_force(client: AsyncClient, mode: Mode) -> None:
    """The push has a change on every sidecar within a second; here we see it arrive."""
    async with asyncio.timeout(_LIMIT.total_seconds()):
        explained = await client.explain(user_id="neither", provider="openai")
        while explained.decision.mode is not mode:
            explained = await client.explain(user_id="neither", provider="openai")


def _in_words(decision: Decision) -> tuple[str, str, str]:
    if decision.key is not None:
        payer = f"own key …{decision.key.hint}"
    elif decision.ticket is not None:
        payer = f"credits, hold {_dollars(decision.ticket.hold_micros)}"
    else:
        payer = "nobody"
    reason = decision.denial.reason if decision.denial is not None else decision.reason
    return payer, reason.name, decision.message


async def _record(console: Console, client: AsyncClient, decisions: list[Decision]) -> None:
    charged_micros = 0
    for decision in decisions:
        recorded = await client.record(
            decision, Outcome.SUCCESS, usage=Usage(input_tokens=1_187, output_tokens=305), http_status=200
        )
        charged_micros += recorded.charged_micros
    again = await client.record(
        decisions[0], Outcome.SUCCESS, usage=Usage(input_tokens=1_187, output_tokens=305), http_status=200
    )
    console.print(
        f"\nRecorded {len(decisions)} requests; credits charged {_dollars(charged_micros)} in all. "
        f"The first one recorded again: replayed={str(again.replayed).lower()}.\n"
    )


async def _show_rows(console: Console, database: Database) -> None:
    for name, rows in (await landed(database)).items():
        table = Table(title=f"{name} ({len(rows)} rows)", title_justify="left", title_style="bold")
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*("" if value is None else _plain(value) for value in row.values()))
        console.print(table)


def _say_what_to_try(console: Console, address: str, socket_directory: Path) -> None:
    request = '{"user_id":"key-and-credits","provider":"openai","model":"gpt-4o-mini"}'
    method = "keyturn.v1.RoutingService"
    console.print("\nStaying up. To try by hand:\n", style="bold")
    flip = "UPDATE feature_flags SET is_enabled = true WHERE key = 'byok_only_mode'"
    for line in (
        f"grpcurl -plaintext -d '{request}' {address} {method}/Decide",
        f"grpcurl -plaintext -d '{{\"decide\":{request}}}' {address} {method}/Explain",
        f"buf curl --protocol grpc --http2-prior-knowledge -d '{request}' http://{address}/{method}/Decide",
        f'psql -h {socket_directory} -U keyturn keyturn -c "{flip}"',
    ):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    console.print("\nCtrl-C ends it; everything made up here goes away.", style="dim")


def _dollars(micros: int) -> str:
    return f"${micros / 1_000_000:.6f}"


def _plain(value: Any) -> str:
    return f"{value.normalize():f}" if isinstance(value, Decimal) else str(value)
