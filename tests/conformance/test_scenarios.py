"""What the scenarios cover between them, and that the table in clients/README.md is today's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.conformance.matching import Mismatch, check, filled
from tests.conformance.scenarios import SCENARIOS
from tests.conformance.suites import CLIENTS, ROOT, SUITES
from tests.conformance.table import PASSED, shown, table

# Faults that no scenario can bring about: a body that is no protobuf, more calls than a driver makes at
# once, a deadline that the client itself does not see pass, a disk that is full.
_OUT_OF_REACH = {"MALFORMED_REQUEST", "OVERLOADED", "OUT_OF_TIME", "SPOOL_UNAVAILABLE"}
_DATA_PLANE = re.compile(r"every method|`(Decide|Record|Redeem|Explain)`")


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a value."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from objects(item)


def words(enum: Any, prefix: str) -> set[str]:
    names: list[str] = enum.keys()
    return {name.removeprefix(prefix) for name in names if not name.endswith("_UNSPECIFIED")}


EXPECTED = [each for scenario in SCENARIOS for step in scenario.steps for each in objects(step.get("expect"))]
ASKED = [each for scenario in SCENARIOS for step in scenario.steps for each in objects(step)]


def said(objects: list[dict[str, Any]], field: str) -> set[str]:
    return {str(each[field]) for each in objects if isinstance(each.get(field), str)}


def test_every_mode_and_reason_is_expected_somewhere() -> None:
    assert words(policy.Mode, "MODE_") <= said(EXPECTED, "mode")
    assert words(policy.Reason, "REASON_") <= said(EXPECTED, "reason")
    denials = [each["denial"] for each in EXPECTED if isinstance(each.get("denial"), dict)]
    assert said(denials, "reason") == words(policy.DenialReason, "DENIAL_REASON_")


def test_every_outcome_is_recorded_for_a_ticket_and_for_a_key() -> None:
    for name in ("every_outcome_of_a_ticket", "every_outcome_of_an_own_key"):
        [scenario] = [each for each in SCENARIOS if each.name == name]
        recorded = {step["record"]["outcome"] for step in scenario.steps if step["op"] == "record"}
        assert recorded == words(pb.Outcome, "OUTCOME_")
    assert words(pb.CostSource, "COST_SOURCE_") <= said(EXPECTED, "cost_source")
    assert words(policy.Constraint, "CONSTRAINT_") <= said(ASKED, "constraint")


def test_every_fault_of_the_data_plane_is_expected_somewhere() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\]\(#\w+\) \| `\w+` \| (.*) \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE
    )
    faults = {reason for reason, source in rows if _DATA_PLANE.search(source)} - _OUT_OF_REACH
    assert len(faults) > 12
    assert faults <= said(
        [each["error"] for each in EXPECTED if isinstance(each.get("error"), dict)], "reason"
    )


def test_every_kind_of_error_of_the_spec_is_expected_somewhere() -> None:
    section = (CLIENTS / "SPEC.md").read_text().partition("## Errors")[2].partition("## ")[0]
    kinds = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) - {"KeyturnError"}
    expected = said([each["error"] for each in EXPECTED if isinstance(each.get("error"), dict)], "kind")
    assert kinds | {"Denied", "Closed", "Cancelled", "QueueFull", "Invalid"} == expected


def test_the_table_in_the_readme_has_every_scenario_and_client_and_all_passed() -> None:
    everything = {
        scenario.name: dict.fromkeys((suite.name for suite in SUITES), True) for scenario in SCENARIOS
    }
    assert PASSED in shown()
    assert shown() == table(everything)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (1, 2),
        (0, False),
        ({"a": 1}, {"b": 1}),
        ({"a": {"$any": True}}, {"a": ""}),
        ([1], [1, 1]),
        ({"$matches": "^a"}, "ba"),
        ({"$not": 1}, 1),
        ({"$between": [1, 2]}, 3),
        ({"$one_of": [1, 2]}, 3),
        ({"$all": 1}, [1, 2]),
        ({"$all": 1}, []),
        ({"$tally": [[1, 2]]}, [1, 1, 1]),
        ({"$tally": [[1, 2]]}, [1, 1, 2]),
        ("$kept.a", 2),
    ],
    ids=str,
)
def test_a_mismatch_is_found(expected: Any, actual: Any) -> None:
    with pytest.raises(Mismatch):
        check(expected, actual, {"kept": {"a": 1}})


def test_a_match_is_none() -> None:
    kept: Mapping[str, Any] = {"kept": {"a": [{"b": 1}]}}
    check({"a": 1, "gone": None}, {"a": 1, "more": 2}, kept)
    check({"$tally": [[{"a": 1}, 2], [{"$any": True}, 1]]}, [{"a": 1}, {"a": 2}, {"a": 1}], kept)
    check("$kept.a.0.b", 1, kept)
    assert filled({"x": ["$kept.a.0.b", {"$repeat": ["ab", 2]}]}, kept) == {"x": [1, "abab"]}
    assert json.loads(json.dumps(filled({"$repeat": [{"a": "$kept.a"}, 2]}, kept))) == [{"a": [{"b": 1}]}] * 2
