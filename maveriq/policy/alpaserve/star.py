"""AlpaServe*: AlpaServe that must keep every model.

No code of it was published. Rule F is the definition here: the one of three rules that meet all
published placements that still means something on more than one node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType

from maveriq.policy.alpaserve.groups import Placement, replicas


class StarRule(StrEnum):
    """Which candidates count; the best score among them wins. None of them leaves a model out.

    A: no model is left out. B: one group spans all GPUs. C: every model stands exactly once.
    F: every group hosts every model.
    """

    A = "A"
    B = "B"
    C = "C"
    F = "F"


def qualifies(rule: StarRule, placement: Placement, models: int) -> bool:
    """Say whether a placement of so many models meets a rule."""
    hosted = {model for group in placement for model in group.models}
    return len(hosted) == models and _RULES[rule](placement, models)


_RULES: Mapping[StarRule, Callable[[Placement, int], bool]] = MappingProxyType(
    {
        StarRule.A: lambda _placement, _models: True,
        # Candidates use all GPUs, so a single group spans them.
        StarRule.B: lambda placement, _models: len(placement) == 1,
        StarRule.C: lambda placement, models: replicas(placement) == models,
        StarRule.F: lambda placement, models: all(len(group.models) == models for group in placement),
    }
)
WORDS: Mapping[StarRule, str] = MappingProxyType(
    {
        StarRule.A: "hosts every model",
        StarRule.B: "hosts every model in one group of all GPUs",
        StarRule.C: "hosts every model exactly once",
        StarRule.F: "hosts every model in every group",
    }
)
