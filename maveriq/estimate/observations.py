"""What was measured of a model: batches of equal requests, on some or all of its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from maveriq.domain.model_config import shape_of_decoder
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig


class Batch(NamedTuple):
    """Equal requests that start together."""

    size: int
    prompt_tokens: int
    output_tokens: int


def with_layers(model: ModelSpec, pattern: tuple[int, ...]) -> ModelSpec:
    """Return a model made of some layers of another.

    Args:
        model: the model.
        pattern: for every layer of the new model in order, a layer of the old one.
    """
    decoder = model.decoder
    kinds = [decoder.layer_pattern[layer] for layer in pattern]
    used = sorted(set(kinds))
    shorter = replace(
        decoder,
        layer_kinds=tuple(decoder.layer_kinds[kind] for kind in used),
        layer_pattern=tuple(used.index(kind) for kind in kinds),
    )
    return replace(model, decoder=shorter, config_json="", **asdict(shape_of_decoder(shorter)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A measured batch: medians over its samples.

    Args:
        model: the model with the layers that were measured.
        configuration: how it was split and stored.
        batch: what was asked.
        first_token_s: from the start to the first token.
        tpot_s: for each further token.
        first_token_noise: standard deviation of the logarithm of the first.
        tpot_noise: of the second.
        memory_bytes: what the engine held; None but for one batch of an engine.
        memory_batch: the batch that it held memory for; None for `batch`.
        mixed_s: a step with one more prompt while the batch decodes; None where it was not measured.
    """

    model: ModelSpec
    configuration: ParallelConfig
    batch: Batch
    first_token_s: float
    tpot_s: float
    first_token_noise: float
    tpot_noise: float
    memory_bytes: int | None = None
    memory_batch: Batch | None = None
    mixed_s: float | None = None
