"""The settings, read once: the only reader of the environment.

Every setting is `KEYTURN_*`; the exceptions are the master keys, `ENCRYPTION_KEY` and
`ENCRYPTION_KEYS_RETIRED`, whose names products that migrate to Keyturn already use.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from keyturn_server.access import ALL_ROLES, Role
from keyturn_server.errors import KeyturnFault

# Names with this alias are read as they are, without the prefix.
_MASTER_KEY = "ENCRYPTION_KEY"
_RETIRED_KEYS = "ENCRYPTION_KEYS_RETIRED"


# Tracers of gRPC that print headers (with the callers' tokens) or bytes as they are sent, and two that are
# there to print bytes and do not do so in the gRPC that we run on. A test compares.
PRINTING_TRACERS: Final = (
    "chttp2_hpack_parser",
    "secure_endpoint",
    "event_engine_endpoint_data",
    "tcp",
)
# With these gRPC prints no traces. `keyturn` sets the first where the variable is unset.
_SILENT: Final = frozenset({"none", "error"})


class SettingsError(KeyturnFault):
    """A setting is not usable; the message names it, and never shows its value."""


class Settings(BaseSettings):
    """What the sidecar runs with. Frozen; durations are in seconds in the environment."""

    model_config = SettingsConfigDict(
        env_prefix="KEYTURN_", frozen=True, hide_input_in_errors=True, extra="ignore", populate_by_name=True
    )

    database_url: SecretStr | None = None
    """PostgreSQL of the operator's: `postgresql://user:password@host/database`."""
    embedded: Path | None = None
    """A directory for an embedded PostgreSQL, instead of `database_url`."""
    listen: Annotated[tuple[str, ...], NoDecode] = ()
    """Addresses, `unix:PATH` or `host:port`, comma-separated. Empty: the default Unix socket."""
    workers: int = Field(default=1, ge=1, le=64)
    """How many processes share the addresses."""
    reflection: bool = False
    insecure_loopback: bool = False
    socket_roles: Annotated[frozenset[Role], NoDecode] = Field(default=ALL_ROLES, min_length=1)
    """The roles of whoever calls on a Unix socket, comma-separated."""
    access_file: Path | None = None
    """Who else may call: see access_file.py."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Whose certificates callers over TLS have to have. Unset: they are asked for none."""
    metrics: str | None = None
    """`host:port` for Prometheus; none by default."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    encryption_key: SecretStr | None = Field(default=None, validation_alias=_MASTER_KEY)
    encryption_keys_retired: SecretStr | None = Field(default=None, validation_alias=_RETIRED_KEYS)
    """Comma-separated."""

    default_hold_micros: int = Field(default=50_000, ge=0, le=1_000_000_000_000)
    """What a request without an estimate holds, in micro-USD."""
    hold_ttl: timedelta = Field(default=timedelta(minutes=10), ge=timedelta(seconds=1), le=timedelta(days=1))
    """How long a hold or handle lives when the caller does not say."""
    sweep_interval: timedelta = Field(default=timedelta(seconds=5), gt=timedelta(0))
    """How often expired holds are released."""

    flag_ttl: timedelta = Field(default=timedelta(seconds=300), gt=timedelta(0))
    """How long the configuration is cached while the push is up."""
    profile_ttl: timedelta = Field(default=timedelta(seconds=60), gt=timedelta(0))
    """How long a user's profile is cached while the push is up."""
    unpushed_ttl: timedelta = Field(default=timedelta(seconds=1), gt=timedelta(0))
    """How long anything is cached while the push is down."""
    cached_profiles: int = Field(default=100_000, gt=0)
    push_beat: timedelta = Field(default=timedelta(seconds=1), gt=timedelta(0))
    """How often the LISTEN connection proves itself."""
    push_timeout: timedelta = Field(default=timedelta(seconds=2), gt=timedelta(0))
    """How long it may take to."""

    database_connections: int = Field(default=8, ge=2)
    connect_timeout: timedelta = Field(default=timedelta(seconds=5), gt=timedelta(0))
    statement_timeout: timedelta = Field(default=timedelta(seconds=5), gt=timedelta(0))
    silence_timeout: timedelta = Field(default=timedelta(seconds=2), ge=timedelta(milliseconds=100))
    """How long the database may say nothing before it counts as away."""
    degraded_for: timedelta = Field(default=timedelta(minutes=5), ge=timedelta(0))
    """How long own keys are decided on from what was last known while the database is away."""
    spool: Path | None = None
    """A directory for records while the database is away. Unset: below `embedded`, if that is set."""
    spool_max_records: int = Field(default=500_000, gt=0)
    spool_max_bytes: int = Field(default=256 * 1024 * 1024, ge=1024 * 1024)
    """How large the spool's file may become."""
    drain_timeout: timedelta = Field(default=timedelta(seconds=15), gt=timedelta(0))
    """How long calls in flight may take after SIGTERM."""

    max_concurrent_calls: int = Field(default=1024, ge=1)
    """How many calls of the data plane are carried out at once; see rpc/guard.py."""
    receive_timeout: timedelta = Field(default=timedelta(seconds=20), gt=timedelta(0))
    """How long the body of a request, or a new connection's first words, may take to come."""
    idle_timeout: timedelta = Field(default=timedelta(minutes=30), gt=timedelta(0))
    """How long a connection may stay without a call."""

    provider_timeout: timedelta = Field(default=timedelta(seconds=5), gt=timedelta(0))
    """How long a provider may take to say whether a key is good."""
    provider_proxy: SecretStr | None = None
    """An HTTP proxy on the way to providers: `http://user:password@host:port`."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_seconds(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name is None or cls.model_fields[info.field_name].annotation is not timedelta:
            return value
        with suppress(ValueError):
            return float(value) if isinstance(value, str) else value
        return value

    @field_validator("listen", "socket_roles", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator(
        "encryption_keys_retired",
        "database_url",
        "embedded",
        "spool",
        "access_file",
        "tls_cert",
        "tls_key",
        "tls_client_ca",
        "metrics",
        "provider_proxy",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("provider_proxy")
    @classmethod
    def _proxy_is_http(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or _is_http_proxy(value.get_secret_value()):
            return value
        raise ValueError("it is not like http://user:password@host:port")

    @property
    def spool_directory(self) -> Path | None:
        """Where records go while the database is away; None: nowhere."""
        if self.spool is None and self.embedded is not None:
            return self.embedded / "spool"
        return self.spool

    @property
    def retired_keys(self) -> tuple[str, ...]:
        """The retired master keys as text, one by one."""
        joined = self.encryption_keys_retired
        if joined is None:
            return ()
        return tuple(part.strip() for part in joined.get_secret_value().split(","))


def _is_http_proxy(url: str) -> bool:
    # The error of a wrong port quotes it, which may be a password.
    with suppress(ValueError):
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and bool(parts.port)
    return False


class ConnectionSettings(BaseSettings):
    """How commands reach a running sidecar."""

    model_config = Settings.model_config

    address: str | None = None
    """`unix:PATH` or `host:port`. Unset: the default socket."""
    token: SecretStr | None = None
    token_file: Path | None = None
    """A file with the token; it wins over `token`."""
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value


_Kind = TypeVar("_Kind", bound=BaseSettings)


def read_settings(**options: object) -> Settings:
    """The settings from the environment; an option that is not None wins over it.

    Raises `SettingsError`.
    """
    return _read(Settings, options)


def read_connection_settings(**options: object) -> ConnectionSettings:
    """The same for the settings of a command's connection. Raises `SettingsError`."""
    return _read(ConnectionSettings, options)


