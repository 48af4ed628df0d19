"""`make demo`, as the README has it, and staying up until it is told to end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys

import pytest

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": os.environ.get("HOME", "/"),
    # What a user's shell may have set is not the demo's.
    "ENCRYPTION_KEY": "not a key",
    "KEYTURN_DATABASE_URL": "postgresql://nowhere.invalid/x",
    "KEYTURN_LISTEN": "0.0.0.0:1",
}


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "keyturn_server", "demo", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )


async def test_the_demo_shows_who_pays_in_every_mode_and_what_landed() -> None:
    process = await start("--once")
    out, errors = (stream.decode() for stream in await process.communicate())
    assert (process.returncode, errors) == (0, "")
    for mode in ("BYOK_FIRST", "CREDIT_FIRST", "BYOK_ONLY", "INTERNAL_ONLY"):
        assert f"\n{mode} " in out
    rows = [tuple(cell.strip() for cell in line.split("│")[1:5]) for line in out.splitlines() if "│" in line]
    assert [row[3] for row in rows if row[0] == "key-only"][:4] == [
        "BYOK_FIRST_OWN_KEY",
        "CREDIT_FIRST_EXHAUSTED",
        "BYOK_ONLY_OWN_KEY",
        "INSUFFICIENT_CREDITS",
    ]
    assert [row[3] for row in rows if row[0] == "free-tier"][:4] == [
        "TIER_NOT_ELIGIBLE",
        "TIER_NOT_ELIGIBLE",
        "TIER_NOT_ELIGIBLE",
        "BYOK_DISABLED",
    ]
    assert "replayed=true" in out
    assert "api_key_usage (5 rows)" in out
    assert "credit_transactions (11 rows)" in out
    assert not re.search(r"sk-demo-[0-9a-f]+", out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_demo_stays_up_until_it_is_told_to_end(number: signal.Signals) -> None:
    process = await start()
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while b"Ctrl-C ends it" not in await process.stdout.readline():
            assert process.returncode is None
    process.send_signal(number)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
