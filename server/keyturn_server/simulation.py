"""SimulateFlags: what would have happened to recorded requests under other flags?

The recorded requests of a window and today's users are sorted by the facts that decide, in SQL; the
policy then decides once for each combination of facts, of which there are some hundreds whatever the
number of requests; and SQL adds up what moves and who is denied.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from bisect import bisect_right
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from itertools import product
from typing import NamedTuple, Protocol
from uuid import UUID

from keyturn_server.configuration import Configuration
from keyturn_server.errors import InvalidFields, Overloaded
from keyturn_server.ids import new_id
from keyturn_server.keys.keyring import Keyring
from keyturn_server.routing.model import (
    Credits,
    DenialReason,
    Flags,
    KeyFacts,
    Mode,
    Path,
    Verdict,
    World,
)
from keyturn_server.routing.policy import choose_route, conclude

MOST_MOVES = 40_000
"""More would not fit into the 4 MiB that gRPC's clients take by default."""
MOST_ASKING = 5
"""Who simulates and who waits for it; one more is refused."""
MOST_KEPT = 16
"""Simulations of a sidecar whose denials it keeps."""
_MOST_KEPT_BYTES = 64 * 1024 * 1024
_KEEPING = timedelta(minutes=10)
_IN_A_BLOCK = 500
# Decisions in a row before others have a turn: some 10 ms.
_IN_A_ROW = 500
# The order of moves that are alike but for these.
_PATHS = (Path.OWN_KEY, Path.CREDITS, None)
_ANY_KEY = UUID(int=0)
_MOMENT = timedelta(seconds=1)


class KeyCondition(NamedTuple):
    """What decides about a stored key."""

    is_active: bool
    is_valid: bool
    is_readable: bool
    """Whether it rests under a master key that we have. It is not opened."""
    is_cooling: bool


class Facts(NamedTuple):
    """What decides about a request of a user to a provider, besides the flags."""

    tier: str
    """Empty for every tier that nobody described."""
    has_credits: bool
    """Whether what is available covers the default hold."""
    keys: frozenset[KeyCondition]
    """The conditions that the user's keys for the provider are in; which key it is decides nothing."""
    is_provider_enabled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentFacts:
    """The facts of today's users, apart: any may come together in a request."""

    people: Sequence[tuple[str, bool]]
    """Tier, and whether there are credits."""
    keys: Sequence[frozenset[KeyCondition]]
    """That of no key among them."""


class Move(NamedTuple):
    """Requests of one day that took one path and would take another, or the same."""

    day: date
    """In UTC."""
    provider: str
    tier: str
    paid_by: Path
    would_pay: Path | None
    """None: it would be denied."""
    requests: int
    total_tokens: int
    cost_micros: int


class DeniedUser(NamedTuple):
    """A user whose requests to a provider would be denied."""

    user_id: str
    email: str
    provider: str
    reason: DenialReason
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The time that is simulated, and what else it takes to see the facts of a request."""

    start: datetime
    end: datetime
    hold_micros: int
    """Having credits is to have as much available, in micro-USD."""
    master_key_ids: Sequence[str]
    """A key that rests under another one is not readable."""
    providers: Sequence[str]
    """Those that are switched on."""


Verdicts = Mapping[Facts, Verdict]


class Reading(Protocol):
    """The database at one moment."""

    @property
    def now(self) -> datetime: ...
    async def configuration(self) -> Configuration: ...
    async def facts(self, window: Window) -> PresentFacts: ...
    async def locked_out_users(self, window: Window, min_tier: str) -> int: ...
    async def moves(self, window: Window, verdicts: Verdicts, limit: int) -> tuple[list[Move], int]: ...
    def denied(self, window: Window, verdicts: Verdicts, size: int) -> AsyncIterator[list[DeniedUser]]: ...


class RecordedRequests(Protocol):
    """Where the recorded requests are."""

    def reading(self) -> AbstractAsyncContextManager[Reading]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a page of a simulation's denials ended, and what it takes to simulate it again."""

    simulation_id: UUID
    end: datetime
    proposed: Mapping[str, bool]
    """All three flags."""
    user_id: str
    provider: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationAsk:
    """What is to be simulated, and which page of it is wanted."""

    proposed: Mapping[str, bool]
    """Those not named stay as they are."""
    window: timedelta
    size: int
    """How many denials at most."""
    after: Place | None
    """None: the first page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What came of simulating."""

    id: UUID
    current_mode: Mode
    proposed: Flags
    start: datetime
    end: datetime
    moves: Sequence[Move]
    skipped_requests: int
    """Of users who no longer exist."""
    locked_out_users: int
    """Whom BYOK_ONLY locks out, whether they made requests or not; 0 under another mode."""
    denials: PackedDenials


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationPage:
    """A page of a simulation. Its moves are on the first page alone."""

    simulation: Simulation
    denials: Sequence[DeniedUser]
    next: Place | None


