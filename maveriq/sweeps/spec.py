"""What a sweep varies: the grid and the samples of a sweep file, and the cells that they make.

A cell is one simulation. Its factors are the options that differ between cells, by name; all cells share the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np

from maveriq.compat import StrEnum
from maveriq.errors import InputError, UnknownNameError
from maveriq.scenario.defaults import choice
from maveriq.scenario.options import Options, options_from
from maveriq.sim.kernels import Kernel
from maveriq.streams import generator
from maveriq.tables import read_toml, readable_error

WHAT = "sweep"
"""What error messages call the file."""

SEED = "seed"
"""The factor over which results are averaged."""

MAX_CELLS = 100_000
_MAX_SAMPLES = 10_000
_KERNEL = "kernel"
_NOT_OF_OPTIONS = ("slo_ttft_ms", "slo_tpot_ms", _KERNEL)

SECONDS, POINTS = "ratio", "difference"

COMPARED: Mapping[str, str] = {
    "latency_mean_s": SECONDS,
    "latency_p95_s": SECONDS,
    "ttft_mean_s": SECONDS,
    "tpot_mean_s": SECONDS,
    "throughput_per_s": SECONDS,
    "cost_gib_s_mean": SECONDS,
    "gpu_hours": SECONDS,
    "slo_attainment": POINTS,
    "goodput": POINTS,
}
"""The figures that are compared: by their ratio, or shares by their difference."""

Value: TypeAlias = bool | int | float | str
_Values: TypeAlias = Annotated[list[Value], msgspec.Meta(min_length=1, max_length=10_000)]


class SampleMethod(StrEnum):
    """How values are drawn from ranges."""

    RANDOM = "random"
    LATIN_HYPERCUBE = "latin-hypercube"


class Draw(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What the values of one sampled factor are drawn from: `low` to `high`, or `values`.

    Whole `low` and `high` give whole numbers. `log` draws evenly over the logarithm.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    values: _Values | None = None

    def why_invalid(self) -> str | None:
        """Return what is wrong with it, None if nothing is."""
        if self.values is not None:
            extra = (self.low, self.high) != (None, None) or self.log
            return "gives both values and a range; keep one" if extra else None
        if self.low is None or self.high is None:
            return "needs low and high, or values"
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            return f"needs a low below its high, not {self.low} and {self.high}"
        if self.log and self.low <= 0:
            return f"draws over the logarithm, which needs a low above 0, not {self.low}"
        return None

    def at(self, quantiles: np.ndarray[Any, Any]) -> list[Value]:
        """Return the values at quantiles from 0 up to 1."""
        if self.values is not None:
            last = len(self.values) - 1
            return [self.values[min(last, int(quantile * (last + 1)))] for quantile in quantiles]
        low, high = self.low or 0, self.high or 0
        whole = isinstance(low, int) and isinstance(high, int)
        end = high + 1 if whole else high  # the last whole number is as likely as the others
        drawn = low * (end / low) ** quantiles if self.log else low + (end - low) * quantiles
        return [min(int(value), int(high)) if whole else float(value) for value in drawn]


class Sample(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`count` points drawn from the ranges `of` some factors; `seed` is of this draw alone."""

    count: Annotated[int, msgspec.Meta(ge=1, le=_MAX_SAMPLES)]
    of: dict[str, Draw]
    method: SampleMethod = SampleMethod.LATIN_HYPERCUBE
    seed: int = 1

    def points(self) -> list[dict[str, Value]]:
        """Return the values of the factors at each point."""
        columns = {}
        for name, draw in self.of.items():
            random = generator(self.seed, f"sweep-{name}")
            quantiles = random.random(self.count)
            if self.method is SampleMethod.LATIN_HYPERCUBE:  # one point in each of `count` equal strata
                quantiles = (random.permutation(self.count) + quantiles) / self.count
            columns[name] = draw.at(quantiles)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Contrast(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Which factor is compared, and the value that its others are compared with; "" is its first one."""

    factor: str
    baseline: Value = ""


class Answer(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What answers the question of a sweep: a figure of the compared factor's values, over all else that varies."""

    figure: str


class SweepSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A sweep as its file describes it; see docs/sweeps.md.

    `options` are of all cells. Each combination of the values in `grid`, with each point of `sample` and each entry of
    `runs`, is a cell. `runs` lists options that belong together.
    `question` is what the sweep was made to answer, in one sentence.
    """

    name: str
    question: str = ""
    options: dict[str, Any] = {}
    grid: dict[str, _Values] = {}
    sample: Sample | None = None
    runs: list[dict[str, Value]] = []
    compare: Contrast | None = None
    answer: Answer | None = None

    def factors(self) -> tuple[str, ...]:
        """Return the options that differ between cells: those of the grid, of the sample, and of the runs listed."""
        listed = dict.fromkeys(name for run in self.runs for name in run)
        return (*self.grid, *(self.sample.of if self.sample else ()), *listed)

    def contrast(self) -> Contrast | None:
        """Return what is compared: as the file says, else the policies if several are in the grid."""
        if self.compare is not None:
            return self.compare
        return Contrast(factor="policy") if len(self.grid.get("policy", ())) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One simulation of a sweep.

    Args:
        number: from 1, in the order of the file: the last factor of the grid changes fastest.
        factors: the values of the factors.
        options: all options that are given, the factors among them, as `maveriq.simulate` takes them.
    """

    number: int
    factors: Mapping[str, Value]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.factors.items()) or "the only one"


