"""The messages between the executor and its engines, versioned, and the channels that carry them.

A message travels as one frame over a Unix socket: its length in four bytes, most significant first, then
MessagePack. Delivery counts as unreliable: a message may come late, twice or never, so every message may be sent
again. Executions are numbered. An engine that gets a finished execution again repeats its result, ignores an older
one, and does nothing for one that runs. Senders do not wait; they repeat what matters until it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Annotated, Generic, Protocol, TypeAlias, TypeVar

import msgspec

from maveriq.errors import InputError, MaveriqError

_LONGEST = 300


def one_line(text: str) -> str:
    """Return a text on one line, shortened where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


PROTOCOL_VERSION = 1

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""A longer frame is not read: its sender does not speak this protocol."""

MAX_SEQUENCES = 10_000
MAX_PROMPT_TOKENS = 1_000_000
MAX_OUTPUT_TOKENS = 1_000_000

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_TokenIdOrEnded = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class ProtocolError(MaveriqError):
    """The other side does not speak this protocol, or not this version of it."""


class PromptSequence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt of an execution, and how many tokens may follow it.

    Generation ends after `output_tokens`, or before that at one of `stop_token_ids`.
    """

    request_id: _Count
    prompt: Annotated[tuple[_TokenId, ...], msgspec.Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_OUTPUT_TOKENS)]
    stop_token_ids: Annotated[tuple[_TokenId, ...], msgspec.Meta(max_length=64)] = ()


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine is to load: everything but its devices' visibility, which its environment fixes.

    `config_json` is the model's Hugging Face configuration. `devices` names one device per rank, stage-major
    ("cpu", or "cuda:0" counted among those that the environment shows). Random weights are drawn from
    `seed` where `weights_folder` is empty. `time_scale` and `load_s` are for engines that only pretend: so many real
    seconds per second of the run, and how long loading still takes, in seconds of the run.
    """

    deployment_id: _Count
    generation: _Count
    model: str
    config_json: str
    tp: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    pp: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    layer_split: tuple[Annotated[int, msgspec.Meta(ge=1)], ...]
    weights: str
    kv: str
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SEQUENCES)]
    devices: tuple[str, ...]
    seed: _Count = 42
    weights_folder: str = ""
    time_scale: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    load_s: _NotNegative = 0.0


# From the executor to an engine


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load", forbid_unknown_fields=True):
    """Load this; answered by `Loaded` or `Failed`. The first message after the engine's `Hello`."""

    spec: EngineSpec


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate", forbid_unknown_fields=True):
    """Run these sequences together; answered by `Progress` per step and at last by `Finished` or `Failed`.

    `first_token_s` and `service_s` say how long that is estimated to take, in seconds of the run; an
    emulated engine takes exactly so long, others do not look at them.
    """

    execution_id: _Count
    sequences: Annotated[tuple[PromptSequence, ...], msgspec.Meta(min_length=1, max_length=MAX_SEQUENCES)]
    first_token_s: _NotNegative = 0.0
    service_s: _NotNegative = 0.0


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping", forbid_unknown_fields=True):
    """Are you there? Answered by a `Pong` of the same number."""

    number: _Count


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop", forbid_unknown_fields=True):
    """Free everything and exit; answered by `Bye`."""


# From an engine to the executor


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", forbid_unknown_fields=True):
    """An engine's process is there and wants to know what to load. Said again at each `Ping` until it knows."""

    protocol: _Count
    pid: _Count


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded", forbid_unknown_fields=True):
    """The engine serves. Memory in bytes over all its devices, as far as the engine knows it (else 0)."""

    backend: str
    version: str
    weights_bytes: _Count = 0
    kv_cache_bytes: _Count = 0


class StepProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress", forbid_unknown_fields=True):
    """Step `step` (from 1) of an execution gave each sequence a token; -1 for a sequence that had ended before."""

    execution_id: _Count
    step: _Count
    tokens: tuple[_TokenIdOrEnded, ...]


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished", forbid_unknown_fields=True):
    """An execution is done. Durations are the engine's own, in real seconds from the start of the execution."""

    execution_id: _Count
    first_token_s: _NotNegative
    service_s: _NotNegative
    outputs: tuple[tuple[_TokenId, ...], ...]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed", forbid_unknown_fields=True):
    """An execution could not be done, or loading could not (`execution_id` 0).

    `kind` is one of `out-of-memory`, `unsupported`, `error`. After a failed execution the engine still
    serves, after a failed load it exits.
    """

    execution_id: _Count
    kind: str
    message: str


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong", forbid_unknown_fields=True):
    """Still there. `execution_id` is under way (0: none), `steps` of it are done."""

    number: _Count
    execution_id: _Count
    steps: _Count


class Bye(msgspec.Struct, frozen=True, kw_only=True, tag="bye", forbid_unknown_fields=True):
    """The engine has freed everything and exits."""


ToEngine: TypeAlias = Load | Generate | Ping | Stop
FromEngine: TypeAlias = Hello | Loaded | StepProgress | Finished | Failed | Pong | Bye

_ENCODER = msgspec.msgpack.Encoder()
_SEQUENCE = msgspec.msgpack.Decoder(PromptSequence)
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """Return a message as the body of a frame."""
    return _ENCODER.encode(message)


def check_sequence(sequence: PromptSequence) -> None:
    """Refuse a sequence that an engine would not take: it would end the conversation with everybody's engine.

    Raises:
        InputError: a count or a token id is out of range.
    """
    try:
        _SEQUENCE.decode(_ENCODER.encode(sequence))
    except (msgspec.ValidationError, OverflowError) as error:
        raise InputError(f"request {sequence.request_id} cannot be put to an engine: {error}") from None


def decode_to_engine(body: bytes) -> ToEngine:
    """Return the message to an engine that a frame holds.

    Raises:
        ProtocolError: it holds none.
    """
    try:
        return _TO_ENGINE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message to an engine: {error}") from None


def decode_from_engine(body: bytes) -> FromEngine:
    """Return the message from an engine that a frame holds.

    Raises:
        ProtocolError: it holds none.
    """
    try:
        return _FROM_ENGINE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message from an engine: {error}") from None


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
        if len(body) > MAX_FRAME_BYTES:
            raise ProtocolError(f"a message of {len(body):,} bytes is too long; at most {MAX_FRAME_BYTES:,} go")
        if not self._writer.is_closing():
            self._writer.write(len(body).to_bytes(_LENGTH_BYTES, "big") + body)

    async def receive(self) -> Received_co:
        """Wait for the next message; see `Channel`."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length:,} bytes is too long; at most {MAX_FRAME_BYTES:,} are read")
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
