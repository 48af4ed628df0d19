"""A gRPC server that no call can end.

The loop of `grpc.aio` (1.85) decodes the path of each call, and shuts the whole server down where that
fails: one call with a path that is not UTF-8, by whoever gets as far as a connection, and nothing listens any
more. So calls are taken here: those of a method that we have by its name, which gRPC's core compares byte by
byte, and all others without a look at theirs. The rest is gRPC's own. docs/decisions/0016-accepting.md
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined,import-untyped,unused-ignore]

_UNKNOWN = "unknown"


class AcceptingServer(grpc.aio._server.Server):  # type: ignore[name-defined,misc]  # it has no types
    """As `grpc.aio.server(options=...)` makes it, without thread pool and interceptors.

    Methods are added by `add_registered_method_handlers`; generic handlers get every call of another method,
    under the name `unknown`.
    """

    def __init__(self, options: Sequence[tuple[str, int]]) -> None:
        self._loop: asyncio.AbstractEventLoop = cygrpc.get_working_loop()
        self._server = _Acceptor(self._loop, options)


class _Acceptor(cygrpc.AioServer):  # type: ignore[misc]  # it has no types
    def __init__(self, loop: asyncio.AbstractEventLoop, options: Sequence[tuple[str, int]]) -> None:
        self._ours = loop
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._rest: list[grpc.GenericRpcHandler] = []
        self._calls: set[asyncio.Task[None]] = set()
        """So that no call is collected as garbage while it runs."""
        super().__init__(loop, None, (), (), tuple(options), None)

    def add_registered_method_handlers(self, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        super().add_registered_method_handlers(handlers)
        self._methods.update(handlers)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        super().add_generic_rpc_handlers(handlers)
        self._rest.extend(handlers)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Task[None]:
        """What gRPC's loop waits for a call in. It gets none, and hears in the end that there are no more."""
        return self._ours.create_task(self._accept(method))

    async def _accept(self, method: bytes | None) -> None:
        """Takes the calls of one method, or of all that nobody knows, until the core has no more to give,
        which it raises."""
        name = _UNKNOWN if method is None else method.decode()
        resolver = cygrpc._MethodResolver(self._rest, self._methods)
        while True:
            state = await (self._request_call() if method is None else self._request_registered_call(method))
            answer = cygrpc._handle_rpc(name, resolver, (), state, self._ours, False)
            call = self._ours.create_task(cygrpc._schedule_rpc_coro(answer, state, self._ours, name))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            del state, answer, call  # the next one may be long in coming
