"""The command line, one file a group of commands."""

from __future__ import annotations

import sys

import cyclopts

from keyturn import __version__
from keyturn_server.cli import db, demo, health, keygen, serve
from keyturn_server.errors import KeyturnFault
from keyturn_server.keys.keyring import KeyringError
from keyturn_server.logs import configure_logs, get_log
from keyturn_server.store.embedded import EmbeddedPostgresError

app = cyclopts.App(
    name="keyturn",
    help=(
        "Whose credential pays for an LLM request? A sidecar that gateways ask over gRPC.\n\n"
        "Options can also be set in the environment, as the variable in brackets; an option given here "
        "wins. The master keys are read from ENCRYPTION_KEY (64 hex characters) and "
        "ENCRYPTION_KEYS_RETIRED (comma-separated) alone, never from an option."
    ),
    version=__version__,
    version_flags=["--version"],
)
app.command(serve.serve)
app.command(demo.demo)
app.command(db.app)
app.command(keygen.keygen)
app.command(health.health)


def run() -> None:
    """Run one command. Exit codes: 0 done, 1 it could not be done (with the reason), 2 wrong usage."""
    configure_logs("info")
    try:
        app(result_action="return_value", exit_on_error=False)
    except cyclopts.CycloptsError:
        raise SystemExit(2) from None
    except (KeyturnFault, KeyringError, EmbeddedPostgresError) as error:
        print(f"keyturn: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception:
        # Through the log and its scrubber: a trace may quote what must not be shown.
        get_log().exception("crashed")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
