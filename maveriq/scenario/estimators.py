"""Who plans and who times simulated service: names and defaults become estimators."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.base import Estimator
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.catalog import CALIBRATED, ESTIMATORS, estimator, note_on_usual, usual
from maveriq.estimate.hardware import HardwareProfile
from maveriq.scenario.options import Options

RECORDED = "recorded"
"""The value of `serve_with` that takes the workload's own recorded times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimators:
    """Belief and world: `plan` is what the policy plans with, `serve` times service (None: recorded times do).

    `notes` say what a reader of the results must know of them.
    """

    plan: Estimator
    serve: Estimator | None
    notes: tuple[str, ...] = ()


def estimators_for(options: Options, profile: HardwareProfile) -> Estimators:
    """Return the estimators that options name, or the best ones that the profile can feed.

    Raises:
        InputError: an unknown name, a profile without what it needs, a recorded run that cannot be left out.
    """
    note = note_on_usual(profile)  # who named both knows
    return Estimators(
        plan=estimator(options.plan_with or usual(profile), profile),
        serve=_server(options.serve_with or usual(profile), profile, options.serve_without),
        notes=(note,) if note and not (options.plan_with and options.serve_with) else (),
    )


def _server(name: str, profile: HardwareProfile, without_run: str | None) -> Estimator | None:
    if name not in (*ESTIMATORS, RECORDED):
        raise UnknownNameError("estimator", name, [*ESTIMATORS, RECORDED])
    if without_run is not None:
        if name != CALIBRATED:
            raise InputError(f"--serve-without applies to --serve-with calibrated, not to {name!r}; leave it out")
        return CalibratedEstimator.serving(profile, without_run=without_run)
    return None if name == RECORDED else estimator(name, profile)
