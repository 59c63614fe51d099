"""`maveriq study`: carries out a study on published measurements or on this machine's engines."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.domain.models import ModelSpec, config_path, load_model
from maveriq.errors import InputError
from maveriq.exec.local_machine import EMULATED, LocalMachine
from maveriq.exec.model_files import hf_config_json
from maveriq.report.formatting import figure as shown
from maveriq.report.formatting import signed
from maveriq.report.run_folder import check_writable
from maveriq.report.terminal import open_console
from maveriq.report.view import Cell, Column, Table, number_column, row
from maveriq.study.analyses import Compared, study_published
from maveriq.study.bench import Bench
from maveriq.study.definition import Definition, known_studies, read_definition
from maveriq.study.folder import STUDY_FILES, fill, write_study
from maveriq.study.grid import SMALL_MODEL
from maveriq.study.measured import Plan, plan_of, study_measured
from maveriq.study.measurement_log import LOG_NAME
from maveriq.study.result import StudyResult

LIST = "list"

_REPEATS = 3
_MIN_WIDTH = 8  # of a column of text; numbers are never cut


def study(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE.toml|list", help="A study, or `list` to list them.")],
    *,
    from_data: Annotated[bool, typer.Option("--from-data", help="Take published measurements.")] = False,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder of them.", show_default="MAVERIQ_DATA")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name, or path of config.json.", show_default="a small llama")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="torch|vllm|trtllm", help="The engine.", show_default="torch")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Repetitions of each measurement.", show_default="3")
    ] = None,
    engine_python: Annotated[
        list[str] | None, typer.Option(metavar="ENGINE=PATH", help="The interpreter that runs the engine; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be measured.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="studies/NAME")] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Study how models scale, and what measuring them costs.

    Measures on this machine's engines, or takes published measurements.
    Leaves a table (CSV) and a plot (PNG and SVG), and compares its figures
    with published ones where there are any. An interrupted study goes on
    when the same command runs again.
    """
    if name == LIST:
        _list(as_json=as_json)
        return
    name, definition = read_definition(name)
    compared: Sequence[Compared] = ()
    if from_data:
        if dry_run or (model, backend, repeats, engine_python) != (None, None, None, None):
            raise InputError(
                "--from-data measures nothing; leave --model, --backend, --repeats, --engine-python and --dry-run out"
            )
        folder = out or Path("studies") / f"{name}-from-data"
        if (folder / LOG_NAME).exists():
            raise InputError(f"folder {str(folder)!r} has measurements of a study; name another with --out")
        check_writable(folder, files=STUDY_FILES, overwrite=overwrite)
        result, compared = study_published(name, definition, data)
        folder = write_study(folder, definition.title, result, compared, overwrite=overwrite)
    else:
        if data is not None:
            raise InputError("--data names published measurements; give --from-data, or leave --data out")
        folder = out or Path("studies") / name
        job = _Job(
            name=name,
            definition=definition,
            model=model or "",
            backend=backend or "torch",
            repeats=repeats or _REPEATS,
            engine_python=tuple(engine_python or ()),
        )
        measured = _measured(job, folder, dry_run=dry_run, overwrite=overwrite)
        if isinstance(measured, Plan):
            _show_plan(name, measured, as_json=as_json)
            return
        result = measured
        fill(folder, definition.title, result, ())
    if as_json:
        typer.echo(json.dumps(_as_json(folder, result, compared), indent=2, allow_nan=False))
        return
    _show(folder, definition.title, result, compared)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    name: str
    definition: Definition
    model: str
    backend: str
    repeats: int
    engine_python: tuple[str, ...]


