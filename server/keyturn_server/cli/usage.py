"""What is said of wrong usage. Where people may have typed a secret, nothing that they typed is quoted."""

from __future__ import annotations

import re

from cyclopts import CycloptsError, MissingArgumentError, UnknownCommandError, UnknownOptionError

from keyturn_server.cli.exit_codes import Ended, ExitCode
from keyturn_server.scrub import scrub

_SECRETS_ARE_NEAR = "keys"


def explained(error: CycloptsError) -> Ended:
    """What is wrong with a command, and where its usage is told."""
    chain = tuple(error.command_chain or ())
    see = f"See: {' '.join(('keyturn', *chain, '--help'))}"
    if chain[:1] == (_SECRETS_ARE_NEAR,):
        advice = ("A secret is never an argument: it is asked for, or read from stdin.",)
        near = chain in {("keys",), ("keys", "save")}
        return Ended(ExitCode.USAGE, _without_values(error), *(advice if near else ()), see)
    return Ended(ExitCode.USAGE, scrub(_without_assigned(str(error))), see)


def _without_values(error: CycloptsError) -> str:
    name = error.argument.name if error.argument is not None else ""
    match error:
        case MissingArgumentError():
            return f"{name} is missing, or has no value."
        case UnknownOptionError():
            return "There is an option that this command does not have."
        case UnknownCommandError():
            return "There is no such command."
        case _ if name:
            return f"{name} cannot be what was given."
        case _:
            return "There is an argument too many."


def _without_assigned(message: str) -> str:
    return re.sub(r"(--[\w-]+)=\S+", r"\1", message).rstrip()
