"""`keyturn serve --workers N`: processes that share the addresses, below one supervisor.

Each is a whole sidecar, as one of N on one database is: its own connections, caches, counts and spool.
docs/decisions/0017-workers.md
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop
from pydantic import SecretStr

from keyturn_server.app import addresses_of, admission_of, check_database, worker
from keyturn_server.dumps import forbid_dumps
from keyturn_server.logs import SpareWriter, configure_logs, get_log, logging_apart
from keyturn_server.metrics_page import MetricsAddressError, MetricsPage, Ours
from keyturn_server.relay import relaying
from keyturn_server.serving import AddressError, claimed, until_signalled
from keyturn_server.settings import Settings
from keyturn_server.shared_addresses import SharedAddresses, hold_port, shared
from keyturn_server.store.spool import beside
from keyturn_server.supervising import Report, Supervisor

OnFault = Callable[[Exception], int]
"""Says what a fault means, and to which exit code it comes."""

# Beside its pool a worker has a connection that hears of changes, and one that watches.
_CONNECTIONS_BESIDE: Final = 2
_CONNECTIONS_SPARE: Final = 10  # for commands, and whoever looks in
_CONNECTIONS_USUAL: Final = 50  # of the embedded PostgreSQL


def run_workers(settings: Settings, *, on_fault: OnFault) -> int:
    """Run `settings.workers` workers until SIGTERM or SIGINT; the exit code.

    What is wrong before the first of them is started is raised, as `sidecar` does; what keeps one from its
    start goes to `on_fault` in that process, whose exit code ours then is.
    """
    configure_logs(settings.log_level, stream=SpareWriter())
    log = get_log()
    check_database(settings)
    admission = admission_of(settings)
    with ExitStack() as stack:
        claims = stack.enter_context(claimed(addresses_of(settings), admission))
        addresses = stack.enter_context(shared(claims))
        pages = _pages(settings, stack)
        turns = os.memfd_create("log")
        stack.callback(os.close, turns)
        supervisor = stack.enter_context(Supervisor(log, on_end=addresses.turn_away))

        def start(run: Callable[[Report], AbstractAsyncContextManager[object]], **facts: Any) -> str:
            work = partial(_work, run, facts=facts, level=settings.log_level, turns=turns, on_fault=on_fault)
            return supervisor.start(work, is_vital="worker" not in facts, **facts)

        if settings.embedded is not None:
            dsn = start(partial(_postgres, settings.embedded, settings), process="postgres")
            settings = settings.model_copy(
                update={
                    "database_url": SecretStr(dsn),
                    "embedded": None,
                    "spool": settings.spool_directory,
                }
            )
        for index in range(settings.workers):
            place = _Place(index=index, addresses=addresses, page=pages[index])
            start(partial(_worker, place.settings(settings), place), worker=index)
        log.warning(
            "counted_apart",
            reason="each worker counts rate limits for itself: a user may reach so many times the limit",
            times=settings.workers,
        )
        log.info("serving", addresses=list(addresses.addresses), workers=settings.workers)
        supervisor.watch()
    return supervisor.code


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What one worker has of what is shared."""

    index: int
    addresses: SharedAddresses
    page: MetricsPage | None

    @property
    def own_paths(self) -> tuple[Path, ...]:
        """Where its server listens in place of the Unix sockets."""
        return tuple(path.with_name(f"{path.name}.{self.index}") for path in self.addresses.paths)

    def settings(self, settings: Settings) -> Settings:
        """As this worker has them."""
        spool = None if settings.spool is None else beside(settings.spool, self.index)
        listen = (*self.addresses.ports, *(f"unix:{path}" for path in self.own_paths))
        return settings.model_copy(update={"listen": listen, "spool": spool})


def _pages(settings: Settings, stack: ExitStack) -> list[MetricsPage | None]:
    """Where each worker serves the metrics of all; the port is held."""
    if settings.metrics is None:
        return [None] * settings.workers
    page = MetricsPage.at(settings.metrics)
    try:
        held = stack.enter_context(hold_port(page.host, page.port))
    except AddressError:
        raise MetricsAddressError(
            f"{settings.metrics}: cannot be listened on for metrics: somebody else does."
        ) from None
    port = held[0].getsockname()[1]
    name = secrets.token_hex(8)
    points = [f"\0keyturn-{name}-{index}" for index in range(settings.workers)]
    return [
        MetricsPage(host=page.host, port=port, ours=Ours(index=index, meeting_points=points))
        for index in range(settings.workers)
    ]


def _work(
    run: Callable[..., AbstractAsyncContextManager[object]],
    report: Report,
    *,
    facts: dict[str, Any],
    level: str,
    turns: int,
    on_fault: OnFault,
) -> int:
    """The life of one process."""
    structlog.contextvars.bind_contextvars(**facts)
    try:
        with logging_apart(level, turns=turns) as lines:
            log = get_log()
            for reason in forbid_dumps():
                log.warning("dumps_allowed", reason=reason)
            uvloop.run(until_signalled(run(report, log=log, audit=lines), log=log))
    except Exception as error:
        return on_fault(error)
    return 0


@asynccontextmanager
async def _worker(
    settings: Settings, place: _Place, report: Report, *, log: Any, audit: Any
) -> AsyncIterator[None]:
    for held in place.addresses.held:
        held.close()  # the supervisor has it
    async with (
        relaying() as relay,
        worker(settings, page=place.page, log=log, audit=audit),
    ):
        with relay.accepting(place.addresses.listeners, place.own_paths):
            report("serving")
            yield


@asynccontextmanager
async def _postgres(
    directory: Path, settings: Settings, report: Report, *, log: Any, audit: Any
) -> AsyncIterator[None]:
    from keyturn_server.store.embedded import EmbeddedPostgres

    needed = settings.workers * (settings.database_connections + _CONNECTIONS_BESIDE) + _CONNECTIONS_SPARE
    connections = str(max(needed, _CONNECTIONS_USUAL))
    async with EmbeddedPostgres(directory, settings={"max_connections": connections}, log=log) as postgres:
        report(postgres.dsn)
        yield
