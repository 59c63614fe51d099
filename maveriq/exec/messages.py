"""The messages between the executor and its engines, and the channels that carry them.

A message is one frame on a Unix socket: its length in four bytes, big-endian, then MessagePack. The protocol has a
version. Delivery counts as unreliable: a message may arrive late, twice or never, so every message may be sent again.
Executions are numbered. An engine that receives a `Generate` again repeats the result if the execution has finished,
and ignores it if the execution is running or older. Senders do not wait for answers; they repeat unanswered messages.

A continuous engine takes `SubmitRequest` and `AbortRequest` while other requests run, and sends a `StepReport` for each
step. Both sides number these messages from 1 and take only the next one in order, so each counts once. `Ping` and
`Pong` say how far each side has got; what was lost is sent again (`maveriq.exec.numbered_messages`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Annotated, Generic, Protocol, TypeAlias, TypeVar

import msgspec

from maveriq.errors import InputError, MaveriqError

_MAX_LINE_LENGTH = 300


def one_line(text: str) -> str:
    """Return a text on one line, shortened to 300 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_LINE_LENGTH else line[: _MAX_LINE_LENGTH - 3] + "..."


PROTOCOL_VERSION = 2

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""A longer frame is a protocol error."""

MAX_RANKS = 10_000
MAX_SEQUENCES = 10_000
MAX_PROMPT_TOKENS = 1_000_000
MAX_OUTPUT_TOKENS = 1_000_000

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
_TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_TokenIdOrEnded = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class ProtocolError(MaveriqError):
    """The other side sends something that is not a message of this protocol, or a message is too long to send."""


class PromptSequence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt of an execution, and the maximum number of tokens to generate.

    Generation ends after `output_tokens`, or earlier at one of `stop_token_ids`.
    """

    request_id: _Count
    prompt: Annotated[tuple[_TokenId, ...], msgspec.Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_OUTPUT_TOKENS)]
    stop_token_ids: Annotated[tuple[_TokenId, ...], msgspec.Meta(max_length=64)] = ()


class BatchingSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine batches continuously: the kind of engine, and its arguments by its own names."""

    kind: _Name
    arguments: Annotated[
        dict[_Name, bool | int | float | Annotated[str, msgspec.Meta(max_length=1000)]], msgspec.Meta(max_length=100)
    ] = {}


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine loads. Which devices it sees is fixed by the environment of its process.

    `config_json` is the model's Hugging Face configuration. `devices` names one device per rank, stage-major: "cpu", or
    "cuda:0" counted among the visible devices. If `weights_folder` is empty, random weights are drawn from `seed`. Only
    the emulated engine uses `time_scale` (real seconds per second of the run) and `load_s` (the rest of the estimated
    load time, in seconds of the run). `batching` is None for an engine that takes one execution at a time.
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
    batching: BatchingSpec | None = None


# From the executor to an engine


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load", forbid_unknown_fields=True):
    """Load a model: the first message after the engine's `Hello`. The answer is `Loaded` or `Failed`."""

    spec: EngineSpec


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag="inspect", forbid_unknown_fields=True):
    """Import the engine's library and say what it would not accept of a spec; nothing is loaded.

    The answer is `Inspected` or `Failed`. It may be sent any number of times before `Load`, and is ignored afterwards.
    """

    spec: EngineSpec


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate", forbid_unknown_fields=True):
    """Run these sequences as one batch. The answers are a `StepProgress` per step, then `Finished` or `Failed`.

    `first_token_s` and `service_s` are the estimated times, in seconds of the run. The emulated engine takes exactly
    these times; other engines ignore them.
    """

    execution_id: _Count
    sequences: Annotated[tuple[PromptSequence, ...], msgspec.Meta(min_length=1, max_length=MAX_SEQUENCES)]
    first_token_s: _NotNegative = 0.0
    service_s: _NotNegative = 0.0


class SubmitRequest(msgspec.Struct, frozen=True, kw_only=True, tag="submit", forbid_unknown_fields=True):
    """Put a request into the queue of a continuous engine. `StepReport`s tell what becomes of it.

    `is_urgent` goes before others where the engine schedules by priority.
    """

    number: _Number
    sequence: PromptSequence
    is_urgent: bool = False


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag="abort", forbid_unknown_fields=True):
    """End a request of a continuous engine, whether it waits or runs. Nothing is reported of it any more."""

    number: _Number
    request_id: _Count


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping", forbid_unknown_fields=True):
    """A heartbeat. The answer is a `Pong` with the same number.

    `received` is the number of the last `StepReport` that was taken.
    """

    number: _Count
    received: _Count = 0


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop", forbid_unknown_fields=True):
    """Free everything and exit. The answer is `Bye`."""


