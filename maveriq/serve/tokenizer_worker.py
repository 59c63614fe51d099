"""The process that runs the tokenizer and chat template of one model: `python -m maveriq.serve.tokenizer_worker`.

Both come with the model and are not trusted: a template may loop, a regular expression may backtrack for hours, a
string may fill the memory. This process has limits of CPU time and memory, and the server kills it after a deadline
(`maveriq.serve.tokenizer_process`). Messages come on stdin and answers go to stdout: a frame is its length in four
bytes, big-endian, then MessagePack. Texts are encoded in one thread and tokens decoded in another, so that a long
prompt does not hold up the outputs. The end of stdin ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import msgspec

from maveriq.errors import InputError
from maveriq.exec.messages import FRAME_LENGTH_BYTES, frame, one_line
from maveriq.exec.model_files import read_model_file

MAX_TOKENS = 1_000_000
"""A longer prompt is an error."""

_NICENESS = 10  # where cores are short, the server and its engines go first, and a hostile model last
_OPEN_FILES = 64
_MAX_OUTPUTS = 4096


class LoadTokenizer(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """The first message: limits, and the folder whose tokenizer to load. The answer is a `TokenizerLoaded`."""

    number: int
    folder: str
    cpu_s: int
    memory_bytes: int


class EncodeText(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Encode a text. The answer is `Encoded`."""

    number: int
    text: str


class EncodeChat(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """Encode messages with `role` and `content`, followed by the assistant's turn. The answer is `Encoded`."""

    number: int
    messages: list[dict[str, str]]


class DecodeTokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Decode the next tokens of an output, and forget the output after its `last`. The answer is `Decoded`."""

    number: int
    output: int
    token_ids: list[int]
    last: bool = False


class TokenizerLoaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The tokenizer is loaded; `stop_token_ids` end an output."""

    number: int
    stop_token_ids: tuple[int, ...]


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag="encoded"):
    """The token IDs of a text."""

    number: int
    token_ids: tuple[int, ...]


class Decoded(msgspec.Struct, frozen=True, kw_only=True, tag="decoded"):
    """The text that each token completes; it may be empty."""

    number: int
    texts: list[str]


class CallFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A call failed, with the reason in one line."""

    number: int
    reason: str


Call: TypeAlias = LoadTokenizer | EncodeText | EncodeChat | DecodeTokens
Answer: TypeAlias = TokenizerLoaded | Encoded | Decoded | CallFailed

_ENCODER = msgspec.msgpack.Encoder()
_CALLS = msgspec.msgpack.Decoder(Call)
ANSWERS = msgspec.msgpack.Decoder(Answer)


def encode(message: Call | Answer) -> bytes:
    """Return the frame of a message."""
    return frame(_ENCODER.encode(message))


class ModelTokenizer:
    """The tokenizer and the chat template in a model's folder.

    Raises:
        InputError: a file cannot be read, or a package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise InputError("tokenizer.json needs the package tokenizers; pip install 'maveriq[serve]'") from None
        path = folder / "tokenizer.json"
        text = read_model_file(folder, "tokenizer.json", what="tokenizer")
        try:
            self._inner = tokenizers.Tokenizer.from_str(text or "")
        except BaseException as error:  # the package raises plain Exception, and BaseException where it panics
            raise InputError(f"tokenizer {str(path)!r} cannot be read: {_reason(error)}") from None
        self.stop_token_ids = _end_tokens(_optional_json(folder, "config.json"))
        self._template = _chat_template(_optional_json(folder, "tokenizer_config.json"), str(path))
        self._streams: dict[int, Any] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token IDs of a text."""
        return tuple(self._inner.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the token IDs of messages, formatted by the template."""
        if self._template is None:
            return self.encode(plain_chat(messages))
        # A template adds the special tokens itself.
        return tuple(self._inner.encode(self._template(messages), add_special_tokens=False).ids)

    def decode(self, output: int, token_ids: Sequence[int], *, last: bool) -> list[str]:
        """Return the text that each of the next tokens of an output completes."""
        from tokenizers.decoders import DecodeStream

        stream = self._streams.setdefault(output, DecodeStream(skip_special_tokens=True))
        if len(self._streams) > _MAX_OUTPUTS:  # outputs whose clients left have no last token
            del self._streams[next(iter(self._streams))]
        texts = [self._step(stream, token_id) for token_id in token_ids]
        if last:
            self._streams.pop(output, None)
        return texts

    def _step(self, stream: Any, token_id: int) -> str:
        # Models may have more IDs than their tokenizer; those have no text.
        with contextlib.suppress(Exception):
            return stream.step(self._inner, token_id) or ""
        return ""


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages as `role: content` lines, for models without a chat template."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def _optional_json(folder: Path, name: str) -> Mapping[str, Any]:
    text = read_model_file(folder, name, what="tokenizer configuration")
    try:
        content = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(folder / name)!r} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _end_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    token_ids = value if isinstance(value, list) else [value]
    return tuple(token_id for token_id in token_ids if type(token_id) is int and 0 <= token_id < 1 << 31)


