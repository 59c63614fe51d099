"""The memory of a deployment: weights and KV cache by their size, all else as fingerprints held it."""

from __future__ import annotations

import math
from typing import NamedTuple

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.calibration_file import BYTES_PER_PARAMETER, Margins, Memory, kv_bytes, layer_parameters
from maveriq.estimate.fingerprints import Fingerprint, Fingerprints
from maveriq.units import BYTES_PER_GIB


class MemoryEstimate(NamedTuple):
    """Memory over all GPUs of a deployment; `requests_gib` of it is what a batch adds beside its KV cache."""

    gib: float
    requests_gib: float

    @property
    def request_share(self) -> float:
        """The part that the requests of a batch beyond the first add."""
        return self.requests_gib / self.gib


def estimate_memory(
    model: ModelSpec,
    configuration: ParallelConfig,
    fingerprints: Fingerprints,
    figures: Memory,
    *,
    tokens: int,
    fingerprint_tokens: int,
) -> MemoryEstimate:
    """Return the memory over all GPUs of a deployment.

    Args:
        model: the model.
        configuration: with its batch size.
        fingerprints: of the model as it is stored; (1, 1) at batch 1 must be there.
        figures: fitted ones; `is_measured` must hold.
        tokens: of prompt and output of a request together.
        fingerprint_tokens: of those that the fingerprints were measured with.
    """
    batch, tp = configuration.batch_size, configuration.tp
    requests_gib = (batch - 1) * configuration.gpus * request_gib(model, tp, figures)
    total_gib = (
        layers_gib(model, configuration, model.layers, tokens, figures)
        + fixed_gib(model, configuration, fingerprints[configuration.at(1, 1)], fingerprint_tokens, figures)
        + _beyond_one_gpu_gib(configuration, fingerprints, figures)
        + requests_gib
    )
    return MemoryEstimate(total_gib, requests_gib)


def memory_margin(margins: Margins, seen: MemoryEstimate) -> float:
    """Return the half-width of the 90 % interval of an estimate of memory."""
    return margins.memory_single + seen.request_share * margins.memory_request


def layers_gib(model: ModelSpec, configuration: ParallelConfig, layers: int, tokens: int, figures: Memory) -> float:
    """Return the memory of the weights of so many layers and of the KV cache of so many tokens a request."""
    blocks = math.ceil(tokens / figures.kv_block_tokens) * configuration.batch_size
    weights = layer_parameters(model) * BYTES_PER_PARAMETER[configuration.weights]
    return layers * (weights + blocks * figures.kv_block_tokens * kv_bytes(model, configuration.kv)) / BYTES_PER_GIB


def fixed_gib(
    model: ModelSpec, configuration: ParallelConfig, fingerprint: Fingerprint, tokens: int, figures: Memory
) -> float:
    """Return what one GPU holds beside layers: the mean of what its two fingerprints leave over."""
    single = configuration.at(1, 1)
    left = (fingerprint.memory_gib(n) - layers_gib(model, single, n, tokens, figures) for n in (1, 2))
    return sum(left) / 2


def request_gib(model: ModelSpec, tp: int, figures: Memory) -> float:
    """Return what a request of a batch adds on every GPU, beside its KV cache."""
    gates = model.feed_forward_matrices - 2
    # A layer's input, its residual, and the wide part between, of which a gate is partly kept beside it.
    width = 2 * model.hidden_size + model.intermediate_size * (1 + gates * figures.gated)
    return figures.request_kb * 1e3 * width * (figures.unsharded + (1 - figures.unsharded) / tp) / BYTES_PER_GIB


def _beyond_one_gpu_gib(configuration: ParallelConfig, fingerprints: Fingerprints, figures: Memory) -> float:
    """Return what (TP, PP) holds more than one GPU: as its own fingerprint did, else as others' did."""
    pp = configuration.pp
    measured = fingerprints.get(configuration.at(configuration.tp, pp))
    if measured is not None:
        # One layer per stage is what was measured there; at (1, 1) nothing is left.
        return measured.memory_gib(pp) - fingerprints[configuration.at(1, 1)].memory_gib(pp)
    return figures.gpus_gib[gpus_key(configuration)]


def is_measured(configuration: ParallelConfig, fingerprints: Fingerprints, figures: Memory) -> bool:
    """Say whether any model's memory was measured at (TP, PP)."""
    return (
        configuration.at(configuration.tp, configuration.pp) in fingerprints
        or gpus_key(configuration) in figures.gpus_gib
    )


def gpus_key(configuration: ParallelConfig) -> str:
    """Return the key of `Memory.gpus_gib`."""
    return f"{configuration.tp}x{configuration.pp}"
