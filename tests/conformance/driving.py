"""The drivers: processes that do with a client what they are told (clients/conformance/README.md)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.conformance.suites import Suite

_LIMIT_SECONDS = 60
_LONGEST_LINE = 16 * 1024 * 1024


class Defect(AssertionError):  # noqa: N818 - the word of the protocol
    """A driver that could not do what it was told, died, or said nothing; the message has what it logged."""


class Driver:
    """One running driver."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._read = 0

    @property
    def well(self) -> bool:
        """Whether it takes more commands."""
        return self._process.returncode is None

    async def do(self, command: dict[str, Any]) -> Any:
        """The answer to one command. Raises `Defect`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            async with asyncio.timeout(_LIMIT_SECONDS):
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
        if not line:
            await self.kill()
            raise Defect(f"no answer to {command}; its log: {self.logged()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise Defect(f"no JSON in answer to {command}: {line!r}") from None
        if "defect" in answer:
            raise Defect(f"{answer['defect']}, in answer to {command}; its log: {self.logged()}")
        return answer

    def logged(self) -> str:
        """What it wrote to standard error since this was last asked."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        self._read += len(text)
        return text.decode(errors="replace")

    async def end(self) -> int:
        """How it ends when it has no more commands."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(_LIMIT_SECONDS):
            return await self._process.wait()

    async def kill(self) -> None:
        """Ends it now."""
        if self.well:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def driving(suite: Suite, directory: Path) -> AsyncIterator[Driver]:
    """The driver of a client, without our environment. What still runs at the end is killed."""
    log = directory / f"{suite.name}.log"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("KEYTURN_", "ENCRYPTION_"))
    }
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *suite.driver,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file.fileno(),
            cwd=directory,
            env=environment,
            limit=_LONGEST_LINE,
        )
    driver = Driver(process, log)
    try:
        yield driver
    finally:
        await driver.kill()
