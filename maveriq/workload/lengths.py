"""How long prompts and outputs are: a distribution, ShareGPT prompts, or a trace's own lengths."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from maveriq.errors import InputError, did_you_mean
from maveriq.files import traces_path
from maveriq.streams import generator
from maveriq.tables import read_csv
from maveriq.workload.arrivals import Draw
from maveriq.workload.distributions import FORMS, Distribution, Fixed, parse_distribution
from maveriq.workload.trace_formats import RequestTrace
from maveriq.workload.traces import EMBEDDED_TRACES, CountedTrace

CHARS_PER_TOKEN = 4

MAX_LENGTH = 10_000_000
"""The longest prompt or output that an option may ask for, in tokens."""

_SHAREGPT_FILE, _SHAREGPT_COLUMN = "sharegpt-prompt-chars.csv", "prompt_chars"
_AZURE_FILE = "azure-lengths.csv"
_AZURE_COLUMNS = tuple(f"{trace}_{kind}_tokens" for trace in EMBEDDED_TRACES for kind in ("context", "generated"))

_Quantiles: TypeAlias = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Percent, ascending from 0 to 100, and the value at each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of each request (int64, at least 1), and the typical number that a deployment is planned for.

    The typical one is the number itself or the median of the distribution, which does not depend on the seed; of
    prompts that grow in conversations it is the median of what was drawn.
    """

    tokens: np.ndarray[Any, Any]
    typical: int


def parse_length(spec: str, option: str, words: tuple[str, ...]) -> Distribution | str:
    """Return a length option as one of its words, or as a distribution of numbers of tokens.

    Args:
        spec: what the user gave.
        option: its name, for messages.
        words: the words it may be.

    Raises:
        InputError: none of these, or a number that is not from 1 to 10 million.
    """
    if spec in words:
        return spec
    if ":" in spec:
        return parse_distribution(spec, option, whole=True, minimum=1, maximum=MAX_LENGTH)
    if re.fullmatch(r"[0-9]{1,8}", spec) and 1 <= int(spec) <= MAX_LENGTH:
        return Fixed(float(spec))
    near = did_you_mean(spec, words)
    raise InputError(
        f"{option} must be {', '.join(words)} or a whole number from 1 to {MAX_LENGTH}, or {FORMS}, not {spec!r}{near}"
    )


def drawn_lengths(distribution: Distribution, requests: int, seed: int, stream: str) -> Lengths:
    """Draw the lengths of requests, each rounded, at least 1 and at most 10 million."""
    drawn = np.rint(distribution.draw(generator(seed, stream), requests))
    return Lengths(tokens=np.clip(drawn, 1, MAX_LENGTH).astype(np.int64), typical=_typical(distribution.median))


def recorded_lengths(tokens: np.ndarray[Any, Any]) -> Lengths:
    """Return lengths that are known request by request; their median is the typical one."""
    return Lengths(tokens=tokens, typical=_typical(float(np.median(tokens))))


def sharegpt_lengths(requests: int, seed: int) -> Lengths:
    """Draw prompts as long as first turns of ShareGPT conversations cut at 512 characters, four characters a token."""
    percent, chars = _quantiles(_SHAREGPT_FILE, (_SHAREGPT_COLUMN,), _SHAREGPT_COLUMN)
    return _from_quantiles((percent, chars / CHARS_PER_TOKEN), requests, seed, "prompt-lengths")


def counted_lengths(trace: CountedTrace, requests: int, seed: int) -> tuple[Lengths, Lengths]:
    """Draw prompt and output lengths of an embedded trace from its quantiles.

    Both are drawn independently of each other and of the time, so their correlation and drift are lost.
    """
    prompts = _quantiles(_AZURE_FILE, _AZURE_COLUMNS, f"{trace.name}_context_tokens")
    outputs = _quantiles(_AZURE_FILE, _AZURE_COLUMNS, f"{trace.name}_generated_tokens")
    return (
        _from_quantiles(prompts, requests, seed, "prompt-lengths"),
        _from_quantiles(outputs, requests, seed, "output-lengths"),
    )


def own_lengths(trace: RequestTrace) -> tuple[Lengths, Lengths]:
    """Return the prompt and output lengths of each request of a file."""
    return recorded_lengths(trace.prompt_tokens), recorded_lengths(trace.output_tokens)


def lengths_of_minutes(trace: RequestTrace, draw: Draw, seed: int) -> tuple[Lengths, Lengths]:
    """Draw lengths for redrawn arrivals of a file.

    Each request takes prompt and output of one of the requests of its very minute, each once before any is taken
    twice.
    """
    requests_per_minute = trace.requests_per_minute
    stream = generator(seed, "trace-rows")
    wanted = np.bincount(draw.bin_index, minlength=len(requests_per_minute))
    first_rows = np.cumsum(requests_per_minute) - requests_per_minute
    # `resize` repeats the permutation as often as it takes: whole repetitions, then a draw without replacement.
    picked = [
        first + stream.permutation(np.resize(stream.permutation(present), count))
        for first, present, count in zip(first_rows, requests_per_minute, wanted, strict=True)
        if count
    ]
    index = np.concatenate(picked) if picked else np.empty(0, np.int64)
    prompts, outputs = own_lengths(trace)
    return replace(prompts, tokens=prompts.tokens[index]), replace(outputs, tokens=outputs.tokens[index])


def _quantiles(file: str, columns: tuple[str, ...], column: str) -> _Quantiles:
    rows = list(read_csv(traces_path(file), ("percent", *columns), what="quantiles"))
    return np.array([row.number("percent") for row in rows]), np.array([row.number(column) for row in rows])


def _from_quantiles(quantiles: _Quantiles, requests: int, seed: int, stream: str) -> Lengths:
    """Draw by the inverse of the distribution function, linear between quantiles."""
    percent, values = quantiles
    drawn = np.interp(generator(seed, stream).uniform(0, 100, requests), percent, values)
    tokens = np.maximum(np.rint(drawn), 1).astype(np.int64)
    return Lengths(tokens=tokens, typical=_typical(float(np.interp(50, percent, values))))


def _typical(median: float) -> int:
    return max(1, round(median))
