"""Measured steps as cases: what was measured, and the kernels that the step model says it consists of.

A row that cannot be a case stays in the list with the reason, so that every table accounts for all its rows.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

import msgspec
import table_models

from maveriq.calibration.engine_fit import StepSample
from maveriq.calibration.measurements import read_measurements
from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat, gpu_sheet, number_format_of
from maveriq.domain.models import KvType, shape_of
from maveriq.domain.weight_formats import BITS_16, FORMATS
from maveriq.estimate.engine_memory import EngineSettings, predict_kv_blocks
from maveriq.estimate.engine_presets import EnginePreset, engine_preset
from maveriq.estimate.hand_over import node_channel
from maveriq.estimate.intervals import Family
from maveriq.estimate.operators import Operators, operators_of
from maveriq.estimate.step_time import Chunk, Formats, Sharding, StepModel, why_not_timed

Row: TypeAlias = Mapping[str, str]

_MAX_STEP_TOKENS = 8192  # tokens of a step that holds prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured time.

    Args:
        source: the table.
        group: under which its errors are reported.
        split: `fit` or `validate`.
        labels: what it is, by name of the label.
        family: the model's family; None where the model is not known.
        beyond: whether it lies outside what a preset is fitted to.
        preset: the engine.
        sample: the time and its steps; None where there is a reason.
        left_out: why it is not compared; "" where it is.
    """

    source: str
    group: str
    split: str
    labels: Mapping[str, str]
    preset: EnginePreset
    family: Family | None = None
    beyond: bool = False
    sample: StepSample | None = None
    left_out: str = ""


@cache
def operators_for(kind: str, preset: EnginePreset, *, measured: bool) -> Operators:
    """Return the operators of a kind of GPU as an engine runs them; without its tables where `measured` is false."""
    found = operators_of(gpu_sheet(kind), preset.kernels)
    return found if measured else Operators(gpu=found.gpu, kernels=preset.kernels)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file, compressed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        yield from csv.DictReader(lines)


@cache
def step_model(stored: table_models.Stored, operators: Operators, tp: int, ep: int = 1) -> StepModel:
    """Return the step model of all layers of a model on `tp` GPUs, the experts dealt out to `ep` groups of them."""
    sharding = Sharding(tp=tp, ep=ep)
    return StepModel(stored.model.decoder, operators, sharding=sharding, formats=stored.formats)


