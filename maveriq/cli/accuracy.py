"""`maveriq accuracy`: measures what weight formats cost a model in accuracy."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import OverwriteFlag, complete_model
from maveriq.domain.models import KvType, ModelSpec, WeightType, config_path, load_model
from maveriq.domain.parallel import ParallelConfig, format_of
from maveriq.errors import InputError
from maveriq.exec.capabilities import why_not
from maveriq.exec.device import Device
from maveriq.exec.engines.external import max_sequence_tokens
from maveriq.exec.engines.vllm import NAME as VLLM
from maveriq.exec.local_machine import LocalMachine
from maveriq.exec.model_files import ModelFiles, has_weights
from maveriq.files import check_file_writable, written_whole
from maveriq.input_files import read_text
from maveriq.profiling.accuracy import (
    ACCURACY_COLUMNS,
    Measure,
    RelativeAccuracy,
    Sample,
    Scorer,
    accuracy_rows,
    question_samples,
    relative_accuracy,
    scores_of,
    text_samples,
)
from maveriq.profiling.questions import Question, read_questions
from maveriq.profiling.torch_scorer import TorchScorer
from maveriq.profiling.vllm_scorer import VllmScorer
from maveriq.report.terminal import open_console
from maveriq.report.view import Column, Table, number_column, row
from maveriq.serve.tokenizer_worker import ModelTokenizer
from maveriq.text import protect_cell

_FLOAT16 = (WeightType.FLOAT16, KvType.NATIVE)
_BACKENDS = ("torch", VLLM)


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
    backend: Annotated[str, typer.Option(metavar="torch|vllm", help="The engine.")] = "torch",
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WEIGHTS=FOLDER", help="The model in a format that the engine does not make itself; repeatable."
        ),
    ] = None,
    engine_python: Annotated[
        list[str] | None, typer.Option(metavar="ENGINE=PATH", help="The interpreter that runs the engine; repeatable.")
    ] = None,
    overwrite: OverwriteFlag = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON, with every detail.")] = False,
) -> None:
    """Measure what weight formats cost a model in accuracy, relative to 16 bits.

    Asks multiple-choice questions, and takes the likeliest of the four letters; or
    compares the perplexity of a text. Writes the table that --accuracy takes, for
    --min-accuracy.
    """
    if backend not in _BACKENDS:
        raise InputError(f"--backend must be {' or '.join(_BACKENDS)}, not {backend!r}: other engines tell no scores")
    if (questions is None) == (text is None):
        raise InputError("give either --questions or --text")
    check_file_writable(out, what="accuracy table", overwrite=overwrite)
    spec = load_model(model)
    if not spec.config_json or not has_weights(config_path(Path(model)).parent):
        raise InputError(f"model {model!r} has no weights; accuracy needs a folder with safetensors files")
    folder = config_path(Path(model)).parent
    wanted = [chosen for chosen in dict.fromkeys(map(format_of, formats.split(","))) if chosen != _FLOAT16]
    with contextlib.closing(LocalMachine(backend, engine_python or ())) as local:
        engine = _Engine(local=local, model=spec, folder=folder, checkpoints=_checkpoints(checkpoint or ()),
                         batch_size=batch_size)  # fmt: skip
        for weights, kv in (_FLOAT16, *wanted):
            engine.check(weights, kv)
        measure = Measure.QUESTIONS if questions is not None else Measure.PERPLEXITY
        encode = ModelTokenizer(folder).encode
        if questions is not None:
            shown = read_questions(examples, what="examples") if examples is not None else []
            samples = question_samples(
                _spread(read_questions(questions), limit),
                encode,
                examples=shown,
                shots=shots if examples is not None else 0,
                max_tokens=engine.prompt_tokens,
            )
        else:
            tokens = encode(read_text(text, what="text")) if text is not None else ()
            samples = text_samples(tokens, context_tokens=context_tokens, samples=limit)
        found = _measured(engine, wanted, samples, measure)
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


def _checkpoints(entries: Sequence[str]) -> dict[WeightType, Path]:
    """Return the folders of the model in other formats, by their weights' format."""
    found = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or name not in list(WeightType) or not has_weights(Path(path)):
            raise InputError(f"--checkpoint {entry!r}: write WEIGHTS=FOLDER, such as int4=my-model-awq, with weights")
        found[WeightType(name)] = Path(path)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """Loads a model in a format, to score with it."""

    local: LocalMachine
    model: ModelSpec
    folder: Path
    checkpoints: Mapping[WeightType, Path]
    batch_size: int

    @property
    def device(self) -> Device:
        return Device.CUDA if self.local.meter else Device.CPU

    @property
    def prompt_tokens(self) -> int | None:
        """The longest prompt, with a token after it; None where nothing limits it."""
        limit = max_sequence_tokens(self.model) if self.local.backend == VLLM else self.model.context_tokens
        return None if limit is None else limit - 1

    def check(self, weights: WeightType, kv: KvType) -> None:
        """Check that the engine runs a format.

        Raises:
            InputError: it does not, or the checkpoint is of another model.
        """
        model, _ = self._files(weights)
        if different := self.model.differences_from(model):
            raise InputError(f"--checkpoint {weights}={self.checkpoints[weights]}: another model: {different}")
        configuration = ParallelConfig(tp=1, pp=1, weights=weights, kv=kv)
        refusal = why_not(
            self.local.backend, model, configuration, self.device, compute_capability=self.local.compute_capability
        )
        if refusal is not None:
            raise InputError(str(refusal))

    def load(self, weights: WeightType, kv: KvType) -> Scorer:
        """Return the loaded model."""
        model, files = self._files(weights)
        if self.local.backend != VLLM:
            return TorchScorer(model, files, weights=weights, kv=kv)
        python = self.local.python_path or Path(sys.executable)
        return VllmScorer(
            model, files, weights=weights, kv=kv, device=self.device, batch_size=self.batch_size, python=python
        )

    def _files(self, weights: WeightType) -> tuple[ModelSpec, ModelFiles]:
        folder = self.checkpoints.get(weights, self.folder)
        model = self.model if folder == self.folder else load_model(str(folder))
        return model, ModelFiles(lambda _: folder / "config.json")


def _measured(
    engine: _Engine, formats: Sequence[tuple[WeightType, KvType]], samples: Sequence[Sample], measure: Measure
) -> list[RelativeAccuracy]:
    """Return the relative accuracy of each format; one model is loaded at a time."""
    console = open_console(stderr=True)

    def scores(weights: WeightType, kv: KvType) -> list[float]:
        label = ParallelConfig(tp=1, pp=1, weights=weights, kv=kv)
        console.print(f"{engine.model.name} with {label}: {len(samples):,} samples", highlight=False, markup=False)
        # vLLM batches by itself, and each call starts it.
        batch_size = len(samples) if engine.local.backend == VLLM else engine.batch_size
        return scores_of(engine.load(weights, kv), samples, measure, batch_size=batch_size)

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