def refuse_leaks() -> None:
    """Raises `SettingsError` where a variable has a library print or write down what nobody may see."""
    traced = printing_tracers(os.environ.get("GRPC_TRACE", ""), os.environ.get("GRPC_VERBOSITY", ""))
    if traced:
        off = ",".join(f"-{tracer}" for tracer in PRINTING_TRACERS)
        raise SettingsError(
            f"GRPC_TRACE: {', '.join(traced)} would print callers' tokens and users' keys to the log. "
            f"End it with {off}, or unset it."
        )
    if os.environ.get("SSLKEYLOGFILE"):
        raise SettingsError(
            "SSLKEYLOGFILE: the keys of TLS connections would be written there, and whoever reads them reads "
            "users' keys on their way to providers. Unset it."
        )


def printing_tracers(trace: str, verbosity: str) -> list[str]:
    """Which of `PRINTING_TRACERS` print with these values of GRPC_TRACE and GRPC_VERBOSITY.

    The first is a list of patterns, of which a later one wins; `-` in front switches off.
    """
    if verbosity.strip().lower() in _SILENT:
        return []
    on: dict[str, bool] = {}
    for item in trace.split(","):
        pattern = item.strip()
        for tracer in PRINTING_TRACERS:
            if pattern == "all" or fnmatchcase(tracer, pattern):
                on[tracer] = True
            elif pattern == "-all" or fnmatchcase(tracer, pattern.removeprefix("-")):
                on[tracer] = False
    return [tracer for tracer in PRINTING_TRACERS if on.get(tracer)]


def forget_secrets() -> None:
    """Take the secret settings out of the environment, for us, for what we start, and for whoever looks at
    /proc/PID/environ. They have to be read before.

    What Python has made of them stays in memory until it is used for something else, and whoever
    started this process may show what it was started with.
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    for name in list(_secret_variables()):
        # Where the kernel put it when this process began. To unset it alone leaves it there.
        if address := getenv(os.fsencode(name)):
            ctypes.memset(address, 0, len(ctypes.string_at(address)))
        del os.environ[name]


def _secret_variables() -> Iterator[str]:
    secret = {
        _variable((name,) if field.validation_alias is None else (str(field.validation_alias),))
        for kind in (Settings, ConnectionSettings)
        for name, field in kind.model_fields.items()
        if SecretStr in get_args(field.annotation)
    }
    # Written in whichever case.
    return (name for name in os.environ if name.upper() in secret)


def _read(kind: type[_Kind], options: Mapping[str, object]) -> _Kind:
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return kind(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError(
            "; ".join(
                f"{_variable(problem['loc'])}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_url=False, include_context=False)
            )
        ) from None


def _variable(location: tuple[int | str, ...]) -> str:
    name = str(location[0]) if location else "settings"
    return name if name in (_MASTER_KEY, _RETIRED_KEYS) else f"KEYTURN_{name.upper()}"
