"""Experiments on measured models: errors of the estimator, the cost of profiling. They need measured data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maveriq.errors import InputError
from maveriq.experiment.definition import Definition
from maveriq.experiment.results import write_files
from maveriq.report.formatting import NONE, figure, signed
from maveriq.report.view import Column, Table, Text, View, number_column, row, spaced
from maveriq.study.analyses import Compared, study_published
from maveriq.study.definition import PublishedFigure, read_definition
from maveriq.study.folder import STUDY_FILES, fill
from maveriq.study.result import StudyResult

FILES = (*STUDY_FILES, "experiment.json")
"""What an experiment on measured models writes."""

_UNEXPLAINED = "not explained"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredResult:
    """Published figures beside ours.

    Args:
        name: of the experiment.
        definition: the experiment.
        title: of the study.
        published: the published figures.
        study: what the study found, None where there are no measurements here.
        compared: its figures beside the published ones, () likewise.
        missing: why there are none, "" where there are.
    """

    name: str
    definition: Definition
    title: str
    published: Sequence[PublishedFigure]
    study: StudyResult | None
    compared: Sequence[Compared]
    missing: str = ""

    @property
    def verdict(self) -> str:
        """How many published figures come out as printed."""
        if self.study is None:
            return f"Not compared: {self.missing}. See `maveriq data status`."
        equal = sum(found.is_equal for found in self.compared)
        return f"{equal} of {len(self.compared)} published figures come out as printed."


def measured_result(name: str, definition: Definition, data: Path | None) -> MeasuredResult:
    """Carry out the study of an experiment on published measurements, where they are.

    Args:
        name: of the experiment.
        definition: the experiment, which names a study.
        data: the folder of measured data; None for MAVERIQ_DATA.
    """
    _, study = read_definition(definition.study)
    published = study.from_data.figures if study.from_data else ()
    try:
        found, compared = study_published(definition.study, study, data)
    except InputError as error:
        return MeasuredResult(
            name=name, definition=definition, title=study.title, published=published, study=None, compared=(),
            missing=str(error),
        )  # fmt: skip
    return MeasuredResult(
        name=name, definition=definition, title=study.title, published=published, study=found, compared=compared
    )


def to_json(result: MeasuredResult) -> dict[str, Any]:
    """Return a result in plain values."""
    ours = {found.published.figure: found for found in result.compared}
    return {
        "name": result.name,
        "title": result.definition.title,
        "question": result.definition.question,
        "source": result.definition.source,
        "verdict": result.verdict,
        "figures": [
            {
                "figure": published.figure,
                "what": published.what,
                "simulated": ours[published.figure].ours if published.figure in ours else None,
                "published": published.value,
                "difference": ours[published.figure].difference if published.figure in ours else None,
                "differs": published.figure in ours and not ours[published.figure].is_equal,
                "source": published.source,
                "why": published.why if published.figure in ours and not ours[published.figure].is_equal else "",
            }
            for published in result.published
        ],
        "improvements": [],
        "notes": list(result.study.notes) if result.study else [result.missing],
    }


def write(result: MeasuredResult, folder: Path, *, overwrite: bool) -> None:
    """Write the tables, the plots and the JSON of a result into a folder, each whole; without data the JSON alone.

    Raises:
        InputError: the folder cannot be written, or has a file that would change and `overwrite` is false.
    """
    contents = {"experiment.json": (json.dumps(to_json(result), indent=2, allow_nan=False) + "\n").encode()}
    if result.study is not None:
        with tempfile.TemporaryDirectory(prefix="maveriq-experiment-") as scratch:
            fill(Path(scratch), result.title, result.study, result.compared)
            contents |= {name: (Path(scratch) / name).read_bytes() for name in STUDY_FILES}
    write_files(folder, contents, overwrite=overwrite)


def view(result: MeasuredResult, *, width: int) -> View:  # noqa: ARG001 - as of other experiments
    """Return what the terminal shows of a result: published figures beside ours, and why they differ."""
    definition, ours = result.definition, {found.published.figure: found for found in result.compared}
    rows = []
    for published in result.published:
        found = ours.get(published.figure)
        difference = NONE if found is None else "as printed" if found.is_equal else signed(found.difference, "%")
        rows.append(row(published.what, figure(found.ours) if found else NONE, str(published.value), difference))
    columns = [
        Column("figure", wrap="words", min_width=20), number_column("ours"), number_column("published"),
        number_column("difference"),
    ]  # fmt: skip
    lines = [Text(line) for line in (*_reasons(result), f"Published: {definition.source}")]
    return View(
        spaced(
            [
                Text.of((definition.title, "bold"), f"\n{definition.question}"),
                Table("", columns, rows),
                Text(result.verdict, "bold"),
                *lines,
            ]
        )
    )


def _reasons(result: MeasuredResult) -> Iterator[str]:
    for found in result.compared:
        if not found.is_equal:
            what = f"{found.published.what} {signed(found.difference, '%')}"
            yield f"Differs: {what}. Why: {found.published.why or _UNEXPLAINED}."
