"""The composition root: settings in, a running sidecar out."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from keyturn.address import default_socket
from keyturn_server.access import ALL_ROLES
from keyturn_server.access_file import Callers, parse_callers
from keyturn_server.audit import Audit, Sink, open_audit
from keyturn_server.configuration import Configuration
from keyturn_server.decide import Decider
from keyturn_server.errors import KeyturnFault, SpoolCause, StoreUnavailable
from keyturn_server.explain import Explainer
from keyturn_server.flags import FlagSetter
from keyturn_server.freshness import PushedCache
from keyturn_server.keys.envelope import Unreadable
from keyturn_server.keys.keyring import Keyring
from keyturn_server.keys.provider_checks import KeyCheck, ProviderChecks, open_provider_checks
from keyturn_server.keys.tokens import TokenSealer
from keyturn_server.ledger import KeyUse, Outcome
from keyturn_server.metrics import Metrics
from keyturn_server.metrics_page import MetricsPage
from keyturn_server.prices import PriceBook
from keyturn_server.profiles import Profile, StoredKey
from keyturn_server.rate_limits import RateLimits, WindowStorage
from keyturn_server.record import Books as RecordBooks
from keyturn_server.record import Recorder
from keyturn_server.redeem import Redeemer
from keyturn_server.rpc.access import Access
from keyturn_server.rpc.credit_service import CreditService
from keyturn_server.rpc.flag_service import FlagService
from keyturn_server.rpc.guard import Guard
from keyturn_server.rpc.key_service import KeyService
from keyturn_server.rpc.pages import Pages
from keyturn_server.rpc.report_service import ReportService
from keyturn_server.rpc.routing_service import RoutingService
from keyturn_server.rpc.user_service import UserService
from keyturn_server.serving import Admission, Health, Limits, Services, checked, claimed, serving
from keyturn_server.settings import Settings
from keyturn_server.simulation import Simulator
from keyturn_server.store.credits import Books
from keyturn_server.store.database import Database, Watch, open_database
from keyturn_server.store.flags import FlagTable
from keyturn_server.store.ledger import Ledger, open_ledger
from keyturn_server.store.migrate import migrate
from keyturn_server.store.people import LEGACY, Users, load_master_key_ids, load_profile
from keyturn_server.store.push import Push
from keyturn_server.store.redemptions import Redemptions
from keyturn_server.store.reports import Reports
from keyturn_server.store.settings import load_configuration, load_token_roots
from keyturn_server.store.simulation import RequestLog
from keyturn_server.store.spool import Kept, Spool, SpoolState, open_spool, workers_in
from keyturn_server.store.spooling import Drain, SpoolingBooks
from keyturn_server.store.user_keys import UserKeyRows
from keyturn_server.tls import watched_tls
from keyturn_server.user_keys import UserKeys
from keyturn_server.user_settings import SettingsPage
from keyturn_server.watched import Watched

PUSH_SERVICE = "keyturn.push"
"""The name under which health tells whether changes in the database are announced."""
DATABASE_SERVICE = "keyturn.database"
"""The same, whether the database is there and takes writes."""
SPOOL_SERVICE = "keyturn.spool"
"""The same, whether records can be kept on our own disk."""

_EVERYTHING = "all"
_MOST_SWEPT = 1000
_FORGET_INTERVAL = timedelta(minutes=1)
_MAX_WINDOWS = 1_000_000
_LOOK_INTERVAL = timedelta(seconds=1)
_DRAIN_PAUSE = timedelta(seconds=2)


class NoDatabase(KeyturnFault):
    """Neither a database URL nor a directory for an embedded one is set, or both are."""

    def __init__(self) -> None:
        super().__init__(
            "Say where the data lives, and only once: KEYTURN_DATABASE_URL for a PostgreSQL of yours, "
            "or --embedded DIR (KEYTURN_EMBEDDED) for one that Keyturn runs itself."
        )


class WrongMasterKey(KeyturnFault):
    """ENCRYPTION_KEY opens none of the stored keys; the message names it and theirs by their ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Configurations:
    cache: PushedCache[Configuration]

    def get(self) -> Coroutine[Any, Any, Configuration]:
        return self.cache.get(_EVERYTHING)

    def cached(self) -> Configuration | None:
        return self.cache.cached(_EVERYTHING)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LastKnown:
    """What decisions are made from while the database is away."""

    configurations: PushedCache[Configuration]
    profiles: PushedCache[Profile]

    def configuration(self) -> tuple[Configuration, timedelta] | None:
        return self.configurations.last_known(_EVERYTHING)

    def profile(self, user_id: str) -> tuple[Profile, timedelta] | None:
        return self.profiles.last_known(user_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _EverKnown:
    """What records are made with while the database is away."""

    configurations: PushedCache[Configuration]
    profiles: PushedCache[Profile]

    def configuration(self) -> Configuration | None:
        return self.configurations.ever_known(_EVERYTHING)

    def profile(self, user_id: str) -> Profile | None:
        return self.profiles.ever_known(user_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyStates:
    """Has the next decision see what an outcome made of a key."""

    profiles: PushedCache[Profile]

    async def changed(self, user_id: str) -> None:
        await self.profiles.expire(user_id)

    async def will_change(self, use: KeyUse) -> None:
        """A record of this use waits in the spool: until it is drained we alone know what it says."""
        changes: dict[str, object] = {}
        if use.report.outcome is Outcome.AUTH_REJECTED:
            changes = {"is_valid": False}
        elif use.cooldown is not None:
            changes = {"cooldown_until": _now() + use.cooldown}
        await self.profiles.amend(
            use.user_id, lambda profile: profile.with_key(use.key_id, use.key_revision, **changes)
        )


@asynccontextmanager
async def sidecar(
    settings: Settings, *, log: Any, audit: Sink | None = None
) -> AsyncIterator[tuple[str, ...]]:
    """A whole sidecar: connected, migrated, listening for changes, and serving on its addresses.

    The lines of the audit go to `audit` (stderr), which is where `log` goes as well.

    The addresses come back as they are listened on. At the end of the block it drains: calls in
    flight are finished, what the ledger has queued is carried out, everything is closed. Raises
    `AddressError`, `AccessFileError`, `TlsError`, `UnreadableFile`, `KeyringError`, `WrongMasterKey`,
    `NoDatabase`, `DatabaseRefused`, `MigrationError`, `EmbeddedPostgresError`, `SpoolError`,
    `MetricsAddressError` and `StoreUnavailable`.
    """
    check_database(settings)
    admission = admission_of(settings)
    page = None if settings.metrics is None else MetricsPage.at(settings.metrics)
    with claimed(addresses_of(settings), admission) as addresses:
        async with _serving(
            settings, admission, addresses, page, shares_ports=False, log=log, audit=audit
        ) as bound:
            yield bound


@asynccontextmanager
async def worker(
    settings: Settings, *, page: MetricsPage | None, log: Any, audit: Sink
) -> AsyncIterator[tuple[str, ...]]:
    """The same for one of several processes that share the TCP ports of `settings`. Somebody else claims the
    addresses for all of them."""
    admission = admission_of(settings)
    addresses = checked(addresses_of(settings), admission)
    async with _serving(
        settings, admission, addresses, page, shares_ports=True, log=log, audit=audit
    ) as bound:
        yield bound


def check_database(settings: Settings) -> None:
    """Raises `NoDatabase` unless there is one."""
    if (settings.database_url is None) == (settings.embedded is None):
        raise NoDatabase


def addresses_of(settings: Settings) -> tuple[str, ...]:
    """Where to listen."""
    return settings.listen or (f"unix:{default_socket()}",)


def admission_of(settings: Settings) -> Admission:
    """How callers may come in. Raises `AccessFileError`, `TlsError` and `UnreadableFile`."""
    return Admission(
        insecure_loopback=settings.insecure_loopback,
        callers=_watched_callers(settings),
        tls=watched_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca),
    )


@asynccontextmanager
async def _serving(
    settings: Settings,
    admission: Admission,
    addresses: tuple[str, ...],
    page: MetricsPage | None,
    *,
    shares_ports: bool,
    log: Any,
    audit: Sink | None,
) -> AsyncIterator[tuple[str, ...]]:
    async with (
        _services(settings, admission, log=log, sink=audit or sys.stderr) as services,
        serving(
            services,
            addresses,
            tls=admission.tls,
            with_reflection=settings.reflection,
            metrics_page=page,
            shares_ports=shares_ports,
            limits=Limits(first_words=settings.receive_timeout, idle=settings.idle_timeout),
            drain_timeout=settings.drain_timeout,
            log=log,
        ) as bound,
    ):
        yield bound


@asynccontextmanager
async def _services(
    settings: Settings, admission: Admission, *, log: Any, sink: Sink
) -> AsyncIterator[Services]:
    keyring = Keyring.from_settings(
        settings.encryption_key.get_secret_value() if settings.encryption_key else None, settings.retired_keys
    )
    health = Health()
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        audit = stack.enter_context(open_audit(sink, on_lost=metrics.lost_audit_lines.inc))
        dsn = await database_url(settings, stack, log)
        spool = await _open_spool(settings, stack, _SpoolNews(metrics, health, log))
        applied = await migrate(
            dsn,
            connect_timeout=settings.connect_timeout,
            on_wait=lambda: log.warning("migration_waits", reason="another one runs"),
        )
        if applied:
            log.info("migrated", migrations=[f"{one.version:04d}_{one.name}" for one in applied])
        database = await stack.enter_async_context(
            open_database(
                dsn,
                connections=settings.database_connections,
                connect_timeout=settings.connect_timeout,
                statement_timeout=settings.statement_timeout,
                on_unavailable=_Complaints(metrics, log),
            )
        )
        await _check_master_keys(database, keyring, log)
        sealer = TokenSealer(await load_token_roots(database))
        await asyncio.to_thread(PriceBook.warm)
        ledger = await stack.enter_async_context(open_ledger(database, on_group=metrics.grouped))
        drain = None
        if spool is not None:
            drain = _drain_of(spool, ledger, sealer, database, metrics, log)
            stack.push_async_callback(drain.finish)
        checks = await stack.enter_async_context(
            open_provider_checks(
                timeout=settings.provider_timeout,
                proxy=settings.provider_proxy.get_secret_value() if settings.provider_proxy else None,
                on_check=_KeyChecks(metrics, log),
            )
        )

        configurations = PushedCache[Configuration](
            lambda key: load_configuration(database),
            ttl=settings.flag_ttl,
            unpushed_ttl=settings.unpushed_ttl,
            max_entries=1,
        )
        profiles = PushedCache[Profile](
            lambda user_id: load_profile(database, user_id),
            ttl=settings.profile_ttl,
            unpushed_ttl=settings.unpushed_ttl,
            max_entries=settings.cached_profiles,
        )
        background = await stack.enter_async_context(_Background())
        watch = Watch(
            database,
            dsn,
            limit=settings.silence_timeout,
            on_change=_DatabaseNews(metrics, health, log),
        )
        health.report(DATABASE_SERVICE, well=True)
        background.start(watch.run(), name="watch")
        await _start_push(
            *(dsn, database, settings, configurations, profiles, metrics, health, log, background),
            master_key_id=keyring.current.id if keyring else None,
        )
        background.start(_sweep(ledger, settings.sweep_interval, metrics, log), name="sweep")
        background.start(_forget(ledger, log), name="forget")
        background.start(_reload(admission, metrics, log), name="reload")
        if spool is not None and drain is not None:
            background.start(spool.keep_looking(), name="spool")
            background.start(_drain(drain, log), name="drain")

        parts = _Parts(
            settings=settings,
            database=database,
            ledger=ledger,
            records=ledger if spool is None else _spooling(ledger, spool, sealer, metrics),
            configurations=_Configurations(cache=configurations),
            profiles=profiles,
            keyring=keyring,
            sealer=sealer,
            checks=checks,
            guard=Guard(
                access=_access(settings, admission),
                log=log,
                on_call=metrics.called,
                on_denied=_Denials(metrics, log),
                on_shed=_Sheddings(metrics, log),
                max_concurrent_calls=settings.max_concurrent_calls,
            ),
            audit=audit,
            metrics=metrics,
            log=log,
        )
        metrics.calls_in_flight.set_function(lambda: parts.guard.in_flight)
        background.start(parts.guard.give_up_bodies(settings.receive_timeout), name="bodies")
        if keyring is None:
            log.warning("byok_off", reason="ENCRYPTION_KEY is not set: own keys cannot be opened or saved")
        else:
            log.info("byok_on", master_key_id=keyring.current.id)
            if keyring.current.is_weak:
                log.warning(
                    "weak_master_key", reason="ENCRYPTION_KEY follows a pattern: see `keyturn keygen`"
                )
        yield Services(
            services=(
                _routing_service(parts),
                _key_service(parts),
                _flag_service(parts),
                _user_service(parts),
                _credit_service(parts),
                _report_service(parts),
            ),
            guard=parts.guard,
            health=health,
            metrics=metrics,
        )


async def database_url(settings: Settings, stack: AsyncExitStack, log: Any) -> str:
    if settings.database_url is not None and settings.embedded is None:
        return settings.database_url.get_secret_value()
    if settings.embedded is None or settings.database_url is not None:
        raise NoDatabase
    from keyturn_server.store.embedded import EmbeddedPostgres

    postgres = await stack.enter_async_context(EmbeddedPostgres(settings.embedded, log=log))
    return postgres.dsn


async def _open_spool(settings: Settings, stack: AsyncExitStack, news: _SpoolNews) -> Spool | None:
    directory = settings.spool_directory
    if directory is None:
        news.log.warning(
            "spool_off", reason="KEYTURN_SPOOL is not set: without the database no record is taken"
        )
        return None
    news.health.report(SPOOL_SERVICE, well=True)
    spool = await stack.enter_async_context(
        open_spool(
            directory,
            max_records=settings.spool_max_records,
            max_bytes=settings.spool_max_bytes,
            on_state=news,
        )
    )
    news.log.info("spool_on", directory=str(directory), waiting=spool.figures.waiting)
    await _take_over(spool, directory, settings.workers, news.log)
    return spool


async def _take_over(spool: Spool, directory: Path, workers: int, log: Any) -> None:
    """What waits in the spools of workers that there are no more is ours."""
    for worker, theirs in workers_in(directory).items():
        if worker < workers:
            continue
        try:
            records, left = await spool.take_over(theirs)
        except KeyturnFault as error:
            # It is tried again at the next start.
            log.error("spool_left", directory=str(theirs), reason=str(error))
            continue
        if records:
            log.info("spool_taken_over", directory=str(theirs), records=records)
        if left:
            log.error("spool_left", directory=str(theirs), reason=f"{left} records have no place here yet")


def _spooling(ledger: Ledger, spool: Spool, sealer: TokenSealer, metrics: Metrics) -> SpoolingBooks:
    return SpoolingBooks(ledger, spool, sealer, clock=_now, on_spooled=metrics.spooled_records.inc)


def _drain_of(
    spool: Spool, ledger: Ledger, sealer: TokenSealer, database: Database, metrics: Metrics, log: Any
) -> Drain:
    next_line = 0.0

    def drained(count: int) -> None:
        metrics.drained_records.inc(count)
        log.info("spool_drained", records=count)

    def set_aside(record: Kept, cause: str) -> None:
        log.error("record_set_aside", decision_id=str(record.id), user_id=record.user_id, cause=cause)

    def failed(record: Kept, error: Exception) -> None:
        nonlocal next_line
        if (now := time.monotonic()) >= next_line:
            next_line = now + 1
            log.error(
                "record_not_drained", decision_id=str(record.id), user_id=record.user_id, exc_info=error
            )

    return Drain(
        spool,
        ledger,
        sealer,
        is_away=lambda: database.is_away,
        clock=_now,
        on_drained=drained,
        on_set_aside=set_aside,
        on_failed=failed,
    )


async def _drain(drain: Drain, log: Any) -> None:
    """Bring what is spooled to the database, again and again, until cancelled."""
    while True:
        pause = _DRAIN_PAUSE
        with _postponed("drain", log):
            pause = await drain.step()
        await asyncio.sleep(pause.total_seconds())


class _SpoolNews:
    """Tells how the spool is: in metrics and health, and in the log when that changes."""

    def __init__(self, metrics: Metrics, health: Health, log: Any) -> None:
        self._metrics = metrics
        self.health = health
        self.log = log
        self._cause: SpoolCause | None = None

    def __call__(self, state: SpoolState) -> None:
        figures = state.figures
        self._metrics.spool(
            well=state.cause is None,
            waiting=figures.waiting,
            set_aside=figures.set_aside,
            file_bytes=figures.file_bytes,
            oldest=figures.oldest,
        )
        if state.cause is self._cause:
            return
        self._cause = state.cause
        self.health.report(SPOOL_SERVICE, well=state.cause is None)
        if state.cause is None:
            self.log.info("spool_back")
        else:
            self.log.error("spool_unavailable", cause=state.cause.value, error=state.error)


class _DatabaseNews:
    """Tells when the database goes away and comes back: in metrics, health and the log."""

    def __init__(self, metrics: Metrics, health: Health, log: Any) -> None:
        self._metrics = metrics
        self._health = health
        self._log = log
        metrics.database_up.set(1)

    def __call__(self, is_there: bool, error: str, sqlstate: str) -> None:
        self._metrics.database_up.set(is_there)
        self._health.report(DATABASE_SERVICE, well=is_there)
        if is_there:
            self._log.info("database_back")
        else:
            self._log.warning("database_away", error=error, sqlstate=sqlstate)


class _Complaints:
    """Tells of statements that the database did not take: each in the metrics, one a second in the log."""

    def __init__(self, metrics: Metrics, log: Any) -> None:
        self._metrics = metrics
        self._log = log
        self._next_line = 0.0

    def __call__(self, error: str, sqlstate: str) -> None:
        self._metrics.unavailable(sqlstate)
        if (now := time.monotonic()) >= self._next_line:
            self._next_line = now + 1
            self._log.warning("store_unavailable", error=error, sqlstate=sqlstate)


def _watched_callers(settings: Settings) -> Watched[Callers] | None:
    if settings.access_file is None:
        return None
    return Watched((settings.access_file,), lambda files: parse_callers(files[0]))


def _access(settings: Settings, admission: Admission) -> Access:
    callers, nobody = admission.callers, Callers()
    return Access(
        callers=(lambda: nobody) if callers is None else (lambda: callers.value),
        socket_roles=settings.socket_roles,
        loopback_roles=ALL_ROLES if settings.insecure_loopback else frozenset(),
        mutual_tls=admission.mutual_tls,
    )


async def _reload(admission: Admission, metrics: Metrics, log: Any) -> None:
    """Look after the access file and the certificates, again and again, until cancelled."""
    watched: list[tuple[str, Watched[Any]]] = []
    if admission.callers is not None:
        watched.append(("access", admission.callers))
    if admission.tls is not None:
        watched.append(("tls", admission.tls))
    for name, _ in watched:
        metrics.in_force(name, latest=True)
    while watched:
        await asyncio.sleep(_LOOK_INTERVAL.total_seconds())
        for name, files in watched:
            try:
                # In a thread: the files may lie on something slow.
                changed = await asyncio.to_thread(files.refresh)
            except KeyturnFault as error:
                metrics.in_force(name, latest=False)
                log.error("reload_failed", file=name, reason=str(error))
                continue
            except Exception as error:  # whatever a file does to us, calls go on
                metrics.in_force(name, latest=False)
                # Its text may quote the file.
                log.error("reload_failed", file=name, reason=f"{type(error).__name__}, which is unexpected")
                continue
            if changed:
                metrics.in_force(name, latest=True)
                if name == "access":
                    log.info("access_reloaded")
                else:
                    log.info("tls_reloaded")


class _Denials:
    """Tells of calls that are turned away: each in the metrics, one a second and code in the log."""

    def __init__(self, metrics: Metrics, log: Any) -> None:
        self._metrics = metrics
        self._log = log
        self._next_lines: dict[str, float] = {}

    def __call__(self, code: str, method: str, caller: str) -> None:
        self._metrics.denied(code)
        if (now := time.monotonic()) >= self._next_lines.get(code, 0):
            self._next_lines[code] = now + 1
            self._log.warning("access_denied", code=code, method=method, caller=caller)


class _Sheddings:
    """Tells of calls that were one too many: each in the metrics, one a second in the log."""

    def __init__(self, metrics: Metrics, log: Any) -> None:
        self._metrics = metrics
        self._log = log
        self._next_line = 0.0

    def __call__(self, method: str) -> None:
        self._metrics.shed(method)
        if (now := time.monotonic()) >= self._next_line:
            self._next_line = now + 1
            self._log.warning("overloaded", method=method)


class _KeyChecks:
    """Tells of keys that a provider was asked about: in the metrics, and of vain questions in the log."""

    def __init__(self, metrics: Metrics, log: Any) -> None:
        self._metrics = metrics
        self._log = log

    def __call__(self, provider: str, result: KeyCheck, cause: str) -> None:
        self._metrics.key_checked(provider, result.value)
        if result is KeyCheck.UNVERIFIED:
            self._log.warning("key_unverified", provider=provider, cause=cause)


class _Background:
    """Tasks that run until the end of the block; one that fails ends the block."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        # The group would wrap an error of the block in a group of one; only a cancellation may be its own.
        if isinstance(error, asyncio.CancelledError):
            await self._group.__aexit__(kind, error, trace)
        else:
            await self._group.__aexit__(None, None, None)

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        self._tasks.append(self._group.create_task(work, name=name))


async def _start_push(
    dsn: str,
    database: Database,
    settings: Settings,
    configurations: PushedCache[Configuration],
    profiles: PushedCache[Profile],
    metrics: Metrics,
    health: Health,
    log: Any,
    background: _Background,
    *,
    master_key_id: str | None,
) -> None:
    """Listen for changes; back when the first connection listens and everything has been read."""
    first_up = asyncio.Event()

    async def up() -> None:
        await configurations.expire_all(pushed=True)
        await profiles.expire_all(pushed=True)
        await configurations.get(_EVERYTHING)
        metrics.push_up.set(1)
        health.report(PUSH_SERVICE, well=True)
        first_up.set()

    async def down() -> None:
        metrics.push_up.set(0)
        health.report(PUSH_SERVICE, well=False)
        await configurations.expire_all(pushed=False)
        await profiles.expire_all(pushed=False)
        # The pool's connections led to the same server.
        await database.renew()

    async def changed(payload: str) -> None:
        what, _, user_id = payload.partition(" ")
        match what:
            case "user":
                await profiles.expire(user_id)
            case "users":
                await profiles.expire_all(pushed=True)
            case "configuration":
                await configurations.expire(_EVERYTHING)
            case _:
                log.warning("push_unknown", payload=payload[:64])

    push = Push(
        dsn,
        beat=settings.push_beat,
        beat_timeout=settings.push_timeout,
        on_up=up,
        on_down=down,
        on_change=changed,
        log=log,
        master_key_id=master_key_id,
    )
    background.start(push.run(), name="push")
    try:
        async with asyncio.timeout(settings.connect_timeout.total_seconds()):
            await first_up.wait()
    except TimeoutError:
        raise StoreUnavailable from None


async def _sweep(ledger: Ledger, interval: timedelta, metrics: Metrics, log: Any) -> None:
    """Release expired holds, again and again, until cancelled."""
    while True:
        with _postponed("sweep", log):
            expired, broken = await ledger.expire_holds(at_most=_MOST_SWEPT)
            metrics.expired_holds.inc(expired)
            if broken:
                log.error("account_broken", user_ids=broken, reason="it holds less than its open holds")
            if expired >= _MOST_SWEPT:
                continue
        await asyncio.sleep(interval.total_seconds())


async def _forget(ledger: Ledger, log: Any) -> None:
    """Delete what has served its time, again and again, until cancelled."""
    while True:
        with _postponed("forget", log):
            if await ledger.forget(at_most=_MOST_SWEPT) >= _MOST_SWEPT:
                continue
        await asyncio.sleep(_FORGET_INTERVAL.total_seconds())


@contextmanager
def _postponed(work: str, log: Any) -> Iterator[None]:
    """What fails in the background is tried again later, and stops nothing else.

    Not when we are being stopped: work may end in another error than the cancellation that it got.
    """
    try:
        yield
    except StoreUnavailable:
        log.warning("upkeep_postponed", work=work, reason="the database cannot be reached")
    except Exception:
        log.exception("upkeep_failed", work=work)
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


async def _check_master_keys(database: Database, keyring: Keyring | None, log: Any) -> None:
    """Raises `WrongMasterKey` when stored keys rest under master keys of which we have none."""
    if keyring is None:
        return
    resting = await load_master_key_ids(database)
    unknown = sorted(resting - set(keyring.ids) - {LEGACY})
    if unknown and not resting & set(keyring.ids):
        raise WrongMasterKey(
            f"ENCRYPTION_KEY is the master key {keyring.current.id}, and the stored keys rest under "
            f"{', '.join(unknown)}: set the right one, or add it to ENCRYPTION_KEYS_RETIRED."
        )
    if unknown:
        log.error("master_key_missing", master_key_ids=unknown, reason="stored keys under these do not open")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What the services are made of."""

    settings: Settings
    database: Database
    ledger: Ledger
    records: RecordBooks
    configurations: _Configurations
    profiles: PushedCache[Profile]
    keyring: Keyring | None
    sealer: TokenSealer
    checks: ProviderChecks
    guard: Guard
    audit: Audit
    metrics: Metrics
    log: Any

    @property
    def master_key_ids(self) -> tuple[str, ...]:
        """Those of the master keys that stored keys may rest under."""
        return () if self.keyring is None else self.keyring.ids


def _now() -> datetime:
    return datetime.now(UTC)


def _user_service(parts: _Parts) -> UserService:
    return UserService(
        users=Users(parts.database),
        page=SettingsPage(
            configurations=parts.configurations,
            profiles=parts.profiles,
            balances=parts.ledger,
            keyring=parts.keyring,
            default_hold_micros=parts.settings.default_hold_micros,
            clock=_now,
        ),
        changes=parts.audit,
        on_change=parts.profiles.expire,
    )


def _credit_service(parts: _Parts) -> CreditService:
    return CreditService(
        grants=parts.ledger,
        books=Books(parts.database),
        pages=Pages(parts.sealer),
        changes=parts.audit,
    )


def _report_service(parts: _Parts) -> ReportService:
    return ReportService(
        reports=Reports(parts.database, master_key_ids=parts.master_key_ids),
        pages=Pages(parts.sealer),
        clock=_now,
    )


def _routing_service(parts: _Parts) -> RoutingService:
    prices = PriceBook()
    reported: set[tuple[str, str]] = set()

    def unreadable(user_id: str, key: StoredKey, error: Unreadable) -> None:
        parts.metrics.unreadable_keys.inc()
        # Once for each key in this process, and bounded: every request of the user comes by here.
        if (user_id, str(key.id)) not in reported and len(reported) < 10_000:
            reported.add((user_id, str(key.id)))
            parts.log.error("key_unreadable", user_id=user_id, key_id=str(key.id), cause=str(error))

    limits = RateLimits(WindowStorage(max_windows=_MAX_WINDOWS))
    decider = Decider(
        configurations=parts.configurations,
        profiles=parts.profiles,
        remembered=_LastKnown(configurations=parts.configurations.cache, profiles=parts.profiles),
        holds=parts.ledger,
        limits=limits,
        keyring=parts.keyring,
        sealer=parts.sealer,
        prices=prices,
        degraded_for=parts.settings.degraded_for,
        default_hold_micros=parts.settings.default_hold_micros,
        default_ttl=parts.settings.hold_ttl,
        clock=_now,
        on_unreadable=unreadable,
        on_degraded=parts.metrics.degraded_decisions.inc,
    )
    return RoutingService(
        decider=decider,
        explainer=Explainer(
            decider,
            configurations=parts.configurations,
            profiles=parts.profiles,
            holds=parts.ledger,
            limits=limits,
            keyring=parts.keyring,
            clock=_now,
        ),
        recorder=Recorder(
            configurations=parts.configurations,
            profiles=parts.profiles,
            remembered=_EverKnown(configurations=parts.configurations.cache, profiles=parts.profiles),
            books=parts.records,
            keyring=parts.keyring,
            sealer=parts.sealer,
            prices=prices,
            clock=_now,
            key_states=_KeyStates(profiles=parts.profiles),
        ),
        redeemer=Redeemer(
            profiles=parts.profiles,
            redemptions=Redemptions(parts.database),
            keyring=parts.keyring,
            sealer=parts.sealer,
            clock=_now,
        ),
        audit=parts.audit,
        guard=parts.guard,
    )


def _key_service(parts: _Parts) -> KeyService:
    def bad_pattern(provider: str) -> None:
        parts.log.error("key_pattern_broken", provider=provider, reason="it is no regular expression")

    keys = UserKeys(
        configurations=parts.configurations,
        rows=UserKeyRows(parts.database),
        checks=parts.checks,
        keyring=parts.keyring,
        clock=_now,
        on_change=parts.profiles.expire,
        on_bad_pattern=bad_pattern,
    )
    return KeyService(keys, changes=parts.audit)


def _flag_service(parts: _Parts) -> FlagService:
    table = FlagTable(parts.database, master_key_ids=parts.master_key_ids)

    async def changed() -> None:
        await parts.configurations.cache.expire(_EVERYTHING)

    return FlagService(
        reader=table,
        setter=FlagSetter(table, on_change=changed),
        simulator=Simulator(
            RequestLog(parts.database),
            keyring=parts.keyring,
            default_hold_micros=parts.settings.default_hold_micros,
        ),
        pages=Pages(parts.sealer),
        audit=parts.audit,
    )
