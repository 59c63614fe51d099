"""Generated conversations: turns whose prompts grow, and prefixes that prompts share."""

from __future__ import annotations

from typing import Any

import numpy as np

from maveriq.streams import generator
from maveriq.workload.arrivals import Draw
from maveriq.workload.distributions import Distribution
from maveriq.workload.prefixes import ConversationHashes


def turns_of(conversations: int, turns: Distribution, seed: int) -> np.ndarray[Any, Any]:
    """Draw the number of turns of each conversation (int64, at least 1)."""
    drawn = np.rint(turns.draw(generator(seed, "turns"), conversations)).astype(np.int64)
    at_least_1: np.ndarray[Any, Any] = np.maximum(drawn, 1)
    return at_least_1


def grown_prompts(
    session: np.ndarray[Any, Any], own_tokens: np.ndarray[Any, Any], output_tokens: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return the prompt of each turn: all prompts and outputs of the turns before it, and its own tokens.

    Args:
        session: conversation of each turn; turns of a conversation follow each other (int64).
        own_tokens: what the user adds in each turn (int64).
        output_tokens: of each turn (int64).
    """
    before = np.cumsum(own_tokens + output_tokens) - own_tokens - output_tokens
    first = np.flatnonzero(np.r_[True, session[1:] != session[:-1]])
    lengths = np.diff(np.r_[first, len(session)])
    prompts: np.ndarray[Any, Any] = before - np.repeat(before[first], lengths) + own_tokens
    return prompts


def conversation_hashes(
    draw: Draw,
    prompt_tokens: np.ndarray[Any, Any],
    output_tokens: np.ndarray[Any, Any],
    *,
    prefix_tokens: int,
    prefixes: int,
    seed: int,
) -> ConversationHashes:
    """Return the prefix hashes of generated requests.

    Args:
        draw: the requests; `session` says which of them are turns of one conversation.
        prompt_tokens: whole prompts, the shared prefix included.
        output_tokens: of each request.
        prefix_tokens: length of the shared prefix, 0 for none.
        prefixes: how many there are; each conversation has one of them, equally likely.
        seed: of the draw.
    """
    requests = len(draw)
    session = np.zeros(requests, np.int64) if draw.session is None else draw.session
    # A request of its own is a conversation of one turn here: its prefix is drawn for it alone.
    units, unit = (
        np.unique(session, return_inverse=True) if draw.session is not None else (session, np.arange(requests))
    )
    drawn = generator(seed, "prefixes").integers(1, prefixes, len(units), endpoint=True)
    hashes = ConversationHashes(
        prefix=drawn[unit], conversation=session, known_tokens=prompt_tokens, prefix_tokens=prefix_tokens
    )
    if draw.session is None:
        return hashes
    # The next turn repeats the output, so its hashes begin behind the prompt; nobody repeats that of the last turn.
    step = hashes.tokens_per_hash
    continues = np.r_[session[1:] == session[:-1], False]
    into_output = np.maximum(prompt_tokens + output_tokens, -(-prompt_tokens // step) * step + 1)
    known = np.where(continues, into_output, prompt_tokens)
    return ConversationHashes(
        prefix=hashes.prefix, conversation=session, known_tokens=known, prefix_tokens=prefix_tokens
    )
