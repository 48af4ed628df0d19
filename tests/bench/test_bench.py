"""`make bench` works on any machine. What it measures is not for a test to judge."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.bench.generators import HOW_TO_GET_H2LOAD, has_h2load
from tests.bench.measurements import MEASUREMENTS

_QUICK = ("--seconds=0.3", "--rounds=1", "--concurrency=4", "--users=10")


async def printed_by(*command: str) -> str:
    """What a bench prints, which has to end well."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    printed = output.decode()
    assert process.returncode == 0, printed
    return printed


async def test_the_bench_prints_every_row_and_says_where_h2load_is_missing(tmp_path: Path) -> None:
    names = [one.name for one in MEASUREMENTS if has_h2load() or not one.by_h2load]
    figures = tmp_path / "figures.json"
    printed = await printed_by(
        "tests.bench",
        *_QUICK,
        f"--json={figures}",
        *(f"--only={one.name}" for one in MEASUREMENTS),
    )
    assert (HOW_TO_GET_H2LOAD in printed) is not has_h2load()
    rows = json.loads(figures.read_text())["rows"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert f"\n{row['name']} " in printed
        assert row["echo"]["calls"] > 0
        assert row["keyturn"]["calls"] > 0


async def test_the_bench_of_simulations_prints_its_figures() -> None:
    printed = await printed_by(
        "tests.bench.simulate",
        *("--records=2000", "--users=100", "--rounds=2", "--idle-seconds=0.3"),
    )
    assert " moves of 2,000 requests, " in printed
    for figure in (
        "first page ",
        "second page ",
        "memory 2 ",
        "own key, meanwhile: ",
        "credits, meanwhile: ",
    ):
        assert figure in printed


async def test_the_bench_of_workers_prints_its_figures() -> None:
    printed = await printed_by(
        "tests.bench.workers",
        *("--workers=2", "--seconds=0.3", "--rounds=1", "--users=10"),
    )
    for row in ("TCP, 1 ", "TCP, 2 ", "Unix, 1 ", "Unix, 2 "):
        assert f"\n{row}" in printed


async def test_the_bench_of_sizes_prints_its_figures() -> None:
    printed = await printed_by(
        "tests.bench.size",
        *("--users=400", "--keys=600", "--usage-rows=1000", "--few-users=100", "--asked=80"),
        *("--rounds=1", "--starts=1", "--cached-profiles=160"),
    )
    assert "\n400 users, 600 keys, 1,000 usage rows: " in printed
    for row in (
        "decide-own-key, started ",
        "decide-own-key, from disk ",
        "decide-own-key, cold ",
        "decide-own-key, cached ",
        "decide-credits, cold ",
        "record-ticket, cold ",
        "record-own-key, cold ",
    ):
        assert f"\n{row}" in printed
    assert " after 320 users " in printed
