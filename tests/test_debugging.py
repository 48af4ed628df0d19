"""docs/debugging.md runs, from its first block to its last, with either tool; and its symptoms are real."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.certificates import Authority
from tests.cli.command import free_port
from tests.support import Sidecar, temporary_directory
from tests.test_access import entry, write
from tests.test_docs import ROOT, assert_alike, environment, pattern, quoted, rows, section
from tests.toolchains import require_toolchain

PAGE = (ROOT / "docs" / "debugging.md").read_text()
SECRET = "sk-made-up-0123456789abcdef"
PORTS = ("50051", "50052", "50053")
TOOLS = {"grpcurl": "grpcurl", "buf": "buf curl|buf --version"}

tool = pytest.mark.parametrize("tool", TOOLS)


def program_of(tool: str) -> Path:
    """The tool itself. grpcurl is what `make tools` builds, and so goes with Go."""
    if tool == "grpcurl":
        require_toolchain("go")
    return require_toolchain(tool)


def test_a_missing_program_skips_a_test_but_not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_toolchain("python").name == "python"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed"):
        require_toolchain("no-such-program")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-program is not installed"):
        require_toolchain("no-such-program")


class Block(NamedTuple):
    """A block of commands, and the block with what it prints, if the page shows that."""

    commands: str
    shown: str | None
    is_json: bool

    @property
    def tools(self) -> set[str]:
        """Whose it is; nobody's in particular, where it is empty."""
        return {name for name, words in TOOLS.items() if re.search(words, self.commands)}

    @property
    def asks_for_the_secret(self) -> bool:
        return '"secret"' in (self.shown or "")

    @property
    def fails(self) -> bool:
        """Whether what it prints is an error: then it has to end with one."""
        return bool(re.match(r'ERROR:|\{\s*"code": "|[a-z_]+: .+\ngoogle\.rpc', self.shown or ""))


