"""`keyturn flags`: the three flags that make the mode, what a change would do, and their history."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

import cyclopts

from keyturn.v1 import flag_service_pb2 as pb
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1.flag_service_pb2_grpc import FlagServiceStub
from keyturn_server.cli.calls import DEFAULTS, Options, note_more
from keyturn_server.cli.exit_codes import wrong_usage
from keyturn_server.cli.printing import counted, dollars, moment, note, on_off, phrase, show, table, word
from keyturn_server.cli.values import Count, Span, switches_of
from keyturn_server.routing.model import Mode, flags_of

app = cyclopts.App(name="flags", help="The feature flags: see, change, simulate, history.")

_SIMULATION: Final = timedelta(minutes=5)


@app.command(name="list")
def list_flags(*, options: Options = DEFAULTS) -> None:
    """Show the three flags as they are in the database, and the mode that they make."""
    answer = options.call(lambda channel: FlagServiceStub(channel).ListFlags, pb.ListFlagsRequest())
    show(answer, _flags, as_json=options.json)


@app.command(name="set")
def set_flags(
    *flags: str,
    reason: str,
    acknowledge_lockout: bool = False,
    options: Options = DEFAULTS,
) -> None:
    """Change flags, all or none, on every sidecar within a second.

    Exit code 3: the change would lock out eligible users without a usable key; nothing was changed.

    Parameters
    ----------
    flags
        KEY=on or KEY=off, for byok_enabled, byok_uses_internal_credits and byok_only_mode.
    reason
        Why, for the history.
    acknowledge_lockout
        Go ahead although users would be locked out.
    """
    if not flags:
        raise wrong_usage("Say what to change: KEY=on or KEY=off.")
    request = pb.SetFlagsRequest(flags=_read(flags), reason=reason, acknowledge_lockout=acknowledge_lockout)
    answer = options.call(lambda channel: FlagServiceStub(channel).SetFlags, request)
    show(answer, _flags, as_json=options.json)
    _note_lockout(answer.locked_out_users)


@app.command
def mode(
    mode: Mode,
    /,
    *,
    reason: str,
    acknowledge_lockout: bool = False,
    options: Options = DEFAULTS,
) -> None:
    """Change the flags so that they make one of the four modes.

    Exit code 3: the change would lock out eligible users without a usable key; nothing was changed.

    Parameters
    ----------
    mode
        BYOK_FIRST: own key first, credits otherwise. CREDIT_FIRST: credits first, own key when they run
        out. BYOK_ONLY: credits never. INTERNAL_ONLY: credits alone.
    reason
        Why, for the history.
    acknowledge_lockout
        Go ahead although users would be locked out.
    """
    request = pb.SetModeRequest(
        mode=policy.Mode.Value(f"MODE_{mode.name}"), reason=reason, acknowledge_lockout=acknowledge_lockout
    )
    answer = options.call(lambda channel: FlagServiceStub(channel).SetMode, request)
    show(answer, _flags, as_json=options.json)
    _note_lockout(answer.locked_out_users)


@app.command
def simulate(
    *flags: str,
    mode: Mode | None = None,
    window: Span = timedelta(days=7),
    denied: Count = 100,
    daily: bool = False,
    options: Options = DEFAULTS,
) -> None:
    """Show what other flags would have done to the recorded requests of a window. Changes nothing.

    What moves between own keys, credits and denial, and which of today's users would be denied. JSON has
    every move by day, provider and tier.

    Parameters
    ----------
    flags
        Proposed KEY=on or KEY=off; flags that are not named stay as they are.
    mode
        A proposed mode, instead of flags.
    window
        How far back, from now: 12h, 30d; 1 minute to 366 days. Default: 7d.
    denied
        How many of the denied users to list; each 500 simulate once more. Default: 100.
    daily
        Show the moves of each day.
    """
    if flags and mode is not None:
        raise wrong_usage("Give either flags or --mode.")
    proposed = flags_of(mode) if mode is not None else _read(flags)
    request = pb.SimulateFlagsRequest(flags=proposed)
    request.window.FromTimedelta(window)
    answer = options.call_pages(
        lambda channel: FlagServiceStub(channel).SimulateFlags,
        request,
        items="denials",
        limit=denied,
        timeout=_SIMULATION,
    )
    show(answer, lambda answer: _simulation(answer, daily=daily), as_json=options.json)
    if not options.json and answer.next_page_token:
        note(f"{len(answer.denials)} of {answer.denied_count:,} denials are shown: see --denied")


@app.command
def history(*, flag: str = "", limit: Count | None = None, options: Options = DEFAULTS) -> None:
    """Show who changed which flag, when and why, the newest first. Changes by plain SQL are in it.

    Parameters
    ----------
    flag
        Only the changes of this flag.
    limit
        How many. Default: 100, and all of them with --json.
    """
    answer = options.call_pages(
        lambda channel: FlagServiceStub(channel).ListFlagChanges,
        pb.ListFlagChangesRequest(key=flag),
        items="changes",
        limit=options.most(limit),
    )
    show(answer, _history, as_json=options.json)
    if not options.json:
        note_more(answer.next_page_token, shown=len(answer.changes))


@app.command
def refresh(*, options: Options = DEFAULTS) -> None:
    """Have every sidecar read the configuration again. Only needed where changes are not announced."""
    answer = options.call(lambda channel: FlagServiceStub(channel).RefreshFlags, pb.RefreshFlagsRequest())
    show(answer, _flags, as_json=options.json)


def _read(settings: Iterable[str]) -> dict[str, bool]:
    try:
        return switches_of(tuple(settings))
    except ValueError as error:
        raise wrong_usage(f"FLAGS: {error}") from None


def _note_lockout(users: int) -> None:
    if users:
        note(
            f"locked out now: {counted(users, 'eligible user')} without a usable key",
            "Who they are: keyturn reports at-risk",
        )


def _flags(
    answer: pb.ListFlagsResponse | pb.SetFlagsResponse | pb.SetModeResponse | pb.RefreshFlagsResponse,
) -> str:
    rows = table(
        ("flag", "switched", "from tier", "changed", "name"),
        (
            (
                flag.key,
                on_off(flag.is_enabled),
                flag.min_tier,
                "default" if flag.is_default else moment(flag.update_time),
                flag.name,
            )
            for flag in answer.flags
        ),
        prose={"name"},
    )
    return f"Mode  {word(policy.Mode, answer.mode)}\n\n{rows}"


def _simulation(answer: pb.SimulateFlagsResponse, *, daily: bool) -> str:
    now, proposed = word(policy.Mode, answer.current_mode), word(policy.Mode, answer.proposed_mode)
    window = f"from {moment(answer.start_time)} to {moment(answer.end_time)}"
    parts = [
        f"Now {now}, proposed {proposed}; requests {window}",
        _moves(("now", "proposed"), answer.moves, _paths, empty="No recorded requests."),
    ]
    headings = ("provider", "tier", "now", "proposed")
    moved = [move for move in answer.moves if move.from_path != move.to_path]
    if moved and daily:
        by_day = ("day", *headings)
        parts.append(_moves(by_day, moved, lambda move: (move.day, move.provider, move.tier, *_paths(move))))
    elif moved:
        parts.append(_moves(headings, moved, lambda move: (move.provider, move.tier, *_paths(move))))
    elif answer.moves:
        parts.append("Nothing moves.")
    if answer.locked_out_users:
        parts.append(
            f"Locked out, with requests or without: {answer.locked_out_users:,} eligible users without a "
            "usable key. Who they are: keyturn reports at-risk"
        )
    if answer.skipped_requests:
        parts.append(f"Left out: {answer.skipped_requests:,} requests of users who no longer exist.")
    parts.append(f"Would be denied: {answer.denied_count:,} (users by provider)")
    if answer.denials:
        parts.append(_denials(answer.denials))
    return "\n\n".join(parts)


def _paths(move: pb.SimulatedMove) -> tuple[str, str]:
    return phrase(pb.PaymentPath, move.from_path), phrase(pb.PaymentPath, move.to_path)


def _moves(
    headings: tuple[str, ...], moves: Iterable[pb.SimulatedMove], group_of: Any, *, empty: str = ""
) -> str:
    """Requests, tokens and cost of the moves, summed up by group."""
    totals: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for move in moves:
        total = totals[group_of(move)]
        for index, amount in enumerate((move.requests, move.total_tokens, move.cost_micros)):
            total[index] += amount
    return table(
        (*headings, "requests", "tokens", "cost"),
        (
            (*group, f"{requests:,}", f"{tokens:,}", dollars(micros))
            for group, (requests, tokens, micros) in sorted(totals.items())
        ),
        numbers={"requests", "tokens", "cost"},
        empty=empty,
    )


def _denials(denials: Iterable[pb.SimulatedDenial]) -> str:
    return table(
        ("user", "email", "provider", "reason", "requests"),
        (
            (
                denial.user_id,
                denial.email,
                denial.provider,
                word(policy.DenialReason, denial.reason),
                f"{denial.requests:,}",
            )
            for denial in denials
        ),
        numbers={"requests"},
    )


def _history(answer: pb.ListFlagChangesResponse) -> str:
    return table(
        ("when", "flag", "change", "by", "reason"),
        (
            (moment(change.change_time), change.key, _change(change), change.changed_by, change.reason)
            for change in answer.changes
        ),
        prose={"reason"},
        empty="No changes.",
    )


def _change(change: pb.FlagChange) -> str:
    old = on_off(change.old_enabled) if change.HasField("old_enabled") else "no row"
    new = on_off(change.new_enabled) if change.HasField("new_enabled") else "no row"
    parts = [old if old == new else f"{old} -> {new}"]
    if change.old_min_tier != change.new_min_tier:
        parts.append(f"from tier {change.old_min_tier or '(none)'} -> {change.new_min_tier or '(none)'}")
    return ", ".join(parts)
