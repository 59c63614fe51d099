"""The closed loops: engines with a fixed number of clients, replayed step by step.

Each client sends its next request when the last one has ended, ten requests a client, all at once at the start.
Prompts and outputs are uniform between 0.8 and 1 times their nominal lengths. Replays are of fewer requests a client
where there are many clients; the burst at the start then counts as one of ten all the same.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import InvalidVersion, Version

from maveriq.domain.engine_defaults import NEWEST_CHECKED
from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet
from maveriq.domain.requests import Request
from maveriq.domain.weight_formats import FORMATS, WeightFormat
from maveriq.engine.interface import Engine
from maveriq.engine.other_settings import SglangSettings, TrtllmSettings
from maveriq.engine.settings import EngineHost, ResolvedSettings
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.estimate.engine_memory import EngineSettings, predict_kv_blocks
from maveriq.estimate.engine_presets import EnginePreset, engine_preset
from maveriq.estimate.intervals import Family
from maveriq.estimate.kernel_bounds import BYTES_PER_WEIGHT
from maveriq.estimate.step_time import why_not_timed
from maveriq.estimate.step_timer import StepTimer
from maveriq.scenario.continuous_engines import EngineParts, admission_delay
from maveriq.sim.engine_replay import replay_on_engine

sys.path.append(str(Path(__file__).parents[1] / "physics"))

import step_cases
import table_models

_REQUESTS_A_CLIENT = 10
_FEW_CLIENTS, _FEWER_REQUESTS = 16, 4
_SHORTEST = 0.8  # of the nominal lengths
_MAX_STEP_TOKENS = 8192
_GPUS = {
    "h100_sxm": "H100-SXM", "h200_sxm": "H200-SXM", "b200_sxm": "B200-SXM", "b300_sxm": "B200-SXM", "gb200": "GB200",
}  # fmt: skip
_FORMATS = {"nvfp4": "nvfp4", "int4_wo": "int4", "fp8": "fp8", "fp8_block": "fp8_block", "": "bfloat16"}


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopPoint:
    """A closed loop of one engine.

    Args:
        row: of the table.
        family: of the model.
        preset: of the engine.
        left_out: why it is not replayed; "" where it is.
    """

    row: Mapping[str, str]
    family: Family | None
    preset: EnginePreset
    left_out: str = ""

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        """Model, format, GPU, engine and version: what a calibration belongs to."""
        row = self.row
        return row["model_path"], row["gemm_quant_mode"], row["system"], self.preset.engine, row["backend_version"]

    @property
    def has_equal_lengths(self) -> bool:
        """Whether all prompts are equally long, and all outputs, so that requests stay in step.

        In runs of the "gap analysis" whose lengths are powers of two, a first token waits for several prompts however
        few the clients: only requests that end together wait so for each other.
        """
        is_power_of_two = not self.prompt_tokens & (self.prompt_tokens - 1)
        return self.row["source_kind"].startswith("nvidia-gap-analysis") and is_power_of_two

    @property
    def clients(self) -> int:
        """Requests in flight."""
        return int(self.row["concurrency"])

    @property
    def prompt_tokens(self) -> int:
        """Nominal length of prompts."""
        return int(self.row["isl"])

    @property
    def output_tokens(self) -> int:
        """Nominal length of outputs."""
        return int(self.row["osl"])

    @property
    def ttft_s(self) -> float:
        """The measured mean."""
        return float(self.row["ttft_ms"]) / 1e3

    @property
    def tpot_s(self) -> float:
        """The measured mean."""
        return float(self.row["tpot_ms"]) / 1e3


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Mean times of a replayed loop, in seconds."""

    ttft_s: float
    tpot_s: float


