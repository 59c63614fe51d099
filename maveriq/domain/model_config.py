"""The text of a Hugging Face `config.json`, and what most of maveriq needs of it: the shape of a decoder.

`parse_config` reads the text, `read_shape` the shape; `maveriq.domain.decoder_config` reads the decoder itself. All
commands and engines read models here, so they all give the same answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maveriq.domain.attention import GroupedAttention, LatentAttention
from maveriq.domain.config_fields import Config
from maveriq.domain.decoder import Decoder
from maveriq.domain.decoder_config import read_decoder
from maveriq.domain.feed_forward import DenseFeedForward, ExpertFeedForward
from maveriq.errors import InputError

_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a plain decoder; fields as in `maveriq.domain.models.ModelSpec`."""

    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    feed_forward_matrices: int
    all_reduces_per_layer: int
    context_tokens: int | None
    rope_type: str


def parse_config(text: str, where: str) -> dict[str, Any]:
    """Parse the text of a `config.json`.

    Args:
        text: the file's content.
        where: the file's name, for messages.

    Raises:
        InputError: it is not a JSON object, a key is written twice, a number is not finite, or it is nested too deeply.
    """

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{where}: key {twice!r} is written twice; leave one of them")
        return found

    try:
        config = json.loads(text, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a JSON object, not {type(config).__name__}")
    for path, value, depth, in_list in _values(config):
        if depth > _MAX_DEPTH:
            raise InputError(f"{where}: {path[:60]} is nested more than {_MAX_DEPTH} levels deep")
        # A list may give a limit that is infinite; no list of numbers that count is read without a check.
        unlimited = value == math.inf and in_list
        if isinstance(value, float) and not math.isfinite(value) and not unlimited:
            raise InputError(f"{where}: {path} must be a finite number, not {value}")
    return config


def _values(config: Config) -> Iterator[tuple[str, Any, int, bool]]:
    """Yield every value with the path of its key, its depth, and whether it is in a list, without recursion."""
    left: list[tuple[str, Any, int, bool]] = [("", config, 0, False)]
    while left:
        path, value, depth, in_list = left.pop()
        yield path, value, depth, in_list
        if isinstance(value, dict):
            left += [(f"{path}.{key}" if path else key, inner, depth + 1, False) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(path, inner, depth + 1, True) for inner in value]


def shape_of_decoder(decoder: Decoder) -> Shape:
    """Return a decoder's shape: all of a plain one, and of another that of its most frequent parts.

    Whoever computes with the shape alone must ask `Decoder.features` first.
    """
    kinds = [kind for kind, _ in sorted(decoder.kinds(), key=lambda counted: -counted[1])]
    parts = (kind.attention for kind in kinds)
    attention = next((part for part in parts if isinstance(part, GroupedAttention | LatentAttention)), None)
    feed_forward = next((kind.feed_forward for kind in kinds if kind.feed_forward is not None), None)
    heads = kv_heads = head_size = width = matrices = 1
    if isinstance(attention, GroupedAttention):
        heads, kv_heads, head_size = attention.heads, attention.kv_heads, attention.head_size
    elif isinstance(attention, LatentAttention):
        heads, head_size = attention.heads, attention.nope_size + attention.rope_size
    if isinstance(feed_forward, DenseFeedForward | ExpertFeedForward):
        width, matrices = feed_forward.width, feed_forward.matrices
    return Shape(
        layers=decoder.layers,
        hidden_size=decoder.hidden_size,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=width,
        vocab_size=decoder.vocab_size,
        feed_forward_matrices=matrices,
        all_reduces_per_layer=1 if kinds[0].parallel else 2,
        context_tokens=decoder.context_tokens,
        rope_type=decoder.rope_type,
    )


def read_shape(config: Config, where: str) -> Shape:
    """Return the shape of the plain decoder that a parsed `config.json` describes.

    Raises:
        InputError: a needed key is missing or wrong, or the model has a part that a plain decoder has not.
    """
    decoder = read_decoder(config, where).decoder
    if features := decoder.features():
        raise InputError(f"{where}: {', '.join(features)}: not a plain decoder")
    return shape_of_decoder(decoder)
