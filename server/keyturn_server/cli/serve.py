"""`keyturn serve`: run the sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import uvloop
from cyclopts import Parameter

from keyturn_server.app import sidecar
from keyturn_server.logs import configure_logs, get_log
from keyturn_server.serving import until_signalled
from keyturn_server.settings import read_settings


def serve(
    *,
    listen: Annotated[list[str] | None, Parameter(negative="")] = None,
    embedded: Path | None = None,
    reflection: Annotated[bool | None, Parameter(negative="")] = None,
    insecure_loopback: Annotated[bool | None, Parameter(negative="")] = None,
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
    reflection
        Serve reflection and channelz, for grpcurl and buf curl. [KEYTURN_REFLECTION]
    insecure_loopback
        Let any local process call a loopback TCP address. [KEYTURN_INSECURE_LOOPBACK]
    metrics
        host:port for Prometheus metrics over HTTP. [KEYTURN_METRICS]
    """
    settings = read_settings(
        listen=tuple(listen) if listen else None,
        embedded=embedded,
        reflection=reflection,
        insecure_loopback=insecure_loopback,
        metrics=metrics,
    )
    configure_logs(settings.log_level)
    log = get_log()
    uvloop.run(until_signalled(sidecar(settings, log=log), log=log))
