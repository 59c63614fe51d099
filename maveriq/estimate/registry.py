"""Estimators by the names that `--estimator` and `--service-times` take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from maveriq.domain.gpu_kinds import gpu_sheets
from maveriq.domain.models import ModelSpec
from maveriq.errors import UnknownNameError
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.estimator import Basis, Estimator
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.measured import MeasuredEstimator
from maveriq.estimate.paper import PaperEstimator
from maveriq.estimate.physics import PhysicsEstimator

PAPER, CALIBRATED, MEASURED, PHYSICS = "paper", "calibrated", "measured", "physics"

ESTIMATORS: Mapping[str, Callable[[HardwareProfile], Estimator]] = {
    PAPER: PaperEstimator,
    CALIBRATED: CalibratedEstimator.serving,
    MEASURED: MeasuredEstimator,
    PHYSICS: PhysicsEstimator,
}


def default_estimator(profile: HardwareProfile, models: Collection[ModelSpec] = ()) -> str:
    """Return the name of the default estimator: the best one that the profile has the data for.

    Args:
        profile: the data.
        models: those that will be estimated; none where they are not known yet.
    """
    unknown = models and not any(profile.has_measured(model) for model in models)
    if unknown and profile.gpu_kind in gpu_sheets():
        return PHYSICS
    if profile.calibrated:
        return CALIBRATED
    if not profile.measured and not profile.fingerprints.by_model:
        return PHYSICS
    # The measured estimator covers only measured models, so prefer fingerprints if the profile has any.
    return MEASURED if profile.measured and not profile.fingerprints.by_model else PAPER


def note_on_default(profile: HardwareProfile, models: Collection[ModelSpec] = ()) -> str | None:
    """Return a note for the user if the default estimator is not the calibrated one, else None."""
    name = default_estimator(profile, models)
    if name == CALIBRATED:
        return None
    if name == PHYSICS:
        rests_on = "the data sheet"
        if PhysicsEstimator(profile).basis is Basis.OPERATORS:
            rests_on = "measured operators"
        some = bool(profile.fingerprints.by_model or profile.models)
        what = f"nothing of {', '.join(model.name for model in models)}" if some else "no model"
        return f"{what} was measured on {profile.gpu_kind}: estimates rest on {rests_on}"
    return (
        f"profile {profile.name} has no calibration, so the estimator {name!r} stands in for the "
        "calibrated one; `maveriq fit DATA --out FOLDER` makes a calibration"
    )


def make_estimator(name: str, profile: HardwareProfile, engine: EnginePreset | None = None) -> Estimator:
    """Return the estimator of that name for a hardware profile.

    Args:
        name: a key of `ESTIMATORS`.
        profile: the profile it reads.
        engine: the engine whose continuous batching `physics` estimates; None for one batch at a time.

    Raises:
        UnknownNameError: there is no such estimator.
    """
    if name not in ESTIMATORS:
        raise UnknownNameError("estimator", name, ESTIMATORS)
    if engine and name == PHYSICS:
        return PhysicsEstimator(profile, engine, continuous=True)
    return ESTIMATORS[name](profile)
