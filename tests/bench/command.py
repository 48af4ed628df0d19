"""What the benches have in common as commands: where they write, and how they end."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.load import LoadError
from tests.bench.machine import end_on_signals
from tests.bench.servers import NotServing


class BenchError(Exception):
    """The figures would say nothing: an answer was not the one to be measured, or a row is missing."""


@contextmanager
def bench_directory() -> Iterator[Path]:
    """A directory for databases, removed at the end of the block."""
    # Not /tmp, which may be memory. Others may enter: PostgreSQL does not run as root.
    directory = Path(tempfile.mkdtemp(prefix="keyturn-bench-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def carry_out(bench: Coroutine[Any, Any, None]) -> None:
    """Runs a bench. Exits with 1 and the reason where it fails, with 130 where it is ended."""

    async def in_order() -> None:
        end_on_signals()
        await bench

    try:
        asyncio.run(in_order())
    except (BenchError, LoadError, NotServing) as error:
        sys.exit(f"bench: {error}")
    except asyncio.CancelledError:
        sys.exit(130)
