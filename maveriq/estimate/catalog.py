"""Estimators by the names that `--plan-with` and `--serve-with` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maveriq.errors import UnknownNameError
from maveriq.estimate.base import Estimator
from maveriq.estimate.hardware import HardwareProfile
from maveriq.estimate.paper import PaperEstimator

ESTIMATORS: Mapping[str, Callable[[HardwareProfile], Estimator]] = {
    "paper": PaperEstimator,
}


def estimator(name: str, profile: HardwareProfile) -> Estimator:
    """Return the estimator of that name, fed by a hardware profile.

    Raises:
        UnknownNameError: there is no such estimator.
    """
    if name not in ESTIMATORS:
        raise UnknownNameError("estimator", name, ESTIMATORS)
    return ESTIMATORS[name](profile)
