"""Estimates the memory of a deployment: weights and KV cache from their sizes, the rest from fingerprints."""

from __future__ import annotations

import math
from typing import NamedTuple

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.calibration_file import BYTES_PER_PARAMETER, Margins, Memory, kv_bytes, layer_parameters
from maveriq.estimate.fingerprints import Fingerprint, Fingerprints
from maveriq.estimate.intervals import Interval, within
from maveriq.units import BYTES_PER_GIB


class MemoryEstimate(NamedTuple):
    """Memory over all GPUs of a deployment.

    `whole_requests_gib` is what a batch would add in addition to its KV cache if the GPUs of a stage split nothing.
    """

    gib: float
    whole_requests_gib: float

    @property
    def request_share(self) -> float:
        """The share that the requests of a batch after the first add at most.

        Errors grow with it. How much of a request the GPUs split was measured with few models, so that the more they
        are the less certain it is what a request adds.
        """
        return self.whole_requests_gib / self.gib


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
        configuration: the configuration, with its batch size.
        fingerprints: fingerprints of the model; (1, 1) at batch 1 with the same storage types must be present.
        figures: the fitted figures; `is_measured` must be true.
        tokens: prompt and output tokens of a request together.
        fingerprint_tokens: prompt and output tokens of the fingerprints together.
    """
    batch, tp = configuration.batch_size, configuration.tp
    further = (batch - 1) * configuration.gpus
    requests_gib, whole_requests_gib = (further * request_gib(model, degree, figures) for degree in (tp, 1))
    total_gib = (
        layers_gib(model, configuration, model.layers, tokens, figures)
        + fixed_gib(model, configuration, fingerprints[configuration.at(1, 1)], fingerprint_tokens, figures)
        + _beyond_one_gpu_gib(configuration, fingerprints, figures)
        + requests_gib
    )
    return MemoryEstimate(total_gib, whole_requests_gib)


def memory_interval(margins: Margins, estimate: MemoryEstimate) -> Interval:
    """Return the 90 % interval of an estimate of memory."""
    return within(margins.memory_single + estimate.request_share * margins.memory_request)


def layers_gib(model: ModelSpec, configuration: ParallelConfig, layers: int, tokens: int, figures: Memory) -> float:
    """Return the memory of the weights of `layers` layers and of their KV cache at `tokens` tokens per request."""
    blocks = math.ceil(tokens / figures.kv_block_tokens) * configuration.batch_size
    weights = layer_parameters(model) * BYTES_PER_PARAMETER[configuration.weights]
    return layers * (weights + blocks * figures.kv_block_tokens * kv_bytes(model, configuration.kv)) / BYTES_PER_GIB


def fixed_gib(
    model: ModelSpec, configuration: ParallelConfig, fingerprint: Fingerprint, tokens: int, figures: Memory
) -> float:
    """Return the memory of one GPU other than layers: the mean remainder of its two fingerprint measurements."""
    single = configuration.at(1, 1)
    left = (fingerprint.memory_gib(n) - layers_gib(model, single, n, tokens, figures) for n in (1, 2))
    return sum(left) / 2


def request_gib(model: ModelSpec, tp: int, figures: Memory) -> float:
    """Return the memory that a request of a batch adds on every GPU, in addition to its KV cache."""
    gates = model.feed_forward_matrices - 2
    # A layer's input, its residual, and the intermediate activations, part of which is kept again for a gate.
    width = 2 * model.hidden_size + model.intermediate_size * (1 + gates * figures.gated)
    return figures.request_kb * 1e3 * width * (figures.unsharded + (1 - figures.unsharded) / tp) / BYTES_PER_GIB


def _beyond_one_gpu_gib(configuration: ParallelConfig, fingerprints: Fingerprints, figures: Memory) -> float:
    """Return the memory that (TP, PP) adds to that of one GPU, from the model's own fingerprint or else the fit."""
    pp = configuration.pp
    measured = fingerprints.get(configuration.at(configuration.tp, pp))
    if measured is not None:
        # The fingerprint has one layer per stage. At (1, 1) the difference is zero.
        return measured.memory_gib(pp) - fingerprints[configuration.at(1, 1)].memory_gib(pp)
    return figures.gpus_gib[gpus_key(configuration)]


def is_measured(configuration: ParallelConfig, fingerprints: Fingerprints, figures: Memory) -> bool:
    """Return whether the memory of any model was measured at (TP, PP)."""
    return (
        configuration.at(configuration.tp, configuration.pp) in fingerprints
        or gpus_key(configuration) in figures.gpus_gib
    )


def gpus_key(configuration: ParallelConfig) -> str:
    """Return the key of `Memory.gpus_gib`."""
    return f"{configuration.tp}x{configuration.pp}"
