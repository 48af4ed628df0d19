"""How commands that ask a sidecar end: every exit code, with the reason on stderr and nothing on stdout."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from keyturn_server.cli.calls import _CODES
from keyturn_server.cli.exit_codes import MEANINGS, ExitCode
from tests.cli.command import (
    answered,
    ask,
    check_fault,
    environment_of,
    keyturn,
    keyturn_on_terminal,
    sigint_ignored,
)
from tests.factories import Connection, Factory
from tests.support import MASTER_KEY, Sidecar, temporary_directory

EXPLAIN = ("explain", "u1", "--provider", "openai")


def test_every_exit_code_has_a_meaning_and_every_other_status_is_a_fault() -> None:
    assert set(MEANINGS) == set(ExitCode)
    assert {code.name: _CODES.get(code, ExitCode.FAULT).value for code in grpc.StatusCode} == {
        "OK": 1,
        "CANCELLED": 1,
        "UNKNOWN": 1,
        "INVALID_ARGUMENT": 2,
        "DEADLINE_EXCEEDED": 6,
        "NOT_FOUND": 4,
        "ALREADY_EXISTS": 3,
        "PERMISSION_DENIED": 5,
        "RESOURCE_EXHAUSTED": 6,
        "FAILED_PRECONDITION": 3,
        "ABORTED": 1,
        "OUT_OF_RANGE": 1,
        "UNIMPLEMENTED": 1,
        "INTERNAL": 1,
        "UNAVAILABLE": 6,
        "DATA_LOSS": 1,
        "UNAUTHENTICATED": 5,
    }


async def test_0_done(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    assert (await answered(sidecar, "explain", user, "--provider", "openai"))["decision"]["ticket"]


async def test_1_a_defect_of_the_sidecar_with_its_error_id(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await sql.execute("ALTER TABLE credit_accounts RENAME TO elsewhere")
    finished = await ask(sidecar, "explain", user, "--provider", "openai")
    await sql.execute("ALTER TABLE elsewhere RENAME TO credit_accounts")
    check_fault(finished, 1, "[INTERNAL]", "error_id")
    assert "credit_accounts" not in finished.err


async def test_1_a_sidecar_that_does_not_know_the_call() -> None:
    async with temporary_directory() as directory:
        server = grpc.aio.server()
        server.add_insecure_port(f"unix:{directory}/s")
        await server.start()
        finished = await keyturn("flags", "list", KEYTURN_ADDRESS=f"unix:{directory}/s")
        await server.stop(None)
    check_fault(finished, 1, "does not know this call", "[UNIMPLEMENTED]")


WRONG_USAGE = {
    "no such option": (("flags", "list", "--nonesuch"), "--nonesuch"),
    "no such command": (("flags", "flip"), "flip"),
    "a value missing": (("flags", "mode", "byok-only"), "--reason"),
    "a mode that there is not": (("flags", "mode", "free-for-all", "--reason", "x"), "byok-only"),
    "no flag": (("flags", "set", "--reason", "x"), "KEY=on"),
    "half a flag": (("flags", "set", "byok_enabled", "--reason", "x"), "KEY=on"),
    "flags and a mode": (("flags", "simulate", "a=on", "--mode", "byok-only"), "either"),
    "half a number": (("flags", "history", "--limit", "1.5"), "whole number"),
    "no money": (("credits", "grant", "u1", "1e3"), "dollars"),
    "below zero": (("credits", "grant", "u1", "-5"), "dollars"),
    "a window twice": (("reports", "split", "--days", "1", "--from", "2026-01-01"), "either"),
    "nothing to change": (("keys", "update", "u1", "k1"), "--active"),
    "no address": (("users", "get", "u1", "--address", "nonsense"), "unix:PATH"),
    "no certificate": (("users", "get", "u1", "--cert", "/nonexistent"), "--cert"),
    "no time": (("users", "get", "u1", "--timeout", "0"), "above zero"),
    "no text": (("users", "get", "u\udcff1"), "UTF-8"),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
async def test_2_wrong_usage_before_anybody_is_asked(name: str) -> None:
    arguments, sentence = WRONG_USAGE[name]
    check_fault(await keyturn(*arguments), 2, sentence)


async def test_2_a_value_that_the_sidecar_refuses(sidecar: Sidecar) -> None:
    finished = await ask(sidecar, "explain", "u" * 129, "--provider", "openai")
    check_fault(finished, 2, "user_id", "128", "[INVALID_FIELD]")


async def test_6_nobody_is_there() -> None:
    async with temporary_directory() as directory:
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(f"{directory}/stale")
        stale.close()
        missing, refused, default = await asyncio.gather(
            keyturn(*EXPLAIN, "--address", f"unix:{directory}/missing"),
            keyturn(*EXPLAIN, "--address", f"unix:{directory}/stale"),
            keyturn(*EXPLAIN, HOME=str(directory), XDG_RUNTIME_DIR=str(directory)),
        )
    check_fault(missing, 6, "no such file", "[UNAVAILABLE]", "--address")
    check_fault(refused, 6, "connection refused", "[UNAVAILABLE]")
    check_fault(default, 6, "keyturn.sock")


@asynccontextmanager
async def silence(directory: Path, *, heard: asyncio.Event | None = None) -> AsyncIterator[str]:
    """An address where connections are taken, which `heard` tells, and nothing is ever said."""
    connections: list[asyncio.StreamWriter] = []

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if heard is not None:
            heard.set()

    server = await asyncio.start_unix_server(take, f"{directory}/silent")
    try:
        yield f"unix:{directory}/silent"
    finally:
        server.close()
        for writer in connections:
            writer.transport.abort()
        await server.wait_closed()


async def test_6_no_answer_in_time() -> None:
    async with temporary_directory() as directory, silence(directory) as address:
        finished = await keyturn(*EXPLAIN, "--address", address, "--timeout", "0.2s")
    check_fault(finished, 6, "No answer within 0.2 s", "[DEADLINE_EXCEEDED]", "--timeout")


async def test_6_a_row_that_somebody_else_keeps_locked(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    async with sql.transaction():
        await sql.execute("SELECT FROM credit_accounts WHERE user_id = $1 FOR UPDATE", user)
        finished = await ask(sidecar, "decide", user, "--provider", "openai")
    check_fault(finished, 6, "[ROW_LOCKED]")


async def interrupted(directory: Path, *options: str) -> tuple[int | None, bytes, bytes]:
    """How a command ends that is sent SIGINT while nobody answers it."""
    heard = asyncio.Event()
    async with silence(directory, heard=heard) as address:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "keyturn_server", *EXPLAIN, "--address", address, *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment_of(),
        )
        try:
            async with asyncio.timeout(60):
                await heard.wait()  # the command is at its call
                await asyncio.sleep(1)
                process.send_signal(signal.SIGINT)
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode, out, err


async def test_130_interrupted() -> None:
    async with temporary_directory() as directory:
        assert await interrupted(directory, "--timeout", "60s") == (130, b"", b"")


async def test_a_command_in_the_background_of_a_script_is_not_interrupted() -> None:
    async with temporary_directory() as directory:
        with sigint_ignored():
            code, _, err = await interrupted(directory, "--timeout", "3s")
    assert (code, b"DEADLINE_EXCEEDED" in err) == (6, True)


async def test_a_reader_that_has_gone_ends_the_command_quietly(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    read, write = os.pipe()
    os.close(read)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "keyturn_server", "explain", user, "--provider", "openai"),
        stdout=write,
        stderr=asyncio.subprocess.PIPE,
        env=environment_of(KEYTURN_ADDRESS=sidecar.address),
    )
    os.close(write)
    _, err = await process.communicate()
    assert (process.returncode, err) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize("command", ["db check", "db check --json", "keys rotate", "keys rotate --json"])
async def test_a_reader_that_has_gone_ends_commands_of_the_database_quietly(
    command: str, database: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(
            "bash",
            "-c",
            f'"$0" -m keyturn_server {command} | true; exit "${{PIPESTATUS[0]}}"',
            sys.executable,
        ),
        stderr=asyncio.subprocess.PIPE,
        env=environment_of(KEYTURN_DATABASE_URL=database, ENCRYPTION_KEY=MASTER_KEY),
    )
    _, err = await process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    ("target", "why"), [(">&-", "stdout is closed"), ("> /dev/full", "No space left on device")]
)
async def test_1_an_answer_that_stdout_does_not_take(
    target: str, why: str, sidecar: Sidecar, database: str
) -> None:
    for command in ("keys providers", "keys providers --json", "db check", "keys rotate", "keygen"):
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", f'exec "$0" -m keyturn_server {command} {target}', sys.executable),
            stderr=asyncio.subprocess.PIPE,
            env=environment_of(
                KEYTURN_ADDRESS=sidecar.address, KEYTURN_DATABASE_URL=database, ENCRYPTION_KEY=MASTER_KEY
            ),
        )
        _, err = await process.communicate()
        said = f"keyturn: It was done, but the answer cannot be printed: {why}.\n"
        assert (process.returncode, err.decode()) == (1, said), command


async def test_an_answer_that_the_locale_cannot_show_is_written_out(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(name="użytkownik")
    finished = await keyturn(
        *("explain", user, "--provider", "openai"),
        KEYTURN_ADDRESS=sidecar.address,
        PYTHONIOENCODING="latin-1",
    )
    assert (finished.code, finished.err) == (0, "")
    assert r"u\u017cytkownik" in finished.out


async def test_json_is_one_document_on_a_terminal_too(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    code, shown = await keyturn_on_terminal(
        *("explain", user, "--provider", "openai", "--json"), KEYTURN_ADDRESS=sidecar.address
    )
    assert code == 0
    assert json.loads(shown)["decision"]["reason"] == "REASON_DENIED"
