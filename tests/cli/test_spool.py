"""`keyturn spool`: what an operator sees of the records that wait, while a sidecar runs and after it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import check_fault, keyturn, rows_of
from tests.factories import Factory
from tests.outages import away, drained, rows
from tests.proxy import Proxy
from tests.support import eventually
from tests.test_docs import OPERATING, blocks, quoted, section
from tests.test_docs import rows as rows_of_page


async def test_what_waits_is_shown_and_what_was_set_aside_can_be_dropped(
    spooling: Callable[..., Any],
    start_sidecar: Callable[..., Any],
    proxy: Proxy,
    directory: Path,
    make: Factory,
) -> None:
    sidecar, elsewhere = await spooling(), await start_sidecar()
    user = await make.user(name="u1", micros=10**6)
    await make.key(user)
    ticket = await sidecar.decide(user, cost_micros=50_000, constraint=policy.CONSTRAINT_CREDITS_ONLY)
    key = await sidecar.decide(user)
    place = {"KEYTURN_SPOOL": str(directory)}
    empty = await keyturn("spool", "show", **place)
    assert (empty.code, empty.err) == (0, "")
    assert [line.split()[0] for line in empty.out.splitlines()] == ["Waiting", "Set", "Used"]

    await away(sidecar, proxy)
    await sidecar.record(ticket, pb.OUTCOME_SUCCESS, cost_micros=40_000)
    await sidecar.record(key, pb.OUTCOME_RATE_LIMITED)
    shown = await keyturn("spool", "show", **place)
    table = rows_of(shown.out.partition("\n\n")[2])
    assert table[0] == ["DECISION", "USER", "TAKEN", "OUTCOME", "CHARGE", "STATE"]
    assert [(row[0], row[1], *row[3:]) for row in table[1:]] == [
        (ticket.decision_id, "u1", "success", "$0.04", "waiting"),
        (key.decision_id, "u1", "rate limited", "own key", "waiting"),
    ]
    none = await keyturn("spool", "drop", ticket.decision_id, **place)
    assert (none.code, none.out) == (1, "Dropped 0 records.\n")
    assert "not set aside" in none.err

    await elsewhere.record(ticket, pb.OUTCOME_SUCCESS, cost_micros=30_000)
    proxy.come_back()

    async def is_set_aside() -> bool:
        return [row[3] for row in rows(directory)] == ["conflict"]

    await eventually(is_set_aside)
    told = await keyturn("spool", "show", **place)
    (example,) = blocks(section(OPERATING, "When the database is away"), "text")
    # As the page shows it, but for ids, times and sizes.
    assert re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9][0-9:,-]{4,}", "…", told.out) == re.sub(
        r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9][0-9:,-]{4,}", "…", example
    )
    document = json.loads((await keyturn("spool", "show", "--json", **place)).out)
    assert (document["waiting"], document["set_aside"]) == (0, 1)
    assert document["records"] == [
        {
            "decision_id": ticket.decision_id,
            "user_id": "u1",
            "taken_at": document["oldest"],
            "cause": "conflict",
            "kind": "settlement",
            "outcome": "SUCCESS",
            "charge_micros": 40_000,
        }
    ]
    dropped = await keyturn("spool", "drop", ticket.decision_id, **place)
    assert (dropped.code, dropped.out, dropped.err) == (0, "Dropped 1 record.\n", "")
    await drained(directory)


async def test_a_spool_that_is_not_there_is_said_so(directory: Path) -> None:
    check_fault(await keyturn("spool", "show"), 1, "--spool DIR (KEYTURN_SPOOL)")
    check_fault(await keyturn("spool", "show", "--spool", str(directory)), 1, "there is no spool")
    check_fault(await keyturn("spool", "show", "--embedded", "/x"), 1, "/x/spool: there is no spool")
    check_fault(await keyturn("spool", "drop", "nonsense", "--spool", "/x"), 2, "is a UUID")
    check_fault(await keyturn("spool", "drop", str(uuid4()), "--spool", "/x"), 1, "there is no spool")


def test_the_page_knows_every_cause() -> None:
    from keyturn_server.cli.spool import _CAUSES

    listed = {
        name
        for row in rows_of_page(section(OPERATING, "When the database is away"))
        for name in quoted(row[0])
    }
    assert _CAUSES.keys() <= listed