# From an engine to the executor


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", forbid_unknown_fields=True):
    """The engine's process is connected and waits for `Load`. It is repeated at each `Ping` until `Load` arrives."""

    protocol: _Count
    pid: _Count


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag="inspected", forbid_unknown_fields=True):
    """The version of the engine's library, "" if unknown, and what the installed classes lack.

    `unknown_arguments` are names of arguments that maveriq would pass for the spec, and that the classes do not have.
    """

    version: str
    unknown_arguments: Annotated[tuple[str, ...], msgspec.Meta(max_length=1000)] = ()


class RankShard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rank holds after loading: transformer layers, parameters in bytes, and the type of activations.

    `pid` is its process, 0 if the engine does not know.
    """

    layers: _Count
    weights_bytes: _Count
    dtype: Annotated[str, msgspec.Meta(max_length=40)]
    pid: _Count = 0


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded", forbid_unknown_fields=True):
    """The engine is ready to serve. Memory is in bytes, over all its devices; 0 if unknown.

    `shards` has one entry per rank, stage-major; it is empty if the engine does not know. `kv_tokens` is how many
    tokens the KV cache of a continuous engine holds; 0 if unknown.
    """

    backend: str
    version: str
    weights_bytes: _Count = 0
    kv_cache_bytes: _Count = 0
    shards: Annotated[tuple[RankShard, ...], msgspec.Meta(max_length=MAX_RANKS)] = ()
    kv_tokens: _Count = 0


class StepProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress", forbid_unknown_fields=True):
    """Step `step` (from 1) of an execution is done: one token per sequence, -1 if the sequence ended earlier."""

    execution_id: _Count
    step: _Count
    tokens: tuple[_TokenIdOrEnded, ...]


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished", forbid_unknown_fields=True):
    """An execution is done. The engine measures the times, in real seconds from the start of the execution."""

    execution_id: _Count
    first_token_s: _NotNegative
    service_s: _NotNegative
    outputs: tuple[tuple[_TokenId, ...], ...]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed", forbid_unknown_fields=True):
    """An execution failed, or loading failed (`execution_id` 0).

    `kind` is one of `out-of-memory`, `unsupported`, `error`. `device` is the one of `EngineSpec.devices` that lacks
    memory, "" if unknown. After a failed execution the engine still serves; after a failed load it exits.
    """

    execution_id: _Count
    kind: str
    message: str
    device: str = ""

    def __str__(self) -> str:
        where = f" on {self.device}" if self.device else ""
        return f"({self.kind}{where}): {self.message}"


class NewTokens(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The tokens that a request got in a step, at least one."""

    request_id: _Count
    tokens: Annotated[tuple[_TokenId, ...], msgspec.Meta(min_length=1, max_length=MAX_OUTPUT_TOKENS)]


class Admitted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request that a step computed for the first time; so many tokens of its prompt were in the prefix cache."""

    request_id: _Count
    cached_tokens: _Count = 0


class Ended(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request that has ended, with its last token or, if there is a `failure`, because the engine cannot do it.

    `service_s` is the time since the engine received it, in real seconds. `steps` computed something of it.
    """

    request_id: _Count
    service_s: _NotNegative
    steps: _Count
    failure: Annotated[str, msgspec.Meta(max_length=2000)] = ""


_OfRequests = msgspec.Meta(max_length=MAX_SEQUENCES)


class StepReport(msgspec.Struct, frozen=True, kw_only=True, tag="step", forbid_unknown_fields=True):
    """A step of a continuous engine is done: what became of requests.

    Args:
        number: of the report.
        ended_s: when it ended, in real seconds on a clock of the engine's own.
        step_s: how long it took, in real seconds.
        tokens: of the requests that got some.
        admitted: computed for the first time.
        preempted: lost what was computed of them, and wait again.
        ended: have ended, after their last tokens.
        running: requests that the engine has admitted, after the step.
        waiting: requests in its queue.
        kv_tokens: tokens of the KV cache that requests hold.
        batch_tokens: tokens that the step computed.
    """

    number: _Number
    ended_s: _NotNegative = 0.0
    step_s: _NotNegative = 0.0
    tokens: Annotated[tuple[NewTokens, ...], _OfRequests] = ()
    admitted: Annotated[tuple[Admitted, ...], _OfRequests] = ()
    preempted: Annotated[tuple[_Count, ...], _OfRequests] = ()
    ended: Annotated[tuple[Ended, ...], _OfRequests] = ()
    running: _Count = 0
    waiting: _Count = 0
    kv_tokens: _Count = 0
    batch_tokens: _Count = 0


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong", forbid_unknown_fields=True):
    """The answer to a `Ping`: the running execution (0 if none) and how many of its steps are done.

    Of a continuous engine, `steps` counts all its reports, and `accepted` is the number of the last `SubmitRequest` or
    `AbortRequest` that it has taken.
    """

    number: _Count
    execution_id: _Count
    steps: _Count
    accepted: _Count = 0


