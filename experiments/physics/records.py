"""Our own records of steps in torch (experiments/h100), compared with the step model; nothing is fitted to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from step_cases import read_rows

from maveriq.domain.decoder import Decoder
from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet
from maveriq.domain.models import load_model
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import Chunk, Formats, StepModel

RESULTS = Path(__file__).parent.parent / "h100" / "results"
GPUS = {"h100": "H100-SXM", "h200": "H200-SXM"}
_MODELS = {"mixtral-8-layers": "mixtral-8x7b"}
_FORMATS = {"bf16": NumberFormat.BFLOAT16, "int8": NumberFormat.INT8}


def decoder_of(row: Mapping[str, str]) -> Decoder:
    """Return the model of a record, with as many layers as were run."""
    decoder = load_model(_MODELS.get(row["model"], row["model"])).decoder
    return replace(decoder, layer_pattern=decoder.layer_pattern[: int(row["layers"])])


def errors() -> Iterator[tuple[str, list[float]]]:
    """Yield the logarithmic errors of each kind of step, weight format and GPU; eager decoding is bound by its host."""
    found: dict[str, list[float]] = {}
    models: dict[tuple[str, str, int, str], StepModel] = {}
    for folder, kind in GPUS.items():
        path = RESULTS / folder / "records.csv"
        for row in read_rows(path) if path.is_file() else ():
            if row["status"] != "measured" or (row["kind"], row["mode"]) == ("decode", "eager"):
                continue
            key = (row["model"], kind, int(row["layers"]), row["weights"])
            if key not in models:
                decoder = decoder_of(row)
                formats = Formats(weights=_FORMATS[row["weights"]])
                models[key] = StepModel(decoder, operators_of(gpu_sheet(kind)), formats=formats)
            batch, tokens = int(row["batch"]), int(row["tokens_each"])
            if row["kind"] == "decode":
                time_us = models[key].gpu_us(decodes=batch, context_tokens=batch * tokens)
            else:
                time_us = models[key].gpu_us(decodes=0, context_tokens=0, chunks=[Chunk(tokens=tokens)] * batch)
            label = f"{kind}, {row['kind']} {row['mode']}, {row['weights']}"
            found.setdefault(label, []).append(math.log(time_us / (1e6 * float(row["seconds"]))))
    yield from sorted(found.items())
