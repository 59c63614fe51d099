"""Takes the estimates of an estimator apart: layers of each kind, attention, sharing, hand-overs, and the rest.

It asks the estimator for the same request on models of one and of two equal layers: what the second layer adds is the
time or the memory of a layer. What several GPUs take for a layer beyond their equal shares of what one takes is the
cost of sharing: all-reduces, and kernels that are less efficient on a share. So any estimator that adds up layers can
be corrected part by part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from maveriq.domain.decoder import LayerKind
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.blending import Computed, Features, Term
from maveriq.estimate.estimator import Estimator, LengthAwareMemory
from maveriq.estimate.observations import Batch, with_layers

FIRST, TOKEN, MEMORY = "first token", "further token", "memory"
"""The phases: what is computed."""

LAYERS, ATTENTION, SHARING, HAND_OVER, REST, CACHE = "layers", "attention", "sharing", "hand-over", "rest", "cache"
ADMISSION = "admission"
"""The parts."""

_Times: TypeAlias = tuple[float, float]
"""Seconds until the first token, and for a further one."""

_NAMELESS = "part"
_LEAST_SHARE = 1e-3  # of a part, so that measurements can find it where it is computed as nothing


@dataclass(frozen=True, slots=True)
class ComputedParts:
    """Takes the estimates of an estimator apart.

    Args:
        estimator: adds up layers.
        admission_s: what of its time to the first token passes before the request is in the engine's queue, where that
            was measured by itself: a part of its own.
    """

    estimator: Estimator
    admission_s: float = 0.0
    _short: dict[tuple[ModelSpec, LayerKind, int], ModelSpec] = field(default_factory=dict)
    _without_name: dict[ModelSpec, ModelSpec] = field(default_factory=dict)
    _kinds: dict[LayerKind, str] = field(default_factory=dict)
    _costs: dict[tuple[ModelSpec, ParallelConfig, Batch], tuple[float, float]] = field(default_factory=dict)

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a model of this shape cannot be estimated; None if it can."""
        return self.estimator.why_not(self._nameless(model), configuration)

    def times(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> tuple[Computed, Computed]:
        """Return the times until the first token and for a further one, in seconds."""
        first, token = self._computed(model, configuration, batch, (0, 1))
        return first, token

    def time(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch, phase: int) -> Computed:
        """Return one of the two times, which takes less than both."""
        [computed] = self._computed(model, configuration, batch, (phase,))
        return computed

    def _computed(
        self, model: ModelSpec, configuration: ParallelConfig, batch: Batch, phases: tuple[int, ...]
    ) -> list[Computed]:
        totals = self._times_s(model, configuration, batch)
        rows = (batch.size * batch.prompt_tokens, batch.size)
        tokens = (batch.prompt_tokens, batch.prompt_tokens + batch.output_tokens / 2)
        layers = list(self._layers(model, configuration, batch, phases))
        split = replace(configuration, batch_size=1)
        alone = totals if configuration.pp == 1 else self._times_s(model, configuration.at(configuration.tp, 1), batch)
        found = []
        for index in phases:
            phase = (FIRST, TOKEN)[index]
            features = Features(
                phase=phase,
                model=model.name,
                kind="",
                stored_as="",
                doublings=math.log2(configuration.tp),
                log_rows=math.log(rows[index]),
                log_tokens=math.log(tokens[index]),
            )
            on_one = features._replace(doublings=0.0)
            rows_alone = on_one._replace(log_tokens=0.0)  # products know rows, not how long sequences are
            weights, kv = configuration.weights.value, configuration.kv.value
            parts = []
            for kind, count, layer in layers:
                dense, attention, sharing = (count * cost[index] for cost in layer)
                parts.append(Term(LAYERS, dense, rows_alone._replace(kind=kind, stored_as=weights)))
                parts.append(Term(ATTENTION, attention, on_one._replace(kind=kind, stored_as=kv)))
                if configuration.tp > 1:
                    parts.append(Term(SHARING, sharing, features._replace(kind=kind)))
            hand_over = max(0.0, totals[index] - alone[index])
            if index == 0 and self.admission_s:
                parts.append(Term(ADMISSION, self.admission_s, features))
            rest = totals[index] - hand_over - sum(term.value for term in parts)
            # The output matrix has a row for each sequence: its last token.
            parts.append(Term(REST, rest, features._replace(log_rows=math.log(batch.size))))
            if configuration.pp > 1:
                of_each = (configuration.pp - 1) * _LEAST_SHARE * totals[index]
                parts.append(Term(HAND_OVER, max(hand_over, of_each), features))
            identity = f"{phase} {model.name} {model.layers} {split} {batch.size} {int(tokens[index])}"
            found.append(Computed(_adding_up(parts, totals[index]), identity))
        return found

    def memory(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> Computed:
        """Return the memory over all GPUs, in bytes."""
        single = replace(configuration, tp=1, pp=1, ep=1, layer_split=())
        total, on_one = (self._memory(model, each, batch) for each in (configuration, single))
        features = Features(
            phase=MEMORY,
            model=model.name,
            kind="",
            stored_as="",
            doublings=0.0,
            log_rows=math.log(batch.size * batch.prompt_tokens),
            log_tokens=math.log(batch.prompt_tokens + batch.output_tokens),
        )
        parts = []
        for kind, count in model.decoder.kinds():
            longer, shorter = (self._short_model(model, kind, layers) for layers in (2, 1))
            each, each_loaded = (
                self._memory(longer, single, asked) - self._memory(shorter, single, asked)
                for asked in (Batch(1, 1, 1), batch)
            )
            of_kind, weights, kv = self._kind_name(kind), configuration.weights.value, configuration.kv.value
            parts.append(Term(LAYERS, count * each, features._replace(kind=of_kind, stored_as=weights)))
            parts.append(Term(CACHE, count * (each_loaded - each), features._replace(kind=of_kind, stored_as=kv)))
        of_layers = sum(term.value for term in parts)
        parts.append(Term(REST, on_one - of_layers, features))
        if configuration.gpus > 1:
            of_gpus = features._replace(doublings=math.log2(configuration.gpus))
            parts.append(Term(SHARING, total - on_one, of_gpus))
        identity = f"{MEMORY} {model.name} {model.layers} {configuration} {batch}"
        return Computed(_adding_up(parts, total), identity)

    def run_memory(self, model: ModelSpec, layers: Sequence[int], configuration: ParallelConfig) -> float:
        """Return the memory over all GPUs of an engine with some layers of a model, before it has a prompt."""
        short = model if len(layers) == model.layers else with_layers(model, tuple(layers))
        return self._memory(short, configuration, Batch(1, 1, 1))

    def _layers(
        self, model: ModelSpec, configuration: ParallelConfig, batch: Batch, phases: tuple[int, ...]
    ) -> Iterator[tuple[str, int, tuple[_Times, _Times, _Times]]]:
        """Yield each kind of layers: its number, and of a layer the times without attention, of attention, of sharing.

        The first two are a GPU's equal share of what one alone takes. Attention is left out in phases not asked for.
        """
        tp, one = configuration.tp, configuration.at(1, 1)
        # The same tokens in a step, with nothing to attend to but themselves.
        bare = (Batch(batch.size * batch.prompt_tokens, 1, 1), Batch(batch.size, 1, 1))
        for kind, count in model.decoder.kinds():
            layer = self._layer_s(model, kind, one, batch)
            attention = tuple(
                max(0.0, layer[index] - self._layer_s(model, kind, one, each)[index]) if index in phases else 0.0
                for index, each in enumerate(bare)
            )
            dense = _less(layer, (attention[0], attention[1]))
            shared = layer if tp == 1 else self._layer_s(model, kind, configuration.at(tp, 1), batch)
            sharing = _less(shared, (layer[0] / tp, layer[1] / tp)) if tp > 1 else (0.0, 0.0)
            share = (attention[0] / tp, attention[1] / tp)
            yield self._kind_name(kind), count, ((dense[0] / tp, dense[1] / tp), share, sharing)

    def _layer_s(self, model: ModelSpec, kind: LayerKind, configuration: ParallelConfig, batch: Batch) -> _Times:
        """Return the times of one layer: what it adds to another one."""
        pair, single = (self._short_model(model, kind, layers) for layers in (2, 1))
        return _less(self._times_s(pair, configuration, batch), self._times_s(single, configuration, batch))

    def _short_model(self, model: ModelSpec, kind: LayerKind, layers: int) -> ModelSpec:
        key = (model, kind, layers)
        if key not in self._short:
            decoder = model.decoder
            layer = decoder.layer_pattern.index(decoder.layer_kinds.index(kind))
            self._short[key] = with_layers(model, (layer,) * layers)
        return self._short[key]

    def _nameless(self, model: ModelSpec) -> ModelSpec:
        """Return a model of the same shape that no table knows: where a whole model does not run, its layers may."""
        if model not in self._without_name:
            self._without_name[model] = replace(model, name=_NAMELESS)
        return self._without_name[model]

    def _kind_name(self, kind: LayerKind) -> str:
        """Return a name for a kind of layers, which is the same in all models that have it."""
        return self._kinds.setdefault(kind, str(len(self._kinds)))

    def _times_s(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> tuple[float, float]:
        key = (model, configuration, batch)
        if key not in self._costs:
            service = self.estimator.service(
                self._nameless(model),
                configuration,
                prompt_tokens=batch.prompt_tokens,
                output_tokens=batch.output_tokens,
                batch=batch.size,
            )
            self._costs[key] = (service.first_token_s, service.tpot_s)
        return self._costs[key]

    def _memory(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> float:
        configuration, model = replace(configuration, batch_size=batch.size), self._nameless(model)
        if not isinstance(self.estimator, LengthAwareMemory):
            return float(self.estimator.memory(model, configuration))
        return float(
            self.estimator.memory_with(
                model, configuration, prompt_tokens=batch.prompt_tokens, output_tokens=batch.output_tokens
            )
        )


def _less(left: _Times, right: _Times) -> _Times:
    return max(0.0, left[0] - right[0]), max(0.0, left[1] - right[1])


def _adding_up(terms: list[Term], total: float) -> tuple[Term, ...]:
    """Return positive terms that add up to a total: none vanishes, and their ratios stay."""
    least = _LEAST_SHARE * total
    positive = [term._replace(value=max(term.value, least)) for term in terms]
    scale = total / sum(term.value for term in positive)
    return tuple(term._replace(value=scale * term.value) for term in positive)
