"""The analyses that a study can name, and how one is carried out on measured runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.study import (
    batch_scaling,
    exponents,
    ground_truth,
    layer_scaling,
    parallelism,
    profiling_cost,
    pruning_effect,
    quantisation,
    uneven_splits,
)
from maveriq.study.definition import Definition, PublishedFigure
from maveriq.study.predictions import Predictions, predictions_of
from maveriq.study.result import StudyResult
from maveriq.study.runs import Runs, read_published

Analyse: TypeAlias = Callable[[Runs, Predictions, Mapping[str, Sequence[int]]], StudyResult]
"""From measured runs, what they are compared with, and options of the study."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What an analysis needs: parts of `Runs`, and options with their defaults."""

    run: Analyse
    parts: tuple[str, ...]
    options: Mapping[str, Sequence[int]] = field(default_factory=dict)


_JUDGED: Mapping[str, Sequence[int]] = MappingProxyType({"judged_output_tokens": (100,)})

ANALYSES: Mapping[str, Analysis] = MappingProxyType(
    {
        "batch-scaling": Analysis(run=batch_scaling.analyse, parts=("batched",)),
        "exponents": Analysis(
            run=exponents.analyse,
            parts=("full_models", "fingerprints"),
            options={"points_per_model": (5,), "seed": (42,)},
        ),
        "full-models": Analysis(run=ground_truth.analyse, parts=("full_models",), options=_JUDGED),
        "layer-scaling": Analysis(run=layer_scaling.analyse, parts=("layers",)),
        "parallelism": Analysis(run=parallelism.analyse, parts=("full_models",), options=_JUDGED),
        "profiling-cost": Analysis(run=profiling_cost.analyse, parts=("full_models", "fingerprints"), options=_JUDGED),
        "pruning": Analysis(run=pruning_effect.analyse, parts=("pruned", "full_models")),
        "quantisation": Analysis(run=quantisation.analyse, parts=("full_models",)),
        "uneven-splits": Analysis(run=uneven_splits.analyse, parts=("splits",)),
    }
)
"""The analyses by the name that a definition gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A published figure beside ours; `difference` is in percent of the published one."""

    published: PublishedFigure
    ours: float

    @property
    def difference(self) -> float:
        """Our figure, relative to the published one, in percent."""
        return 100 * (self.ours / self.published.value - 1)

    @property
    def is_equal(self) -> bool:
        """Whether ours is the published figure when it is rounded as that was."""
        return round(self.ours, self.published.decimals) == self.published.value


def check_definition(definition: Definition) -> Analysis:
    """Return the analysis of a definition.

    Raises:
        UnknownNameError: there is no such analysis, or it has no such option or part.
        InputError: a part of the measured runs is missing.
    """
    analysis = ANALYSES.get(definition.analysis)
    if analysis is None:
        raise UnknownNameError("analysis", definition.analysis, ANALYSES)
    measure = definition.measure
    for option in (*definition.options, *(measure.options if measure else ())):
        if option not in analysis.options:
            raise UnknownNameError(f"option of {definition.analysis}", option, analysis.options)
    for part in () if definition.from_data is None else definition.from_data.tables:
        if part not in analysis.parts:
            raise UnknownNameError(f"table of {definition.analysis}", part, analysis.parts)
    return analysis


def study_published(name: str, definition: Definition, data: Path | None) -> tuple[StudyResult, tuple[Compared, ...]]:
    """Carry out a study on published measurements, and compare its figures with published ones.

    Args:
        name: of the study, for messages.
        definition: what to do.
        data: the folder of measured data; None takes MAVERIQ_DATA.

    Raises:
        InputError: no published measurements answer this study, or they are not there.
    """
    analysis = check_definition(definition)
    if definition.from_data is None:
        raise InputError(f"study {name}: no published measurements answer it; leave --from-data out to measure here")
    absent = [part for part in analysis.parts if part not in definition.from_data.tables]
    if absent:
        raise InputError(f"study {name}: its [from_data.tables] lack {', '.join(absent)}; add them")
    runs = read_published(definition.from_data.tables, data)
    predictions = predictions_of(load_profile(definition.from_data.profile))
    result = analysis.run(runs, predictions, {**analysis.options, **definition.options})
    for published in definition.from_data.figures:
        if published.figure not in result.figures:
            raise UnknownNameError(f"figure of study {name}", published.figure, result.figures)
    compared = tuple(
        Compared(published=published, ours=result.figures[published.figure])
        for published in definition.from_data.figures
    )
    return result, compared
