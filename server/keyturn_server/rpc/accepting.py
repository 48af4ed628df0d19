"""A gRPC server that no call can end, and that spends little on a unary call.

The loop of `grpc.aio` (1.85) decodes the path of each call, and shuts the whole server down where that
fails: one call with a path that is not UTF-8, by whoever gets as far as a connection, and nothing listens any
more. So calls are taken here: those of a method that we have by its name, which gRPC's core compares byte by
byte, and all others without a look at theirs. Unary methods of ours are answered here as well, which takes
about a third off what a call costs in gRPC. The rest is gRPC's own. docs/decisions/0016-accepting.md
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined,import-untyped,unused-ignore]

T = TypeVar("T")

_UNKNOWN = "unknown"
_NO_FLAGS = 0
_OK = 0


class Call:
    """A call of a unary method of ours, until it is answered."""

    __slots__ = ("_server", "_state", "_watch", "context", "task")

    task: asyncio.Task[None]
    """The one that answers it."""

    def __init__(self, server: _Acceptor, state: Any) -> None:
        self._server = server
        self._state = state
        self._watch: asyncio.Task[None] | None = None
        self.context: grpc.aio.ServicerContext[bytes, bytes] = cygrpc._ServicerContext(
            state, None, None, server.loop
        )
        """Of the caller, to read the one message by, and for nothing else."""

    async def carried_out(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to. While it waits for something the caller may go away: then it is cancelled.

        Most work waits for nothing, and is done before anybody could go.
        """
        try:
            waits_for = work.send(None)
        except StopIteration as end:
            result: T = end.value
            return result
        loop = self._server.loop
        watch = cygrpc._handle_cancellation_from_core(self.task, self._state, loop)
        self._watch = self._server.keep(loop.create_task(watch))
        return await _rest_of(work, waits_for)

    async def answer(self, answer: bytes | grpc.Status) -> None:
        """Send the message, or the status that there is instead; back when the call is over."""
        operations: tuple[Any, ...]
        if isinstance(answer, bytes):
            operations = (
                cygrpc.SendMessageOperation(answer, _NO_FLAGS),
                cygrpc.SendStatusFromServerOperation((), _OK, "", _NO_FLAGS),
            )
        else:
            code, details, metadata = answer.code.value[0], answer.details, answer.trailing_metadata
            operations = (cygrpc.SendStatusFromServerOperation(metadata, code, details, _NO_FLAGS),)
        if self._watch is None:  # the core wants to be asked once for each call
            operations += (cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),)
        if self._server.has_stopped:  # the core's server is no more
            return
        try:
            await cygrpc.execute_batch(
                self._state,
                (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS), *operations),
                self._server.loop,
            )
        except cygrpc.ExecuteBatchError:
            return  # the caller has gone


@dataclass(frozen=True, slots=True, kw_only=True)
class UnaryMethod:
    """How the calls of a unary method are taken and answered."""

    answer: Callable[[Call], Coroutine[Any, Any, None]]
    """Answers one. Raises nothing but its cancellation."""
    at_once: int = 1
    """How many the core may hand over before we come back for more. With one alone each call of many costs a
    round of two threads to itself, a quarter of all that it costs."""


class AcceptingServer(grpc.aio._server.Server):  # type: ignore[name-defined,misc]  # it has no types
    """As `grpc.aio.server(options=...)` makes it, without thread pool and interceptors.

    Methods are added by `add_unary_methods` and `add_registered_method_handlers`; generic handlers get every
    call of another method, under the name `unknown`.
    """

    def __init__(self, options: Sequence[tuple[str, int]]) -> None:
        self._loop: asyncio.AbstractEventLoop = cygrpc.get_working_loop()
        self._server = _Acceptor(self._loop, options)

    def add_unary_methods(self, service: str, methods: Mapping[str, UnaryMethod]) -> None:
        """Unary methods of a service, by name."""
        self._server.add_unary_methods({f"/{service}/{name}": method for name, method in methods.items()})


class _Acceptor(cygrpc.AioServer):  # type: ignore[misc]  # it has no types
    def __init__(self, loop: asyncio.AbstractEventLoop, options: Sequence[tuple[str, int]]) -> None:
        self.loop = loop
        self.has_stopped = False
        self._unary: dict[str, UnaryMethod] = {}
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._rest: list[grpc.GenericRpcHandler] = []
        self._calls: set[asyncio.Task[None]] = set()
        super().__init__(loop, None, (), (), tuple(options), None)

    def add_unary_methods(self, methods: Mapping[str, UnaryMethod]) -> None:
        super().add_registered_method_handlers(dict.fromkeys(methods))
        self._unary.update(methods)

    def add_registered_method_handlers(self, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        super().add_registered_method_handlers(handlers)
        self._methods.update(handlers)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        super().add_generic_rpc_handlers(handlers)
        self._rest.extend(handlers)

    async def shutdown(self, grace: float | None) -> None:
        await super().shutdown(grace)
        self.has_stopped = True

    def keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """The task, which is not collected as garbage while it runs."""
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return task

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Task[None]:
        """What gRPC's loop waits for a call in. It gets none, and hears in the end that there are no more."""
        name = _UNKNOWN if method is None else method.decode()
        if method is not None and (unary := self._unary.get(name)) is not None:
            return self.loop.create_task(self._accept_several(method, unary))
        return self.loop.create_task(self._accept(method, name))

    async def _accept_several(self, method: bytes, unary: UnaryMethod) -> None:
        """Takes the calls of one method, until the core has no more to give, which it raises."""
        await asyncio.gather(*(self._accept_unary(method, unary) for _ in range(unary.at_once)))

    async def _accept_unary(self, method: bytes, unary: UnaryMethod) -> None:
        while True:
            call = Call(self, await self._request_registered_call(method))
            call.task = self.keep(self.loop.create_task(unary.answer(call)))
            del call  # the next one may be long in coming

    async def _accept(self, method: bytes | None, name: str) -> None:
        """The same, one by one, of a method that gRPC answers, or of all that nobody knows."""
        resolver = cygrpc._MethodResolver(self._rest, self._methods)
        while True:
            state = await (self._request_call() if method is None else self._request_registered_call(method))
            answer = cygrpc._handle_rpc(name, resolver, (), state, self.loop, False)
            self.keep(self.loop.create_task(cygrpc._schedule_rpc_coro(answer, state, self.loop, name)))
            del state, answer


@types.coroutine
def _rest_of(work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """The rest of a coroutine that has begun, and waits for something already."""
    while True:
        try:
            try:
                yield waits_for
            except BaseException as error:
                waits_for = work.throw(error)
            else:
                waits_for = work.send(None)
        except StopIteration as end:
            result: T = end.value
            return result
