"""The scenarios, as they stand in clients/conformance/scenarios/."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.suites import CLIENTS

_FIELDS = {"name", "says", "given", "clients", "steps", "rows", "only"}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One scenario; clients/conformance/README.md says what its parts mean."""

    theme: str
    name: str
    says: str
    steps: list[dict[str, Any]]
    given: dict[str, Any] = field(default_factory=dict)
    clients: dict[str, dict[str, Any]] = field(default_factory=lambda: {"c": {}})
    rows: list[dict[str, Any]] = field(default_factory=list)
    only: list[str] | None = None

    def is_for(self, suite: str) -> bool:
        """Whether it is about something that this client has."""
        return self.only is None or suite in self.only


def _read() -> tuple[Scenario, ...]:
    found = []
    for path in sorted((CLIENTS / "conformance" / "scenarios").glob("*.json")):
        for fields in json.loads(path.read_text()):
            assert set(fields) <= _FIELDS, f"{path.name}: {fields['name']}: {set(fields) - _FIELDS}"
            found.append(Scenario(theme=path.stem, **fields))
    names = [scenario.name for scenario in found]
    assert len(set(names)) == len(names), "two scenarios have one name"
    return tuple(found)


SCENARIOS = _read()
