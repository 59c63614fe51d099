"""Estimators by the names that `--estimator` and `--service-times` take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from maveriq.domain.gpu_kinds import gpu_sheets
from maveriq.domain.models import ModelSpec
from maveriq.errors import UnknownNameError
from maveriq.estimate.blended import BlendedEstimator
from maveriq.estimate.blended_steps import continuous_estimator
from maveriq.estimate.by_model import JOINED, ByModelEstimator
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.estimator import Basis, Estimator
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.measured import MeasuredEstimator
from maveriq.estimate.paper import PaperEstimator
from maveriq.estimate.physics import PhysicsEstimator

PAPER, CALIBRATED, MEASURED, PHYSICS, BLENDED = "paper", "calibrated", "measured", "physics", "blended"

ESTIMATORS: Mapping[str, Callable[[HardwareProfile], Estimator]] = {
    PAPER: PaperEstimator,
    CALIBRATED: CalibratedEstimator.serving,
    MEASURED: MeasuredEstimator,
    PHYSICS: PhysicsEstimator,
    BLENDED: BlendedEstimator,
}


def default_estimator(profile: HardwareProfile, models: Collection[ModelSpec] = ()) -> str:
    """Return the name of the default estimator: the best one that the profile has the data for.

    Where some models were measured and some were not, it is `calibrated/physics`, which has an estimator for either.

    Args:
        profile: the data.
        models: those that will be estimated; none where they are not known yet.
    """
    if profile.observed:
        return BLENDED
    unmeasured = _unmeasured(profile, models)
    if unmeasured and len(unmeasured) == len(models):
        return PHYSICS
    best = _best_of_measured(profile)
    return f"{best}{JOINED}{PHYSICS}" if unmeasured and best != PHYSICS else best


def _unmeasured(profile: HardwareProfile, models: Collection[ModelSpec]) -> list[ModelSpec]:
    """Return the models of which nothing was measured, and which can be estimated nevertheless."""
    if profile.gpu_kind not in gpu_sheets():
        return []
    return [model for model in models if not profile.has_measured(model)]


def _best_of_measured(profile: HardwareProfile) -> str:
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
    if name == BLENDED:
        return _note_on_blend(profile, models)
    if PHYSICS in name.split(JOINED):
        return _note_on_physics(profile, models, name)
    return (
        f"profile {profile.name} has no calibration, so the estimator {name!r} stands in for the "
        "calibrated one; `maveriq fit DATA --out FOLDER` makes a calibration"
    )


def _note_on_blend(profile: HardwareProfile, models: Collection[ModelSpec]) -> str | None:
    others = dict.fromkeys(model.name for model in models if not profile.has_measured(model))
    if not others:
        return None
    return (
        f"nothing of {', '.join(others)} was measured in profile {profile.name}: estimates of that are computed, and "
        f"corrected by measurements of {', '.join(profile.models)}"
    )


def _note_on_physics(profile: HardwareProfile, models: Collection[ModelSpec], name: str) -> str:
    rests_on = "the data sheet"
    if PhysicsEstimator(profile).basis is Basis.OPERATORS:
        rests_on = "measured operators"
    some = bool(profile.fingerprints.by_model or profile.models)
    unmeasured = dict.fromkeys(model.name for model in _unmeasured(profile, models))
    what = f"nothing of {', '.join(unmeasured)}" if some else "no model"
    if name == PHYSICS:
        return f"{what} was measured on {profile.gpu_kind}: estimates rest on {rests_on}"
    return (
        f"{what} was measured on {profile.gpu_kind}: estimates of that rest on {rests_on} (physics), of the other "
        f"models on measurements ({name.partition(JOINED)[0]})"
    )


def check_estimator_name(name: str) -> None:
    """Check that there is an estimator of a name; `calibrated/physics` has one for measured models and for others.

    Raises:
        UnknownNameError: there is none.
    """
    measured, joined, others = name.partition(JOINED)
    if measured not in ESTIMATORS or (joined and others not in ESTIMATORS):
        raise UnknownNameError("estimator", name, ESTIMATORS)


def make_estimator(
    name: str, profile: HardwareProfile, engine: EnginePreset | None = None, *, node_gpus: int | None = None
) -> Estimator:
    """Return the estimator of that name for a hardware profile.

    Args:
        name: a key of `ESTIMATORS`; or two joined by a slash, for the models that the profile has measured and others.
        profile: the profile it reads.
        engine: the engine whose continuous batching `physics` and `blended` estimate; None for one batch at a time.
        node_gpus: GPUs of the largest node, for `physics`; None for the usual number of the kind.

    Raises:
        UnknownNameError: there is no such estimator.
    """
    check_estimator_name(name)
    measured, joined, others = name.partition(JOINED)
    if joined:
        return ByModelEstimator(
            measured=make_estimator(measured, profile, engine, node_gpus=node_gpus),
            others=make_estimator(others, profile, engine, node_gpus=node_gpus),
            is_measured=profile.has_measured,
        )
    if name == PHYSICS:
        return PhysicsEstimator(profile, engine, continuous=engine is not None, node_gpus=node_gpus)
    if name == BLENDED and engine is not None:
        return continuous_estimator(profile, engine, node_gpus=node_gpus)
    if name == BLENDED:
        return BlendedEstimator(profile, PhysicsEstimator(profile, node_gpus=node_gpus))
    return ESTIMATORS[name](profile)
