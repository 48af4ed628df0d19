"""The yardstick: a bare grpc.aio server on uvloop, which answers with as many bytes as its method says.

`python -m tests.bench.echo BYTES…` listens on a free port of loopback and prints it. It does what no
gRPC service in Python can do without: bytes in, bytes out, on the options that the sidecar has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grpc
import uvloop

_SERVICE = "keyturn.bench.Echo"


def path_of(response_bytes: int) -> str:
    """The path of the method that answers with a message of so many bytes."""
    return f"/{_SERVICE}/Answer{response_bytes}"


def _handler(response_bytes: int) -> grpc.RpcMethodHandler[bytes, bytes]:
    answer = bytes(response_bytes)

    async def handle(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return answer

    return grpc.unary_unary_rpc_method_handler(handle)


async def _serve(sizes: Sequence[int]) -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    handlers = {path_of(size).rpartition("/")[2]: _handler(size) for size in sizes}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve([int(size) for size in sys.argv[1:]]))
