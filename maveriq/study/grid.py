"""The grid of measurements that a study makes on this machine, as its TOML file describes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import LayerSplit, ParallelConfig, even_split
from maveriq.errors import InputError
from maveriq.study.masks import pruning_method

_Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
_Degrees = Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=1024)], ...], msgspec.Meta(min_length=1)]
_Counts = Annotated[tuple[_Count, ...], msgspec.Meta(min_length=1)]

SMALL_MODEL: Mapping[str, Any] = MappingProxyType(
    {
        "_name_or_path": "small-llama",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
)
"""The `config.json` of the model that is measured where the user names none: small enough for a CPU."""


class Grid(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Measurements that play one part in a study: every combination of what its lists hold.

    Args:
        part: of the study, such as `full_models`.
        tp: tensor-parallel degrees.
        pp: pipeline-parallel degrees.
        weights: weight types.
        kv: types of the KV cache.
        batch: batch sizes; an engine is started for each.
        prompt_tokens: prompt lengths.
        output_tokens: output lengths.
        layers: layer counts of models cut to their first layers; () for the whole model.
        stage_shares: shares of the layers for each stage, such as (1, 3); () for an even split.
        pruning: methods such as `magnitude-50`; () for the weights as they are.
    """

    part: Annotated[str, msgspec.Meta(min_length=1)]
    tp: _Degrees = (1,)
    pp: _Degrees = (1,)
    weights: Annotated[tuple[WeightType, ...], msgspec.Meta(min_length=1)] = (WeightType.FLOAT16,)
    kv: Annotated[tuple[KvType, ...], msgspec.Meta(min_length=1)] = (KvType.NATIVE,)
    batch: _Counts = (1,)
    prompt_tokens: _Counts = (64,)
    output_tokens: _Counts = (20,)
    layers: tuple[_Count, ...] = ()
    stage_shares: tuple[_Counts, ...] = ()
    pruning: tuple[str, ...] = ()


class Measure(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a study measures on this machine, and options of its analysis that differ from those for published data."""

    grids: Annotated[tuple[Grid, ...], msgspec.Meta(min_length=1)]
    options: Mapping[str, _Counts] = {}


class EngineKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An engine that is started once: layers of each stage, degrees, types, the largest batch, and the pruning."""

    layer_split: LayerSplit
    tp: int
    pp: int
    weights: WeightType
    kv: KvType
    batch: int
    pruning: str = ""

    @property
    def layers(self) -> int:
        """Layers of the model that it runs."""
        return sum(self.layer_split)

    @property
    def configuration(self) -> ParallelConfig:
        """Its configuration, with the batch size; an even split is ()."""
        split = () if self.layer_split == even_split(self.layers, self.pp) else self.layer_split
        return ParallelConfig(
            tp=self.tp, pp=self.pp, weights=self.weights, kv=self.kv, layer_split=split, batch_size=self.batch
        )


class Point(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One measurement: an engine, and the lengths of a full batch."""

    engine: EngineKey
    prompt_tokens: int
    output_tokens: int


def points_of(grid: Grid, model_layers: int) -> Iterator[Point]:
    """Yield the measurements of a grid for a model of so many layers, engine by engine.

    Combinations that a model cannot have are left out: more stages than layers, more layers than the model has.

    Raises:
        InputError: a method of pruning that is none, or shares for another number of stages.
    """
    prunings = [str(pruning_method(text)) for text in grid.pruning] or [""]
    for pruning, layers, weights, kv, tp, pp, batch in product(
        prunings, grid.layers or (model_layers,), grid.weights, grid.kv, grid.tp, grid.pp, grid.batch
    ):
        if pp > layers or layers > model_layers:
            continue
        for split in _splits(grid, layers, pp):
            engine = EngineKey(layer_split=split, tp=tp, pp=pp, weights=weights, kv=kv, batch=batch, pruning=pruning)
            for prompt_tokens, output_tokens in product(grid.prompt_tokens, grid.output_tokens):
                yield Point(engine=engine, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _splits(grid: Grid, layers: int, pp: int) -> list[LayerSplit]:
    if not grid.stage_shares:
        return [even_split(layers, pp)]
    wrong = next((shares for shares in grid.stage_shares if len(shares) not in grid.pp), None)
    if wrong is not None:
        raise InputError(f"grid {grid.part}: stage_shares {list(wrong)} are for {len(wrong)} stages, which pp lacks")
    return list(dict.fromkeys(dealt(layers, shares) for shares in grid.stage_shares if len(shares) == pp))


def dealt(layers: int, shares: Sequence[int]) -> LayerSplit:
    """Deal layers to stages in proportion to shares, rounded, each stage at least one.

    Args:
        layers: at least one for each stage.
        shares: of the stages.
    """
    exact = [layers * share / sum(shares) for share in shares]
    split = [max(1, int(part)) for part in exact]
    stages = range(len(shares))
    while sum(split) < layers:
        split[max(stages, key=lambda stage: (exact[stage] - split[stage], -stage))] += 1
    while sum(split) > layers:
        large = [stage for stage in stages if split[stage] > 1]
        split[max(large, key=lambda stage: (split[stage] - exact[stage], -stage))] -= 1
    return tuple(split)
