"""What to simulate and what to hold it against, from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.tables import read_toml

_Percent = Annotated[float, msgspec.Meta(ge=0)]


class Bars(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The most that errors may be, in percent (SLO attainment: points); `busy` and `configurations` are shares."""

    busy: _Percent
    mean: _Percent
    p95: _Percent
    mean_and_p95_when_busy: _Percent
    slo_median: _Percent
    slo_worst: _Percent
    configurations: _Percent
    service_median: _Percent
    service_worst: _Percent


class BlindPlan(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How to simulate every recorded run.

    Args:
        estimator: the estimator that the recorded system planned with.
        gain_with: another one, whose plans are compared with those.
        draws: of the phases in which GPUs are sampled; their mean is the prediction.
        placement_draws: likewise, to hold against recorded placements.
        service_factor: by how much to stretch service to see how far queueing magnifies its errors.
        bars: to judge by.
    """

    estimator: str
    gain_with: str
    draws: Annotated[int, msgspec.Meta(ge=1)]
    placement_draws: Annotated[int, msgspec.Meta(ge=1)]
    service_factor: Annotated[float, msgspec.Meta(gt=0)]
    bars: Bars


def load_blind_plan(path: Path) -> BlindPlan:
    """Read it.

    Raises:
        InputError: not such a file; the message says where.
    """
    return read_toml(path, BlindPlan, what="plan of blind runs")
