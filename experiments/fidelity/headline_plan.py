"""The policies to compare in the headline tables, read from a TOML file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cases import Comparison

from maveriq.domain.deployments import Objective
from maveriq.errors import UnknownNameError
from maveriq.scenario.static_placement import STATIC_POLICIES
from maveriq.tables import read_toml
from maveriq.testbed.recordings import RecordedRun


class HeadlinePlan(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The comparisons of the headline tables.

    Args:
        slo_scale: SLO scale of tables with one SLO scale, and of recorded pairs without SLOs.
        judged_by: SLO scales by which each run of the grid is judged.
        even: ratios within this many percent of 1, and shares within this many points, are ties.
        contenders: policies of the grid that are compared with the baselines.
        baselines: the policies to compare with; a contender may be a baseline of others.
        intents: further policies to compare the first contender with.
        grid: simulations without recordings.
    """

    slo_scale: Annotated[float, msgspec.Meta(gt=0)]
    judged_by: Annotated[list[Annotated[float, msgspec.Meta(gt=0)]], msgspec.Meta(min_length=1)]
    even: Annotated[float, msgspec.Meta(ge=0)]
    contenders: Annotated[list[str], msgspec.Meta(min_length=1)]
    baselines: Annotated[list[str], msgspec.Meta(min_length=1)]
    intents: list[str]
    grid: Comparison

    @property
    def order(self) -> dict[str, int]:
        """Return the place of each policy."""
        return {variant.name: place for place, variant in enumerate(self.grid.policies)}

    def against_baselines(self) -> Iterator[tuple[str, str]]:
        """Yield each contender with each baseline; of two contenders, only the earlier one with the other."""
        for place, ours in enumerate(self.contenders):
            yield from ((ours, theirs) for theirs in self.baselines if theirs not in self.contenders[: place + 1])

    @property
    def by_intent(self) -> set[str]:
        """Return the policies that follow intents: MaverIQ's."""
        return {variant.name for variant in self.grid.policies if variant.policy not in STATIC_POLICIES}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Load:
    """A workload: all policies under one load get the same requests."""

    model_set: str
    trace: str
    scale: float

    def __str__(self) -> str:
        return f"{self.model_set} {self.trace} {self.scale:g}"


def load_headline_plan(path: Path) -> HeadlinePlan:
    """Read a plan.

    Raises:
        InputError: the file is invalid; the message says where.
    """
    plan = read_toml(path, HeadlinePlan, what="plan of headline comparisons")
    for name in (*plan.contenders, *plan.baselines, *plan.intents):
        if name not in plan.order:
            raise UnknownNameError("policy of the grid", name, plan.order)
    return plan


def policy_of(run: RecordedRun) -> str:
    """Return the name of a recorded run's policy, as the grid has it."""
    if not run.by_maveriq:
        return run.policy
    return f"{run.policy.replace('-FP16', ' float16')} {Objective.named(run.intent).value}"
