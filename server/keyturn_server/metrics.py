"""Prometheus metrics. No label ever holds a user, a key or a token."""

from __future__ import annotations

from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The sidecar's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "keyturn_calls_total",
            "RPCs by method and status code",
            ["method", "code"],
            registry=self.registry,
        )
        self._call_counters: dict[tuple[str, str], Counter] = {}
        """The children of `_calls`: finding one there costs more than counting."""
        self.calls_in_flight = Gauge(
            "keyturn_calls_in_flight", "RPCs being answered right now", registry=self.registry
        )
        self._shed = Counter(
            "keyturn_shed_total",
            "RPCs turned away because there was too much to do, by method",
            ["method"],
            registry=self.registry,
        )
        self._groups = Histogram(
            "keyturn_group_size",
            "Requests that share one statement, by kind",
            ["kind"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.push_up = Gauge(
            "keyturn_push_up", "1 while changes in the database are announced, else 0", registry=self.registry
        )
        self.unreadable_keys = Counter(
            "keyturn_unreadable_keys_total",
            "Decisions that met a stored key that does not open",
            registry=self.registry,
        )
        self.expired_holds = Counter(
            "keyturn_expired_holds_total", "Holds released because they ran out", registry=self.registry
        )
        self._key_checks = Counter(
            "keyturn_key_checks_total",
            "Keys that a provider was asked about, by provider and result",
            ["provider", "result"],
            registry=self.registry,
        )
        self._unavailable = Counter(
            "keyturn_store_unavailable_total",
            "Statements that the database did not take, by SQLSTATE",
            ["sqlstate"],
            registry=self.registry,
        )

        self._denied = Counter(
            "keyturn_access_denied_total",
            "Calls turned away, by status code",
            ["code"],
            registry=self.registry,
        )
        self.lost_audit_lines = Counter(
            "keyturn_audit_lost_total",
            "Lines of the audit that the log did not take",
            registry=self.registry,
        )
        self._in_force = Gauge(
            "keyturn_file_in_force",
            "1 while the watched files are in force as they are, 0 while older ones are",
            ["file"],
            registry=self.registry,
        )

        self.database_up = Gauge(
            "keyturn_database_up",
            "1 while the database is there and takes writes, else 0",
            registry=self.registry,
        )
        self.degraded_decisions = Counter(
            "keyturn_degraded_decisions_total",
            "Decisions made from what was last known, without the database",
            registry=self.registry,
        )
        self.spooled_records = Counter(
            "keyturn_spooled_records_total",
            "Records acknowledged as durable on the sidecar's own disk",
            registry=self.registry,
        )
        self.drained_records = Counter(
            "keyturn_drained_records_total",
            "Records brought from the spool to the database",
            registry=self.registry,
        )
        self._spool_up = Gauge(
            "keyturn_spool_up",
            "1 while records can be spooled, 0 while they cannot or there is no spool",
            registry=self.registry,
        )
        self._spool_records = Gauge(
            "keyturn_spool_records",
            "Records in the spool, by state",
            ["state"],
            registry=self.registry,
        )
        self._spool_bytes = Gauge(
            "keyturn_spool_bytes", "Bytes that the spool's file uses", registry=self.registry
        )
        self._spool_oldest = Gauge(
            "keyturn_spool_oldest_seconds",
            "When the oldest record in the spool was taken, in Unix time; 0 without any",
            registry=self.registry,
        )

    def spool(
        self, *, well: bool, waiting: int, set_aside: int, file_bytes: int, oldest: datetime | None
    ) -> None:
        """How the spool is."""
        self._spool_up.set(well)
        self._spool_records.labels("waiting").set(waiting)
        self._spool_records.labels("set_aside").set(set_aside)
        self._spool_bytes.set(file_bytes)
        self._spool_oldest.set(0 if oldest is None else oldest.timestamp())

    def key_checked(self, provider: str, result: str) -> None:
        """One provider was asked about a key."""
        self._key_checks.labels(provider, result).inc()

    def denied(self, code: str) -> None:
        """A caller was turned away."""
        self._denied.labels(code).inc()

    def in_force(self, file: str, *, latest: bool) -> None:
        """Whether the `access` file or the `tls` files are in force as they are now."""
        self._in_force.labels(file).set(latest)

    def unavailable(self, sqlstate: str) -> None:
        """One statement was not taken; empty where the server said nothing."""
        self._unavailable.labels(sqlstate).inc()

    def called(self, method: str, code: str) -> None:
        """One RPC has ended."""
        counter = self._call_counters.get((method, code))
        if counter is None:
            counter = self._call_counters[method, code] = self._calls.labels(method, code)
        counter.inc()

    def shed(self, method: str) -> None:
        """One RPC was turned away because there was too much to do."""
        self._shed.labels(method).inc()

    def grouped(self, kind: str, size: int) -> None:
        """One group has been run."""
        self._groups.labels(kind).observe(size)
