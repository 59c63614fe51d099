"""`maveriq experiment`: simulates the published evaluation, and compares it with what was published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.cli.output import echo
from maveriq.cli.sweep import show_progress
from maveriq.errors import InputError, MaveriqError
from maveriq.experiment import measured, results
from maveriq.experiment.definition import Catalog, Definition, points_of
from maveriq.experiment.evaluation import Evaluation
from maveriq.experiment.measured import MeasuredResult, measured_result
from maveriq.experiment.results import ExperimentResult, result_of
from maveriq.files import is_folder, measured_data_path
from maveriq.report.terminal import open_console
from maveriq.report.view import Column, Table, number_column, row
from maveriq.sweeps.run import LOCAL, make_pool

LIST, ALL = "list", "all"
_FOLDER = Path("evaluation")


def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME|all|list", help="An experiment, all, or `list` to list them.")],
    *,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; an interrupted experiment goes on in it.")
    ] = _FOLDER,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of recordings.", show_default="MAVERIQ_DATA")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes at once.", show_default="one a core")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")] = False,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Simulate tables and figures of the published evaluation, beside the published ones.

    Writes figures.csv, improvements.csv, plot.png, plot.svg and experiment.json
    to a folder for each experiment. Experiments share their runs, and an
    interrupted one goes on where it stopped.
    """
    catalog = Catalog()
    if name == LIST:
        _list(catalog, as_json=as_json)
        return
    if data is not None and not is_folder(data):
        raise InputError(f"--data: folder {str(data)!r} does not exist; name the folder of recordings, or leave it out")
    silent = quiet or as_json
    definitions = {each: catalog.read(each) for each in (catalog.names if name == ALL else [name])}
    find = _found_by(catalog, definitions, data or measured_data_path(), out, workers, overwrite, silent=silent)
    answers, failed = [], []
    for each, definition in definitions.items():
        try:
            result = find(each, definition)
            module = results if isinstance(result, ExperimentResult) else measured
            module.write(result, out / each, overwrite=overwrite)
        except InputError as error:  # the others go on
            failed.append(f"{each}: {error}")
            continue
        answers.append(module.to_json(result))
        if not silent:
            console = open_console()
            console.print(module.view(result, width=console.width))
            echo(f"results: {out / each}\n")
    if as_json:
        typer.echo(json.dumps(answers, indent=2, allow_nan=False))
    _report_failures(failed, of=len(definitions))


def _found_by(
    catalog: Catalog,
    definitions: Mapping[str, Definition],
    data: Path | None,
    out: Path,
    workers: int | None,
    overwrite: bool,  # noqa: FBT001 - as the option is
    *,
    silent: bool,
) -> Callable[[str, Definition], ExperimentResult | MeasuredResult]:
    """Simulate what the experiments need, and return what gives the result of each."""
    simulated = [definition for definition in definitions.values() if not definition.study]
    if not simulated:
        return lambda name, definition: measured_result(name, definition, data)
    evaluation = Evaluation(catalog)
    with make_pool(LOCAL, workers) as pool, show_progress(quiet=silent) as watch:
        runs = evaluation.simulate(simulated, out, pool=pool, overwrite=overwrite, watch=watch)
    recorded = evaluation.recorded(data)

    def find(name: str, definition: Definition) -> ExperimentResult | MeasuredResult:
        if definition.study:
            return measured_result(name, definition, data)
        return result_of(name, definition, evaluation.outcomes(definition, runs, recorded))

    return find


def _report_failures(failed: Sequence[str], *, of: int) -> None:
    if len(failed) == of:
        raise InputError(failed[0])
    if failed:
        raise MaveriqError(f"{len(failed)} of {of} experiments failed; {failed[0]}")


def _list(catalog: Catalog, *, as_json: bool) -> None:
    found = {name: catalog.read(name) for name in catalog.names}
    if as_json:
        answer = [
            {"name": name, "question": definition.question, "runs": len(list(points_of(definition)))}
            for name, definition in found.items()
        ]
        typer.echo(json.dumps(answer, indent=2))
        return
    rows = [row(name, str(len(list(points_of(of))) or "–"), of.question) for name, of in found.items()]
    columns = [Column("experiment"), number_column("runs"), Column("question", wrap="words")]
    open_console().print(Table("", columns, rows))
