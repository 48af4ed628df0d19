"""The command line, one file a group of commands.

Commands are named here and imported when they run: one that asks a running sidecar is an answer in
itself, and does not wait for the server's own modules.
"""

from __future__ import annotations

import sys

import cyclopts

from keyturn_server.cli.exit_codes import EPILOGUE, Ended, ExitCode
from keyturn_server.cli.stdout import fill_closed, flush


def _version() -> str:
    from keyturn import __version__

    return __version__


app = cyclopts.App(
    name="keyturn",
    help=(
        "Whose credential pays for an LLM request? A sidecar that gateways ask over gRPC.\n\n"
        "Options can also be set in the environment, as the variable in brackets; an option given here "
        "wins. The master keys are read from ENCRYPTION_KEY (64 hex characters) and "
        "ENCRYPTION_KEYS_RETIRED (comma-separated) alone, never from an option.\n\n"
        "Commands that ask a running sidecar print tables for people and, with --json, one document for "
        "programs on stdout; everything else is on stderr. Money is in US dollars (micros in JSON), "
        "times are in UTC."
    ),
    help_epilogue=EPILOGUE,
    default_parameter=cyclopts.Parameter(negative="", show_default=False),
    version=_version,
    version_flags=["--version"],
)

_PLACE = "keyturn_server.cli"
_SIDECAR = cyclopts.Group("Run it", sort_key=1)
_ASKING = cyclopts.Group("Ask a running sidecar", sort_key=2)

for _where in ("serve:serve", "demo:demo", "db:app", "spool:app", "keygen:keygen", "token:token"):
    app.command(f"{_PLACE}.{_where}", name=_where.partition(":")[0], group=_SIDECAR)
for _where in ("decide", "record", "explain"):
    app.command(f"{_PLACE}.routing:{_where}", name=_where, group=_ASKING)
for _where in ("keys", "flags", "credits", "users", "reports"):
    app.command(f"{_PLACE}.{_where}:app", name=_where, group=_ASKING)
app.command(f"{_PLACE}.health:health", name="health", group=_ASKING)


def run() -> None:
    """Run one command, and end with its exit code: `exit_codes` has the table."""
    fill_closed()
    try:
        code = _run()
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    raise SystemExit(code)


def _run() -> ExitCode:
    try:
        " ".join(sys.argv).encode()
    except UnicodeEncodeError:
        return _end(Ended(ExitCode.USAGE, "An argument is not valid UTF-8."))
    try:
        _load_for_help()
        ended = app(result_action="return_value", exit_on_error=False, print_error=False)
        flush()
    except cyclopts.CycloptsError as error:
        from keyturn_server.cli.usage import explained

        return _end(explained(error))
    except Ended as ending:
        return _end(ending)
    except Exception as error:
        return fault(error)
    return ended if isinstance(ended, ExitCode) else ExitCode.DONE


def _load_for_help() -> None:
    """Imports the commands of a group that is named alone: its help takes their lines from them."""
    chain, _, _ = app.parse_commands()
    group = app
    for name in chain:
        if not name.startswith("-"):
            group = group[name]
    if group.default_command is None:
        group.resolved_commands()


def _end(ending: Ended) -> ExitCode:
    print(f"keyturn: {ending.message}", *ending.next_steps, sep="\n  ", file=sys.stderr)
    return ending.code


def fault(error: Exception) -> ExitCode:
    """Says what a fault means. A defect goes through the log and its scrubber: a trace may quote what
    must not be shown."""
    from keyturn_server.errors import KeyturnFault, StoreUnavailable
    from keyturn_server.keys.keyring import KeyringError
    from keyturn_server.logs import configure_logs, get_log
    from keyturn_server.store.embedded import EmbeddedPostgresError

    if isinstance(error, KeyturnFault | KeyringError | EmbeddedPostgresError):
        is_away = isinstance(error, StoreUnavailable)
        return _end(Ended(ExitCode.UNAVAILABLE if is_away else ExitCode.FAULT, str(error)))
    configure_logs("info")
    get_log().exception("crashed", exc_info=error)
    return ExitCode.FAULT
