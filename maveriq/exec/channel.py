"""Channels: messages one by one between the executor and an engine.

On the wire each message is a frame: its length in four bytes, most significant first, then the message. Whoever
sends does not wait: what matters is repeated until it is answered (`maveriq.exec.messages`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from maveriq.errors import MaveriqError
from maveriq.exec.messages import MOST_FRAME_BYTES, FromEngine, ProtocolError, ToEngine, encode

_LENGTH_BYTES = 4

Sent_contra = TypeVar("Sent_contra", bound=ToEngine | FromEngine, contravariant=True)
Received_co = TypeVar("Received_co", bound=ToEngine | FromEngine, covariant=True)


class ChannelClosedError(MaveriqError):
    """The other side is gone, or has closed the channel."""


class Channel(Protocol[Sent_contra, Received_co]):
    """One end of a channel."""

    def send(self, message: Sent_contra) -> None:
        """Send a message, now or as soon as the other side takes it; to a closed channel it goes nowhere."""

    async def receive(self) -> Received_co:
        """Wait for the next message.

        Raises:
            ChannelClosedError: no more will come.
            ProtocolError: what came is no message; the channel is of no more use.
        """

    def close(self) -> None:
        """Close this end; may be called twice."""


class StreamChannel(Generic[Sent_contra, Received_co]):
    """A channel over a socket."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decode: Callable[[bytes], Received_co]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = decode

    def send(self, message: Sent_contra) -> None:
        """Send a message; see `Channel`.

        Raises:
            ProtocolError: it is too long for a frame.
        """
        body = encode(message)
        if len(body) > MOST_FRAME_BYTES:
            raise ProtocolError(f"a message of {len(body):,} bytes is too long; at most {MOST_FRAME_BYTES:,} go")
        if not self._writer.is_closing():
            self._writer.write(len(body).to_bytes(_LENGTH_BYTES, "big") + body)

    async def receive(self) -> Received_co:
        """Wait for the next message; see `Channel`."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
            if length > MOST_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length:,} bytes is too long; at most {MOST_FRAME_BYTES:,} are read")
            return self._decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            raise ChannelClosedError("the other side has closed the channel") from None

    async def flush(self) -> None:
        """Wait until the other side's socket has taken everything, or is gone."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        """Close this end; see `Channel`."""
        self._writer.close()
