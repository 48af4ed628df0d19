"""Faults become one typed error each, whatever their details look like."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

import keyturn
from keyturn import (
    FieldViolation,
    InternalError,
    InvalidArgument,
    KeyturnError,
    NotFound,
    Resource,
    ResourceExhausted,
    Unavailable,
    errors,
)
from keyturn.v1 import status_pb2
from tests.client import scripted
from tests.client.conftest import PATIENCE, Connect, Either
from tests.client.scripted import Fault, Sidecar

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_every_status_becomes_its_own_class(
    connect: Connect, sidecar: Sidecar, code: grpc.StatusCode
) -> None:
    expected = {
        "INVALID_ARGUMENT": keyturn.InvalidArgument,
        "UNAUTHENTICATED": keyturn.Unauthenticated,
        "PERMISSION_DENIED": keyturn.PermissionDenied,
        "NOT_FOUND": keyturn.NotFound,
        "ALREADY_EXISTS": keyturn.AlreadyExists,
        "FAILED_PRECONDITION": keyturn.FailedPrecondition,
        "RESOURCE_EXHAUSTED": keyturn.ResourceExhausted,
        "UNAVAILABLE": keyturn.Unavailable,
        "DEADLINE_EXCEEDED": keyturn.DeadlineExceeded,
        "INTERNAL": keyturn.InternalError,
        "UNKNOWN": keyturn.InternalError,
        "DATA_LOSS": keyturn.InternalError,
    }.get(code.name, KeyturnError)
    sidecar.answers("Decide", Fault(code, "a sentence", [scripted.error_info("WHY", id="42")]))
    either = connect(timeout=PATIENCE, retries=keyturn.Retries(attempts=1))
    with pytest.raises(KeyturnError) as caught:
        await either("decide", **ASK)
    error = caught.value
    assert type(error) is expected
    assert error.code is code
    assert error.message == "a sentence"
    assert error.reason == "WHY"
    assert error.metadata == {"id": "42"}
    assert str(error) == f"{code.name} (WHY): a sentence"


async def test_refused_fields_are_named(either: Either, sidecar: Sidecar) -> None:
    bad = error_details_pb2.BadRequest(
        field_violations=[
            {"field": "user_id", "description": "is required"},
            {"field": "model", "description": "is too long"},
        ]
    )
    details = [scripted.error_info("INVALID_FIELD"), bad]
    sidecar.answers("Decide", Fault(grpc.StatusCode.INVALID_ARGUMENT, "Two fields.", details))
    with pytest.raises(InvalidArgument) as caught:
        await either("decide", **ASK)
    assert caught.value.field_violations == (
        FieldViolation("user_id", "is required"),
        FieldViolation("model", "is too long"),
    )
    assert str(caught.value) == (
        "INVALID_ARGUMENT (INVALID_FIELD): Two fields. [user_id: is required; model: is too long]"
    )


async def test_what_was_not_found_is_named(either: Either, sidecar: Sidecar) -> None:
    gone = error_details_pb2.ResourceInfo(
        resource_type="user", resource_name="u1", owner="nobody", description="unknown"
    )
    sidecar.answers("Decide", Fault(grpc.StatusCode.NOT_FOUND, "No such user.", [gone]))
    with pytest.raises(NotFound) as caught:
        await either("decide", **ASK)
    assert caught.value.resource == Resource("user", "u1", "unknown")
    assert caught.value.reason == ""


async def test_the_wait_that_the_server_asks_for_is_told(either: Either, sidecar: Sidecar) -> None:
    asked = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    sidecar.answers("Decide", Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "Busy.", [asked]))
    with pytest.raises(ResourceExhausted) as caught:
        await either("decide", **ASK)
    assert caught.value.retry_after == timedelta(seconds=1.5)


def _status(*details: Any) -> bytes:
    return status_pb2.Status(code=3, message="x", details=details).SerializeToString()


GOOD = scripted.packed(scripted.error_info("INVALID_FIELD"))[0]
MALFORMED = {
    "no protobuf at all": b"\xff\xff\xff",
    "cut short": _status(GOOD)[:-3],
    "an unknown detail": _status({"type_url": "type.googleapis.com/google.rpc.Help"}),
    "no type": _status({"value": b"\x01\x02"}),
    "garbage inside a detail": _status(
        {"type_url": "type.googleapis.com/google.rpc.ErrorInfo", "value": b"\x0a\xff"},
        {"type_url": "type.googleapis.com/google.rpc.BadRequest", "value": b"\x0a\x05\xff\xff"},
        {"type_url": "type.googleapis.com/google.rpc.RetryInfo", "value": b"\x0a\x01\xff"},
        {"type_url": "type.googleapis.com/google.rpc.ResourceInfo", "value": b"\x0a\x01\xff"},
    ),
    "a delay beyond all time": _status(
        *scripted.packed(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2**62)))
    ),
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_details_never_mask_the_status(either: Either, sidecar: Sidecar, raw: bytes) -> None:
    sidecar.answers("Decide", Fault(grpc.StatusCode.INVALID_ARGUMENT, "The sentence.", raw=raw))
    with pytest.raises(InvalidArgument) as caught:
        await either("decide", **ASK)
    error = caught.value
    assert str(error) == "INVALID_ARGUMENT: The sentence."
    assert error.field_violations == ()
    assert error.retry_after is None
    assert error.resource is None
    assert error.metadata == {}


async def test_one_garbled_detail_does_not_cost_the_others(either: Either, sidecar: Sidecar) -> None:
    raw = _status({"type_url": "x/google.rpc.RetryInfo", "value": b"\xff"}, GOOD)
    sidecar.answers("Decide", Fault(grpc.StatusCode.INVALID_ARGUMENT, raw=raw))
    with pytest.raises(InvalidArgument) as caught:
        await either("decide", **ASK)
    assert caught.value.reason == "INVALID_FIELD"


def test_a_status_number_that_does_not_exist_is_an_internal_error() -> None:
    error = errors.from_status(status_pb2.Status(code=99, message="odd"))
    assert type(error) is InternalError
    assert error.code is grpc.StatusCode.UNKNOWN


def test_a_delay_before_now_is_no_delay() -> None:
    past = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=-5))
    status = status_pb2.Status(code=14, details=scripted.packed(past))
    assert errors.from_status(status).retry_after == timedelta()


def test_an_error_survives_pickling() -> None:
    error = errors.from_status(status_pb2.Status(code=14, message="gone", details=[GOOD]))
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    assert type(again) is Unavailable
    assert (again.reason, again.code, str(again)) == (error.reason, error.code, str(error))


READ_DETAILS = """
status = keyturn.v1.status_pb2.Status(code=14, message="gone")
status.details.add().Pack(error_details_pb2.ErrorInfo(reason="R", metadata={"a": "b"}))
error = keyturn.errors.from_status(status)
assert (error.reason, error.metadata) == ("R", {"a": "b"}), error
"""
WITHOUT_GOOGLEAPIS = """
import sys
sys.modules["google.rpc"] = None  # not installed
import keyturn
raw = b"\\x0a\\x01R"
status = keyturn.v1.status_pb2.Status(code=14)
status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=raw)
assert keyturn.errors.from_status(status).reason == "R"
from google.protobuf import descriptor_pool
try:
    descriptor_pool.Default().FindMessageTypeByName("google.rpc.ErrorInfo")
except KeyError:
    pass
else:
    raise AssertionError("registered in everyone's pool")
"""


@pytest.mark.parametrize(
    "program",
    [
        "import keyturn\nfrom google.rpc import error_details_pb2" + READ_DETAILS,
        "from google.rpc import error_details_pb2\nimport keyturn" + READ_DETAILS,
        WITHOUT_GOOGLEAPIS,
    ],
    ids=["keyturn first", "googleapis first", "without googleapis"],
)
def test_the_details_get_on_with_googleapis_in_either_order(program: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment)
