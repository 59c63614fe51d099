"""Messages between the torch engine and its ranks: msgspec structs in length-prefixed frames over a socket pair.

Unlike the executor's protocol, delivery within one process group is taken to be reliable.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from maveriq.exec.messages import EngineSpec, Generate, RankShard

_LENGTH_BYTES = 8


class LoadRank(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Load a rank's shard and connect to the other ranks through a file. The answer is `RankLoaded`."""

    spec: EngineSpec
    rank: int
    rendezvous_file: str


class RunExecution(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """Run an execution on every rank. The first rank of the last stage sends a `Stepped` per step."""

    batch: Generate


class RankLoaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """A rank has loaded and warmed up its shard."""

    shard: RankShard
    kv_cache_bytes: int


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="stepped"):
    """A step of an execution is done; `last` says whether it ends the execution."""

    tokens: list[int]
    last: bool


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A rank failed; `kind` is a `FailureKind`, `device` the one that lacks memory, "" if unknown.

    With `serves` all ranks report the failure and accept the next execution; without it the rank exits.
    """

    kind: str
    message: str
    device: str = ""
    serves: bool = False


ToRank: TypeAlias = LoadRank | RunExecution
FromRank: TypeAlias = RankLoaded | Stepped | RankFailed

_ENCODER = msgspec.msgpack.Encoder()
TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
FROM_RANK: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def send(channel: socket.socket, message: ToRank | FromRank) -> None:
    """Send a message.

    Raises:
        OSError: the other side has closed the socket.
    """
    body = _ENCODER.encode(message)
    channel.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)


def receive(channel: socket.socket) -> bytes | None:
    """Wait for a message and return its encoded body; None once the other side has closed the socket."""
    head = _receive_exactly(channel, _LENGTH_BYTES)
    return None if head is None else _receive_exactly(channel, int.from_bytes(head, "big"))


def _receive_exactly(channel: socket.socket, count: int) -> bytes | None:
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
