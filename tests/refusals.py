"""Faults, read as a client reads them: the code, and the details unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from keyturn.v1 import status_pb2
from tests.factories import Connection
from tests.support import Caller, Fault


class Refusal:
    """One fault. Raises AssertionError unless it has exactly one ErrorInfo, of our domain."""

    def __init__(self, code: int, message: str, details: Sequence[Any]) -> None:
        self.code = next(each for each in grpc.StatusCode if each.value[0] == code)
        self.message = message
        self.details = details
        self.info = error_details_pb2.ErrorInfo()
        self.retry = error_details_pb2.RetryInfo()
        self.resource = error_details_pb2.ResourceInfo()
        bad = error_details_pb2.BadRequest()
        self.names = sorted(detail.TypeName().rpartition(".")[2] for detail in details)
        for detail in details:
            assert any(detail.Unpack(kind) for kind in (self.info, self.retry, self.resource, bad))
        self.fields = {violation.field: violation.description for violation in bad.field_violations}
        assert self.names.count("ErrorInfo") == 1
        assert self.info.domain == "keyturn"

    @classmethod
    def of(cls, error: Fault | grpc.aio.AioRpcError | status_pb2.Status) -> Refusal:
        """That of a call, or of one item of a batch."""
        match error:
            case Fault():
                return cls(error.code.value[0], error.message, error.details)
            case status_pb2.Status():
                return cls(error.code, error.message, error.details)
        status = rpc_status.from_call(error)
        assert status is not None, error
        return cls(status.code, status.message, status.details)

    def check(self, code: grpc.StatusCode, reason: str, *others: str) -> Refusal:
        """Raises AssertionError unless it is that code and reason, with those details besides."""
        assert (self.code, self.info.reason) == (code, reason), self.message
        assert self.names == sorted(["ErrorInfo", *others])
        assert self.message.endswith(".")
        return self

    def check_field(self, field: str, sentence: str) -> None:
        """Raises AssertionError unless it is about that one field, and says that of it."""
        self.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "BadRequest")
        assert list(self.fields) == [field]
        assert sentence in self.fields[field]
        assert field in self.message


async def refused(sidecar: Caller, method: str, request: Any) -> Refusal:
    """The refusal of a request."""
    with pytest.raises(Fault) as caught:
        await sidecar.call(method, request)
    return Refusal.of(caught.value)


async def contents(sql: Connection) -> dict[str, str]:
    """Every table's rows, as text."""
    tables = await sql.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    query = "SELECT coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), '') FROM {} t"
    return {row["tablename"]: await sql.fetchval(query.format(row["tablename"])) for row in tables}
