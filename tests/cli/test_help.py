"""What every command says of itself, and what it does not load to say it."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from collections.abc import Iterator

import cyclopts
import pytest
from rich.console import Console

from keyturn_server.cli import app
from keyturn_server.cli.exit_codes import EPILOGUE
from tests.cli.command import environment_of, keyturn

GROUPS = {"keys", "flags", "credits", "users", "reports"}
ALONE = {"decide", "record", "explain"}


def commands(parent: cyclopts.App = app, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command that does something, as it is typed."""
    for name, command in parent.resolved_commands().items():
        if name.startswith("-"):
            continue
        if command.default_command is not None:
            yield (*path, name)
        yield from commands(command, *path, name)


COMMANDS = sorted(commands())


def help_of(*command: str) -> str:
    text = io.StringIO()
    app.help_print(list(command), console=Console(file=text, width=200))
    return text.getvalue()


def test_the_commands_are_there() -> None:
    typed = {" ".join(command) for command in COMMANDS}
    assert typed >= {
        *("keys save", "keys list", "keys update", "keys delete", "keys test", "keys providers"),
        *("flags list", "flags set", "flags mode", "flags simulate", "flags history", "flags refresh"),
        *("credits grant", "credits balance", "credits transactions"),
        *("users put", "users get", "users settings"),
        *("reports split", "reports at-risk", "reports adoption"),
        *("explain", "decide", "record", "serve", "demo", "keygen", "db migrate", "health"),
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_says_what_it_does_what_every_parameter_is_and_how_it_ends(
    command: tuple[str, ...],
) -> None:
    text = help_of(*command)
    said = re.sub(r"\s+", " ", text)
    assert EPILOGUE in said
    description = text.split("\n\n")[1]
    assert description.strip().endswith("."), description
    _, chain, _ = app.parse_commands(list(command))
    for argument in chain[-1].assemble_argument_collection(parse_docstring=True):
        if argument.show:
            assert (argument.parameter.help or "").endswith((".", "]")), argument.name
    if command[0] in GROUPS | ALONE and command != ("keys", "rotate"):
        for option in ("--json", "--timeout", "--address", "--token-file", "KEYTURN_ADDRESS"):
            assert option in text


@pytest.mark.parametrize("arguments", [(), ("--help",), ("keys",), ("keys", "--help"), ("db", "-h")])
async def test_the_help_of_a_group_has_a_line_for_each_command_and_the_exit_codes(
    arguments: tuple[str, ...],
) -> None:
    finished = await keyturn(*arguments, COLUMNS="200")
    assert (finished.code, finished.err) == (0, "")
    listed = dict(re.findall(r"^│ ([a-z-]+) +(\S.*?) +│$", finished.out, re.MULTILINE))
    path = tuple(argument for argument in arguments if not argument.startswith("-"))
    inside = {command[len(path)] for command in COMMANDS if command[: len(path)] == path}
    assert listed.keys() >= inside
    assert EPILOGUE in re.sub(r"\s+", " ", finished.out)


async def test_a_command_that_asks_a_sidecar_loads_nothing_of_the_server_itself() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "importtime", "-m", "keyturn_server", "flags", "list"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment_of(),
    )
    _, err = await process.communicate()
    loaded = set(re.findall(r"\| +(\S+)$", err.decode(), re.MULTILINE))
    assert "keyturn_server.cli.calls" in loaded
    server = {"keyturn_server.app", "keyturn_server.store", "keyturn_server.rpc", "asyncpg", "cryptography"}
    assert not loaded & (server | {"keyturn_server.cli.serve", "aiocache", "limits", "genai_prices"})
