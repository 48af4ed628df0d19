"""`keyturn serve`: run the sidecar."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import uvloop
from cyclopts import Parameter

from keyturn_server.app import sidecar
from keyturn_server.cli import fault
from keyturn_server.dumps import forbid_dumps
from keyturn_server.logs import get_log, logging_apart
from keyturn_server.serving import until_signalled
from keyturn_server.settings import forget_secrets, read_settings, refuse_leaks
from keyturn_server.workers import run_workers


def serve(
    *,
    listen: Annotated[list[str] | None, Parameter(negative="")] = None,
    embedded: Path | None = None,
    spool: Path | None = None,
    workers: int | None = None,
    reflection: Annotated[bool | None, Parameter(negative="")] = None,
    insecure_loopback: Annotated[bool | None, Parameter(negative="")] = None,
    socket_roles: str | None = None,
    access_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_client_ca: Path | None = None,
    metrics: str | None = None,
) -> None:
    """Run the sidecar until SIGTERM or SIGINT; calls in flight are finished first.

    Without a database there is nothing to serve: set KEYTURN_DATABASE_URL, or give --embedded.

    Parameters
    ----------
    listen
        Address to answer on: unix:PATH or host:port; may be given several times. A Unix socket's
        directory must be its owner's alone. Default: a socket in /run/keyturn, or for an ordinary
        user in $XDG_RUNTIME_DIR/keyturn or ~/.keyturn/run. [KEYTURN_LISTEN, comma-separated]
    embedded
        Run a PostgreSQL of its own with its data in this directory. [KEYTURN_EMBEDDED]
    spool
        A directory on a local disk that lasts, for records while the database is away; each sidecar
        has one of its own. Default: in the directory of --embedded; without that, none.
        [KEYTURN_SPOOL]
    workers
        How many processes share the addresses, each with its own connections to the database, caches and
        rate limits. Default: 1. [KEYTURN_WORKERS]
    reflection
        Serve reflection and channelz, for grpcurl and buf curl. [KEYTURN_REFLECTION]
    insecure_loopback
        Let any local process call a loopback TCP address. [KEYTURN_INSECURE_LOOPBACK]
    socket_roles
        What callers on a Unix socket may do: gateway, operator, viewer, comma-separated. Default: all
        of it. [KEYTURN_SOCKET_ROLES]
    access_file
        Who else may call, by token or certificate, and in which roles; see `keyturn token`. Read again
        when it changes. [KEYTURN_ACCESS_FILE]
    tls_cert
        The sidecar's certificate, and those that lead to its authority, as PEM; TCP is then spoken over
        TLS. Read again when it changes, as are the next two. [KEYTURN_TLS_CERT]
    tls_key
        The private key of that certificate, as PEM. [KEYTURN_TLS_KEY]
    tls_client_ca
        The authorities of callers' certificates, as PEM: every caller over TLS has to have one.
        [KEYTURN_TLS_CLIENT_CA]
    metrics
        host:port for Prometheus metrics over HTTP. [KEYTURN_METRICS]
    """
    refuse_leaks()
    settings = read_settings(
        listen=tuple(listen) if listen else None,
        embedded=embedded,
        spool=spool,
        workers=workers,
        reflection=reflection,
        insecure_loopback=insecure_loopback,
        socket_roles=socket_roles,
        access_file=access_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        metrics=metrics,
    )
    forget_secrets()
    if settings.workers > 1:
        sys.exit(run_workers(settings, on_fault=fault))
    with logging_apart(settings.log_level) as lines:
        log = get_log()
        for reason in forbid_dumps():
            log.warning("dumps_allowed", reason=reason)
        uvloop.run(until_signalled(sidecar(settings, log=log, audit=lines), log=log))
