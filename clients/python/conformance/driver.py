"""The conformance driver of both Python clients: `driver.py async` or `driver.py sync`.

Does what clients/conformance/README.md says: a command in JSON on each line of standard input, an answer on
each line of standard output.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import json
import logging
import pickle
import pprint
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

from keyturn import (
    AsyncCall,
    AsyncClient,
    Call,
    Client,
    Constraint,
    CreditTicket,
    DecideRequest,
    Decision,
    Denial,
    Denied,
    KeyHandle,
    KeyturnError,
    Outcome,
    QueueFull,
    Recorded,
    RecordRequest,
    Retries,
    SealedHandle,
    SealedTicket,
    Secret,
    Unavailable,
    Unsent,
    Usage,
    outcome_of,
)

Fields = dict[str, Any]


class Left(Exception):  # noqa: N818
    """How a block is left without a word."""


class Interrupted(BaseException):
    """What cancels a call of the blocking client: raised by a signal, as an alarm is."""


class Driver:
    """Clients, calls, and what came of commands, by their names. Its methods are the commands."""

    def __init__(self, kind: type[Client] | type[AsyncClient]) -> None:
        self.kind = kind
        self.clients: dict[str, Client | AsyncClient] = {}
        self.kept: Fields = {}
        self.told: dict[str, list[Unsent]] = {}
        self.asked: dict[str, list[Fields]] = {}

    async def answer(self, command: Fields) -> Fields:
        """The answer to a command, whatever becomes of it."""
        given = {name: value for name, value in command.items() if value is not None}
        operation = getattr(self, f"do_{given.pop('op', '')}", None)
        if operation is None:
            return {"defect": f"there is no op {command.get('op')!r}"}
        try:
            with interrupting(given.pop("cancel_after_ms", None)):
                return {"ok": await operation(**given)}
        except (Denied, KeyturnError, QueueFull, RuntimeError, TypeError, ValueError, TimeoutError) as raised:
            if kept_as := given.get("as"):
                self.kept[kept_as] = raised
            return {"error": error(raised)}
        except (asyncio.CancelledError, Interrupted) as raised:
            return {"error": error(raised)}
        except Exception as defect:
            return {"defect": f"{type(defect).__name__}: {defect}"}

    # -- clients ---------------------------------------------------------------------------------------

    async def do_open(self, client: str, options: Fields | None = None) -> Fields:
        given = {name: value for name, value in (options or {}).items() if value is not None}
        self.told[client], self.asked[client] = [], []
        for name in ("root_certificates", "certificate_chain", "private_key"):
            if name in given:
                given[name] = given[name].encode()
        for name in ("timeout", "close_timeout"):
            if f"{name}_ms" in given:
                given[name] = span(given.pop(f"{name}_ms"))
        if "retries" in given:
            given["retries"] = Retries(**spans(given["retries"]))
        if passes := given.pop("when_down", None):
            given["when_down"] = self.when_down(client, passes == "pass")
        self.clients[client] = self.kind(**given, on_unsent=self.told[client].append)
        return {}

    def when_down(self, client: str, passes: bool) -> Callable[[DecideRequest, Unavailable], bool]:
        def when_down(request: DecideRequest, error: Unavailable) -> bool:
            self.asked[client].append({"user_id": request.user_id, "code": error.code.name})
            return passes

        return when_down

    async def do_close(self, client: str) -> Fields:
        left = await result(self.clients[client].close())
        return {"unsent": [unsent(each) for each in left]}

    async def do_flush(self, client: str, timeout_ms: float | None = None) -> Fields:
        await result(self.clients[client].flush(**spans(timeout_ms=timeout_ms)))
        return {}

    async def do_unsent(self, client: str) -> list[Fields]:
        return [unsent(each) for each in self.told[client]]

    async def do_when_down_asked(self, client: str) -> list[Fields]:
        return self.asked[client]

    # -- calls of the client ---------------------------------------------------------------------------

    async def do_decide(
        self, client: str, request: Fields, timeout_ms: float | None = None, **names: str
    ) -> Fields:
        fields = {**spans(request), **spans(timeout_ms=timeout_ms)}
        made: Decision = await result(self.clients[client].decide(**words(fields)))
        return decision(self.keep(names, made))

    async def do_decide_many(
        self, client: str, requests: list[Fields], timeout_ms: float | None = None
    ) -> list[Fields]:
        items = [DecideRequest(**words(spans(each))) for each in requests]
        made = await result(self.clients[client].decide_many(items, **spans(timeout_ms=timeout_ms)))
        return [ok_or_error(each, decision) for each in made]

    async def do_explain(self, client: str, request: Fields, timeout_ms: float | None = None) -> Fields:
        fields = {**spans(request), **spans(timeout_ms=timeout_ms)}
        made = await result(self.clients[client].explain(**words(fields)))
        return {
            "decision": decision(made.decision),
            "steps": [dataclasses.asdict(each) for each in made.steps],
        }

    async def do_record(self, client: str, record: Fields, timeout_ms: float | None = None) -> Fields:
        settles, outcome, fields = self.record_fields(record)
        fields |= spans(timeout_ms=timeout_ms)
        return recorded(await result(self.clients[client].record(settles, outcome, **fields)))

    async def do_record_many(
        self, client: str, records: list[Fields], timeout_ms: float | None = None
    ) -> list[Fields]:
        items = [self.record(each) for each in records]
        made = await result(self.clients[client].record_many(items, **spans(timeout_ms=timeout_ms)))
        return [ok_or_error(each, recorded) for each in made]

    async def do_record_later(self, client: str, record: Fields) -> Fields:
        self.clients[client].record_later(self.record(record))
        return {}

    async def do_redeem(
        self, client: str, handle: str, timeout_ms: float | None = None, **names: str
    ) -> Fields:
        redeemed = await result(self.clients[client].redeem(handle, **spans(timeout_ms=timeout_ms)))
        return {"secret": self.keep(names, redeemed).reveal()}

    # -- calls from a decision to a record -------------------------------------------------------------

    async def do_begin(
        self,
        client: str,
        request: Fields,
        background: bool = False,
        timeout_ms: float | None = None,
        **names: str,
    ) -> Fields:
        fields = {**spans(request), **spans(timeout_ms=timeout_ms)}
        call = self.clients[client].request(**words(fields), background=background)
        await result(call.__enter__() if isinstance(call, Call) else call.__aenter__())
        self.keep(names, call)
        return {**decision(call.decision), "request_id": call.request_id}

    async def do_headers(self, call: str, platform: dict[str, str]) -> dict[str, str]:
        signed: dict[str, str] = self.call(call).headers(platform)
        return signed

    async def do_sending(self, call: str) -> Fields:
        self.call(call).sending()
        return {}

    async def do_succeeded(self, call: str) -> Fields:
        self.call(call).succeeded()
        return {}

    async def do_used(self, call: str, usage: Fields) -> Fields:
        self.call(call).used(**usage)
        return {}

    async def do_cost(self, call: str, micros: int) -> Fields:
        self.call(call).cost(micros)
        return {}

    async def do_note(self, call: str, **fields: Any) -> Fields:
        self.call(call).note(**spans(fields))
        return {}

    async def do_failed(self, call: str, outcome: str | int, **fields: Any) -> Fields:
        self.call(call).failed(word(outcome), **spans(fields))
        return {}

    async def do_key_refused(self, call: str, **fields: Any) -> Fields:
        names = {"as": fields.pop("as")} if "as" in fields else {}
        if "outcome" in fields:
            fields["outcome"] = word(fields["outcome"])
        fields.pop("timeout_ms", None)  # that of the call holds
        refused = self.call(call)
        await result(refused.key_refused(**spans(fields)))
        return decision(self.keep(names, refused.decision))

    async def do_finish(self, call: str) -> Fields | None:
        made = await result(self.call(call).finish())
        return None if made is None else recorded(made)

    async def do_end(self, call: str) -> Fields:
        ended, left = self.call(call), Left()
        leave = ended.__exit__ if isinstance(ended, Call) else ended.__aexit__
        await result(leave(Left, left, None))
        return {}

    # -- the rest --------------------------------------------------------------------------------------

    async def do_outcome_of(self, status: int, error_code: str | None = None) -> Fields:
        return {"outcome": str(outcome_of(status, error_code))}

    async def do_show(self, of: str, secret: str = "") -> Fields:
        value = self.kept[of] if of in self.kept else self.clients[of]
        held = secret_of(value)
        return {"prints": list(prints(value)), "revealed": held is not None and held.reveal() == secret}

    async def do_parallel(self, commands: list[Fields]) -> list[Fields]:
        if self.kind is AsyncClient:
            return await asyncio.gather(*map(self.answer, commands))
        with ThreadPoolExecutor(len(commands)) as threads:
            return list(threads.map(lambda command: run_blocking(self.answer(command)), commands))

    # -- names -----------------------------------------------------------------------------------------

    def keep(self, names: dict[str, str], value: Any) -> Any:
        if "as" in names:
            self.kept[names["as"]] = value
        return value

    def call(self, name: str) -> Any:
        return self.kept[name]

    def record_fields(self, given: Fields) -> tuple[Any, Outcome, Fields]:
        fields = spans({name: value for name, value in given.items() if value is not None})
        settles: Any
        if "decision" in fields:
            settles = self.kept[fields.pop("decision")]
            if isinstance(settles, Call | AsyncCall):
                settles = settles.decision
        elif "handle" in fields:
            settles = SealedHandle(fields.pop("handle"))
        else:
            settles = SealedTicket(fields.pop("ticket"))
        if "usage" in fields:
            fields["usage"] = Usage(**{k: v for k, v in fields["usage"].items() if v is not None})
        return settles, word(fields.pop("outcome")), fields

    def record(self, given: Fields) -> RecordRequest:
        settles, outcome, fields = self.record_fields(given)
        return RecordRequest(settles, outcome, **fields)


# -- values, from JSON --------------------------------------------------------------------------------


def span(milliseconds: float) -> timedelta:
    return timedelta(milliseconds=milliseconds)


def spans(fields: Fields | None = None, **more: Any) -> Fields:
    """The fields without those that are not given, and each `…_ms` as a span under its own name."""
    given = {name: value for name, value in {**(fields or {}), **more}.items() if value is not None}
    return {
        name.removesuffix("_ms"): span(value) if name.endswith("_ms") else value
        for name, value in given.items()
    }


def words(fields: Fields) -> Fields:
    if "constraint" in fields:
        fields["constraint"] = Constraint(fields["constraint"])
    return fields


def word(outcome: str | int) -> Outcome:
    return Outcome(f"UNRECOGNIZED_{outcome}" if isinstance(outcome, int) else outcome)


# -- values, to JSON ----------------------------------------------------------------------------------


def milliseconds(of: timedelta | None) -> int | None:
    return None if of is None else round(of / timedelta(milliseconds=1))


def time(of: datetime | None) -> str | None:
    return None if of is None else of.isoformat().replace("+00:00", "Z")


def decision(of: Decision) -> Fields:
    return {
        "decision_id": of.decision_id,
        "mode": of.mode,
        "reason": of.reason,
        "message": of.message,
        "degraded": of.degraded,
        "replayed": of.replayed,
        "unmetered": of.unmetered,
        "allowed": of.allowed,
        "key": None if of.key is None else key(of.key),
        "ticket": None if of.ticket is None else ticket(of.ticket),
        "denial": None if of.denial is None else denial(of.denial),
    }


def key(of: KeyHandle) -> Fields:
    return {
        "handle": str(of.handle),
        "key_id": of.key_id,
        "provider": of.provider,
        "hint": of.hint,
        "secret": None if of.secret is None else of.secret.reveal(),
        "auth_header": of.auth_header,
        "auth_prefix": of.auth_prefix,
        "base_url": of.base_url,
        "expire_time": time(of.expires_at),
    }


def ticket(of: CreditTicket) -> Fields:
    return {
        "ticket": str(of.ticket),
        "hold_micros": of.hold_micros,
        "available_micros": of.available_micros,
        "expire_time": time(of.expires_at),
    }


def denial(of: Denial) -> Fields:
    return {
        "reason": of.reason,
        "retryable": of.retryable,
        "retry_after_ms": milliseconds(of.retry_after),
        "suggestion": of.suggestion,
    }


def recorded(of: Recorded) -> Fields:
    return {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}


def unsent(of: Unsent) -> Fields:
    settles = of.record.settles
    kind = "handle" if isinstance(settles, SealedHandle) else "ticket"
    return {kind: str(settles), "outcome": of.record.outcome, "error": error(of.error)}


def ok_or_error(item: Any, show: Callable[[Any], Fields]) -> Fields:
    return {"error": error(item)} if isinstance(item, KeyturnError) else {"ok": show(item)}


def error(raised: BaseException) -> Fields:
    text = str(raised)
    match raised:
        case KeyturnError():
            return {
                "kind": type(raised).__name__,
                "code": raised.code.name,
                "reason": raised.reason,
                "message": raised.message,
                "text": text,
                "field_violations": [dataclasses.asdict(each) for each in raised.field_violations],
                "retry_after_ms": milliseconds(raised.retry_after),
                "resource": None if raised.resource is None else dataclasses.asdict(raised.resource),
                "metadata": raised.metadata,
            }
        case Denied():
            return {"kind": "Denied", "text": text, "decision": decision(raised.decision)}
        case QueueFull():
            return {"kind": "QueueFull", "text": text}
        case asyncio.CancelledError() | Interrupted():
            return {"kind": "Cancelled", "text": text}
        case TimeoutError():  # of flush
            return {"kind": "DeadlineExceeded", "text": text}
        case RuntimeError() if "closed" in text:
            return {"kind": "Closed", "text": text}
    return {"kind": "Invalid", "text": text}


def secret_of(value: Any) -> Secret | None:
    match value:
        case Secret():
            return value
        case Call() | AsyncCall() | Decision():
            return value.key.secret if value.key is not None else None
    return None


def prints(value: Any) -> Iterator[str]:
    """The value in every way that Python has to print it."""
    yield from (
        repr(value),
        str(value),
        f"{value}",
        f"{value!r:>200}",
        f"{value!a}",
        "%s %r" % (value, value),  # noqa: UP031
    )
    yield repr([value]) + repr({"it": value}) + repr((value,))
    yield pprint.pformat(value)
    yield json.dumps([value], default=repr)
    yield logging.LogRecord("it", logging.INFO, "", 0, "%s %r", (value, value), None).getMessage()
    with suppress(TypeError):
        yield repr(vars(value)) + str(vars(value))
    if (held := secret_of(value)) is not None:
        with suppress(TypeError):
            yield repr(pickle.dumps(held)) + repr(pickle.dumps(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield repr(copy.deepcopy(value))
        yield repr(dataclasses.asdict(value)) + repr(dataclasses.astuple(value))
    if isinstance(value, BaseException):
        trace = value.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # the command itself, as it came
        report = traceback.TracebackException(type(value), value, trace, capture_locals=True)
        yield "".join(report.format())


# -- running ------------------------------------------------------------------------------------------


async def result(made: Any) -> Any:
    """What a method of either client gives."""
    return await made if inspect.isawaitable(made) else made


def run_blocking(answering: Coroutine[Any, Any, Any]) -> Any:
    """The end of a coroutine that never waits for a loop."""
    try:
        answering.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("the blocking client waits for a loop")


@contextmanager
def interrupting(after_ms: float | None) -> Iterator[None]:
    """Cancels what runs in the block after that long: its task, or, without a loop, by an alarm."""
    if after_ms is None:
        yield
        return
    task = None
    with suppress(RuntimeError):
        task = asyncio.current_task()
    if task is not None:
        timer = asyncio.get_running_loop().call_later(after_ms / 1000, task.cancel)
        try:
            yield
        finally:
            timer.cancel()
            task.uncancel()
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, after_ms / 1000)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def reply(answer: Fields) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def blocking() -> None:
    driver = Driver(Client)
    for line in sys.stdin:
        reply(run_blocking(driver.answer(json.loads(line))))
    for client in driver.clients.values():
        client.close()


async def in_a_loop() -> None:
    driver = Driver(AsyncClient)
    while line := await asyncio.to_thread(sys.stdin.readline):
        reply(await driver.answer(json.loads(line)))
    for client in driver.clients.values():
        await result(client.close())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sync"]:
            blocking()
        case ["async"]:
            asyncio.run(in_a_loop())
        case _:
            sys.exit("driver.py sync|async")
