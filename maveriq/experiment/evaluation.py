"""Simulates the points of experiments in one sweep that all experiments share, and pairs each with its recording.

The sweep's cells are the distinct points of all experiments. So what one experiment has simulated no other simulates
again, and an interrupted one goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maveriq.errors import InputError
from maveriq.estimate.calibration_file import online_by_excluded_run, require
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.experiment.definition import Catalog, Definition, Key, Point, points_of
from maveriq.experiment.recorded import Recorded, recorded_runs, shipped_runs
from maveriq.sweeps.run import Pool, SweepProgress, SweepResult, run_sweep
from maveriq.sweeps.spec import SweepSpec, Value
from maveriq.sweeps.tables import ALL

PROFILE = "a6000-short"
"""The hardware profile of the published testbed."""

RUNS_FOLDER = "runs"
"""The folder of the sweep, in the folder of results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A point that was simulated, beside its recording.

    Args:
        point: the system and the load.
        figures: simulated, by the names of `maveriq.experiment.measures`; one that does not apply is missing.
        saturation: of the simulation.
        recorded: the recorded run, None where there is none.
        blind: its service times are from a fit that left the recording out.
    """

    point: Point
    figures: Mapping[str, float]
    saturation: str
    recorded: Recorded | None
    blind: bool

    def published(self, name: str) -> float | None:
        """Return a figure of the recording, None where there is none."""
        if self.recorded is None:
            return None
        figures = self.recorded.figures
        if name == "completed_share":
            completed, requests = figures["completed"], figures["requests"]
            return None if completed is None or not requests else completed / requests
        return figures.get(name)


class Evaluation:
    """All points of the experiments that come with maveriq, as one sweep."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.profile: HardwareProfile = load_profile(PROFILE)
        in_fit = online_by_excluded_run(require(self.profile.calibrated, self.profile.name))
        self._excluded: dict[Key, str] = {run.key: run.run for run in shipped_runs() if run.run in in_fit}
        self._number: dict[Point, int] = {}
        distinct: dict[tuple[tuple[str, Value], ...], int] = {}
        runs: list[dict[str, Value]] = []
        for name in catalog.names:
            for point in points_of(catalog.read(name)):
                options = self._options(point)
                identity = tuple(sorted(options.items()))
                if identity not in distinct:
                    runs.append(options)
                    distinct[identity] = len(runs)
                self._number[point] = distinct[identity]
        self.spec = SweepSpec(name="published evaluation", options=dict(catalog.shared.options), runs=runs)

    def _options(self, point: Point) -> dict[str, Value]:
        options = self.catalog.options(point)
        key = self.catalog.key(point)
        if key is not None and key in self._excluded:
            options["exclude_run"] = self._excluded[key]
        return options

    def numbers(self, points: Iterable[Point]) -> set[int]:
        """Return the numbers of the sweep's cells that simulate these points."""
        return {self._number[point] for point in points}

    def simulate(
        self,
        definitions: Iterable[Definition],
        folder: Path,
        *,
        pool: Pool,
        overwrite: bool = False,
        watch: Callable[[SweepProgress], None] = lambda _: None,
    ) -> SweepResult:
        """Simulate the points of experiments that the folder does not have yet.

        With `overwrite`, runs of another version or of other experiments make room; those of this evaluation stay.

        Raises:
            InputError: the folder cannot be used, see `run_sweep`.
        """
        only = self.numbers(point for definition in definitions for point in points_of(definition))
        run = partial(run_sweep, self.spec, folder / RUNS_FOLDER, pool=pool, only=only, watch=watch)
        try:
            return run()
        except InputError:
            if not overwrite:
                raise
            return run(overwrite=True)

    def recorded(self, data: Path | None) -> Mapping[Key, Recorded]:
        """Return the recorded runs, see `recorded_runs`."""
        return recorded_runs(data, self.profile)

    def outcomes(
        self, definition: Definition, result: SweepResult, recorded: Mapping[Key, Recorded]
    ) -> Sequence[Outcome]:
        """Return the points of an experiment with their figures and recordings.

        Raises:
            InputError: one could not be simulated.
        """
        failed = {cell.number: reason for cell, reason in result.failed}
        whole = result.cells[result.cells["model"] == ALL].set_index("run")
        rows = whole.to_dict("index")
        found = []
        for point in points_of(definition):
            number = self._number[point]
            if number in failed:
                raise InputError(f"{point}: {failed[number]}")
            row = rows[number]
            figures = {
                str(name): float(value)
                for name, value in row.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
            }
            figures["completed_share"] = figures["completed"] / figures["requests"]
            key = self.catalog.key(point)
            found.append(
                Outcome(
                    point=point,
                    figures=figures,
                    saturation=str(row["saturation"]),
                    recorded=None if key is None else recorded.get(key),
                    blind=key in self._excluded,
                )
            )
        return found
