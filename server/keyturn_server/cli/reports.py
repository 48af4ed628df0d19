"""`keyturn reports`: who pays for how much, whom BYOK_ONLY would lock out, and who has brought keys."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Annotated, Final

import cyclopts
from cyclopts import Parameter

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import report_service_pb2 as pb
from keyturn.v1.report_service_pb2_grpc import ReportServiceStub
from keyturn_server.cli.calls import DEFAULTS, Options, note_more
from keyturn_server.cli.exit_codes import wrong_usage
from keyturn_server.cli.printing import counted, dollars, fields, moment, show, table, word, yes_no
from keyturn_server.cli.values import Count, Day

app = cyclopts.App(name="reports", help="Own keys against credits, users without keys, adoption.")

_TIMEOUT: Final = timedelta(minutes=1)
_MOST_DAYS: Final = 366


class Grouping(StrEnum):
    """What a split is by, besides the day."""

    PROVIDER = "PROVIDER"
    SERVICE_TYPE = "SERVICE_TYPE"


@app.command
def split(
    *,
    days: Count | None = None,
    start: Annotated[Day | None, Parameter(name="--from")] = None,
    end: Annotated[Day | None, Parameter(name="--to")] = None,
    by: Grouping = Grouping.PROVIDER,
    options: Options = DEFAULTS,
) -> None:
    """Show own keys against credits: requests, tokens and cost by day, and in all.

    Parameters
    ----------
    days
        The last so many days, up to now, 1 to 366. Default: 30.
    start
        The first day, in UTC, like 2026-01-01.
    end
        The last day, in UTC, itself included. Default: today.
    by
        What to show of each day. Default: provider.
    """
    request = pb.GetUsageSplitRequest(grouping=pb.UsageGrouping.Value(f"USAGE_GROUPING_{by}"))
    for bound, moment_of in zip(
        (request.start_time, request.end_time),
        window(days, start, end, now=datetime.now(UTC)),
        strict=True,
    ):
        bound.FromDatetime(moment_of)
    answer = options.call(lambda channel: ReportServiceStub(channel).GetUsageSplit, request, timeout=_TIMEOUT)
    show(answer, lambda answer: _split(answer, by), as_json=options.json)


def window(
    days: int | None, start: date | None, end: date | None, *, now: datetime
) -> tuple[datetime, datetime]:
    """Where the asked window begins and ends. Raises `Ended`."""
    if days is not None and (start or end):
        raise wrong_usage("Give either --days or --from and --to.")
    if end is not None and start is None:
        raise wrong_usage("--to needs --from.")
    if days is not None and days > _MOST_DAYS:
        raise wrong_usage(f"--days is at most {_MOST_DAYS}.")
    if start is None:
        return now - timedelta(days=days or 30), now
    last = end or now.date()
    if last < start:
        raise wrong_usage(
            "The window would end before it begins: --to is the last day, and not before --from."
        )
    return (
        datetime.combine(start, time(), UTC),
        min(datetime.combine(last, time(), UTC) + timedelta(days=1), now),
    )


@app.command
def at_risk(*, limit: Count | None = None, options: Options = DEFAULTS) -> None:
    """List the eligible users whom BYOK_ONLY would lock out: those without a usable key.

    Parameters
    ----------
    limit
        How many. Default: 100, and all of them with --json.
    """
    answer = options.call_pages(
        lambda channel: ReportServiceStub(channel).ListUsersWithoutKeys,
        pb.ListUsersWithoutKeysRequest(),
        items="users",
        limit=options.most(limit),
        timeout=_TIMEOUT,
    )
    show(answer, _at_risk, as_json=options.json)
    if not options.json:
        note_more(answer.next_page_token, shown=len(answer.users))


@app.command
def adoption(*, options: Options = DEFAULTS) -> None:
    """Show how many of the eligible users have brought a key, in all and by tier."""
    answer = options.call(
        lambda channel: ReportServiceStub(channel).GetAdoption, pb.GetAdoptionRequest(), timeout=_TIMEOUT
    )
    show(answer, _adoption, as_json=options.json)


def _split(answer: pb.GetUsageSplitResponse, by: Grouping) -> str:
    group = by.lower().replace("_", " ")
    numbers = [f"{who} {what}" for who in ("own", "credits") for what in ("requests", "tokens", "cost")]
    rows = [(row.day, row.group, *_totals(row.own_key), *_totals(row.credits)) for row in answer.rows]
    if rows:
        rows.append(("total", "", *_totals(answer.own_key), *_totals(answer.credits)))
    return "\n\n".join(
        (
            f"From {moment(answer.start_time)} to {moment(answer.end_time)}",
            table(("day", group, *numbers), rows, numbers=numbers, empty="No recorded requests."),
            f"Own keys paid for {answer.own_key_percent:.1f}% of the requests.",
        )
    )


def _totals(totals: pb.UsageTotals) -> tuple[str, str, str]:
    return f"{totals.requests:,}", f"{totals.total_tokens:,}", dollars(totals.cost_micros)


def _at_risk(answer: pb.ListUsersWithoutKeysResponse) -> str:
    refused = answer.total_count - answer.without_active_key_count
    head = (
        f"BYOK_ONLY would lock out {counted(answer.total_count, 'eligible user')}: "
        f"{answer.without_active_key_count:,} without an active key, {refused:,} whose keys cannot be used."
    )
    rows = table(
        ("user", "email", "tier", "reason"),
        (
            (user.user_id, user.email, user.tier, word(policy.DenialReason, user.reason))
            for user in answer.users
        ),
    )
    return f"{head}\n\n{rows}" if answer.users else head


def _adoption(answer: pb.GetAdoptionResponse) -> str:
    head = fields(
        ("Eligible users", f"{answer.eligible_users:,}"),
        ("With a key", f"{answer.users_with_keys:,} ({answer.adoption_percent:.1f}%)"),
    )
    rows = table(
        ("tier", "eligible", "users", "with a key"),
        (
            (tier.tier, yes_no(tier.is_eligible), f"{tier.users:,}", f"{tier.users_with_keys:,}")
            for tier in answer.tiers
        ),
        numbers={"users", "with a key"},
        empty="No users.",
    )
    return f"{head}\n\n{rows}"
