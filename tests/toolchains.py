"""The programs of other languages that some tests run: missing ones skip a test, but never in CI."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / ".tools" / "bin"
"""What `make tools` builds."""


def require_toolchain(name: str) -> Path:
    """The program of that name (`go`, `cargo`, `grpcurl`): built by `make tools`, of `.venv`, or on PATH.

    Where it is missing the test, or the module that is being imported, is skipped with a line that says so.
    With `CI=true` in the environment that is a failure instead: there nothing skips.
    """
    places = (str(TOOLS), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is not None:
        return Path(found)
    reason = f"{name} is not installed: neither on PATH, nor by `make setup` or `make tools`"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and with CI=true nothing skips", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
