"""Pages of lists: a bounded size, and an opaque token that leads to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from keyturn_server.keys.tokens import InvalidToken, TokenSealer
from keyturn_server.rpc.fields import Fields
from keyturn_server.rpc.status import BadToken

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000

Cursor = Sequence[str | int]


class PagedRequest(Protocol):
    """A request message with `page_size` and `page_token`."""

    page_size: int
    page_token: str

    def CopyFrom(self, other: Any, /) -> None: ...  # noqa: N802 - protobuf's name
    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...  # noqa: N802 - protobuf's name


@dataclass(frozen=True, slots=True)
class Page:
    """The page that is asked for."""

    size: int
    after: list[Any] | None
    """The cursor of the last item of the page before; None for the first page."""


class Pages:
    """Reads and writes page tokens. They are sealed for what was asked, so that nobody builds one."""

    def __init__(self, sealer: TokenSealer) -> None:
        self._sealer = sealer

    def asked(self, fields: Fields, request: PagedRequest) -> Page:
        """The page that `request` asks for. Raises `BadToken`; `fields` hears of a wrong size."""
        size = fields.number("page_size", request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, least=1)
        if not request.page_token:
            return Page(size, None)
        try:
            return Page(size, self._sealer.open_page(_query(request), request.page_token))
        except InvalidToken as error:
            raise BadToken("page_token", error) from None

    def token(self, request: PagedRequest, cursor: Cursor | None) -> str:
        """The token of the page after the item at `cursor`; empty where there is none."""
        return "" if cursor is None else self._sealer.seal_page(_query(request), cursor)


def _query(request: PagedRequest) -> bytes:
    """What the pages of one list have in common."""
    query = type(request)()
    query.CopyFrom(request)
    query.page_size = 0
    query.page_token = ""
    return type(request).__name__.encode() + b"\0" + query.SerializeToString(deterministic=True)
