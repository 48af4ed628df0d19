"""The clients' own suites, each in its own language, and the packages that they would publish."""

from __future__ import annotations

import pytest

from tests.conformance.suites import SUITES, Suite, make

OTHERS = [suite for suite in SUITES if suite.toolchain]


@pytest.mark.parametrize("suite", OTHERS, ids=lambda suite: suite.name)
def test_the_clients_own_suite_passes(suite: Suite) -> None:
    suite.build()
    make(suite.name, "test")


@pytest.mark.parametrize("suite", OTHERS, ids=lambda suite: suite.name)
def test_the_client_would_publish(suite: Suite) -> None:
    suite.build()
    make(suite.name, "package")
