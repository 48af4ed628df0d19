"""Addresses on which several workers answer together.

A TCP port is held by a socket that does not listen, so that it stays ours whichever worker lives, and the
workers listen on it with SO_REUSEPORT: the kernel spreads connections. A Unix socket has no such thing: one
is listened on here, and the workers take connections from it in turn (see relay.py).
docs/decisions/0017-workers.md
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from keyturn_server.serving import AddressError

_BACKLOG = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAddresses:
    """Addresses that are held for workers."""

    addresses: tuple[str, ...]
    """As callers use them: a port of 0 as the port it became."""
    listeners: tuple[socket.socket, ...]
    """Those of the Unix sockets among them, in their order."""
    held: tuple[socket.socket, ...]
    """What holds the TCP ports."""

    @property
    def ports(self) -> tuple[str, ...]:
        """The TCP addresses."""
        return tuple(address for address in self.addresses if not address.startswith("unix:"))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of the Unix sockets."""
        return tuple(
            Path(address.removeprefix("unix:")) for address in self.addresses if address.startswith("unix:")
        )

    def turn_away(self) -> None:
        """From now on who comes to a Unix socket hears at once that nobody is there."""
        for path, listener in zip(self.paths, self.listeners, strict=True):
            _take_away(path, listener)


@contextmanager
def shared(addresses: Sequence[str]) -> Iterator[SharedAddresses]:
    """Addresses that are `claimed`, held for the length of the block. Raises `AddressError`."""
    with ExitStack() as stack:
        names: list[str] = []
        listeners: list[socket.socket] = []
        held: list[socket.socket] = []
        for address in addresses:
            if address.startswith("unix:"):
                listeners.append(stack.enter_context(_listening(Path(address.removeprefix("unix:")))))
                names.append(address)
            else:
                host, _, port = address.rpartition(":")
                sockets = stack.enter_context(hold_port(host.strip("[]"), int(port)))
                held.extend(sockets)
                names.append(f"{host}:{sockets[0].getsockname()[1]}")
        yield SharedAddresses(addresses=tuple(names), listeners=tuple(listeners), held=tuple(held))


@contextmanager
def hold_port(host: str, port: int) -> Iterator[tuple[socket.socket, ...]]:
    """Sockets that keep everybody but us from the port of a host, one for each of its addresses.

    Raises `AddressError` where somebody has it.
    """
    unusable = AddressError(f"{host}:{port}: cannot be listened on; is another server there?")
    with ExitStack() as stack:
        held: list[socket.socket] = []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError:
            raise unusable from None
        for family, kind, protocol, _, place in dict.fromkeys(found):
            try:
                one = socket.socket(family, kind, protocol)
            except OSError:  # a family that this machine does not have
                continue
            stack.enter_context(one)
            # What a server before us has left behind does not matter (SO_REUSEADDR), a server that is there
            # does. Once the port is ours, the workers may have it as well, and a second supervisor may not.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            place = (place[0], held[0].getsockname()[1] if held else port, *place[2:])
            try:
                one.bind(place)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue
                raise unusable from None
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.append(one)
        if not held:
            raise unusable
        yield tuple(held)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            # We hold its lock: a socket that lies there is a dead one's.
            if path.is_socket():
                path.unlink()
            listener.bind(str(path))
            listener.listen(_BACKLOG)
        except OSError:
            raise AddressError(f"unix:{path}: cannot be listened on; is another server there?") from None
        listener.setblocking(False)
        try:
            yield listener
        finally:
            _take_away(path, listener)


def _take_away(path: Path, listener: socket.socket) -> None:
    if listener.fileno() >= 0:
        with suppress(OSError):
            path.unlink()
        listener.close()
