"""Any input on a socket at most ends the connection."""

import asyncio
import contextlib
import socket

import hypothesis.strategies as st
import msgspec
import pytest
from engine_fixtures import TIMEOUT_S
from hypothesis import given, settings

from maveriq.exec.engine_server import EngineServer
from maveriq.exec.messages import (
    MAX_FRAME_BYTES,
    AbortRequest,
    Admitted,
    BatchingSpec,
    ChannelClosedError,
    Ended,
    EngineSpec,
    Failed,
    Finished,
    Generate,
    Hello,
    Load,
    Loaded,
    NewTokens,
    Ping,
    Pong,
    PromptSequence,
    ProtocolError,
    StepProgress,
    StepReport,
    Stop,
    StreamChannel,
    SubmitRequest,
    decode_from_engine,
    decode_to_engine,
    encode,
)

COUNTS, IDS = st.integers(0, 2**53), st.integers(0, 2**31 - 1)
SECONDS = st.floats(0, 0.001)
TEXTS = st.text(max_size=20)
SPECS = st.builds(
    EngineSpec,
    deployment_id=COUNTS,
    generation=COUNTS,
    model=TEXTS,
    config_json=st.sampled_from(["{}", "[]", "", '{"vocab_size": 0}', '{"vocab_size": 9}']),
    tp=st.just(1),
    pp=st.just(1),
    layer_split=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    weights=TEXTS,
    kv=TEXTS,
    batch_size=st.integers(1, 3),
    devices=st.lists(TEXTS, max_size=3).map(tuple),
    time_scale=st.floats(0.001, 1),
    load_s=SECONDS,
    batching=st.none()
    | st.builds(
        BatchingSpec,
        kind=st.just("emulated"),
        arguments=st.sampled_from([{}, {"step_ms": 0.0}, {"kv_tokens": 3, "step_ms": 0.0}, {"unknown": True}]),
    ),
)
SEQUENCES = st.builds(
    PromptSequence,
    request_id=COUNTS,
    prompt=st.lists(IDS, min_size=1, max_size=5).map(tuple),
    output_tokens=st.integers(1, 5),
    stop_token_ids=st.lists(IDS, max_size=3).map(tuple),
)
TO_ENGINE = st.one_of(
    st.builds(Load, spec=SPECS),
    st.builds(
        Generate,
        execution_id=st.integers(0, 5),
        sequences=st.lists(SEQUENCES, min_size=1, max_size=4).map(tuple),
        first_token_s=SECONDS,
        service_s=SECONDS,
    ),
    st.builds(SubmitRequest, number=st.integers(1, 5), sequence=SEQUENCES, is_urgent=st.booleans()),
    st.builds(AbortRequest, number=st.integers(1, 5), request_id=COUNTS),
    st.builds(Ping, number=COUNTS, received=COUNTS),
    st.builds(Stop),
)
FROM_ENGINE = st.one_of(
    st.builds(Hello, protocol=COUNTS, pid=COUNTS),
    st.builds(Loaded, backend=TEXTS, version=TEXTS, weights_bytes=COUNTS, kv_cache_bytes=COUNTS),
    st.builds(StepProgress, execution_id=COUNTS, step=COUNTS, tokens=st.lists(st.integers(-1, 9)).map(tuple)),
    st.builds(
        Finished,
        execution_id=COUNTS,
        first_token_s=SECONDS,
        service_s=SECONDS,
        outputs=st.lists(st.lists(IDS).map(tuple)).map(tuple),
    ),
    st.builds(Failed, execution_id=COUNTS, kind=TEXTS, message=TEXTS),
    st.builds(
        StepReport,
        number=st.integers(1, 2**53),
        step_s=SECONDS,
        tokens=st.lists(st.builds(NewTokens, COUNTS, st.lists(IDS, min_size=1).map(tuple))).map(tuple),
        admitted=st.lists(st.builds(Admitted, COUNTS, COUNTS)).map(tuple),
        preempted=st.lists(COUNTS).map(tuple),
        ended=st.lists(st.builds(Ended, COUNTS, SECONDS, COUNTS, TEXTS)).map(tuple),
        running=COUNTS,
    ),
    st.builds(Pong, number=COUNTS, execution_id=COUNTS, steps=COUNTS, accepted=COUNTS),
)


def anything() -> st.SearchStrategy[bytes]:
    """Draw bytes: random ones, MessagePack values, and messages with a changed byte."""
    plain = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.just("type"), inner, max_size=4),
        max_leaves=10,
    )
    changed = st.tuples((TO_ENGINE | FROM_ENGINE).map(encode), st.integers(0, 10**6), st.integers(0, 255)).map(
        lambda parts: (
            parts[0][: parts[1] % len(parts[0])] + bytes([parts[2]]) + parts[0][parts[1] % len(parts[0]) + 1 :]
        )
    )
    nested = st.integers(1, 5_000).map(lambda depth: b"\x91" * depth)
    return st.one_of(st.binary(max_size=200), plain.map(msgspec.msgpack.encode), changed, nested)


@given(anything())
@settings(max_examples=400, deadline=None)
def test_bytes_are_a_message_or_a_protocol_error(payload: bytes) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with contextlib.suppress(ProtocolError):
            decode(payload)


@given(TO_ENGINE, FROM_ENGINE)
@settings(max_examples=200, deadline=None)
def test_messages_round_trip(there, back) -> None:
    assert decode_to_engine(encode(there)) == there
    assert decode_from_engine(encode(back)) == back


async def exit_code_after(*frames: bytes) -> int:
    """Send frames to an engine server, close the socket, and return its exit code."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    _, our_writer = await asyncio.open_unix_connection(sock=ours)
    host = EngineServer(StreamChannel(reader, writer, decode_to_engine), "emulated")
    running = asyncio.create_task(host.run())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for frame in frames:
                our_writer.write(frame)
            our_writer.close()
            return await running
    finally:
        our_writer.close()
        writer.close()


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


@given(st.lists(TO_ENGINE, max_size=6), st.none() | anything().map(framed) | st.binary(max_size=50))
@settings(max_examples=60, deadline=None)
def test_an_engine_server_ends_on_any_input(messages, rest: bytes | None) -> None:
    assert asyncio.run(exit_code_after(*(framed(encode(message)) for message in messages), rest or b"")) in (0, 1, 3)


@pytest.mark.parametrize("frame", [b"", b"\0", b"\0\0\0\5abc", (MAX_FRAME_BYTES + 1).to_bytes(4, "big")])
def test_a_truncated_or_too_long_frame_ends_the_channel(frame: bytes) -> None:
    async def check() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(frame)
        reader.feed_eof()
        with pytest.raises((ChannelClosedError, ProtocolError)):
            await StreamChannel(reader, None, decode_from_engine).receive()  # type: ignore[arg-type]

    asyncio.run(check())
