"""Keeps what each scenario came to with each client, for the table in clients/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / ".conformance.json"
"""What the last runs came to: `make conformance` makes the table of it."""


class _Results:
    def __init__(self) -> None:
        self._passed: dict[str, dict[str, bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Also where the test ran in another process."""
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == "conformance":
                suite, scenario = json.loads(str(value))
                self._passed.setdefault(scenario, {})[suite] = report.passed

    def pytest_sessionfinish(self) -> None:
        if self._passed:
            RESULTS.write_text(json.dumps(self._passed))


def pytest_configure(config: pytest.Config) -> None:
    """In the process that reports, not in those that only run tests."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Results())
