"""`keyturn health`: is it well?"""

from __future__ import annotations

import sys
from datetime import timedelta

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keyturn_server.cli.connection import DEFAULT, Connection, connected
from keyturn_server.cli.stdout import write

_TIMEOUT = timedelta(seconds=4)


def health(service: str = "", /, *, connection: Connection = DEFAULT) -> None:
    """Ask a running sidecar whether it is well, for a probe: exit code 0 if it is, 1 if not.

    Parameters
    ----------
    service
        What to ask about, such as keyturn.push for the database. Default: the process as a whole.
    """
    uvloop.run(_health(service, connection))


async def _health(service: str, connection: Connection) -> None:
    async with connected(connection) as channel:
        stub = health_pb2_grpc.HealthStub(channel.grpc)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = await channel.call(stub.Check, request, timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            print(f"keyturn: {error.code().name}: {error.details()}", file=sys.stderr)
            raise SystemExit(1) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    write(status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit(1)
