"""The metrics over HTTP, for Prometheus: of one process, or of all workers together.

Each worker listens on the same port, and whoever is asked asks the others: every sample gets the label
`worker`, so that nothing has to be added up here. docs/decisions/0017-workers.md
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from keyturn_server.errors import KeyturnFault

_ANSWER_LIMIT = timedelta(seconds=2)


class MetricsAddressError(KeyturnFault):
    """Metrics cannot be served there; the message names the address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """Which of the workers this process is, and where each tells the others of its metrics."""

    index: int
    meeting_points: Sequence[str]
    """Abstract Unix sockets, worker by worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsPage:
    """Where the metrics are served."""

    host: str
    port: int
    ours: Ours | None = None
    """Unset: by one process, for itself."""

    @classmethod
    def at(cls, address: str) -> MetricsPage:
        """At `host:port`. Raises `MetricsAddressError`."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise MetricsAddressError(f"{address!r} is no address for metrics: give host:port.")
        return cls(host=host.strip("[]"), port=int(port))

    @contextmanager
    def served(self, registry: CollectorRegistry) -> Iterator[None]:
        """For the length of the block. Raises `MetricsAddressError`."""
        with ExitStack() as stack:
            shown = registry
            if self.ours is not None:
                stack.enter_context(_told(self.ours.meeting_points[self.ours.index], registry))
                shown = CollectorRegistry()
                shown.register(_Together(registry, self.ours))
            try:
                server = make_server(
                    self.host,
                    self.port,
                    make_wsgi_app(shown),
                    server_class=self._server_class(),
                    handler_class=_Handler,
                )
            except OSError as error:
                raise MetricsAddressError(
                    f"{self.host}:{self.port}: cannot be listened on for metrics: {error.strerror}."
                ) from None
            thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            yield

    def _server_class(self) -> type[WSGIServer]:
        try:
            family = socket.getaddrinfo(self.host, self.port)[0][0]
        except OSError as error:
            raise MetricsAddressError(
                f"{self.host}:{self.port}: cannot be listened on for metrics: {error.strerror}."
            ) from None

        class Server(ThreadingMixIn, WSGIServer):
            daemon_threads = True
            address_family = family
            allow_reuse_port = self.ours is not None

        return Server


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Nothing: stderr is for our own lines."""


class _Together(Collector):
    """The samples of all workers; without those of one that does not answer."""

    def __init__(self, own: CollectorRegistry, ours: Ours) -> None:
        self._own = own
        self._ours = ours

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for index, point in enumerate(self._ours.meeting_points):
            for family in self._own.collect() if index == self._ours.index else _asked(point):
                together = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    together.add_sample(
                        sample.name, {**sample.labels, "worker": str(index)}, sample.value, sample.timestamp
                    )
        return families.values()


def _asked(point: str) -> Iterable[Metric]:
    """What the worker there tells; nothing where it does not answer."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_ANSWER_LIMIT.total_seconds())
        try:
            asking.connect(point)
            with asking.makefile("r", encoding="utf-8") as answer:
                text = answer.read()
        except OSError:  # it is being started again
            return ()
    return list(text_string_to_metric_families(text))


@contextmanager
def _told(point: str, registry: CollectorRegistry) -> Iterator[None]:
    """Whoever connects there is told our metrics, for the length of the block."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(point)
        listener.listen()

        def tell() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # the end
                    return
                with connection:
                    connection.settimeout(_ANSWER_LIMIT.total_seconds())
                    try:
                        connection.sendall(generate_latest(registry))
                    except OSError:  # who asked has gone
                        continue

        thread = threading.Thread(target=tell, name="metrics of this worker", daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
