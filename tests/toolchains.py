"""The programs of other languages that some tests run: missing ones skip a test, but never in CI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / ".tools" / "bin"
"""What `make tools` builds."""


def require_toolchain(name: str) -> Path:
    """The program of that name (`go`, `cargo`, `grpcurl`): what `make tools` built, or what is on PATH.

    Where it is missing the test, or the module that is being imported, is skipped with a line that says so.
    With `CI=true` in the environment that is a failure instead: there nothing skips.
    """
    found = shutil.which(name, path=os.pathsep.join((str(TOOLS), os.environ.get("PATH", os.defpath))))
    if found is not None:
        return Path(found)
    reason = f"{name} is neither on PATH nor among what `make tools` builds"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and with CI=true nothing skips", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