def read_sweep(source: Path | Mapping[str, Any]) -> SweepSpec:
    """Return a sweep from a TOML file, or from a mapping with the same keys.

    Raises:
        InputError: it cannot be read, or a key or a value in it is wrong.
    """
    if isinstance(source, Path):
        where = f"{WHAT} {str(source)!r}"
        spec = read_toml(source, SweepSpec, what=WHAT)
    else:
        where = WHAT
        try:
            spec = msgspec.convert({"name": WHAT, **source}, SweepSpec)
        except msgspec.ValidationError as error:
            raise InputError(f"{WHAT}: {readable_error(str(error), SweepSpec)}") from None
    try:
        _check(spec)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return spec


def _check(spec: SweepSpec) -> None:
    known = [*(field.name for field in fields(Options)), *_NOT_OF_OPTIONS]
    for name in (*spec.options, *spec.factors()):
        if "-" in name:
            raise InputError(f"{name} is spelled {name.replace('-', '_')} here")
        if name not in known:
            raise UnknownNameError("option", name, known)
    for name, values in spec.grid.items():
        if len({(type(value), value) for value in values}) < len(values):
            raise InputError(f"grid: {name} has a value twice")
    if spec.sample is not None:
        _check_sample(spec.sample)
    given = (*spec.options, *spec.factors())
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise InputError(f"{twice} is given twice: keep it in one of options, grid and sample")
    _check_contrast(spec)
    count = math.prod(map(len, spec.grid.values())) * (spec.sample.count if spec.sample else 1) * (len(spec.runs) or 1)
    if count > MAX_CELLS:
        raise InputError(f"these are {count:,} runs; a sweep has at most {MAX_CELLS:,}: give fewer values")


def _check_sample(sample: Sample) -> None:
    if not sample.of:
        raise InputError("sample: of names no factor; give one, such as of.rate = { low = 1.0, high = 9.0 }")
    for name, draw in sample.of.items():
        if fault := draw.why_invalid():
            raise InputError(f"sample: {name} {fault}")


def _check_contrast(spec: SweepSpec) -> None:
    if spec.answer is not None:
        if spec.contrast() is None:
            raise InputError("answer: nothing is compared; name a factor in compare")
        if spec.answer.figure not in COMPARED:
            raise UnknownNameError("figure of the answer", spec.answer.figure, COMPARED)
    if spec.compare is None:
        return
    if spec.compare.factor not in spec.grid:
        raise UnknownNameError("factor to compare", spec.compare.factor, spec.grid, "(of the grid)")
    values = spec.grid[spec.compare.factor]
    if spec.compare.baseline != "" and spec.compare.baseline not in values:
        raise InputError(f"compare: baseline {spec.compare.baseline!r} is not a value of {spec.compare.factor}")


def cells_of(spec: SweepSpec) -> list[Cell]:
    """Return the cells of a sweep, with every option checked as far as it can be before a run.

    Raises:
        InputError: a combination of options is invalid; the message names it.
    """
    cells = []
    for number, factors in enumerate(_combinations(spec), start=1):
        cell = Cell(number=number, factors=factors, options={**spec.options, **factors})
        try:
            choice(Kernel, _KERNEL, str(cell.options.get(_KERNEL, Kernel.AUTO)))
            options_from(Options, {name: v for name, v in cell.options.items() if name not in _NOT_OF_OPTIONS})
        except InputError as error:
            raise InputError(f"{WHAT} {spec.name!r}, run {number} ({cell}): {error}") from None
        cells.append(cell)
    return cells


def _combinations(spec: SweepSpec) -> Iterator[dict[str, Value]]:
    points: Sequence[dict[str, Value]] = spec.sample.points() if spec.sample else [{}]
    for values in itertools.product(*spec.grid.values()):
        for point in points:
            for run in spec.runs or [{}]:
                yield dict(zip(spec.grid, values, strict=True)) | point | run
