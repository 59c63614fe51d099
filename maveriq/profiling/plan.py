"""Plans the measurements of a profile: the fewest that estimates of a model need, by expected gain for each second.

What a measurement is worth is known before it is made. The variance of a corrected estimate depends on where was
measured, not on what came out (`maveriq.estimate.blending`). So the plan takes one batch after the other: that by which
the variance of all wanted estimates falls most for each second that it takes, the start of its engine included. Equal
options give equal plans, whatever the machine does meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated

import msgspec
import numpy as np

from maveriq.domain.decoder import Decoder
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.blended import TIME_SCALES
from maveriq.estimate.blending import Computed, Design, Kernel, Names
from maveriq.estimate.computed_parts import ComputedParts
from maveriq.estimate.log_grid import Array
from maveriq.estimate.observations import Batch, with_layers

NOISE, CPU_NOISE = 0.01, 0.04
"""Standard deviation of the logarithm of a median that was repeated until its spread is small, and of one on a CPU.

Nothing keeps a CPU's cores and caches to one engine: other processes, and other guests of the host, take their part. On
two cores of a virtual machine the median of ten samples was known to 4 % (docs/profiling.md).
"""

_ENOUGH = 0.04  # expected error of the wanted estimates at which a plan ends
_LEAST_GAIN = 0.02  # of that error, relative, for which a measurement is still made
USUAL_REPEATS = 5
"""Samples of a batch, about, that make its median sure."""

_DEPTHS = ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8))
_START_S = {"emulated": 1.0, "torch": 8.0, "vllm": 60.0, "trtllm": 120.0}
"""Until an engine serves a few layers, about."""

_START_S_PER_GB, _USUAL_START_S = 1.0, 60.0
_MAX_COVARIANCE = 4_000  # values whose covariances are kept: a table of 128 MB

Layers = tuple[int, ...]
"""The layers of a short model, numbered as in the whole one."""


class PlannedCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A batch to measure, and how long it is expected to take with its repeats."""

    batch: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    expected_s: float

    @property
    def sizes(self) -> Batch:
        """The batch."""
        return Batch(self.batch, self.prompt_tokens, self.output_tokens)


class PlannedRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine to start: layers of a model, how they are split and stored, what to measure, and the time to start."""

    model: str
    layers: tuple[int, ...]
    tp: int
    pp: int
    weights: WeightType
    kv: KvType
    cases: tuple[PlannedCase, ...]
    start_s: float

    @property
    def configuration(self) -> ParallelConfig:
        """How the engine is split and stored."""
        return ParallelConfig(tp=self.tp, pp=self.pp, weights=self.weights, kv=self.kv)

    @property
    def expected_s(self) -> float:
        """How long the run is expected to take."""
        return self.start_s + sum(case.expected_s for case in self.cases)


class ProfilePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to measure.

    Args:
        runs: engines to start, in order.
        error_before: expected error of the wanted estimates without measurements: the root of their mean variance, as
            a logarithm.
        error_after: the same after the runs.
        estimates: how many estimates are wanted: batches in configurations.
        ends: why it ends there.
    """

    runs: tuple[PlannedRun, ...]
    error_before: float
    error_after: float
    estimates: int
    ends: str

    @property
    def expected_s(self) -> float:
        """How long it is expected to take."""
        return sum(run.expected_s for run in self.runs)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours that it is expected to take."""
        return sum(run.expected_s * run.configuration.gpus for run in self.runs) / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What estimates are wanted of a model.

    Args:
        model: the model.
        backend: the engine.
        max_gpus: most GPUs of a deployment.
        formats: of weights and KV cache.
        batch_sizes: sizes of batches.
        prompt_tokens: lengths of prompts.
        output_tokens: tokens of each output.
        layers: numbers of layers to measure with; None for two numbers of which the best are chosen or, where layers
            differ, for those of `short_models`.
        max_step_tokens: most tokens of a batch's prompts together.
        can_run: says whether the engine can run a configuration.
        fits: says whether a model of these layers fits a GPU in all formats.
        noise: standard deviation of the logarithm of a measured median.
        repeats: samples of each batch, about.
        starting: engines that start at once, in the time of one.
    """

    model: ModelSpec
    backend: str
    max_gpus: int
    formats: Sequence[tuple[WeightType, KvType]]
    batch_sizes: Sequence[int]
    prompt_tokens: Sequence[int]
    output_tokens: int
    layers: Sequence[int] | None
    max_step_tokens: int
    can_run: Callable[[ParallelConfig], bool]
    fits: Callable[[Layers], bool] = lambda _layers: True
    noise: float = NOISE
    repeats: int = USUAL_REPEATS
    starting: int = 1

    def batches(self) -> list[Batch]:
        """Return the batches of wanted estimates.

        Raises:
            InputError: none fits the model and a step.
        """
        context = self.model.context_tokens
        found = [
            Batch(size, prompt, self.output_tokens)
            for size, prompt in product(self.batch_sizes, self.prompt_tokens)
            if size * prompt <= self.max_step_tokens and (context is None or prompt + self.output_tokens <= context)
        ]
        if not found:
            raise InputError(
                f"{self.model.name}: no batch has at most {self.max_step_tokens:,} prompt tokens, and prompts and "
                f"outputs of at most {context} tokens together; give shorter ones"
            )
        return found

    def configurations(self) -> Iterator[ParallelConfig]:
        """Yield the configurations of wanted estimates."""
        for weights, kv in self.formats:
            for tp in range(1, self.max_gpus + 1):
                for pp in range(1, min(self.max_gpus // tp, self.model.layers) + 1):
                    configuration = ParallelConfig(tp=tp, pp=pp, weights=weights, kv=kv)
                    if self.can_run(configuration):
                        yield configuration


def short_models(decoder: Decoder, numbers: Sequence[int] | None = None) -> list[Layers]:
    """Return the layers of the models that tell all kinds of layers apart.

    Args:
        decoder: the whole model.
        numbers: how many layers they have, for models whose layers are alike; None for one of each kind, and one more
            of each kind.

    Raises:
        InputError: the model has fewer layers, or layers of several kinds.
    """
    if numbers is not None:
        if len(decoder.layer_kinds) > 1 and min(numbers) < decoder.layers:
            raise InputError(
                f"the model has {len(decoder.layer_kinds)} kinds of layers, and --layers counts layers of one kind; "
                "leave it out"
            )
        if max(numbers) > decoder.layers:
            raise InputError(
                f"the model has {decoder.layers} layers, fewer than {max(numbers)}; give fewer with --layers"
            )
        return [tuple(range(number)) for number in sorted(set(numbers))]
    first = {kind: decoder.layer_pattern.index(kind) for kind in range(len(decoder.layer_kinds))}
    base = tuple(sorted(first.values()))
    longer = []
    for kind, at in first.items():
        more = [layer for layer in range(at + 1, decoder.layers) if decoder.layer_pattern[layer] == kind]
        if more:
            longer.append(tuple(sorted((*base, more[0]))))
    return [base, *longer]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A batch on an engine that may be measured; its two times have the numbers `2 * index` and `2 * index + 1`."""

    layers: Layers
    configuration: ParallelConfig
    batch: Batch
    start_s: float
    case_s: float


def plan_profile(
    wanted: Wanted, parts: ComputedParts, *, budget_s: float | None = None, most: int | None = None
) -> ProfilePlan:
    """Return what to measure for estimates of a model.

    Args:
        wanted: the estimates.
        parts: computes them without measurements.
        budget_s: most seconds that it is expected to take; None for no limit.
        most: most batches to measure; None for no limit. Fewer are those that a longer plan measures first.

    Raises:
        InputError: the engine can run none of the configurations, or nothing can be measured within the budget.
    """
    configurations = list(wanted.configurations())
    if not configurations:
        formats = ", ".join(f"{weights}{'' if kv is KvType.NATIVE else f'+{kv}'}" for weights, kv in wanted.formats)
        raise InputError(
            f"{wanted.backend} can run {wanted.model.name} on {wanted.max_gpus} GPUs with none of {formats}"
        )
    batches = wanted.batches()
    targets = [
        computed
        for configuration, batch in product(configurations, batches)
        for computed in parts.times(wanted.model, configuration, batch)
    ]
    plans = [_planned(short, configurations, targets, parts, budget_s=budget_s, most=most) for short in _depths(wanted)]
    possible = [plan for plan in plans if plan.runs]
    if not possible:
        raise InputError(f"--budget-s {budget_s:g} is too little: the shortest measurement takes longer")
    chosen = min(possible, key=lambda plan: (max(plan.error_after, _ENOUGH), plan.expected_s))
    return msgspec.structs.replace(chosen, estimates=len(configurations) * len(batches))


def _depths(wanted: Wanted) -> list[Wanted]:
    """Return what is wanted with each choice of layers to measure with."""
    decoder = wanted.model.decoder
    pairs = [pair for pair in _DEPTHS if pair[-1] <= decoder.layers // 2 and wanted.fits(tuple(range(pair[-1])))]
    if wanted.layers is not None or len(decoder.layer_kinds) > 1 or not pairs:
        return [wanted]
    return [replace(wanted, layers=pair) for pair in pairs]


def _planned(
    wanted: Wanted,
    configurations: Sequence[ParallelConfig],
    targets: Sequence[Computed],
    parts: ComputedParts,
    *,
    budget_s: float | None,
    most: int | None,
) -> ProfilePlan:
    """Return the plan that measures with given layers; without runs where the budget is too small for any."""
    candidates = list(_candidates(wanted, parts, configurations, wanted.batches()))
    values = [computed for candidate in candidates for computed in _values(wanted, parts, candidate)]
    targets = targets[:: 1 + (len(values) + len(targets)) // _MAX_COVARIANCE]
    choice = _Choice(candidates, values, targets, budget_s=budget_s, most=most, noise=wanted.noise)
    chosen = choice.run()
    return ProfilePlan(
        runs=tuple(_runs(wanted.model.name, chosen)),
        error_before=choice.error_before,
        error_after=choice.error,
        estimates=0,
        ends=choice.ends,
    )


def plan_whole_model(wanted: Wanted, parts: ComputedParts) -> ProfilePlan:
    """Return the plan that measures the whole model in every configuration: what estimates are compared with."""
    layers = tuple(range(wanted.model.layers))
    configurations = list(wanted.configurations())
    batches = wanted.batches()
    chosen = [
        candidate
        for configuration in configurations
        for candidate in _on_engine(wanted, parts, layers, configuration, batches)
    ]
    return ProfilePlan(
        runs=tuple(_runs(wanted.model.name, chosen)),
        error_before=0.0,
        error_after=0.0,
        estimates=len(chosen),
        ends="everything is measured",
    )


def _candidates(
    wanted: Wanted, parts: ComputedParts, configurations: Sequence[ParallelConfig], batches: Sequence[Batch]
) -> Iterator[_Candidate]:
    for layers in short_models(wanted.model.decoder, wanted.layers):
        for configuration in configurations:
            # Stages of few layers mislead about longer ones (maveriq.estimate.blended): pipelines are not measured.
            if configuration.pp == 1:
                yield from _on_engine(wanted, parts, layers, configuration, batches)


def _on_engine(
    wanted: Wanted, parts: ComputedParts, layers: Layers, configuration: ParallelConfig, batches: Sequence[Batch]
) -> Iterator[_Candidate]:
    """Yield the batches that may be measured on one engine."""
    short = _short(wanted.model, layers)
    loaded_gb = parts.memory(short, configuration, Batch(1, 1, 1)).total / 1e9
    start_s = (_START_S.get(wanted.backend, _USUAL_START_S) + _START_S_PER_GB * loaded_gb) / wanted.starting
    for batch in batches:
        first, token = (computed.total for computed in parts.times(short, configuration, batch))
        case_s = (1 + wanted.repeats) * (first + (batch.output_tokens - 1) * token)
        yield _Candidate(layers, configuration, batch, start_s, case_s)


def _short(model: ModelSpec, layers: Layers) -> ModelSpec:
    return model if len(layers) == model.layers else with_layers(model, layers)


def _values(wanted: Wanted, parts: ComputedParts, candidate: _Candidate) -> tuple[Computed, Computed]:
    return parts.times(_short(wanted.model, candidate.layers), candidate.configuration, candidate.batch)


def best_first(values: Sequence[Computed], targets: Sequence[Computed], *, most: int) -> list[int]:
    """Return which of some values to measure, by number: those first that make estimates of the targets surest.

    Args:
        values: what may be measured, all at equal cost.
        targets: what is to be estimated.
        most: how many to return at most.
    """
    covariance, count = _prior_covariance([*values, *targets]), len(values)
    order: list[int] = []
    for _ in range(min(most, count)):
        variances = np.diagonal(covariance)[:count] + NOISE**2
        gains = np.sum(covariance[count:, :count] ** 2, axis=0) / variances
        gains[order] = -1.0
        order.append(int(np.argmax(gains)))
        covariance = _after(covariance, order[-1], NOISE)
    return order


def _prior_covariance(values: Sequence[Computed]) -> Array:
    """Return the covariance of values before anything is measured."""
    names = Names()
    design = Design(values, names)
    return Kernel(names, TIME_SCALES).covariance(design, design, design.shares(), design.shares())


def _after(covariance: Array, measured: int, noise: float) -> Array:
    """Return the covariance of values after one of them was measured."""
    column = covariance[:, measured]
    return np.asarray(covariance - np.outer(column, column) / (column[measured] + noise**2))


class _Choice:
    """Chooses candidates one after the other (mutable); the covariances of all values are kept up to date."""

    def __init__(
        self,
        candidates: Sequence[_Candidate],
        values: Sequence[Computed],
        targets: Sequence[Computed],
        *,
        budget_s: float | None,
        most: int | None,
        noise: float,
    ) -> None:
        self._candidates = candidates
        self._noise = noise
        self._covariance = _prior_covariance([*values, *targets])
        self._targets = slice(len(values), None)
        self._budget_s = np.inf if budget_s is None else budget_s
        self._most = len(candidates) if most is None else most
        self.error_before = self.error
        self.ends = ""

    @property
    def error(self) -> float:
        """The expected error of the wanted estimates."""
        return float(np.sqrt(np.mean(np.diagonal(self._covariance)[self._targets])))

    def run(self) -> list[_Candidate]:
        """Return the candidates to measure."""
        chosen: dict[int, _Candidate] = {}
        started: set[tuple[Layers, ParallelConfig]] = set()
        left_s = self._budget_s
        while self.error > _ENOUGH:
            costs_s = np.array([
                each.case_s + (0.0 if (each.layers, each.configuration) in started else each.start_s)
                for each in self._candidates
            ])  # fmt: skip
            gains = self._gains()
            open_ = np.array([number not in chosen for number in range(len(gains))])
            if len(chosen) >= self._most:
                self.ends = "no more batches may be measured"
                break
            worth = open_ & (gains > 2 * _LEAST_GAIN * self.error**2)
            if not worth.any():
                self.ends = f"no other measurement makes the error {_LEAST_GAIN:.0%} smaller"
                break
            affordable = worth & (costs_s <= left_s)
            if not affordable.any():
                self.ends = "the budget ends"
                break
            best = int(np.argmax(np.where(affordable, gains / costs_s, -1.0)))
            chosen[best] = self._candidates[best]
            started.add((chosen[best].layers, chosen[best].configuration))
            left_s -= float(costs_s[best])
            for value in (2 * best, 2 * best + 1):
                self._covariance = _after(self._covariance, value, self._noise)
        else:
            self.ends = f"the expected error is {_ENOUGH:.0%}"
        return list(chosen.values())

    def _gains(self) -> Array:
        """Return by how much each candidate makes the mean variance of the targets smaller, about."""
        count = 2 * len(self._candidates)
        with_targets = self._covariance[self._targets, :count]
        variances = np.diagonal(self._covariance)[:count] + self._noise**2
        gains = np.sum(with_targets**2, axis=0) / variances / len(with_targets)
        return np.asarray(gains.reshape(-1, 2).sum(axis=1))


def _runs(model: str, chosen: Sequence[_Candidate]) -> Iterator[PlannedRun]:
    """Yield the engines of a choice: those that differ in layers alone one after the other, short batches first."""
    engines: dict[tuple[Layers, ParallelConfig], list[_Candidate]] = {}
    for candidate in chosen:
        engines.setdefault((candidate.layers, candidate.configuration), []).append(candidate)
    order = list(WeightType)
    for layers, configuration in sorted(
        engines,
        key=lambda key: (order.index(key[1].weights), key[1].kv, key[1].tp, key[1].pp, len(key[0]), key[0]),
    ):
        cases = sorted(
            engines[layers, configuration], key=lambda case: (case.batch.size * case.batch.prompt_tokens, case.batch)
        )
        yield PlannedRun(
            model=model,
            layers=layers,
            tp=configuration.tp,
            pp=configuration.pp,
            weights=configuration.weights,
            kv=configuration.kv,
            cases=tuple(PlannedCase(*case.batch, expected_s=round(case.case_s, 3)) for case in cases),
            start_s=round(cases[0].start_s, 3),
        )
