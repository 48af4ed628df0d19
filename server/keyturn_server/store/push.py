"""The push: a LISTEN connection of its own, which proves itself with a heartbeat.

The connection notifies itself through the server. When its own beat does not come back in time, the
connection is dropped and everything cached is treated as expired, until a new one listens: then
everything is read anew. So a connection that was cut, killed, or silently lost leaves nothing stale
for longer than one interval and one timeout of the beat.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import asyncpg

from keyturn_server.errors import StoreUnavailable
from keyturn_server.store.database import is_unavailable
from keyturn_server.store.patience import patience

if TYPE_CHECKING:
    from keyturn_server.store.database import Connection

PUSH_NAME = "keyturn push"
"""The beginning of the name of each sidecar's connection; the id of its master key follows, or `none`."""

_CHANNEL = "keyturn"
_FIRST_PAUSE_SECONDS = 0.05  # before another attempt; doubles up to the last
_LAST_PAUSE_SECONDS = 1.0


class Log(Protocol):
    """The part of a structlog logger that is used here."""

    def info(self, event: str, **values: Any) -> Any: ...
    def warning(self, event: str, **values: Any) -> Any: ...
    def error(self, event: str, **values: Any) -> Any: ...


class Push:
    """Listens for as long as `run` runs. Callbacks run in its task, one at a time, in order.

    `master_key_id` is the key that this sidecar seals under, if it has one.
    """

    def __init__(
        self,
        dsn: str,
        *,
        beat: timedelta,
        beat_timeout: timedelta,
        on_up: Callable[[], Awaitable[None]],
        on_down: Callable[[], Awaitable[None]],
        on_change: Callable[[str], Awaitable[None]],
        log: Log,
        master_key_id: str | None = None,
    ) -> None:
        self._dsn = dsn
        # Seen in pg_stat_activity: rotation asks there under which key each running sidecar seals.
        self._name = f"{PUSH_NAME} {master_key_id or 'none'}"
        self._beat_seconds = beat.total_seconds()
        self._timeout = beat_timeout
        self._on_up = on_up
        self._on_down = on_down
        self._on_change = on_change
        self._log = log
        # A channel of its own: the beats of others are not heard.
        self._beat_channel = f"keyturn_beat_{secrets.token_hex(8)}"
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def run(self) -> None:
        """Listen until cancelled; connect again whenever the connection is lost."""
        while True:
            try:
                async with patience(self._timeout):
                    connection = await asyncpg.connect(
                        self._dsn, server_settings={"application_name": self._name}
                    )
            except Exception as error:
                self._report("push_unreachable", error)
            else:
                try:
                    await self._listen(connection)
                except Exception as error:
                    self._report("push_lost", error)
                finally:
                    connection.terminate()
                await self._on_down()
            await asyncio.sleep(self._pause_seconds)
            self._pause_seconds = min(self._pause_seconds * 2, _LAST_PAUSE_SECONDS)

    def _report(self, event: str, error: Exception) -> None:
        """Whatever it was, the answer is to listen again; what is no mere "not now" is logged whole."""
        # `StoreUnavailable`: what was to be read anew came from the pool, which was lost as well.
        if is_unavailable(error) or isinstance(error, asyncpg.PostgresError | StoreUnavailable):
            sqlstate = getattr(error, "sqlstate", None) or ""
            self._log.warning(event, error=type(error).__name__, sqlstate=sqlstate)
        else:
            self._log.error(event, exc_info=error)

    async def _listen(self, connection: Connection) -> None:
        changes: asyncio.Queue[str | None] = asyncio.Queue()
        heard = asyncio.Event()

        def changed(connection: Any, pid: int, channel: str, payload: object) -> None:
            changes.put_nowait(str(payload))

        def beaten(connection: Any, pid: int, channel: str, payload: object) -> None:
            heard.set()

        connection.add_termination_listener(lambda connection: changes.put_nowait(None))
        async with patience(self._timeout, give_up=connection.terminate):
            await connection.add_listener(_CHANNEL, changed)
            await connection.add_listener(self._beat_channel, beaten)
        await self._beat(connection, heard)
        # What changed before we listened is not announced: only what is read from here on counts.
        await self._on_up()
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._log.info("push_up")
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        while True:
            if (wait_seconds := next_beat - loop.time()) <= 0:
                await self._beat(connection, heard)
                next_beat = loop.time() + self._beat_seconds
                continue
            try:
                async with asyncio.timeout(wait_seconds):
                    change = await changes.get()
            except TimeoutError:
                continue
            if change is None:
                raise asyncpg.ConnectionDoesNotExistError("the server ended the connection")
            await self._on_change(change)

    async def _beat(self, connection: Connection, heard: asyncio.Event) -> None:
        """Notifies ourselves through the server. Raises TimeoutError when it does not come back."""
        heard.clear()
        async with patience(self._timeout, give_up=connection.terminate):
            await connection.execute(f'NOTIFY "{self._beat_channel}"')
            await heard.wait()
