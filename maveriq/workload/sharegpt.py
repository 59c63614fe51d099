"""Conversations as ShareGPT has them: texts without times and token counts, which become sessions of counted turns.

The tokens are counted by whoever calls: maveriq never guesses how many a text has.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from maveriq.errors import InputError
from maveriq.input_files import read_chunks
from maveriq.workload.arrivals import Draw
from maveriq.workload.conversations import conversation_hashes
from maveriq.workload.requests import Arrivals

CountTokens: TypeAlias = Callable[[str], int]
"""Returns how many tokens a text has."""

_WHAT = "trace"
_MAX_BYTES = 4 << 30
_MAX_CONVERSATION_CHARACTERS = 16 << 20
_MAX_CONVERSATIONS = 10_000_000
_USERS, _MODELS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard", "model")


def read_conversations(
    path: Path, count_tokens: CountTokens, *, first_turn_only: bool = False, limit: int | None = None
) -> tuple[Arrivals, int]:
    """Read a JSON array of conversations as requests that all arrive at 0.

    Each answer is a request: its prompt is all that was said before it, its output the answer. The requests of one
    conversation are the turns of a session.

    Args:
        path: the file: `[{"id": ..., "conversations": [{"from": "human", "value": ...}, ...]}, ...]`, or with
            `messages`, `role` and `content`.
        count_tokens: counts the tokens of a message.
        first_turn_only: keep only the first answer of each conversation.
        limit: stop after so many conversations that have an answer; None for all.

    Returns:
        The requests, and how many conversations were left out because nothing in them is answered.

    Raises:
        InputError: the file is not such a file; the message names the conversation.
    """
    session, prompts, outputs = [], [], []
    kept = left_out = 0
    for number, conversation in enumerate(_objects(path), start=1):
        turns = _turns(conversation, count_tokens, f"{_WHAT} {str(path)!r}, conversation {number}")
        if not turns:
            left_out += 1
            continue
        kept += 1
        for prompt, output in turns[:1] if first_turn_only else turns:
            session.append(kept)
            prompts.append(prompt)
            outputs.append(output)
        if kept == limit:
            break
    if not prompts:
        raise InputError(f"{_WHAT} {str(path)!r} has no conversation in which a prompt is answered")
    zeros = np.zeros(len(prompts), np.int64)
    sessions = np.array(session, np.int64)
    prompt_tokens, output_tokens = np.array(prompts, np.int64), np.array(outputs, np.int64)
    draw = Draw(arrival_us=zeros, endpoint_id=zeros + 1, bin_index=zeros, session=sessions)
    has_turns = len(prompts) > kept
    hashes = conversation_hashes(draw, prompt_tokens, output_tokens, prefix_tokens=0, prefixes=1, seed=0)
    arrivals = Arrivals(
        arrival_us=zeros,
        endpoint_id=zeros + 1,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        slo_us=zeros,
        session_id=sessions if has_turns else None,
        prefix_hashes=hashes if has_turns else None,
    )
    return arrivals, left_out


def _turns(conversation: object, count_tokens: CountTokens, where: str) -> list[tuple[int, int]]:
    """Return prompt and output tokens of each answer."""
    turns: list[tuple[int, int]] = []
    before, asked = 0, False
    for speaker, text in _messages(conversation, where):
        tokens = count_tokens(text)
        if speaker in _MODELS and asked and before and tokens:
            turns.append((before, tokens))
        before += tokens
        asked = speaker in _USERS or (asked and speaker not in _MODELS)
    return turns


def _messages(conversation: object, where: str) -> Iterator[tuple[str, str]]:
    """Yield who said what."""
    if not isinstance(conversation, dict):
        raise InputError(f"{where} is not a JSON object")
    messages = conversation.get("conversations", conversation.get("messages"))
    if not isinstance(messages, list):
        raise InputError(f"{where} has no list of conversations or messages")
    for index, message in enumerate(messages):
        parts: dict[str, Any] = message if isinstance(message, dict) else {}
        speaker, text = parts.get("from", parts.get("role")), parts.get("value", parts.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise InputError(f"{where}, message {index + 1}: from and value (or role and content) must be texts")
        yield speaker, text


def _objects(path: Path) -> Iterator[object]:
    """Yield the elements of a JSON array one by one, so that a file of any size takes little memory."""
    where = f"{_WHAT} {str(path)!r}"
    texts = _texts(path, where)
    text = next(texts)
    position = _skip(text, 0, _BLANKS)
    if text[position : position + 1] != "[":
        raise InputError(f"{where} is not a JSON array of conversations")
    position, number = position + 1, 0
    while True:
        position = _skip(text, position, _BLANKS + ",")
        if text[position : position + 1] == "]":
            return
        try:
            found, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError):  # it may go on in the next chunk
            more = next(texts, "")
            if not more or len(text) - position > _MAX_CONVERSATION_CHARACTERS:
                raise InputError(f"{where}, conversation {number + 1} is not valid JSON, or ends too soon") from None
            text, position = text[position:] + more, 0
            continue
        number += 1
        if number > _MAX_CONVERSATIONS:
            raise InputError(f"{where} has more than {_MAX_CONVERSATIONS:,} conversations; give a part of it")
        yield found


_JSON = json.JSONDecoder()
_BLANKS = " \t\r\n"


def _texts(path: Path, where: str) -> Iterator[str]:
    """Yield the text of a file in pieces, of which the first is not empty unless the file is."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for chunk in itertools.chain(read_chunks(path, what=_WHAT, max_bytes=_MAX_BYTES), [b""]):
            yield decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError:
        raise InputError(f"{where} is not a text file in UTF-8") from None


def _skip(text: str, position: int, characters: str) -> int:
    """Return the first position that holds another character."""
    while text[position : position + 1] and text[position] in characters:
        position += 1
    return position
