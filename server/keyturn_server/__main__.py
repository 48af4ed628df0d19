"""The command `keyturn`."""

from __future__ import annotations

import os
import sys

from keyturn_server.dumps import forbid_dumps


def main() -> None:
    """Run the command line; without the extra `server`, say what to install."""
    # Commands hold secrets as well, if not for long. Where it cannot be done, `serve` says so.
    forbid_dumps()
    # gRPC's core writes lines that are no JSON; what matters of them reaches us as errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from keyturn_server.cli import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in {"keyturn", "keyturn_server"}:
            raise
        print(
            f"keyturn: the sidecar's own packages are not installed ({error.name} is missing).\n"
            "Install them with: pip install 'keyturn[server]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    run()


if __name__ == "__main__":
    main()
