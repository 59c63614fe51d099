"""`maveriq accuracy`: measures what weight formats cost a model in accuracy."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import OverwriteFlag, complete_model
from maveriq.domain.models import KvType, ModelSpec, WeightType, config_path, load_model
from maveriq.domain.parallel import ParallelConfig, format_of
from maveriq.errors import InputError
from maveriq.exec.capabilities import why_not
from maveriq.exec.device import Device
from maveriq.exec.model_files import ModelFiles
from maveriq.files import check_file_writable, written_whole
from maveriq.input_files import read_text
from maveriq.profiling.accuracy import (
    ACCURACY_COLUMNS,
    Measure,
    RelativeAccuracy,
    Sample,
    accuracy_rows,
    question_samples,
    relative_accuracy,
    scores_of,
    text_samples,
)
from maveriq.profiling.questions import Question, read_questions
from maveriq.profiling.torch_scorer import TorchScorer
from maveriq.report.terminal import open_console
from maveriq.report.view import Column, Table, number_column, row
from maveriq.serve.tokenizer_worker import ModelTokenizer
from maveriq.text import protect_cell

_FLOAT16 = (WeightType.FLOAT16, KvType.NATIVE)
_BACKENDS = ("torch",)


def accuracy(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The path of a Hugging Face folder, with tokenizer.json.",
            autocompletion=complete_model,
        ),
    ],
    *,
    formats: Annotated[str, typer.Option(metavar="WEIGHTS[+kv8],...", help="Formats to compare with 16 bits.")],
    out: Annotated[Path, typer.Option(help="File for the table, for --accuracy.")],
    questions: Annotated[
        Path | None, typer.Option(help="Questions in MMLU's layout: a CSV file, or a folder with one for each subject.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text, whose perplexity is compared instead.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Questions with answers that stand before each: a file or folder.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, max=100, help="How many of them; needs --examples.")] = 5,
    limit: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Samples at most: questions, or places of the text.")
    ] = 10_000,
    context_tokens: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Tokens of the text before each place.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(min=1, max=1000, help="Prompts that are computed at once.")] = 8,
    backend: Annotated[str, typer.Option(metavar="torch", help="The engine.")] = "torch",
    overwrite: OverwriteFlag = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON, with every detail.")] = False,
) -> None:
    """Measure what weight formats cost a model in accuracy, relative to 16 bits.

    Asks multiple-choice questions, and takes the likeliest of the four letters; or
    compares the perplexity of a text. Writes the table that --accuracy takes, for
    --min-accuracy.
    """
    if backend not in _BACKENDS:
        raise InputError(f"--backend must be {' or '.join(_BACKENDS)}, not {backend!r}: other engines send no logits")
    if (questions is None) == (text is None):
        raise InputError("give either --questions or --text")
    check_file_writable(out, what="accuracy table", overwrite=overwrite)
    spec = load_model(model)
    folder = config_path(Path(model)).parent
    files = ModelFiles(lambda _: folder / "config.json" if spec.config_json else None)
    if not files.weights_folder(spec):
        raise InputError(f"model {model!r} has no weights; accuracy needs a folder with safetensors files")
    wanted = [chosen for chosen in dict.fromkeys(map(format_of, formats.split(","))) if chosen != _FLOAT16]
    _check_supported(spec, [_FLOAT16, *wanted])
    measure = Measure.QUESTIONS if questions is not None else Measure.PERPLEXITY
    encode = ModelTokenizer(folder).encode
    samples: list[Sample]
    if questions is not None:
        shown = read_questions(examples, what="examples") if examples is not None else []
        chosen = _spread(read_questions(questions), limit)
        samples = question_samples(
            chosen, encode, examples=shown, shots=shots if examples is not None else 0, max_tokens=spec.context_tokens
        )
    else:
        samples = text_samples(
            encode(read_text(text, what="text")) if text is not None else (),
            context_tokens=context_tokens,
            samples=limit,
        )
    found = _measured(spec, files, wanted, samples, measure, batch_size)
    _write(out, spec.name, found, overwrite=overwrite)
    if as_json:
        rows = [dict(zip(ACCURACY_COLUMNS, cells, strict=True)) for cells in accuracy_rows(spec.name, found)]
        typer.echo(json.dumps({"model": spec.name, "table": str(out), "formats": rows}, indent=2, allow_nan=False))
        return
    console = open_console()
    console.print(_table(spec.name, found))
    console.print(
        f"table: {out}\nuse it: maveriq plan MODEL --min-accuracy 99 --accuracy {out}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _spread(entries: Sequence[Question], limit: int) -> list[Question]:
    """Return at most so many entries, evenly spaced."""
    if len(entries) <= limit:
        return list(entries)
    return [entries[place * len(entries) // limit] for place in range(limit)]


def _check_supported(model: ModelSpec, formats: Sequence[tuple[WeightType, KvType]]) -> None:
    for weights, kv in formats:
        configuration = ParallelConfig(tp=1, pp=1, weights=weights, kv=kv)
        refusal = why_not("torch", model, configuration, Device.CPU)
        if refusal is not None:
            raise InputError(str(refusal))


def _measured(
    model: ModelSpec,
    files: ModelFiles,
    formats: Sequence[tuple[WeightType, KvType]],
    samples: Sequence[Sample],
    measure: Measure,
    batch_size: int,
) -> list[RelativeAccuracy]:
    """Return the relative accuracy of each format; one model is loaded at a time."""
    console = open_console(stderr=True)

    def scores(weights: WeightType, kv: KvType) -> list[float]:
        label = ParallelConfig(tp=1, pp=1, weights=weights, kv=kv)
        console.print(f"{model.name} with {label}: {len(samples):,} samples", highlight=False, markup=False)
        scorer = TorchScorer(model, files, weights=weights, kv=kv)
        return scores_of(scorer, samples, measure, batch_size=batch_size)

    reference = scores(*_FLOAT16)
    found = [relative_accuracy(reference, reference, weights=_FLOAT16[0], kv=_FLOAT16[1], measure=measure)]
    return found + [
        relative_accuracy(scores(weights, kv), reference, weights=weights, kv=kv, measure=measure)
        for weights, kv in formats
    ]


def _write(path: Path, model: str, found: Sequence[RelativeAccuracy], *, overwrite: bool) -> None:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(ACCURACY_COLUMNS)
    writer.writerows((protect_cell(name), *cells) for name, *cells in accuracy_rows(model, found))
    with written_whole(path, what="accuracy table", overwrite=overwrite) as partial:
        partial.write_text(lines.getvalue(), encoding="utf-8")


def _table(model: str, found: Sequence[RelativeAccuracy]) -> Table:
    measure = found[0].measure
    score = number_column("perplexity" if measure is Measure.PERPLEXITY else "right")
    columns = [
        Column("weights"), Column("KV cache"), score,
        number_column("percent of\n16 bits"), Column("95 % interval"),
    ]  # fmt: skip
    rows = [
        row(
            entry.weights.value,
            entry.kv.value,
            f"{entry.score:.3f}" if measure is Measure.PERPLEXITY else f"{100 * entry.score:.1f} %",
            f"{entry.percent:.2f}",
            f"{entry.low:.2f} to {entry.high:.2f}",
        )
        for entry in found
    ]
    return Table(f"Accuracy of {model}, {found[0].samples:,} samples", columns, rows)
