"""`keyturn serve` that is killed, told to end, and started again in its place."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.command import Served, serving
from tests.support import MASTER_KEY, Caller

# So that a machine that is slow for a while is not taken for a fault.
_PATIENT = {
    "KEYTURN_STATEMENT_TIMEOUT": "30",
    "KEYTURN_CONNECT_TIMEOUT": "30",
    "KEYTURN_PUSH_TIMEOUT": "30",
    "KEYTURN_SILENCE_TIMEOUT": "30",
}


@dataclass(kw_only=True)
class Process(Caller):
    """A running sidecar of its own, as a gateway sees it."""

    served: Served

    async def kill(self) -> None:
        """As the kernel does when memory is short: nothing is finished, nothing said."""
        self.served.signal(signal.SIGKILL)
        assert await self.served.end() == -signal.SIGKILL

    async def stop(self) -> None:
        """As a pod ends. Raises AssertionError for a defect that it told of."""
        self.served.signal(signal.SIGTERM)
        assert await self.served.end() == 0
        assert not (defects := self.defects()), defects

    def defects(self) -> list[dict[str, object]]:
        """What it told of that must not be, whatever breaks around it."""
        known = ("internal_error", "account_broken", "record_set_aside", "upkeep_failed")
        return [event for event in self.served.events if event["event"] in known]


@dataclass(kw_only=True)
class Place:
    """Where one sidecar at a time is: with its socket, its spool, and its way to the database."""

    home: Path
    dsn: str
    name: str = "s"
    acknowledged: list[str] = field(default_factory=list)
    """The ids of the records that were, by whichever process."""

    @property
    def spool(self) -> Path:
        return self.home / f"spool-{self.name}"

    @property
    def address(self) -> str:
        return f"unix:{self.home}/run/{self.name}"

    @asynccontextmanager
    async def sidecar(self, program: Sequence[str] = (), **variables: str) -> AsyncIterator[Process]:
        """Starts one, by another program than `keyturn` itself if need be. What still runs at the end of the
        block is killed."""
        given = {
            **_PATIENT,
            "KEYTURN_DATABASE_URL": self.dsn,
            "KEYTURN_SPOOL": str(self.spool),
            "ENCRYPTION_KEY": MASTER_KEY,
            **variables,
        }
        options: dict[str, Any] = {"program": program, **given} if program else {**given}
        async with (
            serving(self.home, "--listen", self.address, **options) as served,
            served.channel() as channel,
        ):
            yield Process(channel=channel, acknowledged=self.acknowledged, served=served)
