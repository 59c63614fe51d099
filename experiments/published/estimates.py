"""Errors of the paper's estimator against the measured full models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from maveriq.calibration.evaluation import Group, evaluate
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator

# (table of full models, profile with similar prompts, groups of its rows)
_TABLES = (
    ("long_prompt", "a6000-long", ("all", "weights", "tp", "output tokens")),
    ("batched_short_prompt", "a6000-short", ("all", "weights", "batch")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateErrors:
    """Errors over a group of the rows of a table of full models."""

    table: str
    group: Group


def evaluate_all(data: Path) -> Iterator[EstimateErrors]:
    """Yield the errors, table by table and group by group.

    Args:
        data: the folder of measured data.
    """
    for table, profile_name, wanted in _TABLES:
        profile = load_profile(profile_name)
        paper = make_estimator("paper", profile)
        found = evaluate(data / "a6000" / f"full_model_{table}.csv", paper, prompt_tokens=profile.prompt_tokens)
        for group in found.groups:
            if group.by in wanted:
                yield EstimateErrors(table=table, group=group)
