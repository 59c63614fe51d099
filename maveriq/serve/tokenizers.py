"""Tokenizers: a model's own `tokenizer.json`, in a process of its own, or bytes for models that have none."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maveriq.files import exists
from maveriq.serve.background import in_background
from maveriq.serve.tokenizer_process import TokenizerPool, TokenizerProcess
from maveriq.serve.tokenizer_worker import plain_chat

_BYTES = 256
_SPECIAL_TOKENS = 3  # IDs 0 to 2 are padding, end and unknown, as in byte-level models
_MAX_INLINE_CHARACTERS = 4_096  # longer texts are encoded in the background
_FIRST_PRINTABLE, _PRINTABLE_CHARACTERS = 33, 94  # of ASCII


class TextStream(Protocol):
    """Decodes the output of one request."""

    async def feed(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text that each of the next tokens completes; it may be empty."""

    async def flush(self) -> str:
        """Return the text that was held back."""


class Tokenizer(Protocol):
    """What the service needs from a tokenizer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens with which the model ends a text."""

    async def encode(self, text: str) -> tuple[int, ...]:
        """Return the token IDs of a text."""

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the token IDs of messages with `role` and `content`, followed by the assistant's turn."""

    def stream(self) -> TextStream:
        """Return a new decoder for one output."""

    def refuse_prompts(self) -> None:
        """Encode no more prompts, and fail those that are being encoded: the server stops."""

    async def close(self) -> None:
        """Free what it holds. It may be used again."""


async def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of token IDs."""
    stream = tokenizer.stream()
    return "".join(await stream.feed(token_ids)) + await stream.flush()


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

    async def encode(self, text: str) -> tuple[int, ...]:
        """Return one ID per byte."""
        return await in_background(self._encode, text) if len(text) > _MAX_INLINE_CHARACTERS else self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple((byte + self._offset) % self.vocab_size for byte in text.encode())

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the bytes of `plain_chat`."""
        return await self.encode(plain_chat(messages))

    def stream(self) -> TextStream:
        """Return a decoder that joins the bytes of a character."""
        return _ByteStream(self._offset)

    def refuse_prompts(self) -> None:
        """Do nothing: its prompts take no time."""

    async def close(self) -> None:
        """Do nothing: it holds nothing."""


class _ByteStream:
    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    async def feed(self, token_ids: Sequence[int]) -> list[str]:
        return list(map(self._step, token_ids))

    def _step(self, token_id: int) -> str:
        byte = token_id - self._offset
        if not 0 <= byte < _BYTES:
            byte = _FIRST_PRINTABLE + token_id % _PRINTABLE_CHARACTERS
        return self._decoder.decode(bytes((byte,)))

    async def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


async def tokenizer_for(folder: str, vocab_size: int, pool: TokenizerPool) -> Tokenizer:
    """Return the tokenizer in a model's folder, loaded, or a byte tokenizer if there is none.

    Args:
        folder: with the model's files; empty for none.
        vocab_size: of the model.
        pool: bounds the processes of tokenizers.

    Raises:
        InputError: `tokenizer.json` cannot be read, or the package `tokenizers` is not installed.
        TokenizerFailedError: loading it takes too long or too much memory.
    """
    if not folder or not await asyncio.to_thread(_has_tokenizer, Path(folder)):
        return ByteTokenizer(vocab_size)
    tokenizer = TokenizerProcess(folder, pool)
    try:
        await tokenizer.start()
    except BaseException:
        await tokenizer.close()
        raise
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    path = folder / "tokenizer.json"
    return exists(path) or path.is_symlink()
