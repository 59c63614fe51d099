"""Calibrations: the calibrated estimator's fitted figures for one kind of GPU, read from and written to TOML.

`OnlineCalibration` holds the figures in which the live system differs from the benchmark.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.roofline import OpCounts, RooflineParameters, Values
from maveriq.files import exists
from maveriq.tables import Row, read_csv, read_toml

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class OnlineTp(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All-reduces of the live system at a tensor-parallel degree; `across_us` more between sockets."""

    all_reduce_us: _Positive
    ring_gb_s: _Positive
    across_us: _NotNegative = 0.0


class ContentionCosts(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a token costs more while neighbours are busy: engines that run in the same process of the host.

    `layer_us` per layer with any neighbour, `turn_us` with every further one.
    """

    layer_us: _NotNegative
    turn_us: _NotNegative


class OnlineCalibration(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What the live system does otherwise than the benchmark: warm engines, rings, placement.

    GPUs 0 to `gpus_per_socket` - 1 hang at one socket of the host, the next as many at another.
    """

    request_ms: _NotNegative
    gpus_per_socket: Annotated[int, msgspec.Meta(ge=1)]
    tp: dict[str, OnlineTp]
    contention: ContentionCosts = ContentionCosts(layer_us=0.0, turn_us=0.0)


_SERVED_COLUMNS = (
    "without_run",
    "tp",
    "request_ms",
    "gpus_per_socket",
    "layer_us",
    "turn_us",
    "all_reduce_us",
    "ring_gb_s",
    "across_us",
)


def read_online(path: Path) -> dict[str, OnlineCalibration]:
    """Read the figures of the live system by the recorded run that was left out of their fit.

    A row is a run and a TP; one without a TP is of a fit that saw no tensor parallelism.

    Raises:
        InputError: not such a table, or a figure that cannot be.
    """
    found: dict[str, OnlineCalibration] = {}
    for row in read_csv(path, _SERVED_COLUMNS, what="calibration of the live system"):
        run = row.text("without_run")
        found[run] = OnlineCalibration(
            request_ms=row.number("request_ms", minimum=0),
            gpus_per_socket=row.count("gpus_per_socket", minimum=1),
            contention=ContentionCosts(
                layer_us=row.number("layer_us", minimum=0), turn_us=row.number("turn_us", minimum=0)
            ),
            tp={**(found[run].tp if run in found else {}), **(_links(row) if row.cells["tp"] else {})},
        )
    return found


def _links(row: Row) -> dict[str, OnlineTp]:
    figures = OnlineTp(
        all_reduce_us=row.number("all_reduce_us", minimum=1e-6),
        ring_gb_s=row.number("ring_gb_s", minimum=1e-9),
        across_us=row.number("across_us", minimum=0),
    )
    return {str(row.count("tp", minimum=2)): figures}


def online_csv(without: Mapping[str, OnlineCalibration]) -> str:
    """Return the table that `read_served` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_SERVED_COLUMNS)
    for run, served in without.items():
        common = (served.request_ms, served.gpus_per_socket, served.contention.layer_us, served.contention.turn_us)
        for tp, figures in served.tp.items():
            table.writerow([run, tp, *common, figures.all_reduce_us, figures.ring_gb_s, figures.across_us])
        if not served.tp:
            table.writerow([run, "", *common, "", "", ""])
    return text.getvalue()


_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

BYTES_PER_PARAMETER: Mapping[WeightType, float] = {
    WeightType.FLOAT16: 2.0,
    WeightType.INT8: 1.0,
    WeightType.INT4: 0.5,
    WeightType.INT4_GPTQ: 0.5 + 4 / 128,  # and a scale and a zero, two bytes each, per group of 128
}


class ByWeights(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Figures of a weight type."""

    layer_us: _Positive
    prefill_tflops: _Positive
    decode_tflops: _Positive


class ByTp(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """Figures of a tensor-parallel degree; limits are those of the serving software, TP 1 has no links.

    `peer_gb_s` is how fast a GPU reads the memory of others in a custom all-reduce, which it does
    once for each of them (one shot), or for a part of each, twice (two shots).
    """

    request_ms: _Positive
    peer_gb_s: _Positive = 1.0
    ring_gb_s: _Positive = 1.0
    one_shot_limit_mb: _NotNegative = 0.0
    custom_limit_mb: _NotNegative = 0.0


class Memory(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Memory beside weights and KV cache.

    `request_kb` is what a request of a batch adds on every GPU, per unit of width: twice the hidden
    and once the intermediate size, and `gated` of it again where the feed-forward part is gated;
    `unsharded` is the share of it that TP does not divide.
    `gpus_gib` is what (TP, PP) holds beyond (1, 1), by "TPxPP", for models not measured there. KV
    cache is allocated in blocks of tokens, for the prompt and so many output tokens.
    """

    request_kb: _Positive
    gated: _Share
    unsharded: _Share
    kv_block_tokens: Annotated[int, msgspec.Meta(ge=1)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1)]
    gpus_gib: dict[str, float]


class Margins(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Relative half-widths of 90 % intervals: memory, and latency by TP at batch 1 and above it.

    `memory_request` comes on top of `memory_single` by the share of a deployment's memory that
    requests of a batch beyond the first add: that part is the least known.
    """

    memory_single: _Positive
    memory_request: _NotNegative
    single: dict[str, _Positive]
    batched: dict[str, _Positive]


class Calibration(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All fitted figures; `trust` is how much of a fingerprint's deviation from the law is believed."""

    trust: _Share
    bandwidth_gb_s: _Positive
    overlap: Annotated[float, msgspec.Meta(ge=1, le=100)]
    host_layer_us: _NotNegative
    host_pp_power: _NotNegative
    token_us: _NotNegative
    all_reduce_us: _NotNegative
    stage_request_ms: _NotNegative
    boundary_us: _NotNegative
    boundary_gb_s: _Positive
    weights: dict[WeightType, ByWeights]
    tp: dict[str, ByTp]
    memory: Memory
    margins: Margins
    served: OnlineCalibration | None = None

    def law(self, weights: WeightType, tp: int, *, served: bool = False, across: float = 0.0) -> RooflineParameters:
        """Return the law of a weight type and TP, in seconds and bytes.

        Args:
            weights: a key of `weights`.
            tp: a key of `tp`.
            served: as the live system is, where that is known; else as the benchmark was.
            across: share of the stages of the live system whose GPUs hang at several sockets.
        """
        kind, degree = self.weights[weights], self.tp[str(tp)]
        live = self.served if served else None
        live_tp = live.tp.get(str(tp)) if live else None
        others = max(1, tp - 1)
        return RooflineParameters(
            weight_bytes=BYTES_PER_PARAMETER[weights],
            bandwidth=self.bandwidth_gb_s * 1e9,
            layer_s=kind.layer_us * 1e-6,
            prefill_flops=kind.prefill_tflops * 1e12,
            decode_flops=kind.decode_tflops * 1e12,
            overlap=self.overlap,
            host_layer_s=self.host_layer_us * 1e-6,
            host_pp_power=self.host_pp_power,
            token_s=self.token_us * 1e-6,
            request_s=(live.request_ms if live else degree.request_ms) * 1e-3,
            stage_request_s=0.0 if live else self.stage_request_ms * 1e-3,
            boundary_s=self.boundary_us * 1e-6,
            boundary_bandwidth=self.boundary_gb_s * 1e9,
            all_reduce_s=1e-6 * (live_tp.all_reduce_us + across * live_tp.across_us if live_tp else self.all_reduce_us),
            one_shot_bandwidth=degree.peer_gb_s * 1e9 / others,
            two_shot_bandwidth=degree.peer_gb_s * 1e9 / (2 * others / tp),
            ring_bandwidth=(live_tp.ring_gb_s if live_tp else degree.ring_gb_s) * 1e9,
            one_shot_limit=0.0 if live_tp else degree.one_shot_limit_mb * 1e6,
            custom_limit=0.0 if live_tp else degree.custom_limit_mb * 1e6,
        )


def layer_parameters(model: ModelSpec) -> int:
    """Return the weights of a layer: queries, keys, values, output, and the feed-forward part."""
    kv_width = model.kv_heads * model.hidden_size // model.attention_heads
    attention = model.hidden_size * (2 * model.hidden_size + 2 * kv_width)
    return attention + model.feed_forward_matrices * model.hidden_size * model.intermediate_size


def kv_bytes(model: ModelSpec, kv: KvType, tp: int = 1) -> int:
    """Return what a token leaves in the KV cache of one GPU, per layer; no KV head is split."""
    heads = max(1, model.kv_heads // tp)
    return 2 * heads * (model.hidden_size // model.attention_heads) * (1 if kv is KvType.INT8 else 2)


def op_counts(
    model: ModelSpec,
    kv: KvType,
    *,
    tp: int,
    pp: int,
    batch: Values,
    prompt_tokens: Values,
    layer_time_ratio: Values = 1.0,
) -> OpCounts:
    """Return what a model has to do under (TP, PP)."""
    return OpCounts(
        layers=model.layers,
        layer_parameters=layer_parameters(model),
        head_parameters=model.vocab_size * model.hidden_size,
        hidden=model.hidden_size,
        kv_bytes=kv_bytes(model, kv, tp),
        all_reduces=model.all_reduces_per_layer,
        tp=tp,
        pp=pp,
        batch=batch,
        prompt_tokens=prompt_tokens,
        layer_time_ratio=layer_time_ratio,
    )


def calibration_path(path: Path, without_model: str | None) -> Path:
    """Return the file of the calibration that was fitted without a model's ground truth.

    A model that no ground truth was present of left nothing out; for it the file is `path` itself.
    """
    without = path.with_name(f"{path.stem}-without-{without_model}{path.suffix}")
    return without if without_model and exists(without) else path


def read_calibration(path: Path, *, without_model: str | None = None, without_run: str | None = None) -> Calibration:
    """Read a calibration.

    Args:
        path: the TOML file that `scripts/fit_calibrated.py` or `maveriq fit` wrote.
        without_model: take the one fitted without this model's ground truth.
        without_run: take the figures of the live system fitted without this recorded run.

    Raises:
        InputError: not such a file, or a figure that cannot be.
        UnknownNameError: no recorded run of that name.
    """
    calibration = read_toml(calibration_path(path, without_model), Calibration, what="calibration")
    if without_run is None:
        return calibration
    runs = served_without(path)
    if without_run not in runs:
        raise UnknownNameError("recorded run", without_run, runs, hint="or leave none out: no fit saw any other run")
    return msgspec.structs.replace(calibration, served=runs[without_run])


def served_without(path: Path) -> dict[str, OnlineCalibration]:
    """Return the figures of the live system by the recorded run that a calibration's fit left out: every run it saw.

    Raises:
        InputError: there are none, or not in such a table.
    """
    return read_online(path.with_name(f"{path.stem}-served.csv"))


def to_toml(calibration: Calibration, comment: str) -> str:
    """Return the TOML file of a calibration, comment lines first."""
    import tomli_w

    tables = {key: value for key, value in msgspec.to_builtins(calibration).items() if value is not None}
    lines = (f"# {line}".rstrip() for line in comment.splitlines())
    return "\n".join(lines) + "\n\n" + tomli_w.dumps(tables)


def require(path: Path | None, profile: str) -> Path:
    """Return the path of a profile's calibration.

    Raises:
        InputError: the profile has none.
    """
    if path is None:
        raise InputError(
            f"profile {profile} has no calibration, which the calibrated estimator needs: "
            "fit one with `maveriq fit DATA --out FOLDER` and name it in the hardware file as tables.calibrated"
        )
    return path
