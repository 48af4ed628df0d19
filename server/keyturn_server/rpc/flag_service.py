"""FlagService: the flags. protos/keyturn/v1/flag_service.proto says what each method does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from keyturn.v1 import flag_service_pb2
from keyturn_server.access import Caller
from keyturn_server.flags import Flag, FlagsNow, PastChange, in_force
from keyturn_server.routing.model import FLAG_KEYS, Mode, Path, flags_of
from keyturn_server.rpc.encode import DENIALS, MODES, timestamp
from keyturn_server.rpc.fields import Fields
from keyturn_server.rpc.guard import CHANGING, READING, Method
from keyturn_server.rpc.pages import Cursor, Pages
from keyturn_server.simulation import Place, SimulationAsk, SimulationPage

if TYPE_CHECKING:
    from keyturn_server.flags import FlagSetter
    from keyturn_server.simulation import Simulator

NAME = flag_service_pb2.DESCRIPTOR.services_by_name["FlagService"].full_name

MAX_REASON: Final = 500
DEFAULT_WINDOW: Final = timedelta(days=7)
MIN_WINDOW: Final = timedelta(minutes=1)
MAX_WINDOW: Final = timedelta(days=366)
# What is told of keys that are no flags: enough to see what is wrong, and bounded.
_MOST_NAMED: Final = 3
_MOST_OF_A_NAME: Final = 32

_MODE_OF: dict[int, Mode] = {number: mode for mode, number in MODES.items()}
_PATHS = {path: flag_service_pb2.PaymentPath.Value(f"PAYMENT_PATH_{path.name}") for path in Path}
_MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FlagReader(Protocol):
    """Where the flags and their history are read."""

    async def read(self) -> list[Flag]: ...
    async def changes(self, key: str | None, *, before: int | None, limit: int) -> list[PastChange]: ...


class Audit(Protocol):
    """Hears of what operators change."""

    def changed(self, caller: Caller, action: str, **facts: str | int | bool) -> None: ...


class FlagService:
    """Decodes, calls, encodes."""

    def __init__(
        self, *, reader: FlagReader, setter: FlagSetter, simulator: Simulator, pages: Pages, audit: Audit
    ) -> None:
        self._reader = reader
        self._setter = setter
        self._simulator = simulator
        self._pages = pages
        self._audit = audit

    @property
    def name(self) -> str:
        """The service's full name."""
        return NAME

    def methods(self) -> dict[str, Method[Any]]:
        """The methods by name."""
        v1 = flag_service_pb2
        return {
            "ListFlags": Method(request_type=v1.ListFlagsRequest, answer=self.list_flags, roles=READING),
            "SetFlags": Method(request_type=v1.SetFlagsRequest, answer=self.set_flags, roles=CHANGING),
            "SetMode": Method(request_type=v1.SetModeRequest, answer=self.set_mode, roles=CHANGING),
            "SimulateFlags": Method(
                request_type=v1.SimulateFlagsRequest, answer=self.simulate_flags, roles=READING
            ),
            "ListFlagChanges": Method(
                request_type=v1.ListFlagChangesRequest, answer=self.list_flag_changes, roles=READING
            ),
            "RefreshFlags": Method(
                request_type=v1.RefreshFlagsRequest, answer=self.refresh_flags, roles=CHANGING
            ),
        }

    async def list_flags(
        self, request: flag_service_pb2.ListFlagsRequest, caller: Caller
    ) -> flag_service_pb2.ListFlagsResponse:
        flags = await self._reader.read()
        return flag_service_pb2.ListFlagsResponse(flags=map(_flag, flags), mode=MODES[in_force(flags).mode])

    async def set_flags(
        self, request: flag_service_pb2.SetFlagsRequest, caller: Caller
    ) -> flag_service_pb2.SetFlagsResponse:
        fields = Fields()
        changes = _values(fields, request.flags)
        if not request.flags:
            fields.violations.append(("flags", f"Required: at least one of {', '.join(FLAG_KEYS)}."))
        reason = _reason(fields, request.reason)
        fields.check()
        now = await self._change(
            "SetFlags", changes, caller, reason=reason, acknowledge_lockout=request.acknowledge_lockout
        )
        return flag_service_pb2.SetFlagsResponse(
            flags=map(_flag, now.flags), mode=MODES[now.mode], locked_out_users=now.locked_out_users
        )

    async def set_mode(
        self, request: flag_service_pb2.SetModeRequest, caller: Caller
    ) -> flag_service_pb2.SetModeResponse:
        fields = Fields()
        mode = _mode(fields, request.mode)
        reason = _reason(fields, request.reason)
        fields.check()
        now = await self._change(
            "SetMode", flags_of(mode), caller, reason=reason, acknowledge_lockout=request.acknowledge_lockout
        )
        return flag_service_pb2.SetModeResponse(
            flags=map(_flag, now.flags), mode=MODES[now.mode], locked_out_users=now.locked_out_users
        )

    async def _change(
        self,
        action: str,
        changes: Mapping[str, bool],
        caller: Caller,
        *,
        reason: str,
        acknowledge_lockout: bool,
    ) -> FlagsNow:
        now = await self._setter.change(
            changes, caller=caller, reason=reason, acknowledge_lockout=acknowledge_lockout
        )
        self._audit.changed(
            caller, action, **changes, mode=now.mode.value, locked_out_users=now.locked_out_users
        )
        return now

    async def simulate_flags(
        self, request: flag_service_pb2.SimulateFlagsRequest, caller: Caller
    ) -> flag_service_pb2.SimulateFlagsResponse:
        fields = Fields()
        proposed = _values(fields, request.flags)
        window: timedelta | None = DEFAULT_WINDOW
        if request.HasField("window"):
            window = fields.span("window", request.window, least=MIN_WINDOW, most=MAX_WINDOW)
        page = self._pages.asked(fields, request)
        fields.check()
        answer = await self._simulator.simulate(
            SimulationAsk(
                proposed=proposed,
                window=window or DEFAULT_WINDOW,
                size=page.size,
                after=None if page.after is None else _place(page.after),
            )
        )
        message = _simulation(answer)
        cursor = None if answer.next is None else _cursor(answer.next)
        message.next_page_token = self._pages.token(request, cursor)
        return message

    async def list_flag_changes(
        self, request: flag_service_pb2.ListFlagChangesRequest, caller: Caller
    ) -> flag_service_pb2.ListFlagChangesResponse:
        fields = Fields()
        if request.key and request.key not in FLAG_KEYS:
            fields.violations.append(("key", _no_such_flag()))
        page = self._pages.asked(fields, request)
        fields.check()
        before = None if page.after is None else page.after[0]
        changes = await self._reader.changes(request.key or None, before=before, limit=page.size + 1)
        shown = changes[: page.size]
        return flag_service_pb2.ListFlagChangesResponse(
            changes=map(_past_change, shown),
            next_page_token=self._pages.token(request, [shown[-1].id] if len(changes) > len(shown) else None),
        )

    async def refresh_flags(
        self, request: flag_service_pb2.RefreshFlagsRequest, caller: Caller
    ) -> flag_service_pb2.RefreshFlagsResponse:
        flags = await self._setter.refresh()
        self._audit.changed(caller, "RefreshFlags")
        return flag_service_pb2.RefreshFlagsResponse(
            flags=map(_flag, flags), mode=MODES[in_force(flags).mode]
        )


