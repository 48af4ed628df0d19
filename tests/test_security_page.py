"""docs/security.md: each of its claims is held by tests that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.test_docs import OPERATING, README, ROOT, quoted, rows, section

PAGE = (ROOT / "docs" / "security.md").read_text()
CLAIMS = {claim: quoted(tests) for claim, tests in rows(section(PAGE, "What holds it"))}


def names_in(path: str) -> set[str]:
    """The tests that a file has."""
    tree = ast.parse((ROOT / path).read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_is_held_by_tests(claim: str) -> None:
    assert CLAIMS[claim]
    for named in CLAIMS[claim]:
        path, _, name = named.partition("::")
        assert name in names_in(path), named


def test_whoever_might_want_it_is_told_what_is_not_protected() -> None:
    adversaries = re.split(r"\n\n(?=\*\*)", section(PAGE, "Who might want it").strip())
    assert len(adversaries) == 17
    for told in adversaries:
        assert told.startswith("**")
        assert re.search(r"\*Not\s+protected:\*", told), told.splitlines()[0]


def test_it_is_found_from_where_operators_read() -> None:
    assert "](docs/security.md)" in README
    assert "](security.md)" in OPERATING
