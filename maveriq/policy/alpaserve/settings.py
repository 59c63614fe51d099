"""What a placement search may look at, and how hard it looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from maveriq.errors import InputError
from maveriq.policy.alpaserve.fill import BEAM_WIDTH
from maveriq.policy.alpaserve.simulate import SimulatorSettings
from maveriq.policy.alpaserve.star import StarRule


class PlacementPolicy(StrEnum):
    """Which placements are looked at."""

    ALPASERVE = "alpaserve"
    ALPASERVE_STAR = "alpaserve-star"
    SELECTIVE_REPLICATION = "selective-replication"
    MODEL_PARALLELISM = "model-parallelism"
    ROUND_ROBIN = "round-robin"


class Fill(StrEnum):
    """How groups are filled with models."""

    GREEDY = "greedy"
    BEAM = "beam"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How to search.

    Args:
        policy: which placements are looked at.
        fill: how groups are filled; round robin has a fill of its own.
        beam: placements that the beam fill keeps at each step.
        group_size: pipeline stages of each group, for model parallelism alone.
        max_pp: pipeline stages of a candidate at most.
        max_tp: tensor parallel GPUs of a candidate at most.
        bucket: also try to keep models of different latency on GPUs of their own (AlpaServe alone).
        star_rule: what AlpaServe* takes for keeping every model.
        simulator: the constants of the simulator.
        workers: threads; None for all cores where the problem is large.

    Raises:
        InputError: a number below 1, or a policy with what it cannot use.
    """

    policy: PlacementPolicy = PlacementPolicy.ALPASERVE
    fill: Fill = Fill.GREEDY
    beam: int = BEAM_WIDTH
    group_size: int | None = None
    max_pp: int = 8
    max_tp: int = 4
    bucket: bool = False
    star_rule: StarRule = StarRule.F
    simulator: SimulatorSettings = field(default_factory=SimulatorSettings)
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("beam", "group_size", "max_pp", "max_tp", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"placement search: {name} must be at least 1, not {value}")
        if self.policy is PlacementPolicy.MODEL_PARALLELISM and self.group_size is None:
            raise InputError("placement search: model-parallelism needs a group_size")
        if self.bucket and self.policy is not PlacementPolicy.ALPASERVE:
            raise InputError(f"placement search: bucket applies to alpaserve, not to {self.policy}")
