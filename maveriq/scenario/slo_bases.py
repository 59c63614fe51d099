"""The latency that a model's SLOs are multiples of: measured, else estimated for a request alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.blended import BlendedEstimator
from maveriq.estimate.by_model import JOINED
from maveriq.estimate.hardware_profile import HardwareProfile, SloBase
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.registry import BLENDED, PHYSICS, default_estimator

_OUTPUT_TOKENS = 20
_MOST_GPUS = 64


def slo_bases(profile: HardwareProfile, models: Iterable[ModelSpec]) -> Callable[[str, int], float | None]:
    """Return the latency of a model's request of so many output tokens, by the model's name.

    Where no model was measured on the GPUs, it is the latency that physics estimates for a request alone, with the
    profile's prompt, on the fewest GPUs that hold the model unconverted. None where there is neither.
    """
    by_name = {model.name: model for model in models}
    names = default_estimator(profile, by_name.values()).split(JOINED)
    computed = next((name for name in names if name in (PHYSICS, BLENDED)), None)
    estimator = {PHYSICS: PhysicsEstimator, BLENDED: BlendedEstimator}[computed](profile) if computed else None

    @cache
    def estimated(name: str) -> SloBase | None:
        model = by_name.get(name)
        if model is None or estimator is None:
            return None
        at = _fewest_gpus(model, estimator, profile)
        if at is None:
            return None
        lengths = {"prompt_tokens": profile.prompt_tokens, "output_tokens": _OUTPUT_TOKENS}
        service = estimator.service(model, at, **lengths, batch=1)
        return SloBase(ttft_s=service.ttft_s, tpot_s=service.tpot_s)

    def slo_s(name: str, output_tokens: int) -> float | None:
        measured = profile.slo_s(name, output_tokens)
        base = estimated(name) if measured is None else None
        return measured if base is None else base.ttft_s + base.tpot_s * output_tokens

    return slo_s


def _fewest_gpus(
    model: ModelSpec, estimator: PhysicsEstimator | BlendedEstimator, profile: HardwareProfile
) -> ParallelConfig | None:
    """Return the smallest configuration that holds a model, of more stages only where no node holds it."""
    free_bytes = profile.capacity_bytes - profile.idle_bytes
    considered = estimator.configurations(model, gpus=_MOST_GPUS, batch_size=1)
    plain = [at for at in considered if (at.weights, at.ep) == (model.unconverted, 1)]
    for at in sorted(plain, key=lambda at: (at.pp, at.tp)):
        if estimator.why_not(model, at) is None and estimator.memory(model, at) <= at.gpus * free_bytes:
            return at
    return None
