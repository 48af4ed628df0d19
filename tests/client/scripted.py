"""A sidecar that answers what a test tells it to: the real servicer, over a real socket."""

# ruff: noqa: N802  the names of the RPCs

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from keyturn.v1 import policy_pb2, status_pb2
from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1.routing_service_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)

SECRET = "sk-live-do-not-print-0123456789"
HANDLE = "kth1_AAAABBBBCCCCDDDDEEEEFFFFGGGGHHHHIIIIJJJJ"
OTHER_HANDLE = "kth1_ZZZZYYYYXXXXWWWWVVVVUUUUTTTTSSSSRRRRQQQQ"
TICKET = "ktt1_aaaabbbbccccddddeeeeffffgggghhhhiiiijjjj"
EXPIRES = timestamp_pb2.Timestamp(seconds=1_900_000_000)


def own_key(handle: str = HANDLE, secret: str = SECRET) -> pb.DecideResponse:
    return pb.DecideResponse(
        decision_id="decision-1",
        mode=policy_pb2.MODE_BYOK_FIRST,
        reason=policy_pb2.REASON_BYOK_FIRST_OWN_KEY,
        message="The user's own key pays.",
        key=pb.KeyHandle(
            handle=handle,
            key_id="key-1",
            provider="openai",
            hint="6789",
            secret=secret,
            auth=pb.KeyHandle.Auth(header="Authorization", prefix="Bearer "),
            base_url="https://api.openai.com/v1",
            expire_time=EXPIRES,
        ),
    )


def credits_pay() -> pb.DecideResponse:
    return pb.DecideResponse(
        decision_id="decision-2",
        mode=policy_pb2.MODE_BYOK_FIRST,
        reason=policy_pb2.REASON_BYOK_FIRST_NO_KEY,
        message="Credits pay.",
        ticket=pb.CreditTicket(
            ticket=TICKET, hold_micros=20_000, available_micros=480_000, expire_time=EXPIRES
        ),
    )


def denied() -> pb.DecideResponse:
    return pb.DecideResponse(
        decision_id="decision-3",
        mode=policy_pb2.MODE_BYOK_ONLY,
        reason=policy_pb2.REASON_DENIED,
        message="Only an own key may pay, and the user has none.",
        denial=pb.Denial(
            reason=policy_pb2.DENIAL_REASON_BYOK_REQUIRED,
            retryable=True,
            retry_after=duration_pb2.Duration(seconds=30),
            suggestion="Add a key.",
        ),
    )


def recorded() -> pb.RecordResponse:
    return pb.RecordResponse(
        record_id="decision-2",
        charged_micros=1_500,
        released_micros=18_500,
        balance_micros=498_500,
        cost_source=pb.COST_SOURCE_PRICED,
        durability=pb.DURABILITY_DATABASE,
    )


def packed(*details: Message) -> list[any_pb2.Any]:
    """Details as the server sends them."""
    anys = []
    for detail in details:
        one = any_pb2.Any()
        one.Pack(detail)
        anys.append(one)
    return anys


def error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="keyturn", metadata=metadata)


@dataclass
class Fault:
    """Answer with a status. `raw` is what to send as its details, instead of real ones."""

    code: grpc.StatusCode
    message: str = "a sentence"
    details: Sequence[Message] = ()
    raw: bytes | None = None

    def abort(self, context: grpc.ServicerContext) -> None:
        status = status_pb2.Status(
            code=self.code.value[0], message=self.message, details=packed(*self.details)
        )
        trailing = status.SerializeToString() if self.raw is None else self.raw
        if trailing:
            context.set_trailing_metadata((("grpc-status-details-bin", trailing),))
        context.abort(self.code, self.message)


UNAVAILABLE = Fault(grpc.StatusCode.UNAVAILABLE, "The store cannot be reached.")

Answer = Message | Fault
Step = Answer | Callable[[Any], Answer]


@dataclass
class Received:
    """One call as it arrived."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    seconds_left: float
    at: float


@dataclass(repr=False)  # it holds secrets, and shows up in reports that print local variables
class Sidecar(RoutingServiceServicer):
    """`sidecar.answers("Decide", UNAVAILABLE, own_key())`: in order, the last one for ever."""

    target: str = ""
    received: list[Received] = field(default_factory=list)
    script: dict[str, deque[Step]] = field(default_factory=lambda: defaultdict(deque))
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def answers(self, method: str, *steps: Step) -> None:
        self.script[method] = deque(steps)

    def calls(self, method: str) -> list[Any]:
        """The requests that arrived for a method."""
        with self.lock:
            return [each.request for each in self.received if each.method == method]

    def hang(self, request: Any) -> Message:
        """A step that answers nothing until the server stops."""
        self.stopped.wait(60)
        return own_key()

    def Decide(self, request: pb.DecideRequest, context: Any) -> Any:
        return self._answer("Decide", request, context, credits_pay())

    def Record(self, request: pb.RecordRequest, context: Any) -> Any:
        return self._answer("Record", request, context, recorded())

    def Redeem(self, request: pb.RedeemRequest, context: Any) -> Any:
        return self._answer("Redeem", request, context, pb.RedeemResponse(secret=SECRET))

    def Explain(self, request: pb.ExplainRequest, context: Any) -> Any:
        return self._answer("Explain", request, context, pb.ExplainResponse())

    def BatchDecide(self, request: pb.BatchDecideRequest, context: Any) -> Any:
        return self._answer("BatchDecide", request, context, pb.BatchDecideResponse())

    def BatchRecord(self, request: pb.BatchRecordRequest, context: Any) -> Any:
        taken = [pb.BatchRecordResult(response=recorded()) for _ in request.requests]
        return self._answer("BatchRecord", request, context, pb.BatchRecordResponse(results=taken))

    def _answer(self, method: str, request: Any, context: Any, default: Message) -> Any:
        seconds_left = context.time_remaining()
        metadata = dict(context.invocation_metadata())
        with self.lock:
            self.received.append(Received(method, request, metadata, seconds_left, time.monotonic()))
            steps = self.script[method]
            step = steps.popleft() if len(steps) > 1 else steps[0] if steps else default
        answer = step(request) if callable(step) else step
        if isinstance(answer, Fault):
            answer.abort(context)
        return answer


@contextmanager
def serving(address: str, credentials: grpc.ServerCredentials | None = None) -> Iterator[Sidecar]:
    """A scripted sidecar on `unix:PATH` or `HOST:0`; `target` says where to call it."""
    sidecar = Sidecar()
    with futures.ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        add_RoutingServiceServicer_to_server(sidecar, server)
        port = (
            server.add_insecure_port(address)
            if credentials is None
            else server.add_secure_port(address, credentials)
        )
        host, _, asked = address.rpartition(":")
        sidecar.target = f"{host}:{port}" if asked == "0" else address
        server.start()
        try:
            yield sidecar
        finally:
            sidecar.stopped.set()
            server.stop(0).wait()