def _measured(job: _Job, folder: Path, *, dry_run: bool, overwrite: bool) -> StudyResult | Plan:
    """Measure a study, or with `dry_run` return what would be measured.

    Raises:
        InputError: the folder holds something else, or the study cannot be measured here.
    """
    if job.backend == EMULATED:
        raise InputError("an emulated engine takes the estimated time; there is nothing to measure")
    console = open_console(stderr=True)

    def report(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with (
        contextlib.closing(LocalMachine(job.backend, job.engine_python)) as local,
        tempfile.TemporaryDirectory(prefix="maveriq-study-") as scratch,
    ):
        model, config_path = _model(job.model, Path(scratch))
        bench = Bench(
            local=local, model=model, config_path=config_path, scratch=Path(scratch), repeats=job.repeats, report=report
        )
        plan = plan_of(job.name, job.definition, bench)
        if dry_run:
            return plan
        _prepare(folder, overwrite=overwrite)
        return study_measured(job.name, job.definition, bench, folder)


def _show_plan(name: str, plan: Plan, *, as_json: bool) -> None:
    counts = {part: (len({point.engine for point in points}), len(points)) for part, points in plan.points.items()}
    if as_json:
        parts = [
            {"part": part, "engines": engines, "measurements": points} for part, (engines, points) in counts.items()
        ]
        typer.echo(json.dumps({"engines": plan.engines, "parts": parts, "notes": list(plan.notes())}, indent=2))
        return
    console = open_console()
    columns = [Column("part"), number_column("engines"), number_column("measurements")]
    rows = [row(part, str(engines), str(points)) for part, (engines, points) in counts.items()]
    console.print(Table(f"{name}: {plan.engines} engines", columns, rows))
    for line in plan.notes():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _prepare(folder: Path, *, overwrite: bool) -> None:
    """Check that a study may be written to a folder: a new or empty one, or that of a study to go on with."""
    if overwrite and (folder / LOG_NAME).is_file():
        for name in (LOG_NAME, *STUDY_FILES):
            (folder / name).unlink(missing_ok=True)
    if not (folder / LOG_NAME).is_file():
        check_writable(folder, files=STUDY_FILES, overwrite=overwrite)


def _model(name: str, scratch: Path) -> tuple[ModelSpec, Path]:
    """Return the model to measure and its `config.json`; a known model and the small one get a file."""
    if not name:
        written = scratch / SMALL_MODEL["_name_or_path"] / "config.json"
        written.parent.mkdir()
        written.write_text(json.dumps(dict(SMALL_MODEL)), encoding="utf-8")
        return load_model(str(written)), written
    model = load_model(name)
    if model.config_json:
        return model, config_path(Path(name)).resolve()
    written = scratch / model.name / "config.json"
    written.parent.mkdir()
    written.write_text(hf_config_json(model), encoding="utf-8")
    return model, written


def _list(*, as_json: bool) -> None:
    studies = {name: read_definition(name)[1] for name in known_studies()}
    if as_json:
        answer = [
            {
                "name": name,
                "question": found.question,
                "from_data": found.from_data is not None,
                "measures": found.measure is not None,
            }
            for name, found in studies.items()
        ]
        typer.echo(json.dumps(answer, indent=2))
        return
    rows = [row(name, definition.question) for name, definition in studies.items()]
    open_console().print(Table("", [Column("study"), Column("question", wrap="words")], rows))


def _as_json(folder: Path, result: StudyResult, compared: Sequence[Compared]) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "rows": [dict(zip(result.table.columns, cells, strict=True)) for cells in result.table.rows],
        "figures": dict(result.figures),
        "published": [
            {
                "figure": found.published.figure,
                "ours": found.ours,
                "published": found.published.value,
                "equal_as_printed": found.is_equal,
                "difference_percent": found.difference,
                "source": found.published.source,
                "why": found.published.why,
            }
            for found in compared
        ],
        "notes": list(result.notes),
    }


def _show(folder: Path, title: str, result: StudyResult, compared: Sequence[Compared]) -> None:
    console = open_console()
    columns = [_column(index, result) for index in range(len(result.table.columns))]
    console.print(Table(title, columns, [row(*map(_cell, cells)) for cells in result.table.rows], dense=True))
    if compared:
        headers = [Column("figure"), number_column("ours"), number_column("published"), number_column("difference")]
        console.print(Table("Beside published figures", headers, [row(*_compared(found)) for found in compared]))
    for line in (*_reasons(compared), *result.notes, f"results: {folder}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _column(index: int, result: StudyResult) -> Column:
    header = result.table.columns[index].replace("_", "\n")
    if any(isinstance(cells[index], str) for cells in result.table.rows):
        return Column(header, wrap="words", min_width=_MIN_WIDTH)
    return number_column(header)


def _cell(cell: str | float | None) -> Cell:
    if isinstance(cell, float):
        return shown(cell)
    return "" if cell is None else str(cell)


def _compared(found: Compared) -> tuple[Cell, ...]:
    difference = "as printed" if found.is_equal else signed(found.difference, "%")
    return found.published.figure, shown(found.ours), str(found.published.value), difference


def _reasons(compared: Sequence[Compared]) -> Iterator[str]:
    for found in compared:
        if not found.is_equal and found.published.why:
            yield f"{found.published.figure}: {found.published.why}"
