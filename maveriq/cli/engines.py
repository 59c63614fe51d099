"""`maveriq engines`: what engines can do, and which can start here."""

from __future__ import annotations

from typing import Annotated

import typer

_QUESTION = "Ask about a model"
_MAX_DEGREE = 1024


def engines(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A model's name, or the path of a Hugging Face config.json.",
            rich_help_panel=_QUESTION,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="How weights are stored: float16, int8, int4, int4_gptq.",
            show_default="float16",
            rich_help_panel=_QUESTION,
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="native|int8",
            help="How the KV cache is stored.",
            show_default="native",
            rich_help_panel=_QUESTION,
        ),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_DEGREE, help="GPUs of a stage.", show_default="1", rich_help_panel=_QUESTION),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MAX_DEGREE,
            help="Pipeline stages.",
            show_default="1, or those of the split",
            rich_help_panel=_QUESTION,
        ),
    ] = None,
    layer_split: Annotated[
        str | None,
        typer.Option(
            metavar="20,12",
            help="Layers of each stage.",
            show_default="as even as it goes",
            rich_help_panel=_QUESTION,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="cuda|cpu", help="What to compute on.", show_default="cuda", rich_help_panel=_QUESTION),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone, with everything in it.")] = False,
) -> None:
    """Show what engines can do, and which can start here.

    With --model: which engines can run it so, why others cannot,
    and the nearest that they can.
    """
    from maveriq.cli.engine_questions import EngineQuestion, answer_question, show_engines

    question = EngineQuestion(model=model, weights=weights, kv=kv, tp=tp, pp=pp, layer_split=layer_split, device=device)
    if model is None:
        question.refuse_without_model()
        show_engines(as_json=as_json)
    else:
        answer_question(question, model, as_json=as_json)
