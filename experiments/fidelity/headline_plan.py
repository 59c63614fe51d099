"""Which policies to hold against one another, from a TOML file."""

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
    """What the headline tables compare.

    Args:
        slo_scale: of tables that show one; also to judge a pair of recorded runs by, of which neither had SLOs.
        judged_by: SLO scales that each run of the grid is judged by.
        even: ratios within so many percent of 1, and shares within as many points, name no winner.
        contenders: policies of the grid that are held against the baselines.
        baselines: these; a contender may be one for the others.
        intents: what the first contender is held against besides.
        grid: what to simulate where nothing was recorded.
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
        """Yield each contender with each baseline; of two contenders only the earlier is held against the other."""
        for place, ours in enumerate(self.contenders):
            yield from ((ours, theirs) for theirs in self.baselines if theirs not in self.contenders[: place + 1])

    @property
    def by_intent(self) -> set[str]:
        """Return the policies that go by intents: MaverIQ's."""
        return {variant.name for variant in self.grid.policies if variant.policy not in STATIC_POLICIES}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Load:
    """What a policy has to cope with: all policies of a load get the same requests."""

    model_set: str
    trace: str
    scale: float

    def __str__(self) -> str:
        return f"{self.model_set} {self.trace} {self.scale:g}"


def load_headline_plan(path: Path) -> HeadlinePlan:
    """Read it.

    Raises:
        InputError: not such a file; the message says where.
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
