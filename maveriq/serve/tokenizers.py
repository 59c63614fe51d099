"""Tokenizers: a model's own `tokenizer.json`, or bytes for models that have none."""

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
_SPECIAL_TOKENS = 3  # IDs 0 to 2 are padding, end and unknown, as in byte-level models
_FIRST_PRINTABLE, _PRINTABLE_CHARACTERS = 33, 94  # of ASCII


class TextStream(Protocol):
    """Decodes the output of one request token by token."""

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes; it may be empty."""

    def flush(self) -> str:
        """Return the text that was held back."""


class Tokenizer(Protocol):
    """What the service needs from a tokenizer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens with which the model ends a text."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token IDs of a text."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the token IDs of messages with `role` and `content`, followed by the assistant's turn."""

    def stream(self) -> TextStream:
        """Return a new decoder for one output."""


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of token IDs."""
    stream = tokenizer.stream()
    return "".join(map(stream.feed, token_ids)) + stream.flush()


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages as `role: content` lines, for models without a chat template."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """One token per byte of UTF-8, for models without a tokenizer (random weights, emulated engines).

    Byte b has ID b + 3, or b modulo the vocabulary size if that is too small. An ID without a byte decodes to some
    printable character, so that every token is visible.
    """

    vocab_size: int

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """None: outputs of random weights have no end token."""
        return ()

    @property
    def _offset(self) -> int:
        return _SPECIAL_TOKENS if self.vocab_size >= _BYTES + _SPECIAL_TOKENS else 0

    def encode(self, text: str) -> tuple[int, ...]:
        """Return one ID per byte."""
        return tuple((byte + self._offset) % self.vocab_size for byte in text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the bytes of `plain_chat`."""
        return self.encode(plain_chat(messages))

    def stream(self) -> TextStream:
        """Return a decoder that joins the bytes of a character."""
        return _ByteStream(self._offset)


class _ByteStream:
    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        byte = token_id - self._offset
        if not 0 <= byte < _BYTES:
            byte = _FIRST_PRINTABLE + token_id % _PRINTABLE_CHARACTERS
        return self._decoder.decode(bytes((byte,)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def tokenizer_for(folder: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer in a model's folder, or a byte tokenizer if there is none.

    Args:
        folder: with the model's files; empty for none.
        vocab_size: of the model.

    Raises:
        InputError: `tokenizer.json` cannot be read, or the package `tokenizers` is not installed.
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
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"tokenizer {str(path)!r} cannot be read: {error}") from None
    config = _optional_json(path.with_name("tokenizer_config.json"))
    end_tokens = _end_tokens(_optional_json(path.with_name("config.json")))
    return _FileTokenizer(inner, end_tokens, _chat_template(config, str(path)))


class _FileTokenizer:
    """A tokenizer of the `tokenizers` package, with the model's chat template if it has one."""

    def __init__(self, inner: Any, end_tokens: tuple[int, ...], template: Callable[..., str] | None) -> None:
        self._inner = inner
        self._template = template
        self.stop_token_ids = end_tokens

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        if self._template is None:
            return self.encode(plain_chat(messages))
        # A template adds the special tokens itself.
        return tuple(self._inner.encode(self._template(messages), add_special_tokens=False).ids)

    def stream(self) -> TextStream:
        return _FileStream(self._inner)


class _FileStream:
    def __init__(self, inner: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._inner = inner
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_id: int) -> str:
        # Models may have more IDs than their tokenizer; those have no text.
        with contextlib.suppress(Exception):
            return self._stream.step(self._inner, token_id) or ""
        return ""

    def flush(self) -> str:
        return ""


def _optional_json(path: Path) -> Mapping[str, Any]:
    if not exists(path):
        return {}
    try:
        content = json.loads(read_text(path, what="tokenizer configuration"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _end_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    token_ids = value if isinstance(value, list) else [value]
    return tuple(token_id for token_id in token_ids if isinstance(token_id, int) and token_id >= 0)


def _chat_template(config: Mapping[str, Any], path: str) -> Callable[..., str] | None:
    """Return the chat template as a function. It comes with the model and is not trusted, so it runs in a sandbox."""
    text = config.get("chat_template")
    if not isinstance(text, str):
        return None
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    special_tokens = {name: _special_token(config, name) for name in ("bos_token", "eos_token")}
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    except TemplateError as error:
        raise InputError(f"the chat template next to {path!r} cannot be read: {error}") from None

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, **special_tokens)
        except Exception as error:  # a template can raise anything
            raise InputError(f"the model's chat template cannot format these messages: {error}") from None

    return render


def _special_token(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name)
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
