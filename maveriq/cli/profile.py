"""`maveriq profile`: measure models on the engines of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def profile(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names, or paths of config.json.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    configuration: Annotated[
        list[str],
        typer.Option(
            "--configuration",
            "-c",
            metavar="[MODEL=]TPxPP[:WEIGHTS][+kv8]",
            help="What to measure, such as 2x1, 1x3:int8+kv8, or MODEL=4x1; repeatable.",
        ),
    ],
    backend: Annotated[str, typer.Option(metavar="torch|vllm|trtllm", help="What engines are made of.")] = "torch",
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts, with commas.")] = "16,64,256",
    output_tokens: Annotated[int, typer.Option(min=2, max=100_000, help="Tokens to generate.")] = 20,
    batch_size: Annotated[str, typer.Option(help="Sizes of batches, with commas.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Each question is asked so often.")] = 5,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory of one GPU, or of what plays one on a CPU.", show_default="the GPU's, or 4"),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Its name.", show_default="the GPU's, or cpu")] = None,
) -> None:
    """Measure models on this machine's engines.

    Whole models, under the configurations that you choose.

    Writes a profile: maveriq sim --profile FOLDER/profile.toml --estimator
    measured --service-times measured then simulates these very engines.
    """
    from maveriq.cli.profiling import Wanted, measure_and_write

    measure_and_write(
        Wanted(
            models=tuple(models),
            configurations=tuple(configuration),
            backend=backend,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            batch_sizes=batch_size,
            repeats=repeats,
            memory_gib=memory_gib,
            kind=kind,
        ),
        out,
    )
