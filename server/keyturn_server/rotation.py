"""Rotation: every stored key that does not rest under the current master key is sealed anew under it.

Sidecars go on serving meanwhile. Each key is opened and sealed here, and written back only over the
ciphertext that was read: a key that was saved anew in between keeps its new secret, and one whose row
somebody else has locked is left for the next round. Nothing is remembered between two runs: what is
left to do is what the table says, so a run that was killed is finished by the next, and two at once do
no harm. The row's `revision` stays, since its secret does: handles given out before stay good.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from keyturn_server.errors import KeyturnFault
from keyturn_server.keys.envelope import Unreadable, UnreadableCause, open_sealed, seal
from keyturn_server.keys.keyring import Keyring

MOST_LISTED = 1000
"""How many keys that do not open are listed one by one; all of them are counted."""

_MOST_ROUNDS = 20
_PAGES_BETWEEN_LOOKS = 25
_PAUSE_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedKey:
    """A stored key as it rests."""

    user_id: str
    id: UUID
    provider: str
    ciphertext: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSidecar:
    """A sidecar that is connected to the database."""

    address: str
    """Where it connects from; `local` for a Unix socket."""
    backend: int
    """The process of PostgreSQL that serves it."""
    master_key_id: str | None
    """The key that it seals under; None for one that has none."""


class SealedKeys(Protocol):
    """The stored keys by the master key they rest under. Everything raises `StoreUnavailable`."""

    async def counts(self, *, beside: str) -> Mapping[str, int]:
        """How many keys rest under each master key but `beside`; those that name none under `legacy`."""
        ...

    async def page(self, master_key_id: str, *, after: SealedKey | None, at_most: int) -> Sequence[SealedKey]:
        """The next keys under one master key, in a fixed order."""
        ...

    async def rewrite(self, changes: Sequence[tuple[SealedKey, str]]) -> int:
        """Put new ciphertexts in the place of those that were read; how many were still there and free."""
        ...

    async def sidecars(self) -> Sequence[RunningSidecar]:
        """The sidecars that are connected right now."""
        ...


class SidecarsBehind(KeyturnFault):
    """Sidecars run whose ENCRYPTION_KEY is another one; the message names them."""

    def __init__(self, current: str, behind: Sequence[RunningSidecar]) -> None:
        self.behind = tuple(behind)
        names = ", ".join(f"{one.address} (PostgreSQL process {one.backend})" for one in behind)
        ids = ", ".join(sorted({one.master_key_id or "none" for one in behind}))
        super().__init__(
            f"ENCRYPTION_KEY is the master key {current} here, and sidecars run that seal under {ids}: "
            f"{names}. They may not open what is sealed anew. Restart them with the new key as "
            "ENCRYPTION_KEY and the old one in ENCRYPTION_KEYS_RETIRED first, or use --force."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableKey:
    """A stored key that does not open, and so stays as it is."""

    user_id: str
    key_id: UUID
    provider: str
    master_key_id: str
    cause: UnreadableCause


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a rotation is."""

    total: int
    """The keys that were to be sealed anew when it began."""
    rewritten: int
    unreadable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """What a rotation came to. Mappings go by master key id."""

    current: str
    found: Mapping[str, int]
    """The keys under other master keys when it began."""
    rewritten: Mapping[str, int]
    """Sealed anew; in a rehearsal, those that would be."""
    left: Mapping[str, int]
    """The keys under other master keys at the end, by a count of its own."""
    unreadable: Mapping[tuple[str, UnreadableCause], int]
    """The keys that do not open, by master key and cause."""
    listed: Sequence[UnreadableKey]
    """The first `MOST_LISTED` of them."""
    behind: Sequence[RunningSidecar]
    """Sidecars that seal under another key at the end: what they save next is not under ours."""
    is_done: bool
    """Everything that opens rests under the current master key."""
    removable: Sequence[str]
    """The retired master keys that nothing rests under, and that no running sidecar seals under."""


