"""ReportService: who pays, and who would be left without. protos/keyturn/v1/report_service.proto says what
each method does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

from keyturn.v1 import policy_pb2, report_service_pb2
from keyturn_server.access import Caller
from keyturn_server.reports import Grouping
from keyturn_server.rpc.encode import timestamp
from keyturn_server.rpc.fields import Fields
from keyturn_server.rpc.guard import READING, Method

if TYPE_CHECKING:
    from keyturn_server.reports import Adoption, UsageSplit, UsageTotals, UsersWithoutKeys
    from keyturn_server.rpc.pages import Pages

NAME = report_service_pb2.DESCRIPTOR.services_by_name["ReportService"].full_name
DEFAULT_WINDOW: Final = timedelta(days=30)
MAX_WINDOW: Final = timedelta(days=366)

_GROUPINGS = {
    report_service_pb2.USAGE_GROUPING_UNSPECIFIED: Grouping.PROVIDER,
    report_service_pb2.USAGE_GROUPING_PROVIDER: Grouping.PROVIDER,
    report_service_pb2.USAGE_GROUPING_SERVICE_TYPE: Grouping.SERVICE_TYPE,
}


class Reports(Protocol):
    """Where reports come from."""

    async def usage_split(self, start: datetime, end: datetime, grouping: Grouping) -> UsageSplit: ...
    async def users_without_keys(self, *, size: int, after: str | None) -> UsersWithoutKeys: ...
    async def adoption(self) -> Adoption: ...


class ReportService:
    """Decodes, calls, encodes. `clock` tells the time that windows end at by default."""

    def __init__(self, *, reports: Reports, pages: Pages, clock: Callable[[], datetime]) -> None:
        self._reports = reports
        self._pages = pages
        self._clock = clock

    @property
    def name(self) -> str:
        """The service's full name."""
        return NAME

    def methods(self) -> dict[str, Method[Any]]:
        """The methods by name."""
        v1 = report_service_pb2
        return {
            "GetUsageSplit": Method(
                request_type=v1.GetUsageSplitRequest, answer=self.get_usage_split, roles=READING
            ),
            "ListUsersWithoutKeys": Method(
                request_type=v1.ListUsersWithoutKeysRequest,
                answer=self.list_users_without_keys,
                roles=READING,
            ),
            "GetAdoption": Method(
                request_type=v1.GetAdoptionRequest, answer=self.get_adoption, roles=READING
            ),
        }

    async def get_usage_split(
        self, request: report_service_pb2.GetUsageSplitRequest, caller: Caller
    ) -> report_service_pb2.GetUsageSplitResponse:
        fields = Fields()
        grouping = _GROUPINGS.get(request.grouping)
        if grouping is None:
            fields.violations.append(("grouping", f"Unknown value {request.grouping}."))
        start, end = _window(fields, request, self._clock())
        fields.check()
        split = await self._reports.usage_split(start, end, grouping or Grouping.PROVIDER)
        return report_service_pb2.GetUsageSplitResponse(
            rows=[
                report_service_pb2.UsageRow(
                    day=row.day.isoformat(),
                    group=row.group,
                    own_key=_totals(row.own_key),
                    credits=_totals(row.credits),
                )
                for row in split.rows
            ],
            own_key=_totals(split.own_key),
            credits=_totals(split.credits),
            own_key_percent=split.own_key_percent,
            start_time=timestamp(start),
            end_time=timestamp(end),
        )

    async def list_users_without_keys(
        self, request: report_service_pb2.ListUsersWithoutKeysRequest, caller: Caller
    ) -> report_service_pb2.ListUsersWithoutKeysResponse:
        fields = Fields()
        page = self._pages.asked(fields, request)
        fields.check()
        after = page.after[0] if page.after else None
        found = await self._reports.users_without_keys(size=page.size, after=after)
        return report_service_pb2.ListUsersWithoutKeysResponse(
            users=[
                report_service_pb2.UserWithoutKeys(
                    user_id=user.user_id,
                    email=user.email,
                    tier=user.tier,
                    reason=(
                        policy_pb2.DENIAL_REASON_KEY_UNUSABLE
                        if user.has_active_key
                        else policy_pb2.DENIAL_REASON_BYOK_REQUIRED
                    ),
                )
                for user in found.users
            ],
            next_page_token=self._pages.token(request, [found.users[-1].user_id] if found.has_more else None),
            total_count=found.total,
            without_active_key_count=found.without_active_key,
        )

    async def get_adoption(
        self, request: report_service_pb2.GetAdoptionRequest, caller: Caller
    ) -> report_service_pb2.GetAdoptionResponse:
        adoption = await self._reports.adoption()
        return report_service_pb2.GetAdoptionResponse(
            eligible_users=adoption.eligible_users,
            users_with_keys=adoption.users_with_keys,
            adoption_percent=adoption.percent,
            tiers=[
                report_service_pb2.TierAdoption(
                    tier=one.tier,
                    is_eligible=one.is_eligible,
                    users=one.users,
                    users_with_keys=one.users_with_keys,
                )
                for one in adoption.tiers
            ],
        )


def _window(
    fields: Fields, request: report_service_pb2.GetUsageSplitRequest, now: datetime
) -> tuple[datetime, datetime]:
    """The window that is asked for; `fields` hears of a wrong one, which then means nothing."""
    end: datetime | None = now
    if request.HasField("end_time"):
        end = fields.moment("end_time", request.end_time)
    start = None if end is None else end - DEFAULT_WINDOW
    if request.HasField("start_time"):
        start = fields.moment("start_time", request.start_time)
    if start is None or end is None:
        return now, now
    if end <= start:
        fields.violations.append(("end_time", "After start_time."))
    elif end - start > MAX_WINDOW:
        fields.violations.append(("end_time", f"At most {MAX_WINDOW.days} days after start_time."))
    return start, end


def _totals(totals: UsageTotals) -> report_service_pb2.UsageTotals:
    return report_service_pb2.UsageTotals(
        requests=totals.requests, total_tokens=totals.total_tokens, cost_micros=totals.cost_micros
    )
