"""Generate the Python stubs of `keyturn.v1` into the client package.

Runs three ways with the same result: as hatchling's build hook (every install and every wheel),
from `make protos`, and by hand: `python protos/generate.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TARGET = ROOT / "clients" / "python"


def _script(name: str) -> str:
    """A protoc plugin: beside this interpreter, or on PATH (an isolated build puts it there)."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} not found: install mypy-protobuf (make setup does)")
    return found


def generate() -> None:
    """Write `*_pb2.py`, `*_pb2_grpc.py` and their `.pyi` beside `keyturn/v1/__init__.py`.

    Raises `subprocess.CalledProcessError` when protoc refuses a file; its message is on stderr.
    """
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("keyturn/v1/*.proto"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--proto_path={PROTOS}",
            f"--plugin=protoc-gen-mypy={_script('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={_script('protoc-gen-mypy_grpc')}",
            f"--python_out={TARGET}",
            f"--grpc_python_out={TARGET}",
            f"--mypy_out=quiet:{TARGET}",
            f"--mypy_grpc_out=quiet:{TARGET}",
            *files,
        ],
        check=True,
    )


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run by hand, outside a build
    pass
else:

    class GenerateStubs(BuildHookInterface[Any]):
        """Generate before every build; an editable install counts as one."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            generate()


if __name__ == "__main__":
    generate()
