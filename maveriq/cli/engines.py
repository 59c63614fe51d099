"""`maveriq engines`: shows what engines can do, and which can start on this machine."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, TypeVar

import typer

from maveriq.cli.engine_check import check
from maveriq.cli.engine_setup import setup
from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.domain.parallel import LayerSplit, ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.exec.capabilities import installed, known_engines, this_machine, why_not
from maveriq.exec.device import Device
from maveriq.exec.engine_environments import find_environment
from maveriq.exec.gpus import least_compute_capability
from maveriq.report.engines import answers_json, answers_table, installed_table, matrix_json, matrix_table
from maveriq.report.terminal import open_console

_Choice = TypeVar("_Choice", bound=StrEnum)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command()(setup)
app.command()(check)

_MODEL = "Ask about a model"
_MAX_DEGREE = 1024


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A model's name, or the path of a Hugging Face config.json.", rich_help_panel=_MODEL
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="How weights are stored: float16, int8, int4, int4_gptq, fp8.",
            show_default="float16",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="native|int8", help="How the KV cache is stored.", show_default="native", rich_help_panel=_MODEL
        ),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MAX_DEGREE, help="Tensor-parallel size: GPUs of a stage.", show_default="1",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MAX_DEGREE, help="Pipeline stages.", show_default="1, or those of the split",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    layer_split: Annotated[
        str | None,
        typer.Option(
            metavar="20,12", help="Layers of each stage.", show_default="as even as possible", rich_help_panel=_MODEL
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="cuda|cpu", help="What to compute on.", show_default="cuda", rich_help_panel=_MODEL),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON, with every detail.")] = False,
) -> None:  # fmt: skip
    """Show what engines can do, and which can start here.

    With --model: which engines support the configuration, why others do not,
    and the nearest configuration that they support.
    """
    if ctx.invoked_subcommand is not None:
        return
    if model is None:
        about_model = {
            "weights": weights, "kv": kv, "tp": tp, "pp": pp, "layer-split": layer_split, "device": device,
        }  # fmt: skip
        for name, value in about_model.items():
            if value is not None:
                raise InputError(f"--{name} needs a model; name it with --model")
        _show_engines(as_json=as_json)
        return
    spec = load_model(model)
    target = Device.named(device or Device.CUDA.value)
    wanted = _configuration(spec, weights=weights, kv=kv, tp=tp, pp=pp, layer_split=layer_split)
    generation = least_compute_capability(this_machine().gpus) if target is Device.CUDA else None
    answers = {name: why_not(name, spec, wanted, target, compute_capability=generation) for name in known_engines()}
    if as_json:
        typer.echo(json.dumps(answers_json(spec, wanted, target, answers), indent=2, allow_nan=False))
    else:
        open_console().print(answers_table(spec, wanted, target, answers))


def _show_engines(*, as_json: bool) -> None:
    """Print the capability matrix, and which engines can start here."""
    names, machine = known_engines(), this_machine()
    here = {name: installed(name, machine, find_environment(name)) for name in names}
    if as_json:
        typer.echo(json.dumps(matrix_json(names, here, machine), indent=2, allow_nan=False))
        return
    console = open_console()
    console.print(matrix_table(names))
    console.print(installed_table(names, here, machine))


def _configuration(
    model: ModelSpec, *, weights: str | None, kv: str | None, tp: int | None, pp: int | None, layer_split: str | None
) -> ParallelConfig:
    """Return the configuration that the options describe.

    Raises:
        InputError: an option that cannot be used.
    """
    split = () if layer_split is None else _split(layer_split)
    stages = pp or len(split) or 1
    if stages > model.layers:
        raise InputError(f"--pp {stages}: {model.name} has {model.layers} layers, and each stage needs one")
    return ParallelConfig(
        tp=tp or 1,
        pp=stages,
        weights=_choice(WeightType, "weights", weights or WeightType.FLOAT16),
        kv=_choice(KvType, "KV type", kv or KvType.NATIVE),
        layer_split=split,
    ).normalised(model.layers)


def _split(text: str) -> LayerSplit:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--layer-split {text!r}: write the layers of each stage with commas, such as 20,12") from None


def _choice(kind: type[_Choice], what: str, text: str) -> _Choice:
    try:
        return kind(text.replace("-", "_"))
    except ValueError:
        raise UnknownNameError(what, text, [choice.value for choice in kind]) from None
