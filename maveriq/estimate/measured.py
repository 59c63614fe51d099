"""The estimator that interpolates measurements of whole models, taken on the engines that will serve them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, InvariantError
from maveriq.estimate.estimator import Basis, ServiceEstimate, check_estimable
from maveriq.estimate.fingerprints import read_config
from maveriq.estimate.hardware_profile import HardwareProfile, ModelConfig
from maveriq.tables import Row, read_csv, unique
from maveriq.units import Bytes, bytes_from_gib

COLUMNS = ("model", "weights", "kv", "tp", "pp", "batch", "prompt_tokens", "ttft_s", "tpot_s", "memory_gib")
"""Columns of a table of measurements. `ttft_s` is the time at zero output tokens (the first token comes at
`ttft_s + tpot_s`, as everywhere in maveriq); `memory_gib` is over all GPUs."""

OPTIONAL_COLUMNS = ("output_tokens", "layers")
"""Columns that such a table may also have: tokens of an output, which `maveriq fit` needs, and the layers of the model,
fewer than its own where it was cut. The estimator does not use them."""

_MAX_VALUE = 1e6


class _Point(NamedTuple):
    batch: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A measurement at one batch size and prompt length."""

    ttft_s: float
    tpot_s: float
    memory_gib: float


class MeasuredEstimator:
    """Estimates only configurations in the profile's table of measurements.

    It interpolates linearly between measured prompt lengths and batch sizes, and extrapolates beyond them.
    """

    def __init__(self, profile: HardwareProfile) -> None:
        """Read the profile's measurements.

        Raises:
            InputError: the profile has none, or the table is invalid.
        """
        if profile.measured is None:
            raise InputError(
                f"profile {profile.name!r} has no table of measurements; name one as `measured` under [tables] of its "
                "hardware description, or choose another estimator"
            )
        self._profile = profile
        self._measured = _read(profile.measured)

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""
        return "measured"

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated or run here, None if it can."""
        other = self._profile.why_other_model(model) or model.why_not_stored_as(configuration.weights)
        if other is not None:
            return other
        points = self._points(model, configuration)
        if points is None:
            return f"never measured ({self._measured_configurations(model)})"
        if configuration.batch_size > max(point.batch for point in points):
            return f"never measured with batches of {configuration.batch_size} or more"
        if not self._profile.supports(model.name, configuration):
            return f"known not to run on {self._profile.gpu_kind}"
        return None

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine.

        Raises:
            InputError: the configuration was never measured.
        """
        points = self._required_points(model, configuration)
        ttft_s = _at(points, batch, prompt_tokens, "ttft_s")
        tpot_s = _at(points, batch, prompt_tokens, "tpot_s")
        return ServiceEstimate(ttft_s=ttft_s, tpot_s=tpot_s, output_tokens=output_tokens, basis=Basis.MEASURED)

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Return the largest measured memory over all GPUs, at the configuration's batch size or the next larger one.

        Raises:
            InputError: the configuration was never measured.
        """
        points = self._required_points(model, configuration)
        batch = min(point.batch for point in points if point.batch >= configuration.batch_size)
        return bytes_from_gib(max(figures.memory_gib for point, figures in points.items() if point.batch == batch))

    def _points(self, model: ModelSpec, configuration: ParallelConfig) -> Mapping[_Point, _Measured] | None:
        return self._measured.get((model.name, configuration.at(configuration.tp, configuration.pp)))

    def _required_points(self, model: ModelSpec, configuration: ParallelConfig) -> Mapping[_Point, _Measured]:
        check_estimable(self, model, configuration)
        points = self._points(model, configuration)
        if points is None:
            raise InvariantError(f"why_not lets {model.name} with {configuration} pass, which was never measured")
        return points

    def _measured_configurations(self, model: ModelSpec) -> str:
        measured = [configuration for name, configuration in self._measured if name == model.name]
        if not measured:
            models = ", ".join(dict.fromkeys(name for name, _ in self._measured))
            return f"profile {self._profile.name} has measurements of {models}"
        return f"{len(measured)} other configurations of it were, such as {measured[0]}"


def _read(path: Path) -> dict[ModelConfig, dict[_Point, _Measured]]:
    table = read_csv(path, COLUMNS, what="table of measurements", optional=OPTIONAL_COLUMNS)
    rows = unique((_key(row), _figures(row), row) for row in table)
    measured: dict[ModelConfig, dict[_Point, _Measured]] = {}
    for (key, point), figures in rows.items():
        measured.setdefault(key, {})[point] = figures
    return measured


def _key(row: Row) -> tuple[ModelConfig, _Point]:
    point = _Point(row.count("batch", minimum=1), row.count("prompt_tokens", minimum=1))
    return (row.text("model"), read_config(row)), point


def _figures(row: Row) -> _Measured:
    return _Measured(
        ttft_s=row.number("ttft_s", minimum=-_MAX_VALUE, maximum=_MAX_VALUE),
        tpot_s=row.number("tpot_s", minimum=0, maximum=_MAX_VALUE),
        memory_gib=row.number("memory_gib", minimum=1e-6, maximum=_MAX_VALUE),
    )


def _at(measured: Mapping[_Point, _Measured], batch: int, prompt_tokens: int, figure: str) -> float:
    """Return a figure at a batch size and prompt length, interpolated over prompt lengths, then batch sizes."""
    points = sorted((point.batch, point.prompt_tokens, getattr(figures, figure)) for point, figures in measured.items())
    along_prompts = {
        size: _line([(prompt, value) for _, prompt, value in group], prompt_tokens)
        for size, group in groupby(points, key=itemgetter(0))
    }
    return _line(sorted(along_prompts.items()), batch)


def _line(known: Sequence[tuple[int, float]], at: int) -> float:
    """Return the value at `at` on the piecewise linear function through the known points.

    Beyond the ends it is extrapolated linearly and clamped at zero. A falling end is noise, and
    extrapolating it would go below zero; there the last known value is kept.
    """
    if len(known) == 1:
        return known[0][1]
    right = min(max(1, bisect_left(known, at, key=itemgetter(0))), len(known) - 1)
    (x0, y0), (x1, y1) = known[right - 1], known[right]
    if y1 < y0:
        at = min(max(at, x0), x1)
    value = y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return max(value, min(0.0, y0)) if at < x0 else value
