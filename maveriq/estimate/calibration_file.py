"""Calibrations: the fitted figures of the calibrated estimator for one kind of GPU, as TOML files.

`Calibration.roofline` returns the parameters of the roofline for a weight type and TP degree.
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
from maveriq.estimate.intervals import Interval, within
from maveriq.estimate.roofline import OpCounts, RooflineParameters, Values
from maveriq.files import exists
from maveriq.tables import Row, read_csv, read_toml

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class OnlineTp(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All-reduces of the live system at a TP degree; between sockets they take `across_us` longer."""

    all_reduce_us: _Positive
    ring_gb_s: _Positive
    across_us: _NotNegative = 0.0


class ContentionCosts(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How much longer a token takes while co-located engines (in the same host process) are busy.

    `layer_us` per layer if any other engine is busy, plus `turn_us` for each busy one after the first.
    """

    layer_us: _NotNegative
    turn_us: _NotNegative


class OnlineCalibration(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Figures of the live system that differ from the benchmark: warm engines, ring all-reduces, placement.

    GPUs 0 to `gpus_per_socket` - 1 belong to one socket of the host, the next as many to the next one.
    """

    request_ms: _NotNegative
    gpus_per_socket: Annotated[int, msgspec.Meta(ge=1)]
    tp: dict[str, OnlineTp]
    contention: ContentionCosts = ContentionCosts(layer_us=0.0, turn_us=0.0)


_ONLINE_COLUMNS = (
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
    """Read online calibrations by the recorded run that their fit left out.

    A row is a run and a TP degree. A row without a TP degree comes from a fit without tensor parallelism.

    Raises:
        InputError: not such a table, or an impossible value.
    """
    found: dict[str, OnlineCalibration] = {}
    for row in read_csv(path, _ONLINE_COLUMNS, what="calibration of the live system"):
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
    """Return the CSV table that `read_online` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_ONLINE_COLUMNS)
    for run, online in without.items():
        common = (online.request_ms, online.gpus_per_socket, online.contention.layer_us, online.contention.turn_us)
        for tp, figures in online.tp.items():
            table.writerow([run, tp, *common, figures.all_reduce_us, figures.ring_gb_s, figures.across_us])
        if not online.tp:
            table.writerow([run, "", *common, "", "", ""])
    return text.getvalue()


_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

BYTES_PER_PARAMETER: Mapping[WeightType, float] = {
    WeightType.FLOAT16: 2.0,
    WeightType.INT8: 1.0,
    WeightType.INT4: 0.5,
    WeightType.FP8: 1.0,
    WeightType.INT4_GPTQ: 0.5 + 4 / 128,  # plus a scale and a zero point, two bytes each, per group of 128
    WeightType.NVFP4: 0.5 + 1 / 16,  # plus a scale of one byte per block of 16
    WeightType.MXFP4: 0.5 + 1 / 32,
}


class ByWeights(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Fitted figures of a weight type."""

    layer_us: _Positive
    prefill_tflops: _Positive
    decode_tflops: _Positive


class ByTp(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """Fitted figures of a TP degree; the limits are those of the serving software, and TP 1 has no links.

    `peer_gb_s` is how fast a GPU reads the memory of other GPUs in a custom all-reduce. One-shot
    reads all data of every other GPU once; two-shot reads a part of the data of each, twice.
    """

    request_ms: _Positive
    peer_gb_s: _Positive = 1.0
    ring_gb_s: _Positive = 1.0
    one_shot_limit_mb: _NotNegative = 0.0
    custom_limit_mb: _NotNegative = 0.0


class Memory(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Fitted figures of memory other than weights and KV cache.

    `request_kb` is the memory that each request of a batch adds on every GPU, per unit of width.
    The width is twice the hidden size plus the intermediate size; a gated feed-forward part adds
    the share `gated` of the intermediate size again. `unsharded` is the share that TP does not
    divide. `gpus_gib` is the memory that (TP, PP) adds to that of (1, 1), by "TPxPP", for models not
    measured there. The KV cache is allocated in blocks of `kv_block_tokens` tokens, for the prompt
    and `output_tokens` output tokens.
    """

    request_kb: _Positive
    gated: _Share
    unsharded: _Share
    kv_block_tokens: Annotated[int, msgspec.Meta(ge=1)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1)]
    gpus_gib: dict[str, float]


class Margins(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Relative half-widths of 90 % intervals: memory, and latency by TP at batch 1 and above it.

    `memory_request` times the share of the memory that further requests of a batch add is added to
    `memory_single`, because that part is the most uncertain.
    """

    memory_single: _Positive
    memory_request: _NotNegative
    single: dict[str, _Positive]
    batched: dict[str, _Positive]

    def latency_interval(self, tp: int, batch: int) -> Interval:
        """Return the interval of a latency.

        It has equal sides: estimates of one model are too high and of the next too low, so that errors of few models
        do not tell on which side those of another will be.
        """
        return within((self.single if batch == 1 else self.batched)[str(tp)])


class Calibration(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All fitted figures.

    `trust` is the exponent, 0 to 1, on the ratio of measured to predicted layer time of a model's fingerprints.
    `online` is the table `served` in the file.
    """

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
    online: OnlineCalibration | None = msgspec.field(default=None, name="served")

    def roofline(
        self, weights: WeightType, tp: int, *, online: bool = False, across: float = 0.0
    ) -> RooflineParameters:
        """Return the roofline parameters of a weight type and TP degree, in seconds and bytes.

        Args:
            weights: a key of `weights`.
            tp: a key of `tp`.
            online: of the live system if `online` has figures, else of the benchmark.
            across: share of pipeline stages of the live system whose GPUs span several sockets.
        """
        kind, degree = self.weights[weights], self.tp[str(tp)]
        live = self.online if online else None
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
    """Return the parameters of a layer: queries, keys, values, output, and the feed-forward part."""
    attention = model.hidden_size * 2 * (model.attention_heads + model.kv_heads) * model.head_size
    return attention + model.feed_forward_matrices * model.hidden_size * model.intermediate_size


def kv_bytes(model: ModelSpec, kv: KvType, tp: int = 1) -> int:
    """Return the bytes of a token in the KV cache of one GPU, per layer; a KV head is never split."""
    heads = max(1, model.kv_heads // tp)
    return 2 * heads * model.head_size * (1 if kv is KvType.INT8 else 2)


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
    """Return the operation counts of a model under (TP, PP)."""
    return OpCounts(
        layers=model.layers,
        layer_parameters=layer_parameters(model),
        head_parameters=model.vocab_size * model.hidden_size,
        hidden=model.hidden_size,
        attention=model.attention_heads * model.head_size,
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

    It is `path` itself if the ground truth has no such model.
    """
    without = path.with_name(f"{path.stem}-without-{without_model}{path.suffix}")
    return without if without_model and exists(without) else path


def read_calibration(path: Path, *, without_model: str | None = None, without_run: str | None = None) -> Calibration:
    """Read a calibration.

    Args:
        path: the TOML file that `scripts/fit_calibrated.py` or `maveriq fit` wrote.
        without_model: read the calibration fitted without the ground truth of this model.
        without_run: use the online calibration fitted without this recorded run.

    Raises:
        InputError: not such a file, or an impossible value.
        UnknownNameError: no recorded run of that name.
    """
    calibration = read_toml(calibration_path(path, without_model), Calibration, what="calibration")
    if without_run is None:
        return calibration
    runs = online_by_excluded_run(path)
    if without_run not in runs:
        raise UnknownNameError("recorded run", without_run, runs, hint="or leave none out: no fit saw any other run")
    return msgspec.structs.replace(calibration, online=runs[without_run])


def online_by_excluded_run(path: Path) -> dict[str, OnlineCalibration]:
    """Return the online calibrations by the recorded run that their fit left out, for every run of the fit.

    Raises:
        InputError: the table does not exist or is invalid.
    """
    return read_online(path.with_name(f"{path.stem}-served.csv"))


def to_toml(calibration: Calibration, comment: str) -> str:
    """Return a calibration as TOML, after the comment."""
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