class Bye(msgspec.Struct, frozen=True, kw_only=True, tag="bye", forbid_unknown_fields=True):
    """The engine has freed everything and exits."""


ToEngine: TypeAlias = Load | Inspect | Generate | SubmitRequest | AbortRequest | Ping | Stop
FromEngine: TypeAlias = Hello | Inspected | Loaded | StepProgress | StepReport | Finished | Failed | Pong | Bye

_ENCODER = msgspec.msgpack.Encoder()
_SEQUENCE = msgspec.msgpack.Decoder(PromptSequence)
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """Encode a message as the payload of a frame."""
    return _ENCODER.encode(message)


def check_sequence(sequence: PromptSequence) -> None:
    """Reject a sequence that violates the protocol: an engine that receives one exits.

    Raises:
        InputError: a count or a token id is out of range.
    """
    try:
        _SEQUENCE.decode(_ENCODER.encode(sequence))
    except (msgspec.ValidationError, OverflowError) as error:
        raise InputError(f"request {sequence.request_id} cannot be put to an engine: {error}") from None


def decode_to_engine(payload: bytes) -> ToEngine:
    """Decode the payload of a frame to an engine.

    Raises:
        ProtocolError: it is not such a message.
    """
    try:
        return _TO_ENGINE.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message to an engine: {error}") from None


def decode_from_engine(payload: bytes) -> FromEngine:
    """Decode the payload of a frame from an engine.

    Raises:
        ProtocolError: it is not such a message.
    """
    try:
        return _FROM_ENGINE.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message from an engine: {error}") from None


FRAME_LENGTH_BYTES = 4
"""A frame is the length of its payload in so many bytes, big-endian, then the payload."""

Sent_contra = TypeVar("Sent_contra", bound=ToEngine | FromEngine, contravariant=True)
Received_co = TypeVar("Received_co", bound=ToEngine | FromEngine, covariant=True)


class ChannelClosedError(MaveriqError):
    """The other side has closed the channel or exited."""


def frame(payload: bytes) -> bytes:
    """Return a payload as it is sent."""
    return len(payload).to_bytes(FRAME_LENGTH_BYTES, "big") + payload


async def read_frame(reader: asyncio.StreamReader, *, max_bytes: int) -> bytes:
    """Wait for a frame and return its payload.

    Raises:
        ChannelClosedError: the other side has closed the channel.
        ProtocolError: the frame is longer than `max_bytes`.
    """
    try:
        length = int.from_bytes(await reader.readexactly(FRAME_LENGTH_BYTES), "big")
        if length > max_bytes:
            raise ProtocolError(f"a frame of {length:,} bytes is too long; at most {max_bytes:,} are read")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        raise ChannelClosedError("the other side has closed the channel") from None


class Channel(Protocol[Sent_contra, Received_co]):
    """One end of a channel."""

    def send(self, message: Sent_contra) -> None:
        """Queue a message for sending. If the channel is closed, the message is dropped."""

    async def receive(self) -> Received_co:
        """Wait for the next message.

        Raises:
            ChannelClosedError: the other side has closed the channel.
            ProtocolError: the data is not a message; the channel cannot be used any more.
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
            ProtocolError: the message is too long for a frame.
        """
        payload = encode(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise ProtocolError(f"a message of {len(payload):,} bytes is too long; at most {MAX_FRAME_BYTES:,} go")
        if not self._writer.is_closing():
            self._writer.write(frame(payload))

    async def receive(self) -> Received_co:
        """Wait for the next message; see `Channel`."""
        return self._decode(await read_frame(self._reader, max_bytes=MAX_FRAME_BYTES))

    async def flush(self) -> None:
        """Wait until all messages are written to the socket, or the other side has closed it."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        """Close this end; see `Channel`."""
        self._writer.close()
