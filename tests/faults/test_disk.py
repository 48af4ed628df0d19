"""A disk under the spool that fails: nothing is acknowledged that is not on it, and it is said so."""

from __future__ import annotations

import asyncio
import errno
import resource

import grpc
import pytest

from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import keyturn
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.faults.disk import SYNC, WRITE, faulty_disk
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


FAILURES = {
    "is full": (WRITE, errno.ENOSPC),
    "cannot be written to": (WRITE, errno.EIO),
    "does not sync": (SYNC, errno.EIO),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_disk_that_fails_loses_nothing_that_was_acknowledged_and_is_used_again_once_it_is_well(
    place: Place, proxy: Proxy, reports: list[pb.RecordRequest], name: str, form: Form
) -> None:
    calls, error = FAILURES[name]
    quarter = RECORDS // 4
    async with faulty_disk(place.home) as disk:
        async with place.sidecar(program=disk.program) as process:
            proxy.go_away()
            for report in reports[:quarter]:
                await process.call("Record", report)
            disk.refuse(calls, error)
            await refuses_records(process, reports[quarter : 2 * quarter])
            disk.heal()
            await takes_records_again(process)
            for report in reports[quarter : 2 * quarter]:
                await process.call("Record", report)
            # Once more, and then it is killed: what the kernel took for written may not be.
            disk.refuse(calls, error)
            for report in reports[2 * quarter : 3 * quarter]:
                await refused(process, "Record", report)
            await process.kill()
        disk.heal()
        assert len(place.acknowledged) == 2 * quarter
        proxy.come_back()
        async with place.sidecar(program=disk.program) as process:
            for report in reports[2 * quarter :]:
                await process.call("Record", report)
            await drained(place.spool)
            await process.stop()
        form.figures |= {
            "calls that failed": disk.refused,
            "acknowledged": len(place.acknowledged),
            "lost": 0,
        }
    assert len(set(place.acknowledged)) == RECORDS


async def test_a_disk_that_hangs_holds_up_no_decision_and_what_waited_for_it_is_told_in_time(
    place: Place, proxy: Proxy, reports: list[pb.RecordRequest], make: Factory
) -> None:
    owner = await make.user()
    await make.key(owner)
    async with faulty_disk(place.home) as disk, place.sidecar(program=disk.program) as process:
        await process.decide(owner)
        proxy.go_away()
        await process.call("Record", reports[0])
        disk.refuse(SYNC, 0)
        waiting = asyncio.create_task(refuses_records(process, reports[1:2]))
        while not waiting.done():
            assert (await process.decide(owner)).degraded
            await asyncio.sleep(0.05)
        await waiting
        disk.heal()
        await takes_records_again(process)
        for report in reports:
            await process.call("Record", report)
        proxy.come_back()
        await drained(place.spool)
        await process.stop()
    assert len(set(place.acknowledged)) == RECORDS
