"""`keyturn keys`: users' own keys."""

from __future__ import annotations

import cyclopts

from keyturn_server.cli.rotation import rotate

app = cyclopts.App(name="keys", help="Look after users' own keys.")
app.command(rotate)
