"""docs/reliability.md: each fault that it names is made by tests that exist, and none is left out."""

from __future__ import annotations

import shlex

import pytest

from tests.test_docs import OPERATING, README, ROOT, quoted, rows, section
from tests.test_security_page import names_in

PAGE = (ROOT / "docs" / "reliability.md").read_text()
FAULTS = {fault: quoted(tests) for fault, _, tests in rows(section(PAGE, "What was broken on purpose"))}
FIGURES = {command: quoted(command) for command, _, _ in rows(section(PAGE, "Figures"))}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_made_by_tests(fault: str) -> None:
    assert FAULTS[fault]
    for named in FAULTS[fault]:
        path, _, name = named.partition("::")
        assert name in names_in(path), named


@pytest.mark.parametrize("command", FIGURES)
def test_a_figure_has_a_command_that_runs_a_test(command: str) -> None:
    (quoted_command,) = FIGURES[command]
    *_, named = shlex.split(quoted_command)
    path, _, name = named.partition("::")
    assert name.partition("[")[0] in names_in(path), named


def test_every_fault_test_is_told_of() -> None:
    told = {named for tests in FAULTS.values() for named in tests}
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        relative = path.relative_to(ROOT).as_posix()
        missing = {f"{relative}::{name}" for name in names_in(relative)} - told
        assert not missing


def test_it_is_found_from_where_operators_read() -> None:
    assert "](docs/reliability.md)" in README
    assert "](reliability.md)" in OPERATING
