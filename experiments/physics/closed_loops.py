"""Measured closed loops as cases: mean times to the first token and between tokens at a fixed number of clients.

Nothing is fitted to them. Requests whose lengths are drawn from 0.8 to 1 times the nominal ones come apart. In the
"gap analysis" with nominal lengths that are powers of two, lengths have no spread: in its runs of vLLM and TensorRT-LLM
whose split is `fit`, a first token takes as long as two or three prompts even with eight clients, of which the prompts
take a tenth of the time. Only requests that end together wait so for each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import table_models
from packaging.version import InvalidVersion, Version
from step_cases import Case, Row, operators_for, read_rows, step_model

from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat
from maveriq.domain.weight_formats import FORMATS, WeightFormat, fp8_blocks
from maveriq.estimate.engine_memory import predict_kv_blocks
from maveriq.estimate.engine_presets import EnginePreset, engine_preset
from maveriq.estimate.kernel_bounds import BYTES_PER_WEIGHT, TILE
from maveriq.estimate.steady_state import SteadyLoad, SteadyTimes
from maveriq.estimate.step_time import Chunk, StepModel, why_not_timed

_GPUS = {
    "h100_sxm": "H100-SXM", "h200_sxm": "H200-SXM", "b200_sxm": "B200-SXM", "b300_sxm": "B200-SXM", "gb200": "GB200",
}  # fmt: skip
_FORMATS = {"nvfp4": "nvfp4", "int4_wo": "int4", "fp8": "fp8", "fp8_block": "fp8_block", "": "bfloat16"}
_MEAN_SHARE = 0.9  # of the nominal lengths, which are drawn from 0.8 to 1 times them
_REQUESTS_OF_A_CLIENT = 10
_MAX_STEP_TOKENS = 8192
_MOST_GPUS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSample:
    """Measured mean times of requests in a closed loop, and the load and the steps behind them.

    Args:
        measured: the times; the first token's with HTTP and tokenizer.
        load: the requests.
        steps: the time of a step's kernels.
        layers: layers of the model.
    """

    measured: SteadyTimes
    load: SteadyLoad
    steps: StepModel
    layers: int

    def predicted(self, preset: EnginePreset) -> SteadyTimes:
        """Return the times that a preset predicts."""
        context = self.load.prompt_tokens + self.load.output_tokens / 2

        def step_us(decodes: float, chunks: Sequence[Chunk]) -> float:
            gpu_us = self.steps.gpu_us(decodes=decodes, context_tokens=decodes * context, chunks=chunks)
            sequences = decodes + len(chunks)
            return float(preset.step_time_us(gpu_us, sequences=sequences, has_prefill=bool(chunks), layers=self.layers))

        first_us, token_us = self.load.times(step_us)
        # All clients start at once, and each sends ten requests: the first waits for half the prompts of all others.
        start_us = replace(self.load, in_step=True, mixes_prefill=False).times(step_us).first_us
        first_us += (max(start_us, first_us) - first_us) / _REQUESTS_OF_A_CLIENT
        return SteadyTimes(
            first_us + preset.first_token_delay_us(self.load.prompt_tokens, running=self.load.in_flight), token_us
        )

    def log_error(self, preset: EnginePreset) -> float:
        """Return the logarithm of the predicted over the measured time of a token."""
        return math.log(self.predicted(preset).token_us / self.measured.token_us)

    def first_log_error(self, preset: EnginePreset) -> float:
        """Return the same of the first token."""
        return math.log(self.predicted(preset).first_us / self.measured.first_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopCase(Case):
    """A measured closed loop; `loop` is None where there is a reason in `left_out`."""

    loop: LoopSample | None = None


def closed_loops(data: Path, *, measured: bool = True) -> Iterator[LoopCase]:
    """Yield all closed loops; B300 counts as B200.

    Args:
        data: the folder of measured data.
        measured: whether operators are; else the data sheet answers.
    """
    for row in read_rows(data / "serving" / "closed_loop_silicon.csv.gz"):
        stored = table_models.stored_model(row["model_path"], _FORMATS[row["gemm_quant_mode"]], data)
        family = stored.family if stored else None
        preset = _version_of(row["backend"], row["backend_version"])
        case = LoopCase(
            source="closed loop",
            group=str(family),
            split=row["split"],
            labels={
                "model": row["model_path"], "GPU": row["system"],
                "engine": preset.name if preset.version else f"{preset.name}, version unknown",
                "format": row["gemm_quant_mode"] or "bfloat16", "tp": row["tp_size"], "concurrency": row["concurrency"],
            },
            preset=preset,
            family=family,
        )  # fmt: skip
        tp, ep = int(row["tp_size"]), int(row["moe_ep_size"])
        parallel_attention = float(row["attention_dp_size"] or 1) > 1
        if stored is None or (reason := why_not_timed(stored.model.decoder)):
            yield replace(case, left_out=f"{row['model_path']}: {reason if stored else 'not among the configurations'}")
        elif parallel_attention or tp > _MOST_GPUS:
            yield replace(case, left_out="attention is data parallel or over more than 8 GPUs, which is not modelled")
        else:
            operators = operators_for(_GPUS[row["system"]], preset, measured=measured)
            model = step_model(stored, operators, tp, ep if tp % ep == 0 else 1)
            yield _loop_case(case, row, model, stored, operators.gpu)


def compared_loops(read: Sequence[LoopCase]) -> list[tuple[LoopCase, LoopSample]]:
    """Return the cases that are compared, each with its sample."""
    return [(case, case.loop) for case in read if case.loop is not None]


def _loop_case(case: LoopCase, row: Row, model: StepModel, stored: table_models.Stored, gpu: GpuSheet) -> LoopCase:
    clients = int(row["concurrency"])
    prompt, output = _MEAN_SHARE * float(row["isl"]), _MEAN_SHARE * float(row["osl"])
    kernels_us = _prefill_us(model, prompt)
    request_us = 1e3 * (float(row["ttft_ms"]) + output * float(row["tpot_ms"]))
    if clients * kernels_us > request_us:
        return replace(case, left_out="more prefill than the GPUs can do: other settings held than stated")
    load = SteadyLoad(
        in_flight=clients,
        prompt_tokens=prompt,
        output_tokens=output,
        max_step_tokens=_MAX_STEP_TOKENS,
        mixes_prefill=case.preset.mixes_prefill,
        asynchronous=case.preset.asynchronous,
        max_running=_sequences(case.preset, stored, gpu, tp=int(row["tp_size"]), tokens=prompt + output),
        in_step=row["source_kind"].startswith("nvidia-gap-analysis") and _is_power_of_two(int(row["isl"])),
    )
    measured = SteadyTimes(1e3 * float(row["ttft_ms"]), 1e3 * float(row["tpot_ms"]))
    return replace(case, loop=LoopSample(measured=measured, load=load, steps=model, layers=stored.model.layers))


def _sequences(
    preset: EnginePreset, stored: table_models.Stored, gpu: GpuSheet, *, tp: int, tokens: float
) -> float | None:
    """Return how many whole sequences the KV cache holds; None where no weights should fit, since they did."""
    settings = preset.settings(gpu, tp=tp, kv_value_bytes=BYTES_PER_WEIGHT[stored.formats.kv])
    settings = replace(settings, max_num_batched_tokens=_MAX_STEP_TOKENS)
    blocks = predict_kv_blocks(
        stored.model.decoder, gpu, tp=tp, settings=settings, stored_as=_weight_format(stored.formats.weights)
    )
    held = blocks * settings.block_size / tokens
    return held if held >= 1 else None


def _weight_format(weights: NumberFormat | None) -> WeightFormat | None:
    if weights is NumberFormat.FP8_BLOCK:
        return fp8_blocks(TILE, TILE)
    return None if weights is None else FORMATS[weights]


def _prefill_us(model: StepModel, tokens: float) -> float:
    """Return the kernels of a prompt, in chunks where it is longer than a step."""
    whole = round(tokens)
    starts = range(0, whole, _MAX_STEP_TOKENS)
    chunks = [Chunk(tokens=min(_MAX_STEP_TOKENS, whole - start), past=start) for start in starts]
    return sum(model.gpu_us(decodes=0, context_tokens=0, chunks=[chunk]) for chunk in chunks)


def _is_power_of_two(length: int) -> bool:
    return not length & (length - 1)


def _version_of(engine: str, version: str) -> EnginePreset:
    """Return the preset of an engine, the newest where the version is none."""
    try:
        Version(version)
    except InvalidVersion:
        return engine_preset(engine)
    return engine_preset(f"{engine}-{version}")
