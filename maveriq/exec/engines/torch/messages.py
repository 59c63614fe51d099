"""What an engine and its ranks say to each other: msgspec messages in frames over a pair of sockets.

Unlike the executor's, this channel is within one group of processes and loses nothing.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from maveriq.exec.messages import EngineSpec, Generate

_LENGTH_BYTES = 8


class LoadRank(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Load a rank's part and meet the other ranks at a file; answered by `RankLoaded`."""

    spec: EngineSpec
    rank: int
    meeting_point: str


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """Generate; every rank takes part, the one that reports answers by `Stepped` after `Stepped`."""

    work: Generate


class RankLoaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """A rank is ready."""

    weights_bytes: int
    kv_cache_bytes: int


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="stepped"):
    """A step of an execution is done; `last` says that the execution is."""

    tokens: list[int]
    last: bool


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A rank could not do what it was told; `kind` is a `FailureKind`.

    Where it `serves` on, so do all others, and each of them says the same. Else it ends.
    """

    kind: str
    message: str
    serves: bool = False


ToRank: TypeAlias = LoadRank | Run
FromRank: TypeAlias = RankLoaded | Stepped | RankFailed

_ENCODER = msgspec.msgpack.Encoder()
TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
FROM_RANK: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def send(channel: socket.socket, message: ToRank | FromRank) -> None:
    """Send a message.

    Raises:
        OSError: nobody is there any more.
    """
    body = _ENCODER.encode(message)
    channel.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)


def receive(channel: socket.socket) -> bytes | None:
    """Wait for a message and return its body; None when the other side has gone."""
    head = _exactly(channel, _LENGTH_BYTES)
    return None if head is None else _exactly(channel, int.from_bytes(head, "big"))


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = channel.recv(min(count - len(parts), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
