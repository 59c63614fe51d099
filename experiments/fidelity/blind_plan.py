"""Settings of the blind simulations and the bars for their errors, read from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.tables import read_toml

_Percent = Annotated[float, msgspec.Meta(ge=0)]


class Bars(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The maximum errors, in percent (SLO attainment: points); `busy` and `configurations` are shares."""

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
        estimator: the planning estimator of the recorded system.
        gain_with: the estimator whose plans are compared with those.
        draws: number of draws of the sampling phases; the prediction is the mean over them.
        placement_draws: number of draws for the comparison with recorded placements.
        service_factor: factor on all service times, which shows how much queueing amplifies their errors.
        bars: the maximum errors.
    """

    estimator: str
    gain_with: str
    draws: Annotated[int, msgspec.Meta(ge=1)]
    placement_draws: Annotated[int, msgspec.Meta(ge=1)]
    service_factor: Annotated[float, msgspec.Meta(gt=0)]
    bars: Bars


def load_blind_plan(path: Path) -> BlindPlan:
    """Read a plan.

    Raises:
        InputError: the file is invalid; the message says where.
    """
    return read_toml(path, BlindPlan, what="plan of blind runs")
