"""What other processes may see of a sidecar's memory and environment, and what a crash leaves behind."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from keyturn_server import dumps
from keyturn_server.settings import forget_secrets, read_settings
from tests.cli.command import embedded, environment_of
from tests.support import MASTER_KEY, eventually, temporary_directory

# Becomes the command that is given, in that directory, which may leave core dumps as far as that can be had.
# Root gives up the rights to look into other processes, for good and for what it becomes.
_LAUNCH = """
import ctypes, os, resource, sys
SYS_PTRACE, SYS_ADMIN, PERFMON = 19, 21, 38
prctl = ctypes.CDLL(None).prctl
for capability in (SYS_PTRACE, SYS_ADMIN, PERFMON):
    if os.geteuid() == 0 and prctl(23, capability, 0, 0, 0) == 1:
        assert prctl(24, capability, 0, 0, 0) == 0
most = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (most, most))
os.chdir(sys.argv[1])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@contextmanager
def launched(directory: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python of its own, with its output in `directory`/output. What still runs at the end is killed."""
    command = [sys.executable, "-c", _LAUNCH, str(directory), *arguments]
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            command, env=environment_of(**variables), stdout=output, stderr=output, stdin=subprocess.PIPE
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


async def told(directory: Path, process: subprocess.Popen[bytes], word: str) -> None:
    """Back once a launched process has said `word`."""

    async def said() -> bool:
        output = (directory / "output").read_text()
        assert process.poll() is None, output
        return word in output

    await eventually(said, seconds=60)


@asynccontextmanager
async def served(database: str) -> AsyncIterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A sidecar that was launched so, and its directory."""
    async with temporary_directory() as directory:
        variables = {"KEYTURN_DATABASE_URL": database, "ENCRYPTION_KEY": MASTER_KEY}
        command = ("-m", "keyturn_server", "serve", "--listen", f"unix:{directory}/run/s")
        with launched(directory, *command, **variables) as process:
            await told(directory, process, '"serving"')
            yield directory, process


_LOOK = """
import json, sys
seen = {}
for path in sys.argv[1:]:
    try:
        with open(path, "rb") as file:
            seen[path] = "" if path.endswith("/mem") else file.read().decode("latin-1")
    except OSError as error:
        seen[path] = error.strerror
print(json.dumps(seen))
"""


async def seen_by_a_neighbour(process: int) -> dict[str, str]:
    """What another process of the same user finds in /proc of a process, or why it does not."""
    files = ("environ", "mem", "maps")
    paths = [f"/proc/{process}/{file}" for file in files]
    async with temporary_directory() as directory:
        with launched(directory, "-c", _LOOK, *paths) as neighbour:
            assert await asyncio.to_thread(neighbour.wait, 60) == 0
        seen = json.loads((directory / "output").read_text())
    return {file: seen[path] for file, path in zip(files, paths, strict=True)}


async def test_processes_of_the_same_user_see_neither_memory_nor_environment(database: str) -> None:
    async with temporary_directory() as directory:
        script = "print('here', flush=True); input()"
        with launched(directory, "-c", script, SEEN="by everybody") as control:
            await told(directory, control, "here")
            if "SEEN=by everybody" not in (await seen_by_a_neighbour(control.pid))["environ"]:
                pytest.skip("here no process sees another's environment, whatever a sidecar does")
    async with served(database) as (directory, process):
        seen = await seen_by_a_neighbour(process.pid)
        assert seen == dict.fromkeys(("environ", "mem", "maps"), "Permission denied")
        # The kernel gives to root what is not dumpable.
        assert Path(f"/proc/{process.pid}/environ").stat().st_uid == 0
        assert "dumps_allowed" not in (directory / "output").read_text()


async def test_nobody_finds_the_master_key_in_the_environment_of_a_sidecar_or_its_children() -> None:
    async with temporary_directory() as directory, embedded(directory) as (running, _):
        looked = 0
        for process in (running.process.pid, *children_of(running.process.pid)):
            for file in ("environ", "cmdline"):
                try:
                    contents = Path(f"/proc/{process}/{file}").read_bytes()
                except PermissionError:  # as it should be, where we are not root
                    continue
                looked += 1
                assert MASTER_KEY.encode() not in contents
        assert looked >= 3
        assert running.event("byok_on")


def children_of(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    direct = [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return direct + [each for child in direct for each in children_of(child)]


_FORGETTING = """
from pathlib import Path
from keyturn_server.settings import forget_secrets, read_settings
import os
import resource
settings = read_settings()
before = Path("/proc/self/environ").read_text()
forget_secrets()
after = Path("/proc/self/environ").read_text()
for name in ("encryption_key", "encryption_keys_retired", "database_url", "provider_proxy"):
    value = getattr(settings, name).get_secret_value()
    assert value in before and value not in after, name
assert "KEYTURN_LISTEN=unix:/x" in after and os.environ["KEYTURN_LISTEN"] == "unix:/x"
assert set(os.environ) <= {"KEYTURN_LISTEN", "LC_CTYPE"}, list(os.environ)
"""


def test_secret_settings_leave_the_environment_once_they_are_read() -> None:
    variables = {
        "ENCRYPTION_KEY": MASTER_KEY,
        "encryption_keys_retired": "9" * 64,
        "KEYTURN_DATABASE_URL": "postgresql://u:a-password@h/d",
        "KEYTURN_PROVIDER_PROXY": "http://u:another-one@h:1",
        "KEYTURN_TOKEN": "kta_a-token",
        "KEYTURN_LISTEN": "unix:/x",
    }
    finished = subprocess.run(
        [sys.executable, "-c", _FORGETTING], env=variables, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_forgetting_leaves_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCRYPTION_KEY", MASTER_KEY)
    settings = read_settings()
    forget_secrets()
    assert "ENCRYPTION_KEY" not in os.environ
    assert settings.encryption_key is not None
    assert settings.encryption_key.get_secret_value() == MASTER_KEY


# -- core dumps ---------------------------------------------------------------------------------------


def crashed(process: subprocess.Popen[bytes]) -> int:
    """The wait status of a process that ends by SIGABRT."""
    _, status = os.waitpid(process.pid, 0)
    process.returncode = -signal.SIGABRT  # it has been waited for
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGABRT
    return status


async def test_a_crash_leaves_no_core_dump(database: str) -> None:
    async with temporary_directory() as directory:
        with launched(directory, "-c", "import os; os.abort()") as control:
            if not os.WCOREDUMP(await asyncio.to_thread(crashed, control)):
                pytest.skip("here no crash leaves a core dump, whatever a sidecar does")
    async with served(database) as (directory, process):
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        (core,) = [line.split() for line in limits.splitlines() if line.startswith("Max core file size")]
        assert core[4:6] == ["0", "0"]
        process.send_signal(signal.SIGABRT)
        assert not os.WCOREDUMP(await asyncio.to_thread(crashed, process))
        assert not list(directory.glob("core*"))


# -- where it cannot be done --------------------------------------------------------------------------

_ELSEWHERE = """
import sys
from types import SimpleNamespace
from keyturn_server import dumps
from keyturn_server.__main__ import main
dumps.sys = SimpleNamespace(platform="elsewhere")
main()
"""


async def test_where_memory_cannot_be_closed_serve_says_so() -> None:
    finished = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _ELSEWHERE, "serve"),
        stderr=asyncio.subprocess.PIPE,
        env=environment_of(),
    )
    _, told = await finished.communicate()
    event = json.loads(told.splitlines()[0])
    assert (event["event"], event["level"]) == ("dumps_allowed", "warning")
    assert event["reason"] == "this process's memory cannot be closed to others: that takes Linux"
    assert finished.returncode == 1


class _Refusing:
    """A C library whose prctl does nothing, as under a strict seccomp filter."""

    @staticmethod
    def prctl(option: int, *arguments: int) -> int:
        return 1 if option == 3 else -1


def test_what_the_kernel_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Refusing)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert dumps.forbid_dumps() == [
        "core dumps cannot be switched off: [Errno 1] Operation not permitted",
        "this process's memory cannot be closed to others: the kernel refuses",
    ]
