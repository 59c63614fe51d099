"""Profiles for the search: from maveriq's own estimator, or the table of the published placements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from maveriq.domain.models import KvType, ModelSpec
from maveriq.domain.parallel import ParallelConfig, even_split, shard_bytes, tensor_parallel_degrees
from maveriq.errors import UnknownNameError
from maveriq.estimate.estimator import Estimator
from maveriq.files import data_path
from maveriq.policy.alpaserve.problem import GroupShape, ModelProfile, StageProfile
from maveriq.tables import read_csv
from maveriq.units import Bytes

PUBLISHED_COLUMNS = ("model", "tp", "pp", "stage_latency_s", "stage_weight_bytes")


def profiles_from_estimator(
    models: Sequence[ModelSpec],
    estimator: Estimator,
    *,
    gpus: int,
    prompt_tokens: int,
    output_tokens: int,
    batch_size: int = 1,
) -> tuple[ModelProfile, ...]:
    """Return each model's profile as an estimator sees it, with float16 weights or those of a quantised checkpoint.

    A stage takes its share by layers of the whole generation, which is what an SLO covers, and
    holds its share of the whole memory, KV cache included. (The published table has the prefill
    and the weights alone.) Latency is of one request, which is what the search simulates; memory is
    of `batch_size` at once. Layers are split evenly, the first stages take the remainder. What the
    estimator refuses is missing.
    """
    return tuple(
        ModelProfile(shapes=dict(_shapes(model, estimator, gpus, prompt_tokens, output_tokens, batch_size)))
        for model in models
    )


def _shapes(
    model: ModelSpec, estimator: Estimator, gpus: int, prompt_tokens: int, output_tokens: int, batch_size: int
) -> Iterator[tuple[GroupShape, StageProfile]]:
    for tp in tensor_parallel_degrees(model, gpus):
        for pp in range(1, min(gpus // tp, model.layers) + 1):
            configuration = ParallelConfig(
                tp=tp, pp=pp, weights=model.unconverted, kv=KvType.NATIVE, batch_size=batch_size
            )
            if estimator.why_not(model, configuration):
                continue
            service = estimator.service(
                model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=1
            )
            if service.latency_s > 0:  # a fit that falls below 0 says nothing about this shape
                memory_bytes = estimator.memory(model, configuration)
                yield GroupShape(tp, pp), _stages(model, GroupShape(tp, pp), service.latency_s, memory_bytes)


def _stages(model: ModelSpec, shape: GroupShape, latency_s: float, memory_bytes: Bytes) -> StageProfile:
    split = even_split(model.layers, shape.pp)
    shards = shard_bytes(split, tp=shape.tp, layers=model.layers, memory_bytes=memory_bytes)
    return StageProfile(
        stage_latency_s=tuple(latency_s * layers / model.layers for layers in split),
        stage_weight_bytes=shards[:: shape.tp],
    )


def published_profiles() -> Mapping[str, ModelProfile]:
    """Return the profiles by model name that the published placements were computed with.

    Float16 on one A6000 and more; prefill latency and weights alone. All stages are alike.
    """
    shapes: dict[str, dict[GroupShape, StageProfile]] = {}
    for row in read_csv(data_path("alpaserve", "profile-float16.csv"), PUBLISHED_COLUMNS, what="AlpaServe profile"):
        shape = GroupShape(row.count("tp", minimum=1), row.count("pp", minimum=1))
        shapes.setdefault(row.text("model"), {})[shape] = StageProfile(
            stage_latency_s=(row.number("stage_latency_s"),) * shape.pp,
            stage_weight_bytes=(row.number("stage_weight_bytes"),) * shape.pp,
        )
    return {name: ModelProfile(shapes=found) for name, found in shapes.items()}


def published_profiles_of(model_names: Sequence[str]) -> tuple[ModelProfile, ...]:
    """Return the published profile of each model.

    Raises:
        UnknownNameError: a model that the table does not have.
    """
    known = published_profiles()
    for name in model_names:
        if name not in known:
            raise UnknownNameError("model", name, known, hint="in AlpaServe's published profile")
    return tuple(known[name] for name in model_names)
