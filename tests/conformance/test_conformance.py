"""Every scenario with every client, against the real sidecar (clients/conformance/README.md)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conformance.driving import Driver, driving
from tests.conformance.matching import check, filled
from tests.conformance.scenarios import SCENARIOS, Scenario
from tests.conformance.suites import SUITES, Suite
from tests.conformance.world import World
from tests.factories import Connection
from tests.invariants import check_invariants
from tests.support import temporary_directory

_RECORDING = {"record", "finish"}
_WITHOUT_CLIENT = {"show", "outcome_of"}
_KEPT_BY_DRIVERS = {"decide", "redeem", "begin", "key_refused"}


class Drivers:
    """One driver for each client, started when it is first needed, and again when it died."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._running: dict[str, Driver] = {}

    async def of(self, suite: Suite) -> Driver:
        """A driver that takes commands."""
        running = self._running.get(suite.name)
        if running is None or not running.well:
            await asyncio.to_thread(suite.build)
            running = await self._stack.enter_async_context(driving(suite, self._directory))
            self._running[suite.name] = running
        return running

    async def end(self) -> None:
        """Every one ends by itself, and well, when there is no more to do."""
        for name, driver in self._running.items():
            if driver.well:
                assert await driver.end() == 0, f"the driver {name} ended badly: {driver.logged()}"


@pytest_asyncio.fixture(scope="session")
async def drivers() -> AsyncIterator[Drivers]:
    async with temporary_directory() as directory, AsyncExitStack() as stack:
        drivers = Drivers(directory, stack)
        yield drivers
        await drivers.end()


class Play:
    """One scenario, played with one client."""

    def __init__(self, scenario: Scenario, world: World, driver: Driver) -> None:
        self.acknowledged: list[str] = []
        self._scenario = scenario
        self._world = world
        self._driver = driver
        self._open: set[str] = set()
        self._seen: list[str] = []

    async def play(self) -> None:
        """All steps, and what has to be so afterwards. Raises AssertionError."""
        for name, about in self._scenario.clients.items():
            options = self._world.client_options(filled(about, self._world.answers))
            await self._do({"op": "open", "client": name, "options": options})
            self._open.add(name)
        try:
            for number, step in enumerate(self._scenario.steps, 1):
                try:
                    await self._step(step)
                except AssertionError as error:
                    raise AssertionError(f"step {number}, {step}: {error}") from error
        finally:
            await self._world.mend()
            for name in list(self._open):
                closed = await self._do({"op": "close", "client": name})
                assert closed["ok"]["unsent"] == [], f"the client {name} left records unsent"
        for rows in self._scenario.rows:
            await self._world.rows(rows["sql"], rows.get("with", ()), rows["are"])
        self._check_nothing_leaked()

    async def _step(self, step: dict[str, Any]) -> None:
        if "host" in step:
            await self._world.happen(step)
            return
        command = {key: value for key, value in step.items() if key not in {"expect", "during"}}
        command = self._with_client(filled(command, self._world.answers))
        if "during" in step:
            async with asyncio.TaskGroup() as tasks:
                answering = tasks.create_task(self._do(command))
                for each in step["during"]:
                    await self._world.happen(each)
            answer = answering.result()
        else:
            answer = await self._do(command)
        check(step.get("expect", {"error": None}), answer, self._world.answers)
        self._keep(command, answer)
        if command["op"] == "close":
            self._open.discard(command["client"])

    def _with_client(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["op"] == "parallel":
            commands = [self._with_client(each) for each in command["commands"]]
            return {**command, "commands": commands}
        if "call" in command or command["op"] in _WITHOUT_CLIENT:
            return command
        return {"client": "c", **command}

    async def _do(self, command: dict[str, Any]) -> Any:
        answer = await self._driver.do(_for_driver(command))
        self._acknowledge(command, answer)
        return answer

    def _keep(self, command: dict[str, Any], answer: Any) -> None:
        if command["op"] == "parallel":
            for each, answered in zip(command["commands"], answer["ok"], strict=True):
                self._keep(each, answered)
        elif "as" in command:
            self._world.answers[command["as"]] = answer.get("ok") or answer.get("error")

    def _acknowledge(self, command: dict[str, Any], answer: Any) -> None:
        """Remembers the records that were taken, and what was said to people on the way."""
        match command["op"], answer:
            case "parallel", {"ok": answers}:
                for each, answered in zip(command["commands"], answers, strict=True):
                    self._acknowledge(each, answered)
            case "record_many", {"ok": answers}:
                self.acknowledged += [each["ok"]["record_id"] for each in answers if "ok" in each]
            case op, {"ok": {"record_id": record_id}} if op in _RECORDING:
                self.acknowledged.append(record_id)
            case "show", {"ok": {"prints": prints}}:
                self._seen += prints
            case _, {"error": {"text": text}}:
                self._seen.append(text)

    def _check_nothing_leaked(self) -> None:
        tokens = [
            kept[part][name]
            for kept in self._world.answers.values()
            for part, name in (("key", "handle"), ("ticket", "ticket"))
            if isinstance(kept, dict) and kept.get(part)
        ]
        places = {
            "the sidecar's log": self._world.logged(),
            "the driver's log": self._driver.logged(),
            **{f"print {number}": text for number, text in enumerate(self._seen)},
        }
        for place, text in places.items():
            for secret in (*self._world.secrets, *tokens):
                assert secret not in text, f"a secret or token is in {place}: {text}"


def _for_driver(command: dict[str, Any]) -> dict[str, Any]:
    """The command without what only the host keeps."""
    if command["op"] == "parallel":
        return {**command, "commands": [_for_driver(each) for each in command["commands"]]}
    if "as" in command and command["op"] not in _KEPT_BY_DRIVERS:
        return {name: value for name, value in command.items() if name != "as"}
    return command


@asynccontextmanager
async def world_of(scenario: Scenario, sql: Connection, database: str) -> AsyncIterator[World]:
    async with (
        temporary_directory() as directory,
        World(sql, database, directory, scenario.given).open() as world,
    ):
        yield world


def _cases() -> Iterator[Any]:
    for suite in SUITES:
        for scenario in SCENARIOS:
            if scenario.is_for(suite.name):
                yield pytest.param(suite, scenario, id=f"{suite.name}-{scenario.name}")


@pytest.mark.parametrize(("suite", "scenario"), list(_cases()))
async def test_conformance(
    suite: Suite,
    scenario: Scenario,
    drivers: Drivers,
    sql: Connection,
    database: str,
    record_property: Any,
) -> None:
    record_property("conformance", json.dumps([suite.name, scenario.name]))
    driver = await drivers.of(suite)
    async with world_of(scenario, sql, database) as world:
        play = Play(scenario, world, driver)
        await play.play()
    await check_invariants(sql, play.acknowledged)
