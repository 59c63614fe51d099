"""What a model's own fingerprints say of it: how much longer a layer took than the law says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import median

from maveriq.domain.models import ModelSpec, WeightType
from maveriq.estimate.calibration import work
from maveriq.estimate.fingerprints import OUTPUTS, Point, Stored
from maveriq.estimate.formula import Fingerprint
from maveriq.estimate.physics import Law, Work, latency_s


def deviation(seen: Iterable[tuple[Work, int, float]], law: Law) -> float:
    """Return the median logarithm of a layer's measured time over what the law says, on one GPU.

    Args:
        seen: what was asked of a layer, output tokens, and the time that the second layer took, in
            seconds. Each alone is noisy, hence the median; noise that went below zero is left out.
        law: at TP 1.
    """
    logs = [
        math.log(measured_s / _second_layer_s(asked, law, output_tokens))
        for asked, output_tokens, measured_s in seen
        if measured_s > 0
    ]
    return median(logs) if logs else 0.0


def _second_layer_s(asked: Work, law: Law, output_tokens: int) -> float:
    two, one = (latency_s(replace(asked, layers=layers), law, output_tokens) for layers in (2, 1))
    return float(two - one)


def measured_layers(
    constants: Mapping[Stored, Mapping[Point, Fingerprint]],
    model: ModelSpec,
    weights: WeightType,
    *,
    prompt_tokens: int,
) -> Iterator[tuple[Work, int, float]]:
    """Yield what a model's fingerprints on one GPU say of a layer, whatever their batch size and KV type.

    Args:
        constants: of all models.
        model: whose layer.
        weights: its weight type.
        prompt_tokens: of the prompts that the fingerprints were taken with.
    """
    for stored, points in constants.items():
        if (stored.model, stored.weights) != (model.name, weights):
            continue
        for point, found in points.items():
            if (point.tp, point.pp) == (1, 1):
                asked = work(model, stored.kv, tp=1, pp=1, batch=point.batch, prompt_tokens=prompt_tokens)
                for output_tokens in OUTPUTS:  # the constants give back exactly what was measured at these
                    yield asked, output_tokens, found.ttft_layer_s + output_tokens * found.tpot_layer_s
