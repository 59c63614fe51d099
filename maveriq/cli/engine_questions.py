"""The work behind `maveriq engines`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TypeVar

import typer
from rich.console import Console

from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.domain.parallel import LayerSplit, ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.exec.capabilities import Device, installed, known_engines, this_machine, why_not
from maveriq.report.engines import answers_json, answers_table, installed_table, matrix_json, matrix_table

_Choice = TypeVar("_Choice", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineQuestion:
    """What a user asks of `maveriq engines` about a model; fields as its options, None where not said."""

    model: str | None
    weights: str | None
    kv: str | None
    tp: int | None
    pp: int | None
    layer_split: str | None
    device: str | None

    def refuse_without_model(self) -> None:
        """Raise where something is asked about no model.

        Raises:
            InputError: an option says something about a model that is not named.
        """
        said = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if said:
            raise InputError(f"--{said[0].replace('_', '-')} asks about a model; name it with --model")

    def configuration(self, model: ModelSpec) -> ParallelConfig:
        """Return the configuration that the options name.

        Raises:
            InputError: an option that cannot be used.
        """
        split = None if self.layer_split is None else _split(self.layer_split)
        pp = self.pp or (len(split) if split else 1)
        if pp > model.layers:
            raise InputError(f"--pp {pp}: {model.name} has {model.layers} layers, and each stage needs one")
        return ParallelConfig(
            tp=self.tp or 1,
            pp=pp,
            weights=_choice(WeightType, "weights", self.weights or WeightType.FLOAT16),
            kv=_choice(KvType, "KV type", self.kv or KvType.NATIVE),
            layer_split=split or (),
        ).normalised(model.layers)


def show_engines(*, as_json: bool) -> None:
    """Print the matrix, and which engines can start here."""
    engines, machine = known_engines(), this_machine()
    here = {name: installed(name, machine) for name in engines}
    if as_json:
        typer.echo(json.dumps(matrix_json(engines, here, machine), indent=2, allow_nan=False))
        return
    console = Console()
    console.print(matrix_table(engines))
    console.print(installed_table(engines, here, machine))


def answer_question(question: EngineQuestion, model_name: str, *, as_json: bool) -> None:
    """Print for each engine whether it can run the model so.

    Raises:
        InputError: an option that cannot be used.
    """
    model = load_model(model_name)
    device = Device.named(question.device or Device.CUDA.value)
    asked = question.configuration(model)
    answers = {name: why_not(name, model, asked, device) for name in known_engines()}
    if as_json:
        typer.echo(json.dumps(answers_json(model, asked, device, answers), indent=2, allow_nan=False))
    else:
        Console().print(answers_table(model, asked, device, answers))


def _split(text: str) -> LayerSplit:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--layer-split {text!r}: write the layers of each stage with commas, such as 20,12") from None


def _choice(kind: type[_Choice], what: str, text: str) -> _Choice:
    try:
        return kind(text.replace("-", "_"))
    except ValueError:
        raise UnknownNameError(what, text, [one.value for one in kind]) from None