def verdict_of(
    facts: Facts, flags: Flags, ranks: Mapping[str, int], *, encryption_configured: bool, now: datetime
) -> Verdict:
    """What `Decide` would come to without rate limits, estimates and holds in flight."""
    world = World(
        flags=flags,
        tier=facts.tier,
        tier_ranks=ranks,
        keys=tuple(
            KeyFacts(
                id=_ANY_KEY,
                is_active=key.is_active,
                is_valid=key.is_valid,
                is_readable=key.is_readable,
                cooldown_until=now + _MOMENT if key.is_cooling else None,
            )
            for key in facts.keys
        ),
        provider_enabled=facts.is_provider_enabled,
        encryption_configured=encryption_configured,
    )
    credit = Credits.HELD if facts.has_credits else Credits.INSUFFICIENT
    return conclude(choose_route(world, now=now), credit)


class PackedDenials:
    """Denials in the order of user and provider, packed to some 10 bytes each.

    Counts all that are added, and keeps those after a place, as many as fit into `most_bytes`.
    """

    def __init__(self, *, after: tuple[str, str] | None, most_bytes: int) -> None:
        self._after = after
        self._most_bytes = most_bytes
        self._blocks: list[bytes] = []
        self._lasts: list[tuple[str, str]] = []
        self._is_cut = False
        self.count = 0
        self.packed_bytes = 0

    def add(self, denials: Sequence[DeniedUser]) -> None:
        """The next ones."""
        self.count += len(denials)
        kept = [one for one in denials if self._after is None or _place_of(one) > self._after]
        # However little may be kept: a page is to be had of it.
        self._is_cut = self._is_cut or (bool(self._blocks) and self.packed_bytes >= self._most_bytes)
        if not kept or self._is_cut:
            return
        rows = [(*one[:3], one.reason.value, one.requests) for one in kept]
        block = zlib.compress(json.dumps(rows).encode(), level=1)
        self._blocks.append(block)
        self._lasts.append(_place_of(kept[-1]))
        self.packed_bytes += len(block)

    def page(self, after: tuple[str, str] | None, size: int) -> tuple[list[DeniedUser], bool] | None:
        """Up to `size` denials after a place, and whether there are more; None: they were not kept."""
        if self._after is not None and (after is None or after < self._after):
            return None
        found: list[DeniedUser] = []
        first = 0 if after is None else bisect_right(self._lasts, after)
        for block in self._blocks[first:]:
            for user_id, email, provider, reason, requests in json.loads(zlib.decompress(block)):
                one = DeniedUser(user_id, email, provider, DenialReason(reason), requests)
                if after is None or _place_of(one) > after:
                    found.append(one)
            if len(found) > size:
                return found[:size], True
        if self._is_cut and not found:
            return None
        return found, self._is_cut


def _place_of(one: DeniedUser) -> tuple[str, str]:
    return one.user_id, one.provider


