"""The clients that are held to the scenarios: how each is built, and started."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.toolchains import require_toolchain

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "clients"
_LIMIT_SECONDS = 1500


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One client, as the scenarios see it."""

    name: str
    title: str
    toolchain: tuple[str, ...] = ()
    """The programs that the machine has to have to build it; none: what runs the tests does."""
    python: tuple[str, ...] = ()
    """The arguments of the driver, where this interpreter runs it."""

    @property
    def driver(self) -> tuple[str, ...]:
        """The command line of its driver."""
        if not self.toolchain:
            return (sys.executable, str(CLIENTS / "python/conformance/driver.py"), *self.python)
        return (str(CLIENTS / self.name / "bin/driver"),)

    @property
    def gateway(self) -> tuple[str, ...]:
        """The command line of its example gateway."""
        if not self.toolchain:
            return (sys.executable, str(CLIENTS / "python/examples/gateway.py"))
        return (str(CLIENTS / self.name / "bin/gateway"),)

    def build(self) -> None:
        """Makes driver and gateway. Skips the test where the toolchain is missing, unless this is CI."""
        for program in self.toolchain:
            require_toolchain(program)
        if self.toolchain:
            _built(self.name)


SUITES = (
    Suite(name="python", title="Python", python=("sync",)),
    Suite(name="python-async", title="Python, asyncio", python=("async",)),
    Suite(name="go", title="Go", toolchain=("go",)),
    Suite(name="typescript", title="TypeScript", toolchain=("node", "npm")),
    Suite(name="java", title="Java", toolchain=("javac", "mvn")),
    Suite(name="rust", title="Rust", toolchain=("cargo",)),
)


@cache
def _built(name: str) -> None:
    make(name, "build")


def make(name: str, target: str) -> None:
    """A target of a client's own Makefile, one at a time. Raises AssertionError with what it printed."""
    directory = CLIENTS / name
    with (directory / "Makefile").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes may be running the tests in this checkout
        done = subprocess.run(
            ["make", "--no-print-directory", "--directory", str(directory), target],
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            env={key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))},
        )
    assert done.returncode == 0, f"make -C clients/{name} {target}:\n{done.stdout}\n{done.stderr}"
