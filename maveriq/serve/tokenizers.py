"""Text to token ids and back: a model's own tokenizer, else one of bytes that any model can take."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maveriq.errors import InputError
from maveriq.files import exists
from maveriq.tables import read_text

_BYTES = 256
_SPECIAL = 3  # ids 0 to 2 are left to padding, end and unknown, as in byte-level models
_PRINTABLE_FROM, _PRINTABLE = 33, 94


class TextStream(Protocol):
    """Turns one request's tokens into text as they come."""

    def step(self, token_id: int) -> str:
        """Return the text that is certain with this token; may be empty."""

    def end(self) -> str:
        """Return what was held back."""


class Tokenizer(Protocol):
    """What the service needs of a tokenizer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text of their own accord."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the ids of a conversation (`role` and `content` each) that the model is to continue."""

    def stream(self) -> TextStream:
        """Return a new stream for one request's output."""


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of an output."""
    stream = tokenizer.stream()
    return "".join(map(stream.step, token_ids)) + stream.end()


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation for a model without a template: `role: content` lines and an open last one."""
    return "".join(f"{one['role']}: {one['content']}\n" for one in messages) + "assistant:"


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """A token per byte of UTF-8, for models without a tokenizer (random weights, emulated engines).

    Byte b is id b + 3, or b modulo the vocabulary where that is too small. An id that stands for no byte
    is shown as some printable character, so that every token can be seen.
    """

    vocab_size: int

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """None: what random weights say last means nothing."""
        return ()

    @property
    def _offset(self) -> int:
        return _SPECIAL if self.vocab_size >= _BYTES + _SPECIAL else 0

    def encode(self, text: str) -> tuple[int, ...]:
        """Return an id per byte."""
        return tuple((byte + self._offset) % self.vocab_size for byte in text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the bytes of the conversation in lines."""
        return self.encode(plain_chat(messages))

    def stream(self) -> TextStream:
        """Return a stream that puts characters of several bytes together."""
        return _ByteStream(self._offset)


class _ByteStream:
    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token_id: int) -> str:
        byte = token_id - self._offset
        if not 0 <= byte < _BYTES:
            byte = _PRINTABLE_FROM + token_id % _PRINTABLE
        return self._decoder.decode(bytes((byte,)))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


def tokenizer_for(folder: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer that lies in a model's folder, else one of bytes.

    Args:
        folder: where the model's files lie; empty for none.
        vocab_size: of the model.

    Raises:
        InputError: there is a tokenizer that cannot be read, or the package `tokenizers` is missing for it.
    """
    path = Path(folder) / "tokenizer.json"
    if not folder or not exists(path):
        return ByteTokenizer(vocab_size)
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            f"{str(path)!r} needs the package tokenizers; install it with pip install 'maveriq[serve]'"
        ) from None
    try:
        inner = tokenizers.Tokenizer.from_str(read_text(path, what="tokenizer"))
    except Exception as error:  # the package raises nothing more special
        raise InputError(f"tokenizer {str(path)!r} cannot be read: {error}") from None
    configured = _optional_json(path.with_name("tokenizer_config.json"))
    ends = _end_ids(_optional_json(path.with_name("config.json")))
    return _FileTokenizer(inner, ends, _chat_template(configured, str(path)))


class _FileTokenizer:
    """A tokenizer of the `tokenizers` package, with its model's chat template if there is one."""

    def __init__(self, inner: Any, ends: tuple[int, ...], template: Callable[..., str] | None) -> None:
        self._inner = inner
        self._template = template
        self.stop_token_ids = ends

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        if self._template is None:
            return self.encode(plain_chat(messages))
        # A template writes the special tokens itself.
        return tuple(self._inner.encode(self._template(messages), add_special_tokens=False).ids)

    def stream(self) -> TextStream:
        return _FileStream(self._inner)


class _FileStream:
    def __init__(self, inner: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._inner = inner
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        # Models are built with more ids than their tokenizer has; those have no text.
        with contextlib.suppress(Exception):
            return self._stream.step(self._inner, token_id) or ""
        return ""

    def end(self) -> str:
        return ""


def _optional_json(path: Path) -> Mapping[str, Any]:
    if not exists(path):
        return {}
    try:
        found = json.loads(read_text(path, what="tokenizer's configuration"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _end_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    said = config.get("eos_token_id")
    ids = said if isinstance(said, list) else [said]
    return tuple(one for one in ids if isinstance(one, int) and one >= 0)


def _chat_template(configured: Mapping[str, Any], where: str) -> Callable[..., str] | None:
    """Return the chat template as a function; it comes with the model, so it runs in a sandbox."""
    text = configured.get("chat_template")
    if not isinstance(text, str):
        return None
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    specials = {name: _special(configured, name) for name in ("bos_token", "eos_token")}
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    except TemplateError as error:
        raise InputError(f"the chat template beside {where!r} cannot be read: {error}") from None

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, **specials)
        except Exception as error:  # templates raise what they like
            raise InputError(f"the model's chat template cannot take these messages: {error}") from None

    return render


def _special(configured: Mapping[str, Any], name: str) -> str:
    said = configured.get(name)
    return str(said.get("content", "")) if isinstance(said, dict) else str(said or "")
