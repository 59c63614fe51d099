"""`maveriq data`: says which public data is here, and where the rest comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import JsonFlag
from maveriq.errors import InputError
from maveriq.experiment.data_sets import DataSetStatus, FileState, status_of
from maveriq.files import is_folder, measured_data_path
from maveriq.report.terminal import open_console
from maveriq.report.view import Column, Part, Table, Text, View, number_column, row, spaced

app = typer.Typer(rich_markup_mode=None, help="Say which public data is here, and where the rest comes from.")


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context) -> None:
    """Say which public data is here, and where the rest comes from."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def status(
    *,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of measured data.", show_default="MAVERIQ_DATA")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the public data that maveriq can read: what is here, what is missing, and how to get it.

    Files are compared by their SHA-256. maveriq works without them: they are
    measurements that it is compared with.
    """
    if data is not None and not is_folder(data):
        raise InputError(f"--data: folder {str(data)!r} does not exist; name another, or leave it out")
    folder = data or measured_data_path()
    found = status_of(folder)
    if as_json:
        typer.echo(json.dumps([_as_json(each) for each in found], indent=2))
        return
    parts: list[Part] = [_table(found), Text(f"folder: {folder}" if folder else "MAVERIQ_DATA names no folder")]
    parts += [Text("\n".join(_how_to_get(each))) for each in found if not each.is_complete]
    open_console().print(View(spaced(parts)))


def _table(found: list[DataSetStatus]) -> Table:
    columns = [
        Column("data set"), Column("what", wrap="words", min_width=24), number_column("found"),
        number_column("other\ncontent"), number_column("missing"),
    ]  # fmt: skip
    rows = [
        row(
            each.name,
            each.data_set.what,
            *(str(each.count(state)) for state in (FileState.FOUND, FileState.OTHER, FileState.MISSING)),
        )
        for each in found
    ]
    return Table("Public data, files", columns, rows)


def _how_to_get(found: DataSetStatus) -> Iterator[str]:
    data_set = found.data_set
    commit = f"commit {data_set.commit}" if data_set.commit else "no commit noted"
    yield f"{found.name}: {data_set.repository}, {data_set.where} ({commit}, licence {data_set.licence})"
    yield f"  read by: {data_set.used_by}"
    for file in found.files:
        if file.state is FileState.MISSING:
            yield f"  missing: {file.path}, {file.size_bytes:,} bytes, sha256 {file.sha256}"
    if data_set.note:
        yield f"  {data_set.note}"
    yield from (f"    {line}" for line in data_set.unpack.strip().splitlines())


def _as_json(found: DataSetStatus) -> dict[str, object]:
    data_set = found.data_set
    return {
        "name": found.name,
        "what": data_set.what,
        "used_by": data_set.used_by,
        "repository": data_set.repository,
        "commit": data_set.commit or None,
        "where": data_set.where,
        "licence": data_set.licence,
        "note": data_set.note,
        "unpack": data_set.unpack.strip().splitlines(),
        "complete": found.is_complete,
        "files": [
            {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256, "state": file.state.value}
            for file in found.files
        ],
    }