def prefill_us(model: StepModel, requests: int, tokens: int) -> tuple[float, float]:
    """Return the kernels of all steps that process prompts of `tokens` tokens, and the number of steps.

    Steps hold whole prompts up to the tokens of a step; longer prompts are cut into chunks.
    """
    if tokens >= _MAX_STEP_TOKENS:
        starts = range(0, tokens, _MAX_STEP_TOKENS)
        chunks = [Chunk(tokens=min(_MAX_STEP_TOKENS, tokens - start), past=start) for start in starts]
        one = sum(model.gpu_us(decodes=0, context_tokens=0, chunks=[chunk]) for chunk in chunks)
        return requests * one, float(requests * len(chunks))
    a_step = max(1, _MAX_STEP_TOKENS // tokens)
    total, steps = 0.0, 0
    left = requests
    while left > 0:
        chunks = [Chunk(tokens=tokens)] * min(a_step, left)
        total += model.gpu_us(decodes=0, context_tokens=0, chunks=chunks)
        steps, left = steps + 1, left - len(chunks)
    return total, float(steps)


def static_batch(
    model: StepModel, *, name: str, layers: int, batch: int, prompt: int, output: int, measured_us: float
) -> StepSample:
    """Return a static batch: all prompts, then a token of each sequence a step."""
    prefill, steps = prefill_us(model, batch, prompt)
    return StepSample(
        model=name,
        measured_us=measured_us,
        layers=layers,
        prefill_steps=steps,
        prefill_us=prefill / steps,
        prefill_sequences=batch / steps,
        decode_steps=output - 1,
        decode_us=model.gpu_us(decodes=batch, context_tokens=batch * (prompt + output / 2)),
        decode_sequences=batch,
    )


_STEADY_GPUS = {"H100": "H100-SXM", "B200": "B200-SXM"}
_SLOW_GPQA = ("Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B")
_STEADY_BATCH = 700


def steady_decode(data: Path, *, measured: bool = True) -> Iterator[Case]:
    """Yield the energy leaderboard: the median time between tokens in a steady batch of vLLM of 2025.

    Prompt lengths are not published: 250 tokens are assumed, 1,200 for code.
    """
    preset = engine_preset("vllm-2025")
    for row in read_rows(data / "serving" / "decode_steady_mlenergy.csv.gz"):
        stored = table_models.stored_model(row["model"], row["weight_precision"], data)
        family = stored.family if stored else None
        gpus, ep, batch = int(row["n_gpu"]), int(row["ep"]), float(row["avg_batch_size"])
        beyond = int(row["max_num_seqs"]) > _STEADY_BATCH
        case = Case(
            source="energy leaderboard",
            group=f"{family}, more than {_STEADY_BATCH} sequences" if beyond else str(family),
            split="fit",
            labels={"model": row["model"], "GPU": row["gpu"]},
            preset=preset,
            family=family,
            beyond=beyond,
        )
        if stored is None or (reason := why_not_timed(stored.model.decoder)):
            yield replace(case, left_out=f"{row['model']}: {reason if stored else 'not among the configurations'}")
        elif int(row["dp"]) > 1:
            yield replace(case, left_out="attention is data parallel, which is not modelled")
        elif row["gpu"] == "B200" and row["task"] == "gpqa" and any(name in row["model"] for name in _SLOW_GPQA):
            yield replace(case, left_out="two to five times slower than the same batch of another task")
        else:
            operators = operators_for(_STEADY_GPUS[row["gpu"]], preset, measured=measured)
            model = step_model(stored, operators, gpus, ep)
            context = (1200 if row["task"] == "sourcegraph-fim" else 250) + float(row["avg_output_len"]) / 2
            sample = StepSample(
                model=_base_model(row["model"]),
                measured_us=1e3 * float(row["median_itl_ms"]),
                layers=stored.model.layers,
                decode_steps=1,
                decode_us=model.gpu_us(decodes=batch, context_tokens=batch * context),
                decode_sequences=batch,
            )
            yield replace(case, sample=sample)


def _base_model(name: str) -> str:
    for suffix in ("-FP8", "-Instruct-2507", "-Thinking-2507", "-Instruct"):
        name = name.replace(suffix, "")
    return name


_STATIC_ENGINES = {"vLLM": "vllm-2024", "TensorRT-LLM": "trtllm-2024"}
_STATIC_GPUS: Mapping[str, tuple[str, float, float]] = {
    "Nvidia A100 GPU": ("A100-80GB-SXM", 1555, 39.4),  # 40 GB, same chip
    "Nvidia H100 GPU": ("H100-SXM", 3350, 79.18),
    "Nvidia GH200 GPU": ("H100-SXM", 4000, 95.0),  # 96 GB, same chip
}
"""The kind whose corrections apply, and the bandwidth and memory of the GPUs in GB/s and GiB."""


@cache
def _with_memory(
    kind: str, preset: EnginePreset, bandwidth_gb_s: float, usable_gib: float, *, measured: bool
) -> Operators:
    found = operators_for(kind, preset, measured=measured)
    sheet: GpuSheet = msgspec.structs.replace(found.gpu, bandwidth_gb_s=bandwidth_gb_s, usable_gib=usable_gib)
    return replace(found, gpu=sheet)


def static_batches(data: Path, *, measured: bool = True) -> Iterator[Case]:
    """Yield the static batches of Argonne's benchmark: as many tokens out as in, engines of 2024."""
    for row in read_rows(data / "serving" / "static_batch_argonne.csv.gz"):
        if row["framework"] not in _STATIC_ENGINES:
            continue
        case = Case(
            source=f"Argonne {row['framework']}",
            group="all",
            split="fit",
            labels={"model": row["model"], "GPU": row["gpu"], "GPUs": row["n_gpu"], "batch": row["batch_size"]},
            preset=engine_preset(_STATIC_ENGINES[row["framework"]]),
        )
        stored = table_models.stored_model(row["model"], "bfloat16", data)
        if stored is None:
            yield replace(case, left_out=f"{row['model']}: not among the configurations")
            continue
        length, gpus = int(row["input_len_and_output_len"]), int(row["n_gpu"])
        if stored.model.why_too_long(2 * length):
            yield replace(case, left_out="longer than the model's positions: its answers end earlier")
            continue
        kind, bandwidth, memory = _STATIC_GPUS[row["gpu"]]
        operators = _with_memory(kind, case.preset, bandwidth, memory, measured=measured)
        blocks = predict_kv_blocks(stored.model.decoder, operators.gpu, tp=gpus, stored_as=BITS_16)
        held = blocks * EngineSettings().block_size
        if int(row["batch_size"]) * 2 * length > held:
            yield replace(case, left_out="the batch does not fit the memory at once: it ran in parts")
            continue
        model = step_model(stored, operators, gpus)
        sample = static_batch(
            model, name=row["model"], layers=stored.model.layers, batch=int(row["batch_size"]), prompt=length,
            output=length, measured_us=1e6 * float(row["latency_s"]),
        )  # fmt: skip
        yield replace(case, sample=sample, family=stored.family)


def splitwise_batches(data: Path, *, measured: bool = True) -> Iterator[Case]:
    """Yield the steps of static batches on an engine of 2023, prefill and decode apart."""
    preset = engine_preset("vllm-2023")
    for row in read_rows(data / "serving" / "steps_splitwise.csv"):
        gpu = {"a100-80gb": "A100-80GB-SXM", "h100-80gb": "H100-SXM"}.get(row["gpu"])
        for part in ("decode", "prefill"):
            case = Case(
                source="splitwise",
                group=part,
                split="fit",
                labels={"model": row["model"], "GPU": row["gpu"], "tp": row["tp"], "batch": row["batch_size"]},
                preset=preset,
            )
            if gpu is None:
                yield replace(case, left_out="the power of its GPUs was capped")
                continue
            stored = table_models.stored_model(row["model"], "bfloat16", data)
            if stored is None:
                yield replace(case, left_out="not among the configurations")
                continue
            batch, prompt, output = (int(row[key]) for key in ("batch_size", "prompt_tokens_per_req", "output_tokens"))
            model = step_model(stored, operators_for(gpu, preset, measured=measured), int(row["tp"]))
            name, layers = row["model"], stored.model.layers
            if part == "decode":
                sample = StepSample(
                    model=name, measured_us=1e3 * float(row["decode_step_ms_mean"]), layers=layers, decode_steps=1,
                    decode_us=model.gpu_us(decodes=batch, context_tokens=batch * (prompt + output / 2)),
                    decode_sequences=batch,
                )  # fmt: skip
            else:
                kernels = model.gpu_us(decodes=0, context_tokens=0, chunks=[Chunk(tokens=prompt)] * batch)
                sample = StepSample(
                    model=name, measured_us=1e3 * float(row["prefill_ms_mean"]), layers=layers, prefill_steps=1,
                    prefill_us=kernels, prefill_sequences=batch,
                )  # fmt: skip
            yield replace(case, sample=sample, family=stored.family)


LONG_PROMPT = 923
"""Tokens of the text that all runs on A6000 were given."""


def a6000_runs(data: Path, *, measured: bool = True) -> Iterator[Case]:
    """Yield the recorded whole models on A6000, which quantise weights and not activations."""
    preset = engine_preset("trtllm-0.9")
    operators = operators_for("A6000", preset, measured=measured)
    for run in read_measurements(data / "a6000" / "full_model_long_prompt.csv"):
        at, model = run.configuration, shape_of(run.model_name)
        case = Case(
            source="A6000", group=f"TP {at.tp}", split="fit",
            labels={"model": run.model_name, "tp": str(at.tp), "pp": str(at.pp), "weights": at.weights}, preset=preset,
        )  # fmt: skip
        if model is None:
            yield replace(case, left_out=f"{run.model_name}: not in the catalogue")
            continue
        weights = number_format_of(FORMATS[at.weights])
        kv = NumberFormat.BFLOAT16 if at.kv is KvType.NATIVE else NumberFormat.FP8
        stored = table_models.Stored(model, Formats(weights=weights, kv=kv))
        sample = static_batch(
            step_model(stored, operators, at.tp), name=run.model_name, layers=model.layers, batch=at.batch_size,
            prompt=LONG_PROMPT, output=run.output_tokens, measured_us=1e6 * run.latency_s,
        )  # fmt: skip
        channel, hand_overs = node_channel(operators.gpu), at.pp - 1
        sample = replace(
            sample,
            decode_us=sample.decode_us + hand_overs * channel.hand_over_us(at.batch_size, model.hidden_size),
            prefill_us=sample.prefill_us
            + hand_overs * channel.hand_over_us(at.batch_size * LONG_PROMPT, model.hidden_size),
        )
        yield replace(case, sample=sample, family=stored.family)
