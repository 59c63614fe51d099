"""The configuration of a decoder with some of its layers: lists, numbers and names that speak of layers, adapted.

Pure functions on a parsed `config.json`. They know how configurations speak of layers (a list with an entry a layer, a
list of layers, "the first k layers", "every k-th layer"), not which family does what. So they only propose: the caller
checks that the layers of a proposal are those that were meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from typing import Any

from maveriq.domain.config_fields import Config

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The keys that say how many layers there are."""

_PREDICTED_FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
_RULE = re.compile(
    r".*(layer|period|offset|step|freq|interval|every|pattern|replace|stride|dense|start|end|share|skip|block).*"
)
_NO_RULE = re.compile(r".*(token|head|_size|size_|dim|num_experts|n_experts|experts_per|vocab|epsilon|eps|layernorm).*")
_BOUNDARY = re.compile(r".*(first|replace|start|dense|max_window).*")
_LISTS_LAYERS = re.compile(r".*(layer|block|idx|indices|index|enum).*")
_PATTERN = re.compile(r".*(pattern|types).*")
_UNRELATED = re.compile(r".*(token_id|architectures|rope_(parameters|scaling)|quantization|vision|audio).*")
_MAX_PROPOSALS = 400
_MAX_CHANGES_TRIED = 6


def proposals(
    config: Config, explicit: Config, kept: Sequence[int], layers: int, kinds_of: Callable[[Config], object]
) -> Iterator[dict[str, Any]]:
    """Yield configurations of the decoder that may have the kept layers alone, the likeliest first.

    Args:
        config: the part of the configuration that describes the decoder, as it was read.
        explicit: the same with what its family implies (lists of layer types that a rule gives, for example).
        kept: the layers that are kept, in order.
        layers: how many layers the whole decoder has.
        kinds_of: returns the kinds of a proposal's layers, in a form that can be compared; None if it is no valid
            configuration. Rules that do not change them are not varied.
    """
    base = _without_rules(config, explicit, kept, layers)
    choices = {
        key: _choices(value, kept, layers, boundary=key in config and _BOUNDARY.fullmatch(key) is not None)
        for key, value in _rules(config, explicit, layers).items()
    }
    first = base | {key: values[0] for key, values in choices.items() if key in config}
    yield first
    found = kinds_of(first)
    relevant = {
        key: values
        for key, values in choices.items()
        if any(kinds_of(first | {key: value}) != found for value in values[1:_MAX_CHANGES_TRIED])
    }
    ranked = sorted(
        product(*(range(len(values)) for values in relevant.values())), key=lambda ranks: (sum(ranks), ranks)
    )
    for ranks in islice(ranked, 1, _MAX_PROPOSALS):
        yield first | {key: relevant[key][rank] for key, rank in zip(relevant, ranks, strict=True)}


def _without_rules(config: Config, explicit: Config, kept: Sequence[int], layers: int) -> dict[str, Any]:
    """Return the configuration with counts of layers, and all lists by layer, adapted."""
    reduced = {key: _per_layer(key, value, kept, layers) for key, value in config.items()}
    for key, value in explicit.items():
        # A list that a rule gives is written down where it says more than "all alike".
        if key not in config and isinstance(value, list) and len(value) == layers and _differ(value):
            reduced[key] = _per_layer(key, value, kept, layers)
    counts = [key for key in LAYER_COUNTS if key in config] or [key for key in LAYER_COUNTS if key in explicit][:1]
    reduced |= dict.fromkeys(counts, len(kept))
    reduced |= {key: 0 for key in _PREDICTED_FURTHER if config.get(key)}
    return reduced


def _differ(values: Sequence[object]) -> bool:
    return any(value != values[0] for value in values)


def _per_layer(key: str, value: Any, kept: Sequence[int], layers: int) -> Any:
    """Return a value for the kept layers: an entry for each of them, or the kept ones among the layers it lists."""
    if _UNRELATED.fullmatch(key):
        return value
    if isinstance(value, dict):
        if "layer" in key and value and all(re.fullmatch(r"\d{1,5}", inner) for inner in value):  # by layer
            return {str(place): value[str(layer)] for place, layer in enumerate(kept) if str(layer) in value}
        return {inner: _per_layer(inner, entry, kept, layers) for inner, entry in value.items()}
    if isinstance(value, str):
        return _text_per_layer(key, value, kept, layers)
    if not isinstance(value, list):
        return value
    if _LISTS_LAYERS.fullmatch(key) and value and _are_layers(value, layers):
        return [kept.index(layer) for layer in value if layer in kept]
    repeats = 0 < len(value) < layers and _PATTERN.fullmatch(key) and all(isinstance(entry, str) for entry in value)
    return [value[layer % len(value)] for layer in kept] if len(value) == layers or repeats else value


def _text_per_layer(key: str, value: str, kept: Sequence[int], layers: int) -> str:
    if "pattern" in key and 0 < len(value) <= layers:  # a shorter one repeats
        return "".join(value[layer % len(value)] for layer in kept)
    if _LISTS_LAYERS.fullmatch(key) and re.fullmatch(r"\d{1,5}(,\d{1,5})*", value):
        named = {int(number) for number in value.split(",")}
        return ",".join(str(place) for place, layer in enumerate(kept) if layer in named)
    return value


def _are_layers(values: Sequence[Any], layers: int) -> bool:
    whole = all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < layers for value in values)
    return whole and len(set(values)) == len(values)


def _rules(config: Config, explicit: Config, layers: int) -> dict[str, int]:
    """Return the numbers that may say which layers are of which kind."""
    return {
        key: value
        for key, value in ({**explicit, **config}).items()
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= layers
        and _RULE.fullmatch(key) and not _NO_RULE.fullmatch(key)
        and key not in LAYER_COUNTS and key not in _PREDICTED_FURTHER
    }  # fmt: skip


def _choices(value: int, kept: Sequence[int], layers: int, *, boundary: bool) -> list[int]:
    """Return what a number may be for the kept layers, the likeliest first.

    It may count layers at the start or at the end, or name a period or a place within it; `boundary` if it is likely
    to count those at the start.
    """
    at_start = sum(layer < value for layer in kept)
    at_end = sum(layer >= layers - value for layer in kept)
    likely = [at_start, value] if boundary else [value, at_end, at_start]
    return list(dict.fromkeys([*likely, *range(len(kept) + 2)]))
