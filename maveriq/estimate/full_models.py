"""Measured latencies of whole models, relative to each other: evidence for what a ranking claims.

An estimate is fitted to measurements, and a user cannot see which. Where a configuration wins by a rule that no
engineer expects, such as a pipeline that is faster than one GPU, this table says whether it was measured, and on what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.fingerprints import read_config
from maveriq.tables import Row, read_csv, unique

COLUMNS = ("model", "weights", "kv", "tp", "pp", "prompt_tokens", "output_tokens", "relative_latency")
"""Columns of the table. `relative_latency` is relative to any one configuration of the same model and types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRatio:
    """The measured latency of a configuration over that of another, and the requests that it was measured with."""

    ratio: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class _Latency:
    relative: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class FullModelTable:
    """Relative latencies by model and configuration (batch 1, even split)."""

    _latencies: Mapping[tuple[str, ParallelConfig], _Latency] = field(default_factory=dict)

    def ratio(self, model_name: str, configuration: ParallelConfig, other: ParallelConfig) -> MeasuredRatio | None:
        """Return the latency of one configuration over that of another; None unless both were measured alike."""
        keys = [(model_name, cfg.at(cfg.tp, cfg.pp)) for cfg in (configuration, other)]
        ours, theirs = (self._latencies.get(key) for key in keys)
        if ours is None or theirs is None or (configuration.weights, configuration.kv) != (other.weights, other.kv):
            return None
        if (ours.prompt_tokens, ours.output_tokens) != (theirs.prompt_tokens, theirs.output_tokens):
            return None
        return MeasuredRatio(
            ratio=ours.relative / theirs.relative, prompt_tokens=ours.prompt_tokens, output_tokens=ours.output_tokens
        )


def read_full_models(path: Path) -> FullModelTable:
    """Read the table.

    Raises:
        InputError: not such a table, a configuration twice, or a latency that is not positive.
    """
    rows = read_csv(path, COLUMNS, what="table of full models")
    return FullModelTable(unique(((row.text("model"), read_config(row)), _latency(row), row) for row in rows))


def _latency(row: Row) -> _Latency:
    return _Latency(
        row.number("relative_latency", minimum=1e-6, maximum=1e6),
        row.count("prompt_tokens", minimum=1),
        row.count("output_tokens", minimum=1),
    )
