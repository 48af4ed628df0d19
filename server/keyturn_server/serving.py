"""Sockets, health and drain: a running sidecar on its addresses."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from keyturn_server.access_file import Callers
from keyturn_server.errors import KeyturnFault
from keyturn_server.metrics import Metrics
from keyturn_server.metrics_page import MetricsPage
from keyturn_server.private_files import locked, make_private
from keyturn_server.rpc.accepting import AcceptingServer
from keyturn_server.rpc.guard import MAX_BATCH_BYTES, Context, Guard, Service
from keyturn_server.tls import TlsFiles
from keyturn_server.watched import Watched

_MAX_SOCKET_PATH = 107
_SERVING: int = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING

# Clients ping a quiet connection, so that a load balancer keeps it and a dead one is noticed. gRPC would take
# one ping in 5 minutes, in 2 hours between calls, and close the connection on the third that is faster. One
# in 10 s is promised; the second less is for pings that were held up on their way.
_PING_INTERVAL = timedelta(seconds=9)

# A peer that went away without a word is noticed, and its connection closed.
_KEEPALIVE = timedelta(minutes=1)
_KEEPALIVE_TIMEOUT = timedelta(seconds=20)

# More than we turn away in a second. There is no limit for each connection (max_concurrent_streams): gRPC's
# own clients open more streams than it allows, and hear UNAVAILABLE then.
_MOST_PENDING = 16_384

# More than all calls in flight make; Python's default is 700. At some 100 bytes each.
_GARBAGE_THRESHOLD = 20_000

# One server an address: with SO_REUSEPORT a second one would silently take half of the calls.
_ALONE = (("grpc.so_reuseport", 0),)

# The kernel spreads connections among workers, and those of a worker that died stay with the others: so
# clients are told to connect again now and then, once what they have begun is done.
_CONNECTION_AGE = timedelta(minutes=10)
_SHARED = (
    ("grpc.so_reuseport", 1),
    ("grpc.max_connection_age_ms", _CONNECTION_AGE // timedelta(milliseconds=1)),
)

_OPTIONS = (
    # A little above the limit of our own, which answers with details.
    ("grpc.max_receive_message_length", MAX_BATCH_BYTES + 64 * 1024),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL // timedelta(milliseconds=1)),
    # Beyond 1000 that have not come to us yet gRPC would cancel calls, without a reason. We say why.
    ("grpc.server.max_pending_requests", _MOST_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
    ("grpc.keepalive_time_ms", _KEEPALIVE // timedelta(milliseconds=1)),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT // timedelta(milliseconds=1)),
)


class AddressError(KeyturnFault):
    """An address cannot be listened on; the message names it and the way out."""


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
    """The health of the process, of each service, and of the push, as grpc.health.v1.Health.

    Not the library's servicer: its watches never end, so that a drain would have to cut every call.
    """

    def __init__(self) -> None:
        self._well: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self.draining = asyncio.Event()
        """Set when nothing is well any more, for good."""

    def report(self, service: str, *, well: bool) -> None:
        """Tell whoever asks or watches; the empty name is the process as a whole."""
        self._well[service] = well
        self._tell()

    def drain(self) -> None:
        """From now on nothing is well. Watches end once they have said so."""
        self.draining.set()
        self._tell()

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The health of one service; NOT_FOUND for an unknown one."""
        status = self._status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthListRequest, context: Context
    ) -> health_pb2.HealthListResponse:
        """The health of everything."""
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in self._well}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> None:
        """The health of one service, and again whenever it changes."""
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status is None:
                status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if self.draining.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "The sidecar is shutting down.")
            await changed.wait()

    def _status(self, service: str) -> int | None:
        if service not in self._well:
            return None
        return _SERVING if self._well[service] and not self.draining.is_set() else _NOT_SERVING

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What is served."""

    services: tuple[Service, ...]
    guard: Guard
    health: Health
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """For how long a connection may do nothing."""

    first_words: timedelta
    """From its opening until it has said that it speaks HTTP/2, TLS included."""
    idle: timedelta
    """Without a call. It is then told to go, so that no call is lost."""

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        """As gRPC takes them."""
        return (
            ("grpc.server_handshake_timeout_ms", max(1, self.first_words // timedelta(milliseconds=1))),
            ("grpc.max_connection_idle_ms", max(1, self.idle // timedelta(milliseconds=1))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """How callers may come in."""

    insecure_loopback: bool = False
    """Whether every local process may call a loopback address."""
    callers: Watched[Callers] | None = None
    tls: Watched[TlsFiles] | None = None
    """With it, TCP is spoken over TLS alone."""

    @property
    def mutual_tls(self) -> bool:
        """Whether callers over TCP have to have a certificate."""
        return self.tls is not None and self.tls.value.client_ca is not None


def checked(addresses: Sequence[str], admission: Admission) -> tuple[str, ...]:
    """The addresses as gRPC takes them, if all of them may be listened on. Raises `AddressError`."""
    return tuple(_check(address, admission) for address in addresses)


@contextlib.contextmanager
def claimed(addresses: Sequence[str], admission: Admission) -> Iterator[tuple[str, ...]]:
    """The addresses, `checked`, and the Unix sockets among them locked for this process.

    Done before anything else, so that a second sidecar fails before it touches the database. Raises
    `AddressError`.
    """
    ours = checked(addresses, admission)
    with contextlib.ExitStack() as stack:
        for address in ours:
            if address.startswith("unix:"):
                # gRPC would take a socket over from a running server.
                lock = Path(f"{address.removeprefix('unix:')}.lock")
                taken = f"{address}: another server listens there."
                stack.enter_context(locked(lock, taken=taken, fault=AddressError))
        yield ours


@asynccontextmanager
async def serving(
    services: Services,
    addresses: Sequence[str],
    *,
    tls: Watched[TlsFiles] | None,
    with_reflection: bool,
    metrics_page: MetricsPage | None,
    shares_ports: bool,
    limits: Limits,
    drain_timeout: timedelta,
    log: Any,
) -> AsyncIterator[tuple[str, ...]]:
    """Answers on addresses that are `claimed` for the length of the block, then drains.

    With `shares_ports` other processes may listen on the same TCP ports, and take a part of the connections.

    The addresses come back as they are listened on: a port of 0 as the port it became. Raises
    `AddressError`.
    """
    server = AcceptingServer((*_OPTIONS, *(_SHARED if shares_ports else _ALONE), *limits.options))
    names = tuple(service.name for service in services.services)
    foreign = _Foreign()
    health_pb2_grpc.add_HealthServicer_to_server(services.health, foreign)
    if with_reflection:
        channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.aio.ChannelzServicer(), foreign)
        reflected = (*names, *foreign.services, reflection.SERVICE_NAME)
        foreign.services |= _reflection(reflected, services.health.draining)
    guard = services.guard
    for service in services.services:
        server.add_unary_methods(service.name, guard.methods(service))
    for name, handlers in foreign.services.items():
        server.add_registered_method_handlers(name, guard.foreign(handlers))
    server.add_generic_rpc_handlers([guard.rest()])
    with contextlib.ExitStack() as stack:
        bound = tuple([_bind(server, address, tls) for address in addresses])
        if metrics_page is not None:
            stack.enter_context(metrics_page.served(services.metrics.registry))
        for name in ("", *names):
            services.health.report(name, well=True)
        await server.start()
        log.info("serving", addresses=list(bound))
        try:
            yield bound
        finally:
            # New calls are told to go elsewhere, those in flight are finished. What never ends by
            # itself, watches and reflection, has been told to: so this ends with the last answer.
            log.info("draining", in_flight=guard.in_flight)
            services.health.drain()
            await server.stop(drain_timeout.total_seconds())
            await guard.settled()
            log.info("stopped")


async def until_signalled(sidecar: AbstractAsyncContextManager[object], *, log: Any) -> None:
    """Run `sidecar` until SIGTERM or SIGINT; a second signal ends the process at once.

    SIGINT stays ignored where we were started so, as a shell does with what it runs in the background.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    starting = asyncio.current_task()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        log.info("signalled", signal=number.name)
        stop.set()
        if starting is not None:
            starting.cancel()

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        async with sidecar:
            starting = None
            # What has been made so far lasts: full collections, which every call waits for, pass it by.
            gc.collect()
            gc.freeze()
            # Calls in flight are not worth a collection: there is next to nothing in them to collect.
            gc.set_threshold(_GARBAGE_THRESHOLD)
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Foreign:
    """Takes the place of a server where generated code adds a service, and keeps its handlers."""

    def __init__(self) -> None:
        self.services: dict[str, Mapping[str, grpc.RpcMethodHandler[Any, Any]]] = {}

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        self.services[service_name] = method_handlers

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The same handlers in another form."""


def _reflection(
    services: tuple[str, ...], draining: asyncio.Event
) -> dict[str, Mapping[str, grpc.RpcMethodHandler[Any, Any]]]:
    """Reflection under its two names: the library has only v1alpha, which v1 equals on the wire."""
    servicer = reflection.aio.ReflectionServicer(services)

    async def answer(requests: AsyncIterator[Any], context: Context) -> None:
        async for response in servicer.ServerReflectionInfo(requests, context):
            await context.write(response)

    async def converse(requests: AsyncIterator[Any], context: Context) -> None:
        """Until the client has no more questions, or we are draining."""
        try:
            async with asyncio.TaskGroup() as tasks:
                answering = tasks.create_task(answer(requests, context))
                ending = tasks.create_task(draining.wait())
                await asyncio.wait((answering, ending), return_when=asyncio.FIRST_COMPLETED)
                answering.cancel()
                ending.cancel()
        except ExceptionGroup as group:  # of one: only the answering can fail
            raise group.exceptions[0] from None

    handler = grpc.stream_stream_rpc_method_handler(
        converse,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    return {reflection.SERVICE_NAME: methods, "grpc.reflection.v1.ServerReflection": methods}


def _check(address: str, admission: Admission) -> str:
    """The address as gRPC takes it, if it is one that may be listened on."""
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:").removeprefix("//")).absolute()
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise AddressError(
                f"{path}: a Unix socket's path has at most {_MAX_SOCKET_PATH} bytes; choose a shorter one."
            )
        # Whoever can enter the directory of a socket can call.
        make_private(path.parent, what="socket", fault=AddressError)
        return f"unix:{path}"
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"{address!r} is no address: give unix:PATH or host:port.")
    if admission.tls is not None:
        if admission.insecure_loopback:
            raise AddressError(
                f"{address}: --insecure-loopback is for TCP without TLS. Leave it out, or --tls-cert."
            )
        if admission.callers is None:
            raise AddressError(f"{address}: TLS knows its callers from an access file: give --access-file.")
    elif not _is_loopback(host.strip("[]")):
        raise AddressError(
            f"{address}: TCP off loopback needs TLS (--tls-cert, --tls-key) and an access file "
            "(--access-file). Give them, or listen on loopback or a Unix socket."
        )
    elif not admission.insecure_loopback and not (admission.callers and admission.callers.value.by_token):
        raise AddressError(
            f"{address}: any local process could call a TCP port. Listen on unix:PATH, give an access "
            "file with tokens (--access-file), or say --insecure-loopback if every local process may."
        )
    return address


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(server: grpc.aio.Server, address: str, tls: Watched[TlsFiles] | None) -> str:
    try:
        if tls is None or address.startswith("unix:"):
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _credentials(tls))
    except RuntimeError:
        port = 0
    if not port:
        raise AddressError(f"{address}: cannot be listened on; is another server there?")
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _credentials(tls: Watched[TlsFiles]) -> grpc.ServerCredentials:
    """The credentials of one port. For each connection gRPC asks whether the files are other ones."""
    used = tls.value

    def newer() -> Any:
        nonlocal used
        if (latest := tls.value) is used:
            return None
        used = latest
        return _certificates(latest)

    return grpc.dynamic_ssl_server_credentials(_certificates(used), newer, used.client_ca is not None)


def _certificates(tls: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(tls.private_key, tls.certificate_chain)], root_certificates=tls.client_ca
    )
