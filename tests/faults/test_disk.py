"""A disk under the spool that is full: nothing is acknowledged that is not on it, and it is said so."""

from __future__ import annotations

import resource

import grpc
import pytest

from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import keyturn
from tests.factories import Connection, Factory
from tests.faults.processes import Place, Process
from tests.faults.test_killed import asks, records
from tests.outages import drained
from tests.proxy import Proxy
from tests.refusals import refused
from tests.support import eventually

RECORDS = 40


async def refuses_records(process: Process, reports: list[pb.RecordRequest]) -> None:
    """Raises AssertionError unless it takes none of these, and says so to whoever asks how it is."""
    for report in reports:
        refusal = await refused(process, "Record", report)
        refusal.check(grpc.StatusCode.UNAVAILABLE, "SPOOL_UNAVAILABLE", "RetryInfo")
    told = await keyturn("health", "keyturn.spool", KEYTURN_ADDRESS=process.served.addresses[0])
    assert (told.code, told.out) == (1, "NOT_SERVING\n")
    failed = process.served.event("spool_unavailable")
    assert failed is not None
    assert failed["cause"] == "disk"


async def takes_records_again(process: Process) -> None:
    """Back when it has said that it does."""

    async def is_back() -> bool:
        return process.served.event("spool_back") is not None

    await eventually(is_back)


@pytest.fixture
async def reports(place: Place, make: Factory, sql: Connection) -> list[pb.RecordRequest]:
    """Records of tickets that a sidecar gave before the disk broke."""
    user = await make.user(micros=10**9)
    async with place.sidecar() as process:
        decided = await process.call("BatchDecide", asks(user, RECORDS))
        await process.stop()
    return list(records(decided).requests)


async def test_a_disk_that_takes_nothing_more_is_said_so_and_nothing_is_acknowledged(
    place: Place, proxy: Proxy, reports: list[pb.RecordRequest]
) -> None:
    async with place.sidecar() as process:
        proxy.go_away()
        for report in reports[:10]:
            await process.call("Record", report)
        # Whatever it writes past these bytes of a file fails, its log excepted: that is shorter.
        pid = process.served.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
        await refuses_records(process, reports[10:20])
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        await takes_records_again(process)
        for report in reports[10:]:
            await process.call("Record", report)
        proxy.come_back()
        await drained(place.spool)
        await process.stop()
    assert len(set(place.acknowledged)) == RECORDS
