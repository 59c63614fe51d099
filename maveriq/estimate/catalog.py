"""Estimators by the names that `--plan-with` and `--serve-with` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maveriq.domain.catalog import shape_of
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.base import Estimator
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.hardware import HardwareProfile
from maveriq.estimate.leaveoneout import LeaveOneOut
from maveriq.estimate.measured import MeasuredEstimator
from maveriq.estimate.paper import PaperEstimator

PAPER, CALIBRATED, MEASURED = "paper", "calibrated", "measured"

ESTIMATORS: Mapping[str, Callable[[HardwareProfile], Estimator]] = {
    PAPER: PaperEstimator,
    CALIBRATED: CalibratedEstimator.serving,
    MEASURED: MeasuredEstimator,
}

EACH = "each"
"""Said instead of a model: leave out each for its own rows."""


def usual(profile: HardwareProfile) -> str:
    """Return the name of the estimator to take where none is said: the best one that the profile can feed."""
    if profile.calibrated:
        return CALIBRATED
    # Measurements of whole models answer for these alone; without fingerprints there is nothing else to go by.
    return MEASURED if profile.measured and not profile.fingerprints.constants else PAPER


def note_on_usual(profile: HardwareProfile) -> str | None:
    """Return what to say where the usual estimator is not the calibrated one, None where it is."""
    if profile.calibrated:
        return None
    return (
        f"profile {profile.name} has no calibration, so the estimator {usual(profile)!r} stands in for the calibrated "
        "one; `maveriq fit DATA --out FOLDER` makes a calibration"
    )


def estimator(name: str, profile: HardwareProfile) -> Estimator:
    """Return the estimator of that name, fed by a hardware profile.

    Raises:
        UnknownNameError: there is no such estimator.
    """
    if name not in ESTIMATORS:
        raise UnknownNameError("estimator", name, ESTIMATORS)
    return ESTIMATORS[name](profile)


def benchmarked_estimator(name: str, profile: HardwareProfile, *, without_model: str | None = None) -> Estimator:
    """Return an estimator to be compared with a benchmark's tables, not with the live system.

    Args:
        name: of `ESTIMATORS`.
        profile: feeds it.
        without_model: a model whose ground truth it must not have seen; `EACH` for every model its own.

    Raises:
        UnknownNameError: there is no such estimator, or the profile knows no such model.
        InputError: the estimator is not fitted with models left out.
    """
    if name == CALIBRATED and without_model == EACH:
        return LeaveOneOut(profile)
    if name == CALIBRATED:
        meant = None if without_model is None else _fingerprinted(without_model, profile)
        return CalibratedEstimator.benchmarked(profile, without_model=meant)
    if without_model is not None:
        raise InputError(f"--leave-out {without_model}: only the calibrated estimator is fitted with models left out")
    return estimator(name, profile)


def _fingerprinted(name: str, profile: HardwareProfile) -> str:
    """Return the model that a profile has fingerprints of: of that name, or the one that a variant was made of."""
    known, shape = profile.fingerprints.models(), shape_of(name)
    if name in known:
        return name
    if shape is None or shape.name not in known:
        raise UnknownNameError("model to leave out", name, known, hint=f"or say {EACH!r}")
    return shape.name
