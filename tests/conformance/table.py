"""`make conformance`: writes the table of scenario by client into clients/README.md, from what was run."""

from __future__ import annotations

import itertools
import json
import sys

from tests.conformance.conftest import RESULTS
from tests.conformance.scenarios import SCENARIOS
from tests.conformance.suites import CLIENTS, SUITES

README = CLIENTS / "README.md"
_BEGIN, _END = "<!-- conformance: made by `make conformance` -->\n", "<!-- conformance: end -->\n"
PASSED, FAILED, NOT_RUN, NOT_FOR_IT = "✓", "✗", "?", "–"


def table(passed: dict[str, dict[str, bool]]) -> str:
    """The table in Markdown; `passed` by scenario and client."""
    lines = [
        "| scenario | " + " | ".join(suite.title for suite in SUITES) + " |",
        "|---|" + ":-:|" * len(SUITES),
    ]
    for theme, scenarios in itertools.groupby(SCENARIOS, key=lambda scenario: scenario.theme):
        lines.append(f"| **{theme.replace('_', ' ')}** |" + " |" * len(SUITES))
        for scenario in scenarios:
            cells = [
                _cell(passed.get(scenario.name, {}).get(suite.name))
                if scenario.is_for(suite.name)
                else NOT_FOR_IT
                for suite in SUITES
            ]
            lines.append(f"| {scenario.says} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(passed: bool | None) -> str:
    return NOT_RUN if passed is None else PASSED if passed else FAILED


def shown() -> str:
    """The table that stands in the README."""
    return README.read_text().partition(_BEGIN)[2].partition(_END)[0]


def main() -> None:
    """Replaces the table. Exits with a sentence when something failed or was not run."""
    before, _, rest = README.read_text().partition(_BEGIN)
    made = table(json.loads(RESULTS.read_text()))
    README.write_text(before + _BEGIN + made + _END + rest.partition(_END)[2])
    if FAILED in made or NOT_RUN in made:
        sys.exit(f"{README}: not everything has passed; see {FAILED} and {NOT_RUN}")


if __name__ == "__main__":
    main()