# -- messages to values -------------------------------------------------------------------------------


def _values(fields: Fields, flags: Mapping[str, bool]) -> dict[str, bool]:
    """The flags of a request, by key; `fields` hears of keys that are none."""
    unknown = sorted(flags.keys() - set(FLAG_KEYS))
    for key in unknown[:_MOST_NAMED]:
        fields.violations.append((f"flags[{json.dumps(key[:_MOST_OF_A_NAME])}]", _no_such_flag()))
    return {key: flags[key] for key in FLAG_KEYS if key in flags}


def _no_such_flag() -> str:
    return f"There is no such flag; there are {', '.join(FLAG_KEYS)}."


def _reason(fields: Fields, text: str) -> str:
    return fields.text("reason", text.strip(), MAX_REASON, required=True)


def _mode(fields: Fields, number: int) -> Mode:
    mode = _MODE_OF.get(number)
    if mode is None:
        why = "There is no such mode." if number else "Required."
        fields.violations.append(("mode", why))
        return Mode.BYOK_FIRST
    return mode


def _place(cursor: Sequence[Any]) -> Place:
    """What `_cursor` wrote."""
    simulation_id, end_micros, *values, user_id, provider = cursor
    return Place(
        simulation_id=UUID(simulation_id),
        end=_EPOCH + timedelta(microseconds=end_micros),
        proposed={key: bool(value) for key, value in zip(FLAG_KEYS, values, strict=True)},
        user_id=user_id,
        provider=provider,
    )


# -- values to messages -------------------------------------------------------------------------------


def _cursor(place: Place) -> Cursor:
    return [
        str(place.simulation_id),
        (place.end - _EPOCH) // _MICROSECOND,
        *(int(place.proposed[key]) for key in FLAG_KEYS),
        place.user_id,
        place.provider,
    ]


def _flag(flag: Flag) -> flag_service_pb2.Flag:
    return flag_service_pb2.Flag(
        key=flag.key,
        is_enabled=flag.is_enabled,
        name=flag.name,
        description=flag.description,
        min_tier=flag.min_tier,
        is_default=flag.updated_at is None,
        update_time=None if flag.updated_at is None else timestamp(flag.updated_at),
    )


def _past_change(change: PastChange) -> flag_service_pb2.FlagChange:
    return flag_service_pb2.FlagChange(
        key=change.key,
        old_enabled=change.old_enabled,
        new_enabled=change.new_enabled,
        old_min_tier=change.old_min_tier,
        new_min_tier=change.new_min_tier,
        changed_by=change.changed_by,
        reason=change.reason,
        change_time=timestamp(change.changed_at),
    )


def _simulation(page: SimulationPage) -> flag_service_pb2.SimulateFlagsResponse:
    """A SimulateFlagsResponse without its token."""
    simulation = page.simulation
    return flag_service_pb2.SimulateFlagsResponse(
        current_mode=MODES[simulation.current_mode],
        proposed_mode=MODES[simulation.proposed.mode],
        moves=[
            flag_service_pb2.SimulatedMove(
                day=move.day.isoformat(),
                provider=move.provider,
                tier=move.tier,
                from_path=_PATHS[move.paid_by],
                to_path=(
                    flag_service_pb2.PAYMENT_PATH_DENIED if move.would_pay is None else _PATHS[move.would_pay]
                ),
                requests=move.requests,
                total_tokens=move.total_tokens,
                cost_micros=move.cost_micros,
            )
            for move in simulation.moves
        ],
        denied_count=simulation.denials.count,
        denials=[
            flag_service_pb2.SimulatedDenial(
                user_id=denied.user_id,
                email=denied.email,
                provider=denied.provider,
                reason=DENIALS[denied.reason],
                requests=denied.requests,
            )
            for denied in page.denials
        ],
        start_time=timestamp(simulation.start),
        end_time=timestamp(simulation.end),
        skipped_requests=simulation.skipped_requests,
        locked_out_users=simulation.locked_out_users,
    )