def loop_points(data: Path) -> Iterator[LoopPoint]:
    """Yield the points of the table.

    Args:
        data: the folder of measured data, with `serving` and `models`.
    """
    with gzip.open(data / "serving" / "closed_loop_silicon.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            stored = _stored(row, data)
            point = LoopPoint(row=row, family=stored.family if stored else None, preset=_preset(row))
            if stored is None:
                yield replace(point, left_out="model not among the configurations")
            elif reason := why_not_timed(stored.model.decoder):
                yield replace(point, left_out=reason)
            elif float(row["attention_dp_size"] or 1) > 1 or int(row["tp_size"]) > 8 or int(row["pp_size"] or 1) > 1:
                yield replace(point, left_out="attention is data parallel, or over more than 8 GPUs, or in stages")
            elif not _holds_all_clients(point, stored):
                yield replace(point, left_out="the KV cache, of a format that is not recorded, may be too small")
            else:
                yield point


def replay(point: LoopPoint, data: Path) -> LoopTimes:
    """Replay a point that is not left out."""
    stored = _stored(point.row, data)
    assert stored is not None  # noqa: S101
    tp, ep = int(point.row["tp_size"]), int(point.row["moe_ep_size"] or 1)
    operators = step_cases.operators_for(_GPUS[point.row["system"]], point.preset, measured=True)
    steps = step_cases.step_model(stored, operators, tp, ep if tp % ep == 0 else 1)
    parts = EngineParts(
        engine=_engine(point, stored),
        timer=StepTimer(steps, point.preset, layers=stored.model.layers),
        admission_delay_us=admission_delay(point.preset, max_num_seqs=point.clients),
    )
    requests = _requests(point)
    found = replay_on_engine(parts, requests, max_in_flight=point.clients)
    outputs = np.asarray([request.output_tokens for request in requests])
    tpot_s = (found.e2e_s - found.ttft_s) / np.maximum(outputs - 1, 1)
    return LoopTimes(_mean(point, found.ttft_s), _mean(point, tpot_s))


def _mean(point: LoopPoint, values: Any) -> float:
    """Return the mean as if there were ten requests a client, of which the first come at once."""
    first, later = values[: point.clients], values[point.clients :]
    share = 1 / _REQUESTS_A_CLIENT
    return float(share * first.mean() + (1 - share) * later.mean())


def _requests(point: LoopPoint) -> list[Request]:
    number = point.clients * (_REQUESTS_A_CLIENT if point.clients <= _FEW_CLIENTS else _FEWER_REQUESTS)
    random = np.random.default_rng([point.clients, point.prompt_tokens, point.output_tokens])
    shortest = 1.0 if point.has_equal_lengths else _SHORTEST
    prompts, outputs = (
        random.integers(max(1, round(shortest * nominal)), nominal, endpoint=True, size=number)
        for nominal in (point.prompt_tokens, point.output_tokens)
    )
    return [
        Request(request_id=index, endpoint_id=1, arrival_us=0, prompt_tokens=int(prompt), output_tokens=int(output))
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1)
    ]


def _holds_all_clients(point: LoopPoint, stored: table_models.Stored) -> bool:
    """Return whether the KV cache holds the longest request of every client at once.

    Where it does not, the points measure how requests wait for it. They cannot judge that: with a cache of half as many
    bytes a value they would not wait.
    """
    settings, blocks = _sized(point, stored)
    tokens = point.prompt_tokens + point.output_tokens
    return blocks >= point.clients * -(-tokens // settings.block_size) + settings.reserved_blocks


def _engine(point: LoopPoint, stored: table_models.Stored) -> Engine:
    settings, blocks = _sized(point, stored)
    return settings.make_engine(blocks)


def _sized(point: LoopPoint, stored: table_models.Stored) -> tuple[ResolvedSettings, int]:
    """Return the engine's settings and its KV blocks; 0 blocks where the weights do not fit."""
    gpu, tp = gpu_sheet(_GPUS[point.row["system"]]), int(point.row["tp_size"])
    longest = point.prompt_tokens + point.output_tokens
    host = EngineHost(context_tokens=longest, gpu_name=gpu.name, gpu_memory_gib=gpu.usable_gib)
    if point.preset.engine == "sglang":
        settings = SglangSettings(
            max_running_requests=max(point.clients, 1), disable_radix_cache=True, tensor_parallel_size=tp
        ).resolve(host)
    elif point.preset.engine == "trtllm":
        settings = TrtllmSettings(
            max_batch_size=max(point.clients, 1), max_num_tokens=max(_MAX_STEP_TOKENS, longest),
            enable_block_reuse=False, max_seq_len=longest,
        ).resolve(host)  # fmt: skip
    else:
        settings = VllmSettings(
            version=_release(point.row["backend_version"]) or NEWEST_CHECKED, max_num_seqs=point.clients,
            max_num_batched_tokens=_MAX_STEP_TOKENS, max_model_len=longest, enable_prefix_caching=False,
            block_size=16,
        ).resolve(host)  # fmt: skip
    blocks = predict_kv_blocks(
        stored.model.decoder, gpu, tp=tp, stored_as=_weights(stored),
        settings=EngineSettings(
            block_size=settings.block_size, kv_value_bytes=BYTES_PER_WEIGHT[stored.formats.kv],
            gpu_memory_utilization=0.9 if settings.is_share_of_free else settings.memory_share,
        ),
    )  # fmt: skip
    return settings, blocks


def _weights(stored: table_models.Stored) -> WeightFormat | None:
    """Return how weights are stored for their size; None for as the checkpoint stores them."""
    number_format = stored.formats.weights
    if number_format is None or stored.model.quantization:
        return None
    return FORMATS["fp8" if number_format is NumberFormat.FP8_BLOCK else str(number_format)]


def _stored(row: Mapping[str, str], data: Path) -> table_models.Stored | None:
    return table_models.stored_model(row["model_path"], _FORMATS[row["gemm_quant_mode"]], data)


def _release(version: str) -> str | None:
    try:
        return str(Version(version).base_version)
    except InvalidVersion:
        return None


def _preset(row: Mapping[str, str]) -> EnginePreset:
    """Return the preset of an engine, the newest where the version is none."""
    release = _release(row["backend_version"])
    return engine_preset(row["backend"] if release is None else f"{row['backend']}-{release}")