def page_blocks() -> list[Block]:
    """All of the page, in order. What is shown once for both tools is the output of both blocks before it."""
    found: list[Block] = []
    for between, language, text in re.findall(r"(.*?)^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        if language == "sh":
            found.append(Block(text, None, is_json=False))
            continue
        assert not between.strip(), "what is shown stands right below its commands"
        found[-1] = found[-1]._replace(shown=text, is_json=language == "json")
        if found[-1].tools == {"buf"} and found[-2].tools == {"grpcurl"} and found[-2].shown is None:
            found[-2] = found[-2]._replace(shown=text, is_json=language == "json")
    return found


BLOCKS = page_blocks()


class Printed(NamedTuple):
    """What a block came to."""

    code: int
    text: str


async def session(commands: Sequence[str], directory: Path, path: str) -> list[Printed]:
    """Runs blocks one after the other in one shell, as they are pasted."""
    mark = f"end-of-block-{os.urandom(8).hex()}"
    script = "set -uo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null' EXIT\n" + "".join(
        f'{{\n{block}\n}} 2>&1 < /dev/null\necho "{mark} $?"\n' for block in commands
    )
    variables = environment(directory)
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script),
        cwd=directory,
        env={**variables, "PATH": f"{path}{os.pathsep}{variables['PATH']}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(180):
            out = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    *printed, rest = re.split(rf"{mark} (\d+)\n", out)
    assert not rest, rest
    return [Printed(int(code), text) for text, code in zip(printed[::2], printed[1::2], strict=True)]


def in_lower_camel_case(value: Any) -> Any:
    """A JSON document with its names as protobuf has them in JSON: by reflection grpcurl does otherwise."""
    if isinstance(value, dict):
        return {
            re.sub("_([a-z])", lambda found: found[1].upper(), key): in_lower_camel_case(one)
            for key, one in value.items()
        }
    return [in_lower_camel_case(one) for one in value] if isinstance(value, list) else value


def words(text: str) -> str:
    """A text in which only words count, not the space between them."""
    return " ".join(text.split())


def assert_shown(block: Block, printed: Printed) -> None:
    """The block ended as the page has it."""
    assert (printed.code != 0) == block.fails, printed.text
    if block.shown is None:
        return
    if block.is_json:
        assert_alike(
            in_lower_camel_case(json.loads(block.shown)), in_lower_camel_case(json.loads(printed.text))
        )
    else:
        assert re.fullmatch(pattern(words(block.shown)), words(printed.text)), printed.text


def with_free_ports(text: str) -> dict[str, str]:
    return {port: str(free_port()) for port in PORTS if port in text}


@tool
async def test_the_page_runs_in_one_shell_and_prints_what_it_shows(tool: str) -> None:
    program = program_of(tool)
    setup, *blocks = [block for block in BLOCKS if block.tools <= {tool}]
    # Both have been run, or there is nothing to run here.
    assert setup.commands == 'make setup tools\nexport PATH="$PWD/.tools/bin:$PWD/.venv/bin:$PATH"\n'
    ports = with_free_ports(PAGE)
    commands = [re.sub("|".join(PORTS), lambda port: ports[port[0]], block.commands) for block in blocks]
    async with temporary_directory() as directory:
        (directory / "protos").symlink_to(ROOT / "protos")
        authority = Authority()
        (directory / "ca.pem").write_bytes(authority.certificate)
        for name, identity in (("server", authority.server()), ("ops", authority.caller("ops.example.com"))):
            write(directory / f"{name}.pem", identity.certificate)
            write(directory / f"{name}.key", identity.key)
        # The last block cleans up.
        commands.insert(-1, "cat keyturn.log")
        printed = await session(commands, directory, str(program.parent))
        left = {path.name for path in directory.glob("[!.]*")}
    log = printed.pop(-2).text
    assert left == {"protos", "ca.pem", "server.pem", "server.key", "ops.pem", "ops.key"}
    assert len(printed) == len(blocks), printed[-1:]
    wrong = []
    for block, one in zip(blocks, printed, strict=True):
        try:
            assert_shown(block, one)
        except (AssertionError, json.JSONDecodeError) as error:
            wrong.append(f"{block.commands}\n{one.text}\nexit code {one.code}; {error}")
    assert not wrong, "\n\n".join(wrong)

    asked = [block.commands for block in blocks if block.asks_for_the_secret]
    assert ["KEY_DELIVERY_INLINE" in asked[0], "/Redeem" in asked[1], len(asked)] == [True, True, 2]
    told = [block.commands for block, one in zip(blocks, printed, strict=True) if SECRET in one.text]
    assert told == asked
    assert SECRET not in log
    assert log.count('"event": "secret_handed_out"') == 2


def test_each_tool_has_a_block_for_every_method_that_the_page_calls() -> None:
    called = {
        name: {
            method
            for block in BLOCKS
            if block.tools == {name}
            for method in re.findall(r"\b(?:keyturn|grpc)\.[\w.]+/\w+", block.commands)
        }
        for name in TOOLS
    }
    assert called["grpcurl"] == called["buf"]
    assert len(called["buf"]) > 15


def test_the_page_names_the_version_of_grpcurl_that_is_built() -> None:
    (pinned,) = re.findall(r"grpcurl@(v[\d.]+)", (ROOT / "Makefile").read_text())
    assert set(re.findall(r"grpcurl@(v[\d.]+)", PAGE)) == {pinned}


# -- what it says, what it means ----------------------------------------------------------------------

TOKEN = "kta_the-token-of-gateway"
ROUTING, PROTO = "keyturn.v1.RoutingService", "keyturn/v1/routing_service.proto"
GRPCURL_SCHEMA = f"-import-path protos -proto {PROTO}"

# Directories are closed to everybody but root.
STRANGER = "" if os.getuid() else "setpriv --reuid=65534 --regid=65534 --clear-groups"

# By tool: what is said, and each line that gets it said.
SYMPTOMS: dict[str, dict[str, str]] = {
    "grpcurl": {
        "connect: connection refused": "grpcurl -plaintext 127.0.0.1:{closed} list",
        "connect: no such file or directory": "grpcurl -plaintext unix:none.sock list",
        "connect: permission denied": "{stranger} grpcurl -plaintext unix:closed/k.sock list",
        "missing port in address": "grpcurl -plaintext -unix {socket} list",
        "context deadline exceeded": (
            "grpcurl -plaintext -max-time 0.000001 {tcp} list\n"
            "grpcurl -plaintext -connect-timeout 0.5 {tls} list\n"
            "grpcurl -cacert ca.pem -connect-timeout 0.5 {mutual} list"
        ),
        "server does not support the reflection API": "grpcurl -plaintext unix:{bare} list",
        "first record does not look like a TLS handshake": "grpcurl {tcp} list",
        "certificate signed by unknown authority": "grpcurl {tls} list",
        "certificate is valid for": "grpcurl -cacert ca.pem -authority other.example {tls} list",
        "This caller is not known here.": "grpcurl -cacert ca.pem {tls} list",
        "This method is for the role": (
            f"grpcurl -cacert ca.pem -H 'authorization: Bearer {TOKEN}'"
            " {tls} keyturn.v1.FlagService/ListFlags"
        ),
        "has no known field named": "grpcurl -plaintext -d '{{\"user\": 1}}' {tcp} {routing}/Decide",
        "does not have value named": (
            'grpcurl -plaintext -d \'{{"key_delivery": "INLINE"}}\' {tcp} {routing}/Decide'
        ),
        "bad Duration": (
            'grpcurl -plaintext -d \'{{"window": "7d"}}\' {tcp} keyturn.v1.FlagService/SimulateFlags'
        ),
        "Symbol not found": "grpcurl -plaintext {tcp} describe {routing}.Decide",
        "is not recognized; see @value": f"grpcurl -plaintext {GRPCURL_SCHEMA} {{tcp}} {{routing}}/Decide",
    },
    "buf": {
        "connect: connection refused": "{curl} --schema protos http://127.0.0.1:{closed}/{routing}/Decide",
        "connect: no such file or directory": (
            "{curl} --schema protos --unix-socket none.sock http://localhost/{routing}/Decide"
        ),
        "connect: permission denied": (
            "{stranger} {curl} --schema protos --unix-socket closed/k.sock http://localhost/{routing}/Decide"
        ),
        "context deadline exceeded": "{curl} --timeout 1ns http://{tcp}/{routing}/Decide",
        'failed to find service named "keyturn.v1.RoutingService" in schema': (
            "{curl} --unix-socket {bare} http://localhost/{routing}/Decide"
        ),
        "the server hosted at that remote is unavailable": "{curl} --list-services http://127.0.0.1:{closed}",
        "There is no such method here.": "{curl} --unix-socket {bare} --list-services http://localhost",
        "first record does not look like a TLS handshake": (
            "{curl} --schema protos https://{tcp}/{routing}/Decide"
        ),
        "certificate signed by unknown authority": "{curl} --schema protos https://{tls}/{routing}/Decide",
        "certificate is valid for": (
            "{curl} --cacert ca.pem --servername other.example --schema protos https://{tls}/{routing}/Decide"
        ),
        "unexpected EOF": (
            "{curl} --schema protos http://{tls}/{routing}/Decide\n"
            "{curl} --cacert ca.pem --schema protos https://{mutual}/{routing}/Decide"
        ),
        "This caller is not known here.": (
            "{curl} --cacert ca.pem --schema protos https://{tls}/{routing}/Decide"
        ),
        "Set the BUF_TOKEN environment variable": "{curl} --cacert ca.pem --list-services https://{tls}",
        "This method is for the role": (
            f"{{curl}} --cacert ca.pem -H 'authorization: Bearer {TOKEN}' --schema protos"
            " https://{tls}/keyturn.v1.FlagService/ListFlags"
        ),
        "malformed HTTP response": "buf curl --schema protos http://{tcp}/{routing}/Decide",
        "stream error: stream ID 1; INTERNAL_ERROR": "buf curl --list-services http://{tcp}",
        'unknown field "': "{curl} -d '{{\"user\": 1}}' http://{tcp}/{routing}/Decide",
        "invalid value for enum field": (
            '{curl} -d \'{{"key_delivery": "INLINE"}}\' http://{tcp}/{routing}/Decide'
        ),
        "invalid google.protobuf.Duration value": (
            '{curl} -d \'{{"window": "7d"}}\' http://{tcp}/keyturn.v1.FlagService/SimulateFlags'
        ),
        'unable to resolve "type.googleapis.com/google.rpc.ErrorInfo"': (
            "{curl} --schema protos -d '{{\"requests\": [{{}}]}}' http://{tcp}/{routing}/BatchDecide"
        ),
    },
}
LISTED = rows(section(PAGE, "What it says, what it means"))
SAID_BY = {quoted(said)[0]: who for said, who, *_ in LISTED}
# Which one of several is a matter of who is faster.
ALTERNATIVES = {quoted(said)[0]: quoted(said) for said, *_ in LISTED}
PINGS = "Too many pings"


def test_the_table_of_symptoms_says_of_which_tool_each_is() -> None:
    listed = {
        name: {said for said, who in SAID_BY.items() if who == "both" or f"`{name}`" in who} for name in TOOLS
    }
    assert listed == {name: set(symptoms) for name, symptoms in SYMPTOMS.items()}
    assert {said for said, who in SAID_BY.items() if who == "clients"} == {PINGS}


@tool
async def test_each_symptom_is_what_the_tool_says(tool: str, start_sidecar: Callable[..., Any]) -> None:
    program = program_of(tool)
    authority, symptoms = Authority(), SYMPTOMS[tool]
    async with temporary_directory() as directory:
        shutil.copytree(ROOT / "protos", directory / "protos")
        (directory / "closed").mkdir()
        (tools := directory / "bin").mkdir(mode=0o755)
        shutil.copy(program, tools)  # where another user finds it
        write(directory / "access.toml", entry("web", ["gateway"], tokens=[TOKEN]))
        write(directory / "ca.pem", authority.certificate).chmod(0o644)
        served = authority.server()
        write(directory / "cert.pem", served.certificate)
        write(directory / "key.pem", served.key)
        files = {
            "tls_cert": directory / "cert.pem",
            "tls_key": directory / "key.pem",
            "access_file": directory / "access.toml",
        }
        plain = await start_sidecar(also=["127.0.0.1:0"], insecure_loopback=True, reflection=True)
        secure = await start_sidecar(also=["127.0.0.1:0"], reflection=True, **files)
        mutual = await start_sidecar(
            also=["127.0.0.1:0"], reflection=True, tls_client_ca=directory / "ca.pem", **files
        )
        bare = await start_sidecar()
        places = {
            "closed": free_port(),
            "socket": plain.address.removeprefix("unix:"),
            "bare": bare.address.removeprefix("unix:"),
            "tcp": plain.addresses[1],
            "tls": secure.addresses[1],
            "mutual": mutual.addresses[1],
            "routing": ROUTING,
            "curl": "buf curl --protocol grpc --http2-prior-knowledge",
            "stranger": STRANGER,
        }
        lines = [
            (said, line.format_map(places)) for said, lines in symptoms.items() for line in lines.splitlines()
        ]
        (directory / "closed").chmod(0)
        try:
            printed = await session([line for _, line in lines], directory, str(tools))
        finally:
            (directory / "closed").chmod(0o700)
    for (said, line), one in zip(lines, printed, strict=True):
        assert one.code != 0, line
        assert any(text in one.text for text in ALTERNATIVES[said]), f"{line}\n{one.text}"


async def test_a_client_that_pings_too_often_is_told_so(sidecar: Sidecar) -> None:
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(sidecar.address, options=options) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in watch:
                pass
    assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.UNAVAILABLE, PINGS)