class KeptSimulations:
    """The last simulations, for their further pages: for some minutes, and bounded in number and bytes."""

    def __init__(self, *, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._simulations: dict[UUID, Simulation] = {}
        self._timers: dict[UUID, asyncio.TimerHandle] = {}

    def get(self, simulation_id: UUID) -> Simulation | None:
        """The simulation without its moves, if it is still kept."""
        return self._simulations.get(simulation_id)

    def keep(self, simulation: Simulation) -> None:
        """Keeps it, and drops the oldest ones where there are too many."""
        self._drop(simulation.id)
        total_bytes = simulation.denials.packed_bytes
        for number, kept in enumerate(reversed(list(self._simulations.values())), start=2):
            total_bytes += kept.denials.packed_bytes
            if number > MOST_KEPT or total_bytes > self._most_bytes:
                self._drop(kept.id)
        # The moves have been told with the first page.
        self._simulations[simulation.id] = replace(simulation, moves=())
        self._timers[simulation.id] = asyncio.get_running_loop().call_later(
            _KEEPING.total_seconds(), self._drop, simulation.id
        )

    def _drop(self, simulation_id: UUID) -> None:
        self._simulations.pop(simulation_id, None)
        if (timer := self._timers.pop(simulation_id, None)) is not None:
            timer.cancel()


class Simulator:
    """Simulates, one simulation at a time: others wait for their turn."""

    def __init__(
        self,
        requests: RecordedRequests,
        *,
        keyring: Keyring | None,
        default_hold_micros: int,
        most_kept_bytes: int = _MOST_KEPT_BYTES,
    ) -> None:
        self._requests = requests
        self._keyring = keyring
        self._default_hold_micros = default_hold_micros
        self._most_kept_bytes = most_kept_bytes
        self._kept = KeptSimulations(most_bytes=most_kept_bytes)
        self._turn = asyncio.Lock()
        self._asking = 0

    async def simulate(self, ask: SimulationAsk) -> SimulationPage:
        """A page of a simulation: of a new one, or of the one that `ask.after` is a place of.

        That one is simulated again, as of the same time, where it is no longer kept. Raises
        `InvalidFields` (the window makes too many moves), `Overloaded` and `StoreUnavailable`.
        """
        if (page := self._kept_page(ask)) is not None:
            return page
        if self._asking >= MOST_ASKING:
            raise Overloaded
        self._asking += 1
        try:
            async with self._turn:
                # Who had the turn before may have wanted the same.
                if (page := self._kept_page(ask)) is None:
                    simulation = await self._simulate(ask)
                    page = _page(simulation, ask)
                    if page is not None and page.next is not None:
                        self._kept.keep(simulation)
        finally:
            self._asking -= 1
        if page is None:
            raise RuntimeError("a simulation kept nothing of the page it was made for")
        return page

    def _kept_page(self, ask: SimulationAsk) -> SimulationPage | None:
        simulation = None if ask.after is None else self._kept.get(ask.after.simulation_id)
        return None if simulation is None else _page(simulation, ask)

    async def _simulate(self, ask: SimulationAsk) -> Simulation:
        async with self._requests.reading() as reading:
            configuration = await reading.configuration()
            flags = configuration.flags
            proposed = flags.with_values(ask.proposed if ask.after is None else ask.after.proposed)
            end = reading.now if ask.after is None else ask.after.end
            window = Window(
                start=end - ask.window,
                end=end,
                hold_micros=self._default_hold_micros,
                master_key_ids=() if self._keyring is None else self._keyring.ids,
                providers=[one.id for one in configuration.providers.values() if one.is_enabled],
            )
            facts = await reading.facts(window)
            verdicts = await self._decide(facts, proposed, configuration, end)
            moves, skipped_requests = await reading.moves(window, verdicts, MOST_MOVES + 1)
            if len(moves) > MOST_MOVES:
                raise InvalidFields(
                    ("window", f"It makes more than {MOST_MOVES} moves, too many for one answer: shorten it.")
                )
            moves.sort(key=_order_of)
            locked_out_users = (
                await reading.locked_out_users(window, proposed.min_tier)
                if proposed.mode is Mode.BYOK_ONLY
                else 0
            )
            denials = PackedDenials(
                after=None if ask.after is None else (ask.after.user_id, ask.after.provider),
                most_bytes=self._most_kept_bytes,
            )
            async for denied in reading.denied(window, verdicts, _IN_A_BLOCK):
                denials.add(denied)
        return Simulation(
            id=new_id() if ask.after is None else ask.after.simulation_id,
            current_mode=flags.mode,
            proposed=proposed,
            start=window.start,
            end=window.end,
            moves=moves,
            skipped_requests=skipped_requests,
            locked_out_users=locked_out_users,
            denials=denials,
        )

    async def _decide(
        self, facts: PresentFacts, flags: Flags, configuration: Configuration, now: datetime
    ) -> Verdicts:
        """The verdict for every combination of facts."""
        verdicts: dict[Facts, Verdict] = {}
        for (tier, has_credits), keys, enabled in product(facts.people, facts.keys, (True, False)):
            one = Facts(tier, has_credits, keys, enabled)
            verdicts[one] = verdict_of(
                one,
                flags,
                configuration.tier_ranks,
                encryption_configured=self._keyring is not None,
                now=now,
            )
            if len(verdicts) % _IN_A_ROW == 0:
                await asyncio.sleep(0)
        return verdicts


def _order_of(move: Move) -> tuple[date, str, str, int, int]:
    return (move.day, move.provider, move.tier, _PATHS.index(move.paid_by), _PATHS.index(move.would_pay))


def _page(simulation: Simulation, ask: SimulationAsk) -> SimulationPage | None:
    after = None if ask.after is None else (ask.after.user_id, ask.after.provider)
    if (found := simulation.denials.page(after, ask.size)) is None:
        return None
    denials, has_more = found
    place = None
    if has_more:
        place = Place(
            simulation_id=simulation.id,
            end=simulation.end,
            proposed=simulation.proposed.values,
            user_id=denials[-1].user_id,
            provider=denials[-1].provider,
        )
    return SimulationPage(
        simulation=simulation if ask.after is None else replace(simulation, moves=()),
        denials=denials,
        next=place,
    )
