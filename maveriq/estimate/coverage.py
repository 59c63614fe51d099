"""Coverage: explains why a configuration cannot be estimated from a profile's fingerprints, or cannot run."""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig, tensor_parallel_degrees
from maveriq.estimate.hardware_profile import HardwareProfile


def why_not(
    profile: HardwareProfile, model: ModelSpec, configuration: ParallelConfig, needed: Sequence[ParallelConfig]
) -> str | None:
    """Return why a configuration cannot be estimated or run, None if it can.

    Args:
        profile: the measurements.
        model: the model.
        configuration: the configuration, whatever its batch size.
        needed: configurations with the same storage types whose fingerprints the estimate needs.
    """
    other = profile.why_other_model(model) or model.why_not_stored_as(configuration.weights)
    if other is not None:
        return other
    if different := model.why_not_plain():
        return f"{different}, which this estimator does not model: it knows plain decoders"
    fingerprints, tp = profile.fingerprints.of(model.name), configuration.tp
    missing = [point for point in needed if point not in fingerprints]
    if missing and not _has_storage_types(profile, model, configuration):
        return _without_fingerprints(profile, model, configuration)
    if tp not in tensor_parallel_degrees(model, tp):
        return f"TP {tp} is not a power of two that divides the {model.attention_heads} attention heads"
    if not profile.supports(model.name, configuration):
        return f"known not to run on {profile.gpu_kind}"
    if missing:
        points = " and ".join(f"TP {point.tp} x PP {point.pp}" for point in missing)
        return f"profile {profile.name} has no fingerprint of it at {points}"
    return None


def _has_storage_types(profile: HardwareProfile, model: ModelSpec, configuration: ParallelConfig) -> bool:
    stored_as = (configuration.weights, configuration.kv)
    return any((measured.weights, measured.kv) == stored_as for measured in profile.fingerprints.of(model.name))


def _without_fingerprints(profile: HardwareProfile, model: ModelSpec, configuration: ParallelConfig) -> str:
    """Return the reason for a model without fingerprints, or without fingerprints of these storage types."""
    table = profile.fingerprints
    if not table.of(model.name):
        has = ", ".join(table.models()) or "none"
        return (
            f"profile {profile.name} has no fingerprint of {model.name} (it has {has}); "
            "give a profile that was measured with it, or --estimator physics and --service-times physics"
        )
    return (
        f"no fingerprint with {configuration.weights} weights and {configuration.kv} KV cache in profile {profile.name}"
    )
