"""TODO."""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.fingerprints import ParallelPoint, StoredFormat
from maveriq.estimate.hardware_profile import HardwareProfile


def stored_as(model: ModelSpec, configuration: ParallelConfig) -> StoredFormat:
    """Return the key of a model's fingerprints."""
    return StoredFormat(model.name, configuration.weights, configuration.kv)


def why_not(
    profile: HardwareProfile, model: ModelSpec, configuration: ParallelConfig, points: Sequence[ParallelPoint]
) -> str | None:
    """Return why a configuration cannot be estimated or run, None if it can.

    Args:
        profile: what was measured.
        model: the model.
        configuration: of which the batch size plays no part.
        points: fingerprints that the estimate needs.
    """
    stored, tp = stored_as(model, configuration), configuration.tp
    fingerprints = profile.fingerprints.constants.get(stored)
    if fingerprints is None:
        return _what_exists(profile, stored)
    if tp not in model.tensor_parallel_degrees(tp):
        return f"TP {tp} is not a power of two that divides the {model.attention_heads} attention heads"
    if not profile.supports(model.name, configuration):
        return f"known not to run on {profile.gpu_kind}"
    missing = [f"TP {point.tp} x PP {point.pp}" for point in points if point not in fingerprints]
    if missing:
        return f"profile {profile.name} has no fingerprint of it at {' and '.join(missing)}"
    return None


def _what_exists(profile: HardwareProfile, stored: StoredFormat) -> str:
    """Say which fingerprints there are instead of the ones asked for."""
    table = profile.fingerprints
    if not table.stored_as(stored.model):
        has = ", ".join(table.models()) or "none"
        return (
            f"profile {profile.name} has no fingerprint of {stored.model} (it has {has}); "
            "give a profile that was measured with it"
        )
    return f"no fingerprint with {stored.weights} weights and {stored.kv} KV cache in profile {profile.name}"
