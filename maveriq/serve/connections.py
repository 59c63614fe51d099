"""Bounds the open connections of the server: how many there are, who has a place, and for how long.

A connection is a guest until a request on it has passed the checks of `maveriq.serve.auth`. Guests have at most half of
the places. A new connection always gets a place as long as another one waits for its client: the oldest guest, of the
peer that has most, makes room first, then the connection that has been idle longest. Idle connections therefore cannot
keep an authenticated client out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from maveriq.errors import InputError
from maveriq.serve.errors import ApiError

_LOG = logging.getLogger(__name__)
_CROWDED_SHARE = 0.5  # of the places of guests; above it they have less time
_MIN_CONNECTIONS = 8
_MIN_RESERVE, _MAX_RESERVE = 16, 128  # descriptors for engines, the state file and logs

FULL = ApiError(
    503, "the server has too many connections; try again later", code="too_many_connections", retry_after_s=2
)
"""What a connection without a place gets."""


def connection_limit(wanted: int) -> int:
    """Return how many connections the server may have, after raising the soft limit of open files if necessary.

    Raises:
        InputError: the limit of open files is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _open_descriptors() + _MAX_RESERVE
    if soft != resource.RLIM_INFINITY and soft < needed:
        target = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        if target > soft:
            with contextlib.suppress(OSError, ValueError):  # the system allows less
                resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    reserve = min(_MAX_RESERVE, max(_MIN_RESERVE, soft // 4))
    limit = soft - _open_descriptors() - reserve
    if limit < _MIN_CONNECTIONS:
        raise InputError(
            f"the limit of open files (ulimit -n) is {soft}; maveriq serve needs at least "
            f"{soft + _MIN_CONNECTIONS - limit}, and {needed} for {wanted} connections"
        )
    _LOG.warning(
        "at most %d connections at a time: the limit of open files (ulimit -n) is %d; %d would be enough for %d",
        limit, soft, needed, wanted,
    )  # fmt: skip
    return limit


class Connection(asyncio.Protocol, ABC):
    """The protocol of one connection, as `Connections` sees it."""

    @property
    @abstractmethod
    def peer(self) -> str:
        """The address of the client, without its port."""

    @property
    @abstractmethod
    def waits_for_client(self) -> bool:
        """Whether the client, not the server, has to act next."""

    @abstractmethod
    def make_room(self) -> None:
        """Close the connection; a client that has sent a part of a request, or nothing yet, gets `FULL`."""

    @abstractmethod
    def close_if_expired(self, *, crowded: bool) -> bool:
        """Close the connection if the client has been too slow; return whether it was."""


class Connections:
    """The open connections of a server."""

    def __init__(self, limit: int, on_closed: Callable[[str], None]) -> None:
        """Create an empty set.

        Args:
            limit: of connections.
            on_closed: called with the reason, `full` or `slow`, when a connection is closed early.
        """
        self._limit = limit
        self._max_guests = max(1, limit // 2)
        self._on_closed = on_closed
        self._guests: dict[str, dict[Connection, None]] = {}  # by peer, oldest first
        self._authenticated: dict[Connection, None] = {}  # least recently used first

    def __len__(self) -> int:
        """The number of connections."""
        return self._guest_count + len(self._authenticated)

    def __iter__(self) -> Iterator[Connection]:
        for guests in self._guests.values():
            yield from guests
        yield from self._authenticated

    def add(self, connection: Connection) -> bool:
        """Add a guest, and close another connection if there is no place; return False if none can be closed."""
        if self._guest_count >= self._max_guests or (len(self) >= self._limit and self._guest_count):
            self._close(self._oldest_guest())
        elif len(self) >= self._limit:
            idle = next((other for other in self._authenticated if other.waits_for_client), None)
            if idle is None:
                self._on_closed("full")
                return False
            self._close(idle)
        self._guests.setdefault(connection.peer, {})[connection] = None
        return True

    def remove(self, connection: Connection) -> None:
        """Forget a connection. It has no effect on one that is unknown."""
        self._authenticated.pop(connection, None)
        guests = self._guests.get(connection.peer)
        if guests is not None:
            guests.pop(connection, None)
            if not guests:
                del self._guests[connection.peer]

    def authenticate(self, connection: Connection) -> None:
        """Note that a request on the connection has passed the checks."""
        is_known = connection in self._authenticated or connection in self._guests.get(connection.peer, ())
        if is_known:
            self.remove(connection)
            self._authenticated[connection] = None

    def close_one(self) -> None:
        """Close the connection that can be missed most, if there is one."""
        if self._guest_count:
            self._close(self._oldest_guest())

    def close_expired(self) -> None:
        """Close the connections whose clients have been too slow."""
        crowded = self._guest_count > _CROWDED_SHARE * self._max_guests
        for connection in list(self):
            if connection.close_if_expired(crowded=crowded):
                self._on_closed("slow")

    @property
    def _guest_count(self) -> int:
        return sum(map(len, self._guests.values()))

    def _oldest_guest(self) -> Connection:
        most: dict[Connection, None] = max(self._guests.values(), key=len)
        return next(iter(most))

    def _close(self, connection: Connection) -> None:
        self.remove(connection)
        connection.make_room()
        self._on_closed("full")
        _LOG.warning("more connections than places: those that wait longest are closed")


def _open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208  (one of them is that of the listing)