def _chat_template(config: Mapping[str, Any], path: str) -> Callable[..., str] | None:
    """Return the chat template as a function, None if there is none."""
    text = config.get("chat_template")
    if not isinstance(text, str):
        return None
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    special_tokens = {name: _special_token(config, name) for name in ("bos_token", "eos_token")}
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    except Exception as error:  # constants are computed here, so a template can raise anything
        raise InputError(f"the chat template next to {path!r} cannot be read: {_reason(error)}") from None

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, **special_tokens)
        except Exception as error:  # a template can raise anything
            raise InputError(f"the model's chat template cannot format these messages: {_reason(error)}") from None

    return render


def _special_token(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name)
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _reason(error: BaseException) -> str:
    return "it needs too much memory" if isinstance(error, MemoryError) else one_line(str(error))


class _Worker:
    """Answers calls until stdin ends."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._writing = threading.Lock()
        self._encoding = ThreadPoolExecutor(1)
        self._decoding = ThreadPoolExecutor(1)
        self._tokenizer: ModelTokenizer | None = None
        self._cpu_s = 0

    def take(self, call: Call) -> None:
        """Start a call; its thread sends the answer."""
        (self._decoding if isinstance(call, DecodeTokens) else self._encoding).submit(self._run, call)

    def _run(self, call: Call) -> None:
        try:
            answer = self._answer(call)
        except (InputError, MemoryError) as error:
            answer = CallFailed(number=call.number, reason=_reason(error))
        except BaseException as error:  # the package raises plain Exception, and BaseException where it panics
            answer = CallFailed(number=call.number, reason=f"the tokenizer failed: {one_line(str(error))}")
        body = encode(answer)
        with self._writing:
            self._answers.write(body)
            self._answers.flush()

    def _answer(self, call: Call) -> Answer:
        if isinstance(call, LoadTokenizer):
            _limit(call)
            self._cpu_s = call.cpu_s
            self._tokenizer = ModelTokenizer(Path(call.folder))
            return TokenizerLoaded(number=call.number, stop_token_ids=self._tokenizer.stop_token_ids)
        _allow_cpu_time(self._cpu_s)
        if self._tokenizer is None:
            raise InputError("no tokenizer is loaded")
        if isinstance(call, DecodeTokens):
            texts = self._tokenizer.decode(call.output, call.token_ids, last=call.last)
            return Decoded(number=call.number, texts=texts)
        if isinstance(call, EncodeText):
            ids = self._tokenizer.encode(call.text)
        else:
            ids = self._tokenizer.encode_chat(call.messages)
        if len(ids) > MAX_TOKENS:
            raise InputError(f"the prompt has {len(ids):,} tokens; the maximum is {MAX_TOKENS:,}")
        return Encoded(number=call.number, token_ids=ids)


def _limit(load: LoadTokenizer) -> None:
    """Limit this process: memory, CPU time, open files; it writes no file and leaves no core dump."""
    _allow_cpu_time(load.cpu_s)
    resource.setrlimit(resource.RLIMIT_AS, (load.memory_bytes, load.memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    for nothing in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(nothing, (0, 0))


def _allow_cpu_time(seconds: int) -> None:
    """Let this process compute for so many more seconds; then the kernel ends it, whatever the server does."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    """Serve calls from stdin."""
    os.nice(_NICENESS)
    calls, worker = sys.stdin.buffer, _Worker(sys.stdout.buffer)
    while len(header := calls.read(FRAME_LENGTH_BYTES)) == FRAME_LENGTH_BYTES:
        worker.take(_CALLS.decode(calls.read(int.from_bytes(header, "big"))))
    # Not sys.exit: a thread may be computing.
    os._exit(0)


if __name__ == "__main__":
    main()
