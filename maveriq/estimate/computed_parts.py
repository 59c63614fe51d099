"""Takes the estimates of an estimator apart: what each kind of layers adds, attention alone, hand-overs, and the rest.

It asks the estimator for the same request on models of one and of two equal layers: what the second layer adds is the
time or the memory of a layer. So any estimator that adds up layers can be corrected part by part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from maveriq.domain.decoder import LayerKind
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.blending import Computed, Features, Term
from maveriq.estimate.estimator import Estimator, LengthAwareMemory
from maveriq.estimate.observations import Batch, with_layers

FIRST, TOKEN, MEMORY = "first token", "further token", "memory"
"""The phases: what is computed."""

LAYERS, ATTENTION, HAND_OVER, REST, CACHE = "layers", "attention", "hand-over", "rest", "cache"
"""The parts."""

_LEAST_SHARE = 1e-3  # of a part, so that measurements can find it where it is computed as nothing


@dataclass(frozen=True, slots=True)
class ComputedParts:
    """Takes the estimates of an estimator apart.

    Args:
        estimator: adds up layers.
    """

    estimator: Estimator
    _short: dict[tuple[ModelSpec, LayerKind, int], ModelSpec] = field(default_factory=dict)
    _kinds: dict[LayerKind, str] = field(default_factory=dict)
    _costs: dict[tuple[ModelSpec, ParallelConfig, Batch], tuple[float, float]] = field(default_factory=dict)

    def times(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> tuple[Computed, Computed]:
        """Return the times until the first token and for a further one, in seconds."""
        totals = self._times_s(model, configuration, batch)
        rows = (batch.size * batch.prompt_tokens, batch.size)
        tokens = (batch.prompt_tokens, batch.prompt_tokens + batch.output_tokens / 2)
        layers = list(self._layers(model, configuration, batch))
        alone = totals if configuration.pp == 1 else self._times_s(model, configuration.at(configuration.tp, 1), batch)
        found = []
        for index, phase in enumerate((FIRST, TOKEN)):
            features = Features(
                phase=phase,
                model=model.name,
                kind="",
                stored_as="",
                doublings=math.log2(configuration.tp),
                log_rows=math.log(rows[index]),
                log_tokens=math.log(tokens[index]),
            )
            parts = [
                Term(part, count * cost[index], features._replace(kind=kind, stored_as=stored))
                for kind, count, cost, attention in layers
                for part, cost, stored in (
                    (LAYERS, _less(cost, attention), configuration.weights.value),
                    (ATTENTION, attention, configuration.kv.value),
                )
            ]
            hand_over = max(0.0, totals[index] - alone[index])
            rest = totals[index] - hand_over - sum(term.value for term in parts)
            parts.append(Term(REST, rest, features))
            if configuration.pp > 1:
                of_each = (configuration.pp - 1) * _LEAST_SHARE * totals[index]
                parts.append(Term(HAND_OVER, max(hand_over, of_each), features))
            identity = f"{phase} {model.name} {model.layers} {configuration} {batch}"
            found.append(Computed(_adding_up(parts, totals[index]), identity))
        return found[0], found[1]

    def memory(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> Computed:
        """Return the memory over all GPUs, in bytes."""
        one = Batch(1, 1, 1)
        total = self._memory(model, configuration, batch)
        features = Features(
            phase=MEMORY,
            model=model.name,
            kind="",
            stored_as="",
            doublings=math.log2(configuration.gpus),
            log_rows=math.log(batch.size * batch.prompt_tokens),
            log_tokens=math.log(batch.prompt_tokens + batch.output_tokens),
        )
        parts = []
        flat = configuration.at(configuration.tp, 1)
        for kind, count in model.decoder.kinds():
            pair, single = (self._short_model(model, kind, layers) for layers in (2, 1))
            each, each_loaded = (
                self._memory(pair, flat, asked) - self._memory(single, flat, asked) for asked in (one, batch)
            )
            of_kind, weights, kv = self._kind_name(kind), configuration.weights.value, configuration.kv.value
            parts.append(Term(LAYERS, count * each, features._replace(kind=of_kind, stored_as=weights)))
            parts.append(Term(CACHE, count * (each_loaded - each), features._replace(kind=of_kind, stored_as=kv)))
        of_layers = sum(term.value for term in parts)
        rest = Term(REST, total - of_layers, features)
        identity = f"{MEMORY} {model.name} {model.layers} {configuration} {batch}"
        return Computed(_adding_up([*parts, rest], total), identity)

    def run_memory(self, model: ModelSpec, layers: Sequence[int], configuration: ParallelConfig) -> float:
        """Return the memory over all GPUs of an engine with some layers of a model, before it has a prompt."""
        short = model if len(layers) == model.layers else with_layers(model, tuple(layers))
        return self._memory(short, configuration, Batch(1, 1, 1))

    def _layers(
        self, model: ModelSpec, configuration: ParallelConfig, batch: Batch
    ) -> Iterator[tuple[str, int, tuple[float, float], tuple[float, float]]]:
        """Yield each kind of layers: its number, the times of a layer, and those of its attention alone."""
        flat = configuration.at(configuration.tp, 1)
        # The same tokens in a step, with nothing to attend to but themselves.
        rows = batch.size * batch.prompt_tokens
        for kind, count in model.decoder.kinds():
            pair, single = (self._short_model(model, kind, layers) for layers in (2, 1))
            layer = _less(self._times_s(pair, flat, batch), self._times_s(single, flat, batch))
            bare_first, bare_token = (
                _less(self._times_s(pair, flat, bare), self._times_s(single, flat, bare))[index]
                for index, bare in enumerate((Batch(rows, 1, 1), Batch(batch.size, 1, 1)))
            )
            attention = (max(0.0, layer[0] - bare_first), max(0.0, layer[1] - bare_token))
            yield self._kind_name(kind), count, layer, attention

    def _short_model(self, model: ModelSpec, kind: LayerKind, layers: int) -> ModelSpec:
        key = (model, kind, layers)
        if key not in self._short:
            decoder = model.decoder
            layer = decoder.layer_pattern.index(decoder.layer_kinds.index(kind))
            self._short[key] = with_layers(model, (layer,) * layers)
        return self._short[key]

    def _kind_name(self, kind: LayerKind) -> str:
        """Return a name for a kind of layers, which is the same in all models that have it."""
        return self._kinds.setdefault(kind, str(len(self._kinds)))

    def _times_s(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> tuple[float, float]:
        key = (model, configuration, batch)
        if key not in self._costs:
            service = self.estimator.service(
                model,
                configuration,
                prompt_tokens=batch.prompt_tokens,
                output_tokens=batch.output_tokens,
                batch=batch.size,
            )
            self._costs[key] = (service.first_token_s, service.tpot_s)
        return self._costs[key]

    def _memory(self, model: ModelSpec, configuration: ParallelConfig, batch: Batch) -> float:
        configuration = replace(configuration, batch_size=batch.size)
        if not isinstance(self.estimator, LengthAwareMemory):
            return float(self.estimator.memory(model, configuration))
        return float(
            self.estimator.memory_with(
                model, configuration, prompt_tokens=batch.prompt_tokens, output_tokens=batch.output_tokens
            )
        )


def _less(left: tuple[float, float], right: tuple[float, float]) -> tuple[float, float]:
    return max(0.0, left[0] - right[0]), max(0.0, left[1] - right[1])


def _adding_up(terms: list[Term], total: float) -> tuple[Term, ...]:
    """Return positive terms that add up to a total: none vanishes, and their ratios stay."""
    least = _LEAST_SHARE * total
    positive = [term._replace(value=max(term.value, least)) for term in terms]
    scale = total / sum(term.value for term in positive)
    return tuple(term._replace(value=scale * term.value) for term in positive)
