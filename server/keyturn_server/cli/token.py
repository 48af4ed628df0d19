"""`keyturn token`: a new bearer token."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from keyturn_server.access import Role
from keyturn_server.access_file import entry_of, new_token
from keyturn_server.cli.stdout import write


def token(name: str, /, *, role: Annotated[list[Role], Parameter(negative="")]) -> None:
    """Print a new bearer token for a caller, once. What goes into the access file is printed on stderr.

    The token is kept nowhere: the access file has its hash.

    Parameters
    ----------
    name
        The caller's name, as logs and histories will show it.
    role
        What the caller may do: gateway, operator or viewer; may be given several times.
    """
    made = new_token()
    entry = entry_of(name, role, made)
    write(made.reveal())
    print(entry, end="", file=sys.stderr)
