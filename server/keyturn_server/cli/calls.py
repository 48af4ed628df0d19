"""How commands call the sidecar: the options that all of them take, the call, and how a fault ends them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Final, TypeVar

import grpc
from cyclopts import Group, Parameter

from keyturn.address import default_socket
from keyturn.errors import KeyturnError, from_rpc
from keyturn_server.cli.connection import DEFAULT, Channel, Connection, connected
from keyturn_server.cli.exit_codes import Ended, ExitCode, wrong_usage
from keyturn_server.cli.printing import counted, note, printable
from keyturn_server.cli.values import PositiveSpan
from keyturn_server.errors import KeyturnFault

Request = TypeVar("Request")
Response = TypeVar("Response")
Answer = TypeVar("Answer")
Method = Callable[[grpc.aio.Channel], "grpc.aio.UnaryUnaryMultiCallable[Request, Response]"]
"""Finds a method on a channel: `lambda channel: FlagServiceStub(channel).ListFlags`."""

TIMEOUT: Final = timedelta(seconds=10)
SHOWN: Final = 100
"""How many items of a list people see when they do not say."""
_CONNECTION: Final = Group("Connection", sort_key=10)
# Fewer than a page may have: with every text at its limit, it stays within grpc's 4 MiB.
PAGE_SIZE: Final = 500


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command that asks a sidecar takes.

    Parameters
    ----------
    json
        Print the answer as one JSON document: protobuf's JSON mapping, money in micros.
    timeout
        How long to wait for each answer: 10s, 2m. Default: 10s, for reports 1m, for simulate 5m.
    """

    json: bool = False
    timeout: PositiveSpan | None = None
    connection: Annotated[Connection, Parameter(name="*", group=_CONNECTION)] = DEFAULT

    def most(self, limit: int | None) -> int | None:
        """How many items a list shall have: for programs all, unless they say otherwise."""
        return limit if limit is not None or self.json else SHOWN

    def call(
        self, method: Method[Request, Response], request: Request, *, timeout: timedelta = TIMEOUT
    ) -> Response:
        """The answer to one call. `timeout` is for when none was given. Raises `Ended`."""
        return self._talk(lambda ask: ask(method, request), timeout)

    def call_pages(
        self,
        method: Method[Any, Response],
        request: Any,
        *,
        items: str,
        limit: int | None,
        timeout: timedelta = TIMEOUT,
    ) -> Response:
        """The first page with the items of all further ones added to its field `items`: `limit` in all, or
        all there are. Where there are more, `next_page_token` is set. Raises `Ended`."""

        async def collect(ask: Ask) -> Response:
            answer: Any = None
            while True:
                left = PAGE_SIZE if limit is None else limit - (len(getattr(answer, items)) if answer else 0)
                request.page_size = min(PAGE_SIZE, left)
                page: Any = await ask(method, request)
                if answer is None:
                    answer = page
                else:
                    getattr(answer, items).extend(getattr(page, items))
                    answer.next_page_token = page.next_page_token
                if not page.next_page_token or len(getattr(answer, items)) == limit:
                    collected: Response = answer
                    return collected
                request.page_token = page.next_page_token

        return self._talk(collect, timeout)

    def _talk(self, talk: Callable[[Ask], Awaitable[Answer]], timeout: timedelta) -> Answer:
        return asyncio.run(self._connected(talk, self.timeout or timeout))

    async def _connected(self, talk: Callable[[Ask], Awaitable[Answer]], timeout: timedelta) -> Answer:
        self._check_files()
        try:
            async with connected(self.connection) as channel:
                return await talk(Ask(channel, timeout))
        except grpc.aio.AioRpcError as error:
            raise _ended(from_rpc(error), timeout) from None
        except KeyturnFault as error:  # the connection's options and variables
            raise wrong_usage(str(error)) from None

    def _check_files(self) -> None:
        """No path that leads nowhere is quoted: `--key` may have been taken for a place for a secret."""
        paths = {
            "--token-file": self.connection.token_file,
            "--ca": self.connection.ca,
            "--cert": self.connection.cert,
            "--key": self.connection.key,
        }
        for option, path in paths.items():
            try:
                missing = path is not None and not path.exists()
            except OSError:  # too long for a path
                missing = True
            if missing:
                raise wrong_usage(f"{option} is not the path of a file that is there.")


@dataclass(frozen=True, slots=True)
class Ask:
    """Asks on one channel, with one deadline for each call."""

    channel: Channel
    timeout: timedelta

    async def __call__(self, method: Method[Request, Response], request: Request) -> Response:
        answer: Response = await self.channel.call(method(self.channel.grpc), request, timeout=self.timeout)
        return answer


DEFAULTS: Final = Options()


def note_more(next_page_token: str, *, shown: int) -> None:
    """Says on stderr that a list was cut at its limit."""
    if next_page_token:
        note(f"these are the first {shown}; there are more: see --limit, or take --json, which has all.")


_CODES: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
    grpc.StatusCode.FAILED_PRECONDITION: ExitCode.REFUSED,
    grpc.StatusCode.ALREADY_EXISTS: ExitCode.REFUSED,
    grpc.StatusCode.NOT_FOUND: ExitCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.NOT_ALLOWED,
    grpc.StatusCode.PERMISSION_DENIED: ExitCode.NOT_ALLOWED,
    grpc.StatusCode.UNAVAILABLE: ExitCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExitCode.UNAVAILABLE,
}


def _ended(error: KeyturnError, timeout: timedelta) -> Ended:
    """How a command ends on a fault: what the sidecar said, or what grpc means, the reason in brackets."""
    code = _CODES.get(error.code, ExitCode.FAULT)
    reason = error.reason or error.code.name
    message = printable(error.message)
    steps: tuple[str, ...] = ()
    match reason:
        case "LOCKOUT_NOT_ACKNOWLEDGED":
            users = counted(int(error.metadata.get("locked_out_users", "0")), "eligible user")
            message = f"Nothing was changed: BYOK_ONLY would lock out {users} without a usable key."
            steps = (
                "Who they are: keyturn reports at-risk",
                "To go ahead all the same: the same command with --acknowledge-lockout",
            )
        case "UNAUTHENTICATED":
            steps = ("See --token-file, KEYTURN_TOKEN, --cert and --key.",)
        case "REQUEST_TOO_LARGE":
            code = ExitCode.USAGE
        case "RESOURCE_EXHAUSTED":  # grpc's own: an answer over its limit, which no retry makes smaller
            code = ExitCode.FAULT
        case "UNAVAILABLE":  # grpc's own: nobody answers there
            message = f"The sidecar cannot be reached{_cause(error.message)}. Is it running, and is it there?"
            steps = (f"See --address and KEYTURN_ADDRESS; the default is unix:{default_socket()}.",)
        case "DEADLINE_EXCEEDED":
            message = f"No answer within {timeout.total_seconds():g} s; what was asked may have been done."
            steps = ("See --timeout.",)
        case "UNIMPLEMENTED":
            message = "The sidecar does not know this call: is it of another release than this command?"
    return Ended(code, f"{message} [{reason}]", *steps)


def _cause(details: str) -> str:
    """What grpc knows of a connection that failed, in two or three words."""
    found = re.search(r"No such file or directory|Permission denied|Connection refused|[Hh]andshake", details)
    return f" ({found[0].lower()})" if found else ""
