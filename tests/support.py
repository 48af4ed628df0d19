"""What tests stand on: a real sidecar over a real socket on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import io
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status

from keyturn.v1 import (
    credit_service_pb2_grpc,
    flag_service_pb2_grpc,
    key_service_pb2_grpc,
    report_service_pb2_grpc,
    routing_service_pb2_grpc,
    user_service_pb2_grpc,
)
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.app import sidecar
from keyturn_server.settings import Settings
from tests.canaries import check_files, check_metrics, check_text, remember, remember_fields

T = TypeVar("T")

MASTER_KEY = "3f8a1c5e7b9d2046a8c0e2f4163758b9da7c1e3f5b0924867dacbe1f30527496"
remember("master key", MASTER_KEY)


@asynccontextmanager
async def in_own_task(manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves `manager` in one task: a fixture's two halves run in two."""
    entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def hold() -> None:
        try:
            async with manager as value:
                entered.set_result(value)
                await leave.wait()
        except BaseException as error:
            if not entered.done():
                entered.set_exception(error)
            else:
                raise

    task = asyncio.create_task(hold())
    try:
        yield await entered
    finally:
        leave.set()
        await task


@asynccontextmanager
async def temporary_directory() -> AsyncIterator[Path]:
    """A short path under /tmp that another user may enter: for sockets, and PostgreSQL under root."""
    path = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Fault(Exception):  # noqa: N818 - the word of the design
    """A call that ended with another status than OK."""

    def __init__(self, code: grpc.StatusCode, message: str, status: status_pb2.Status | None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.details = [] if status is None else list(status.details)


_STUBS = (
    routing_service_pb2_grpc.RoutingServiceStub,
    key_service_pb2_grpc.KeyServiceStub,
    flag_service_pb2_grpc.FlagServiceStub,
    credit_service_pb2_grpc.CreditServiceStub,
    user_service_pb2_grpc.UserServiceStub,
    report_service_pb2_grpc.ReportServiceStub,
)


def method_of(channel: grpc.aio.Channel, name: str) -> Any:
    """The method of that name, of whatever service: no two services share one."""
    return next(found for stub in _STUBS if (found := getattr(stub(channel), name, None)) is not None)


@dataclass(kw_only=True)
class Caller:
    """A gateway's channel to a sidecar. Remembers what was acknowledged, for the invariants."""

    channel: grpc.aio.Channel
    acknowledged: list[str] = field(default_factory=list)

    async def call(self, method: str, request: Any, **options: Any) -> Any:
        """One call of a method of any service. Raises `Fault`."""
        remember_fields(request)
        for key, value in options.get("metadata", ()):
            if key == "authorization":
                remember(key, str(value))
        try:
            answer = await method_of(self.channel, method)(request, timeout=30, **options)
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)
            check_text("a fault", f"{error.details()} {status}")
            raise Fault(error.code(), error.details() or "", status) from None
        remember_fields(answer)
        if method == "Record":
            self.acknowledged.append(answer.record_id)
        elif method == "BatchRecord":
            self.acknowledged += [
                one.response.record_id for one in answer.results if one.HasField("response")
            ]
        return answer

    async def decide(self, user_id: str, provider: str = "openai", **fields: Any) -> pb.DecideResponse:
        answer: pb.DecideResponse = await self.call(
            "Decide", pb.DecideRequest(user_id=user_id, provider=provider, **fields)
        )
        return answer

    async def record(
        self, decision: pb.DecideResponse | str, outcome: int, **fields: Any
    ) -> pb.RecordResponse:
        """Records the outcome of a decision, or of a handle or ticket."""
        if isinstance(decision, str):
            settles = {"key_handle" if decision.startswith("kth") else "credit_ticket": decision}
        elif decision.WhichOneof("route") == "key":
            settles = {"key_handle": decision.key.handle}
        else:
            settles = {"credit_ticket": decision.ticket.ticket}
        answer: pb.RecordResponse = await self.call(
            "Record",
            pb.RecordRequest(outcome=outcome, **settles, **fields),  # type: ignore[arg-type]
        )
        return answer


@dataclass(kw_only=True)
class Sidecar(Caller):
    """A running sidecar of this process."""

    address: str
    log: io.StringIO
    settings: Settings
    addresses: tuple[str, ...] = ()
    """All of them; `address` is the first."""


def make_settings(dsn: str, address: str, **changes: Any) -> Settings:
    """Settings for a test's sidecar, with nothing from the environment."""
    values: dict[str, Any] = {
        "database_url": dsn,
        "embedded": None,
        "listen": (address,),
        "encryption_key": MASTER_KEY,
        "encryption_keys_retired": None,
        # On a busy machine a database may be slow, and is not away.
        "silence_timeout": 30,
        **changes,
    }
    return Settings(**values)


def log_into(stream: io.StringIO) -> Any:
    """A logger of JSON lines into `stream`: with traces and the scrubber as the sidecar's own has them."""
    from keyturn_server.logs import scrub_event

    return structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            scrub_event,
            structlog.processors.JSONRenderer(),
        ],
    )


@asynccontextmanager
async def running_sidecar(dsn: str, *, also: Sequence[str] = (), **changes: Any) -> AsyncIterator[Sidecar]:
    """A sidecar of this process on a Unix socket of its own and on `also`, and a channel to the socket."""
    async with temporary_directory() as directory:
        address = f"unix:{directory}/run/{secrets.token_hex(4)}.sock"
        settings = make_settings(dsn, address, **{"listen": (address, *also), **changes})
        log = io.StringIO()
        async with (
            in_own_task(sidecar(settings, log=log_into(log), audit=log)) as addresses,
            # A channel of its own for each: gRPC shares connections between channels that look alike.
            grpc.aio.insecure_channel(
                addresses[0], options=[("grpc.use_local_subchannel_pool", 1)]
            ) as channel,
        ):
            yield Sidecar(
                address=addresses[0], channel=channel, log=log, settings=settings, addresses=addresses
            )
        check_text("the log", log.getvalue())
        check_metrics()
        check_files(directory)


async def eventually(check: Any, *, seconds: float = 20) -> Any:
    """What `check` comes to once it is true. A limit, not a measurement."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        if result := await check():
            return result
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError("not within the limit")
        await asyncio.sleep(0.02)