class Rotation:
    """One run over the stored keys.

    `batch` keys are read, sealed and written at a time, each batch in a transaction of its own.
    `force` goes on although sidecars run that seal under another master key. `on_progress` is called
    after each batch.
    """

    def __init__(
        self,
        keys: SealedKeys,
        keyring: Keyring,
        *,
        batch: int,
        force: bool = False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._keys = keys
        self._keyring = keyring
        self._batch = batch
        self._force = force
        self._on_progress = on_progress
        self._total = 0
        self._rewritten: Counter[str] = Counter()

    async def run(self) -> Rotated:
        """Seal anew, in rounds, until one finds nothing more to do.

        Raises `SidecarsBehind` and `StoreUnavailable`; what was rewritten until then stays so, and another
        run goes on with the rest.
        """
        await self._look_for_sidecars()
        found = await self._keys.counts(beside=self._keyring.current.id)
        self._total = sum(found.values())
        is_done = False
        for number in range(_MOST_ROUNDS):
            if number > 1:  # what is left is locked by somebody, or keeps coming
                await asyncio.sleep(_PAUSE_SECONDS)
            round_ = _Round()
            before = self._rewritten.total()
            await self._go_over(round_, self._write)
            if round_.missed == 0 and self._rewritten.total() == before:
                is_done = True
                break
        return await self._report(found, round_, is_done)

    async def rehearse(self) -> Rotated:
        """What `run` would do: opens every key, and writes nothing. Raises `StoreUnavailable`."""
        found = await self._keys.counts(beside=self._keyring.current.id)
        self._total = sum(found.values())
        round_ = _Round()
        await self._go_over(round_, self._pretend)
        return await self._report(found, round_, is_done=not found)

    async def _go_over(
        self, round_: _Round, write: Callable[[str, Sequence[tuple[SealedKey, str]]], Awaitable[int]]
    ) -> None:
        """Once over every key that rests under another master key."""
        pages = 0
        now = asyncio.get_running_loop().time
        for master_key_id in await self._keys.counts(beside=self._keyring.current.id):
            after: SealedKey | None = None
            began = now()
            while page := await self._keys.page(master_key_id, after=after, at_most=self._batch):
                after = page[-1]
                changes = self._sealed_anew(master_key_id, page, round_)
                round_.missed += len(changes) - (await write(master_key_id, changes) if changes else 0)
                self._on_progress(
                    Progress(
                        total=self._total,
                        rewritten=self._rewritten.total(),
                        unreadable=round_.unreadable.total(),
                    )
                )
                pages += 1
                if pages % _PAGES_BETWEEN_LOOKS == 0:
                    await self._look_for_sidecars()
                # As long as the work took: what serves requests has at least half of the machine.
                await asyncio.sleep(now() - began)
                began = now()

    def _sealed_anew(
        self, master_key_id: str, page: Sequence[SealedKey], round_: _Round
    ) -> list[tuple[SealedKey, str]]:
        changes = []
        for key in page:
            place = {"user_id": key.user_id, "provider": key.provider}
            try:
                secret = open_sealed(self._keyring, key.ciphertext, row_id=key.id, **place)
            except Unreadable as error:
                round_.found_unreadable(key, master_key_id, error.cause)
            else:
                changes.append((key, seal(self._keyring, secret, row_id=key.id, **place)))
        return changes

    async def _write(self, master_key_id: str, changes: Sequence[tuple[SealedKey, str]]) -> int:
        written = await self._keys.rewrite(changes)
        self._rewritten[master_key_id] += written
        return written

    async def _pretend(self, master_key_id: str, changes: Sequence[tuple[SealedKey, str]]) -> int:
        self._rewritten[master_key_id] += len(changes)
        return len(changes)

    async def _behind(self) -> list[RunningSidecar]:
        # One without a master key neither seals nor opens.
        return [
            one
            for one in await self._keys.sidecars()
            if one.master_key_id not in (None, self._keyring.current.id)
        ]

    async def _look_for_sidecars(self) -> None:
        if not self._force and (behind := await self._behind()):
            raise SidecarsBehind(self._keyring.current.id, behind)

    async def _report(self, found: Mapping[str, int], last: _Round, is_done: bool) -> Rotated:
        behind = await self._behind()
        # After the look at the sidecars: one that is gone by then seals nothing after this count.
        left = await self._keys.counts(beside=self._keyring.current.id)
        in_use = {*left, *(one.master_key_id for one in behind)}
        return Rotated(
            current=self._keyring.current.id,
            found=found,
            rewritten=dict(self._rewritten),
            left=left,
            unreadable=dict(last.unreadable),
            listed=tuple(last.listed),
            behind=behind,
            is_done=is_done,
            removable=tuple(
                one.id
                for one in self._keyring
                if is_done and one.id != self._keyring.current.id and one.id not in in_use
            ),
        )


class _Round:
    """What one go over the keys met."""

    def __init__(self) -> None:
        self.missed = 0
        self.unreadable: Counter[tuple[str, UnreadableCause]] = Counter()
        self.listed: list[UnreadableKey] = []

    def found_unreadable(self, key: SealedKey, master_key_id: str, cause: UnreadableCause) -> None:
        self.unreadable[master_key_id, cause] += 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(
                UnreadableKey(
                    user_id=key.user_id,
                    key_id=key.id,
                    provider=key.provider,
                    master_key_id=master_key_id,
                    cause=cause,
                )
            )
