"""Tokenizers and stop strings."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.errors import InputError
from maveriq.serve.completions import StopStrings
from maveriq.serve.tokenizer_process import TokenizerLimits, TokenizerPool
from maveriq.serve.tokenizer_worker import plain_chat
from maveriq.serve.tokenizers import ByteTokenizer, Tokenizer, decode, tokenizer_for

T = TypeVar("T")
VOCAB = ["<unk>", "<s>", "</s>", "hello", "world", "Ġhello", "Ġworld", "a", "user", "assistant", ":", "Ċ"]


@given(st.text(), st.sampled_from([259, 300, 32_000]))
def test_byte_tokenizer_round_trip(text: str, vocab_size: int) -> None:
    bytes_ = ByteTokenizer(vocab_size)
    ids = asyncio.run(bytes_.encode(text))
    assert all(0 <= token_id < vocab_size for token_id in ids)
    assert asyncio.run(decode(bytes_, ids)) == text


@given(st.text(), st.integers(1, 258))
def test_byte_tokenizer_with_a_small_vocabulary(text: str, vocab_size: int) -> None:
    assert all(0 <= token_id < vocab_size for token_id in asyncio.run(ByteTokenizer(vocab_size).encode(text)))


@given(st.lists(st.integers(0, 31_999)))
def test_every_token_decodes_to_text(ids: list[int]) -> None:
    text = asyncio.run(decode(ByteTokenizer(32_000), ids))
    text.encode()  # which can be sent
    assert len(text) <= len(ids)
    assert bool(text) == bool(ids)


PIECES = st.lists(st.text("abc", max_size=3), max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_stop_strings_in_pieces_equal_those_in_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    scanner = StopStrings(stops)
    shown = "".join(map(scanner.feed, pieces)) + scanner.flush()
    ends = [at for at in map("".join(pieces).find, stops) if at >= 0]
    whole = "".join(pieces)
    if ends:
        assert scanner.stopped
        # A longer stop string may begin earlier, but be whole only after a shorter one was seen.
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)
    else:
        assert (shown, scanner.stopped) == (whole, False)


@given(PIECES, STOPS)
def test_stop_strings_hold_back_only_possible_matches(pieces: list[str], stops: list[str]) -> None:
    scanner, seen, shown = StopStrings(stops), "", ""
    for piece in pieces:
        seen += piece
        shown += scanner.feed(piece)
        assert seen.startswith(shown)
        if scanner.stopped:
            break
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a small tokenizer of its own, a chat template, and an end token."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCAB)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    return tmp_path


CHAT = [{"role": "user", "content": "hello"}]


def with_tokenizer(folder: Path | str, use: Callable[[Tokenizer], Awaitable[T]], **limits: float) -> T:
    """Load a folder's tokenizer, use it, and end its process."""

    async def run() -> T:
        own = await tokenizer_for(str(folder), 100, TokenizerPool(TokenizerLimits(**limits) if limits else None))  # type: ignore[arg-type]
        try:
            return await use(own)
        finally:
            await own.close()

    return asyncio.run(run())


def test_tokenizer_file(folder: Path) -> None:
    async def use(own: Tokenizer) -> None:
        assert await own.encode("hello world") == (3, 6)
        assert await own.encode_chat(CHAT) == (1, 3)
        assert own.stop_token_ids == (2,)
        assert await decode(own, [3, 6, 2]) == "hello world"
        assert await decode(own, [3, 99]) == "hello", "a model may have more ids than its tokenizer"

    with_tokenizer(folder, use)


def test_chat_without_a_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert plain_chat(CHAT) == "user: hello\nassistant:"

    async def use(own: Tokenizer) -> None:
        assert await own.encode_chat(CHAT) == await own.encode(plain_chat(CHAT))

    with_tokenizer(folder, use)


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% for %}"])
def test_bad_chat_template(folder: Path, template: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(InputError, match="chat template"):
        with_tokenizer(folder, lambda own: own.encode_chat(CHAT))


def test_unreadable_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json.* cannot be read"):
        with_tokenizer(folder, lambda own: own.encode("hello"))


def test_no_tokenizer_file_means_bytes(tmp_path: Path) -> None:
    for folder in ("", str(tmp_path)):
        assert asyncio.run(tokenizer_for(folder, 300, TokenizerPool())) == ByteTokenizer(300)
