"""A roofline of transformer inference: bytes over bandwidth, operations over speed, messages over links.

These are the formulas of the calibrated estimator. Every field of `OpCounts` and
`RooflineParameters` is a number or an array, so that a fit evaluates thousands of rows at once.
Times are seconds, amounts are bytes and floating-point operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Values: TypeAlias = Any
"""A number, or an array of them with one element per case."""

_FLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCounts:
    """The work of `batch` equal requests to a model under (TP, PP).

    Args:
        layers: layers of the whole model.
        layer_parameters: parameters of a layer.
        head_parameters: parameters of the output projection, which stay float16.
        hidden: hidden size.
        attention: width of all heads together; the hidden size in most models.
        kv_bytes: bytes of a token in the KV cache of one GPU, per layer.
        all_reduces: all-reduces per layer if TP is above 1.
        tp: tensor-parallel degree.
        pp: pipeline-parallel degree.
        batch: number of requests.
        prompt_tokens: prompt length of each request.
        layer_time_ratio: measured over predicted time of a layer; 1 if the model was not measured.
    """

    layers: Values
    layer_parameters: Values
    head_parameters: Values
    hidden: Values
    attention: Values
    kv_bytes: Values
    all_reduces: Values
    tp: Values
    pp: Values
    batch: Values
    prompt_tokens: Values
    layer_time_ratio: Values = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineParameters:
    """Speeds and fixed times of a kind of GPU and its serving software, for one weight type and TP degree.

    Args:
        weight_bytes: bytes of one parameter of a layer.
        bandwidth: bandwidth of GPU memory.
        layer_s: fixed time of a layer (kernels too short to fill the GPU).
        prefill_flops: operations per second during prefill.
        decode_flops: operations per second during decode.
        overlap: 1 adds the time for bytes and the time for operations; infinity takes the longer one.
        host_layer_s: host time per layer and token; pipeline stages hide most of it.
        host_pp_power: the host time falls with PP to this power.
        token_s: fixed time of a token.
        request_s: fixed time of a request at this TP degree.
        stage_request_s: fixed time per request and pipeline boundary, times the square root of TP.
        boundary_s: latency of a pipeline boundary per token.
        boundary_bandwidth: bandwidth of a pipeline boundary.
        all_reduce_s: latency of an all-reduce.
        one_shot_bandwidth: bandwidth of an all-reduce in which every GPU reads all data of all others.
        two_shot_bandwidth: bandwidth of one that scatters first; used above `one_shot_limit` bytes.
        ring_bandwidth: bandwidth of a ring all-reduce; used above `custom_limit` bytes.
        one_shot_limit: bytes.
        custom_limit: bytes.
    """

    weight_bytes: Values
    bandwidth: Values
    layer_s: Values
    prefill_flops: Values
    decode_flops: Values
    overlap: Values
    host_layer_s: Values
    host_pp_power: Values
    token_s: Values
    request_s: Values
    stage_request_s: Values
    boundary_s: Values
    boundary_bandwidth: Values
    all_reduce_s: Values
    one_shot_bandwidth: Values
    two_shot_bandwidth: Values
    ring_bandwidth: Values
    one_shot_limit: Values
    custom_limit: Values


def latency_s(ops: OpCounts, hardware: RooflineParameters, output_tokens: Values) -> Values:
    """Return the time from the start to the last token."""
    # On average half of the output tokens are in the KV cache.
    mean_context = ops.prompt_tokens + output_tokens / 2
    return first_token_s(ops, hardware) + (output_tokens - 1) * token_s(ops, hardware, mean_context)


def first_token_s(ops: OpCounts, hardware: RooflineParameters) -> Values:
    """Return the time of prefill: all prompt tokens at once, then the first output token."""
    tokens = ops.batch * ops.prompt_tokens
    # Causal attention needs half of 4 x tokens x context x width operations.
    attention_flop = 2 * tokens * ops.prompt_tokens * ops.attention
    operations_s = (2 * ops.layer_parameters * tokens + attention_flop) / ops.tp / hardware.prefill_flops
    layer_s = ops.layer_time_ratio * (
        _combined_s(_weights_s(ops, hardware), operations_s, hardware.overlap) + hardware.layer_s
    )
    boundaries = ops.pp - 1
    return (
        ops.layers * (layer_s + ops.all_reduces * all_reduce_s(hardware, ops.tp, _message_bytes(ops, tokens)))
        + _head_s(ops, hardware)
        + hardware.request_s
        + boundaries
        * (hardware.stage_request_s * ops.tp**0.5 + _message_bytes(ops, tokens) / hardware.boundary_bandwidth)
    )


def token_s(ops: OpCounts, hardware: RooflineParameters, context_tokens: Values) -> Values:
    """Return the time of one decode step, with `context_tokens` tokens of each request in the KV cache."""
    operations_s = 2 * ops.layer_parameters * ops.batch / ops.tp / hardware.decode_flops
    kv_s = ops.batch * context_tokens * ops.kv_bytes / hardware.bandwidth
    layer_s = ops.layer_time_ratio * (
        _combined_s(_weights_s(ops, hardware), operations_s, hardware.overlap) + kv_s + hardware.layer_s
    )
    message = _message_bytes(ops, ops.batch)
    return (
        ops.layers * (layer_s + ops.all_reduces * all_reduce_s(hardware, ops.tp, message))
        + ops.layers * hardware.host_layer_s / ops.pp**hardware.host_pp_power
        + _head_s(ops, hardware)
        + hardware.token_s
        + (ops.pp - 1) * (hardware.boundary_s + message / hardware.boundary_bandwidth)
    )


def all_reduce_s(hardware: RooflineParameters, tp: Values, message_bytes: Values) -> Values:
    """Return the time of an all-reduce over the GPUs of a layer; 0 at TP 1."""
    bandwidth = np.where(
        message_bytes > hardware.custom_limit,
        hardware.ring_bandwidth,
        np.where(message_bytes > hardware.one_shot_limit, hardware.two_shot_bandwidth, hardware.one_shot_bandwidth),
    )
    return (np.asarray(tp) > 1) * (hardware.all_reduce_s + message_bytes / bandwidth)


def _weights_s(ops: OpCounts, hardware: RooflineParameters) -> Values:
    return ops.layer_parameters * hardware.weight_bytes / ops.tp / hardware.bandwidth


def _head_s(ops: OpCounts, hardware: RooflineParameters) -> Values:
    return ops.head_parameters * _FLOAT16_BYTES / ops.tp / hardware.bandwidth


def _message_bytes(ops: OpCounts, tokens: Values) -> Values:
    return tokens * ops.hidden * _FLOAT16_BYTES


def _combined_s(bytes_s: Values, operations_s: Values, overlap: Values) -> Values:
    """Return a smooth roofline: with more overlap the result approaches the longer time."""
    return (bytes_s**overlap + operations_s**overlap) ** (1 / overlap)
