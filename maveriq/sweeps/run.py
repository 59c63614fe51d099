"""Runs a sweep: cells that are not finished go to workers, and what comes back is kept and tabulated."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from maveriq.errors import InputError
from maveriq.files import as_path
from maveriq.sweeps.folder import RUNS_FOLDER, open_folder, read_folder
from maveriq.sweeps.local_pool import LocalPool
from maveriq.sweeps.spec import Cell, SweepSpec, cells_of, read_sweep
from maveriq.sweeps.tables import cells_table, compare_values, over_seeds, write_tables
from maveriq.sweeps.worker import CellResult, CellTask

if TYPE_CHECKING:
    import pandas as pd

LOCAL = "local"


class Pool(Protocol):
    """Simulates cells somewhere; entered before its first use, and left after the last."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def results(self, tasks: Iterable[CellTask]) -> Iterator[CellResult]:
        """Yield the results as they come; stop the work when the caller stops asking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepProgress:
    """How far a sweep is.

    Args:
        cells: how many it has.
        resumed: how many were finished before it started.
        finished: how many of the others are.
        last: the cell that has just ended, None at the start.
        result: what became of it.
    """

    cells: int
    resumed: int
    finished: int
    last: Cell | None = None
    result: CellResult | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """What a sweep found.

    Args:
        spec: the sweep.
        cells: a row for each cell and model, see `cells_table`.
        seeds: means over seeds, see `over_seeds`.
        comparison: values of a factor compared, see `compare_values`; empty where nothing is.
        failed: the cells that could not be simulated, with the reason.
    """

    spec: SweepSpec
    cells: pd.DataFrame
    seeds: pd.DataFrame
    comparison: pd.DataFrame
    failed: tuple[tuple[Cell, str], ...]

    def to_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a report of the sweep as one HTML file that loads nothing, and return where it is.

        Args:
            path: the file to write.
            overwrite: replace a file that is there.

        Raises:
            InputError: the file is there already and `overwrite` is false, or it cannot be written.
            MaveriqError: the extra `maveriq[report]` is not installed; the disk is full.
        """
        from maveriq.report.page.render import write_page
        from maveriq.sweeps.page import sweep_page

        return write_page(sweep_page(self, name=self.spec.name), path, overwrite=overwrite)


def sweep(
    source: str | Path | Mapping[str, Any],
    /,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    on: str = LOCAL,
    keep_runs: bool = False,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Simulate every cell of a sweep, as `maveriq sweep` does, and return one tidy table.

    Args:
        source: the path of a TOML file, or its keys and values: `{"options": {...}, "grid": {"scale": [0.1, 0.2]}}`.
        out: the folder of results, in which an interrupted sweep goes on; None keeps nothing.
        workers: how many processes; None for one a core.
        on: `local`, `ray` (a cluster on this machine), or the address of a Ray cluster.
        keep_runs: also keep the run folder of each cell, in `out`/runs.
        overwrite: start anew if `out` holds a sweep.

    Returns:
        A row for each cell and model: `run`, the factors, `model` ("all" for the whole run), `saturation`, `error`, and
        the figures of `Run.metrics`.

    Raises:
        InputError: the sweep, an option or the folder cannot be used.
    """
    spec = read_sweep(Path(source) if isinstance(source, str) else source)
    folder = None if out is None else Path(out)
    with make_pool(on, workers) as pool:
        return run_sweep(spec, folder, pool=pool, keep_runs=keep_runs, overwrite=overwrite).cells


def make_pool(on: str, workers: int | None) -> Pool:
    """Return where the cells are simulated; see `sweep`.

    Raises:
        InputError: fewer than one worker; Ray is not installed, or cannot be reached.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    if on == LOCAL:
        return LocalPool(workers or len(os.sched_getaffinity(0)))
    from maveriq.sweeps.ray_pool import RayPool

    return RayPool(on, workers)


def run_sweep(
    spec: SweepSpec,
    folder: Path | None,
    *,
    pool: Pool,
    only: Collection[int] | None = None,
    keep_runs: bool = False,
    overwrite: bool = False,
    watch: Callable[[SweepProgress], None] = lambda _: None,
) -> SweepResult:
    """Simulate the cells of a sweep that its folder does not have yet.

    Args:
        spec: the sweep.
        folder: of the results; None keeps nothing.
        pool: simulates cells.
        only: numbers of the cells to simulate; None for all. The result has those of earlier calls too.
        keep_runs: keep the run folder of each cell.
        overwrite: start anew if the folder holds a sweep.
        watch: is called at the start and after each cell.

    Raises:
        InputError: a combination of options is invalid, or the folder cannot be used. A cell that fails raises nothing.
        KeyboardInterrupt: as it arrives; finished cells are in the folder, and the next call goes on from there.
    """
    cells = cells_of(spec)
    if keep_runs and folder is None:
        raise InputError("keep_runs needs out, the folder to keep them in")
    with ExitStack() as stack:
        path = folder if folder is not None else Path(stack.enter_context(tempfile.TemporaryDirectory("-sweep")))
        opened = stack.enter_context(open_folder(path, spec, overwrite=overwrite))
        results = dict(opened.finished)
        wanted = cells if only is None else [cell for cell in cells if cell.number in only]
        todo = [cell for cell in wanted if cell.number not in results]
        runs = path.absolute() / RUNS_FOLDER if keep_runs else None
        by_number = {cell.number: cell for cell in cells}
        resumed = len(wanted) - len(todo)
        watch(SweepProgress(cells=len(wanted), resumed=resumed, finished=0))
        tasks = [
            CellTask(
                number=cell.number, options=dict(cell.options), folder=str(runs / f"{cell.number:05d}") if runs else ""
            )
            for cell in todo
        ]
        for finished, result in enumerate(pool.results(tasks), start=1):
            opened.add(result)
            results[result.number] = result
            watch(
                SweepProgress(
                    cells=len(wanted), resumed=resumed, finished=finished, last=by_number[result.number], result=result
                )
            )
        found = _tabulated(spec, cells, results)
        if folder is not None:
            write_tables(path, found.cells, found.seeds, found.comparison)
    return found


def load_sweep(path: str | Path) -> SweepResult:
    """Return what a sweep has found so far, from its folder; a sweep may be writing to it.

    Raises:
        InputError: the folder holds no sweep, or its files are damaged.
    """
    spec, results = read_folder(as_path(path, "path"))
    return _tabulated(spec, cells_of(spec), results)


def _tabulated(spec: SweepSpec, cells: list[Cell], results: Mapping[int, CellResult]) -> SweepResult:
    import pandas as pd

    factors, contrast = spec.factors(), spec.contrast()
    table = cells_table(cells, results, factors)
    return SweepResult(
        spec=spec,
        cells=table,
        seeds=over_seeds(table, factors),
        comparison=pd.DataFrame() if contrast is None else compare_values(table, factors, contrast),
        failed=tuple((cell, result.error) for cell in cells if (result := results.get(cell.number)) and result.error),
    )
