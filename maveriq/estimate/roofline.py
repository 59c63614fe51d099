"""A roofline of transformer inference: bytes over bandwidth, operations over speed, messages over links.

These are the calibrated estimator's formulas, free of tables and names. Every field of `OpCounts`
and `RooflineParameters` is a number or an array, so that a fit evaluates thousands of rows at
once. Times are seconds, amounts are bytes and floating-point operations.
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
    """What there is to do: a model under (TP, PP), for `batch` equal requests.

    Args:
        layers: of the whole model.
        layer_parameters: weights of a layer.
        head_parameters: weights of the output projection, which stay float16.
        hidden: hidden size.
        kv_bytes: that a token leaves in the KV cache of one GPU, per layer.
        all_reduces: per layer, where TP is above 1.
        tp: tensor-parallel degree.
        pp: pipeline-parallel degree.
        batch: requests at once.
        prompt_tokens: of each.
        layer_time_ratio: time of a layer over what the law says; 1 where nothing is known of the model.
    """

    layers: Values
    layer_parameters: Values
    head_parameters: Values
    hidden: Values
    kv_bytes: Values
    all_reduces: Values
    tp: Values
    pp: Values
    batch: Values
    prompt_tokens: Values
    layer_time_ratio: Values = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineParameters:
    """What a kind of GPU and its serving software can do, for one weight type and TP.

    Args:
        weight_bytes: of one parameter of a layer.
        bandwidth: of GPU memory.
        layer_s: fixed time of a layer (kernels too short to fill the GPU).
        prefill_flops: operations per second on many tokens at once.
        decode_flops: on one token of each request of a batch.
        overlap: 1 adds the time for bytes and the time for operations, infinity takes the longer.
        host_layer_s: per layer and token, spent by the host; pipeline stages hide most of it.
        host_pp_power: that time falls with PP to this power.
        token_s: fixed time of a token.
        request_s: fixed time of a request at this TP.
        stage_request_s: per request and pipeline boundary, times the root of TP.
        boundary_s: latency of handing a token over a pipeline boundary.
        boundary_bandwidth: of it.
        all_reduce_s: latency of an all-reduce.
        one_shot_bandwidth: of an all-reduce in which every GPU reads all of all others.
        two_shot_bandwidth: of one that scatters first; taken from `one_shot_limit` bytes on.
        ring_bandwidth: of one around a ring; taken above `custom_limit` bytes.
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


def latency_s(work: OpCounts, law: RooflineParameters, output_tokens: Values) -> Values:
    """Return the time from the start to the last token."""
    # Half the output tokens are in the KV cache of the mean token.
    mean_context = work.prompt_tokens + output_tokens / 2
    return first_token_s(work, law) + (output_tokens - 1) * token_s(work, law, mean_context)


def first_token_s(work: OpCounts, law: RooflineParameters) -> Values:
    """Return the time of prefill: all prompt tokens at once, then the first output token."""
    tokens = work.batch * work.prompt_tokens
    # Causal attention needs half of 4 x tokens x context x hidden operations.
    attention_flop = 2 * tokens * work.prompt_tokens * work.hidden
    operations_s = (2 * work.layer_parameters * tokens + attention_flop) / work.tp / law.prefill_flops
    layer_s = work.layer_time_ratio * (_together(_weights_s(work, law), operations_s, law.overlap) + law.layer_s)
    boundaries = work.pp - 1
    return (
        work.layers * (layer_s + work.all_reduces * all_reduce_s(law, work.tp, _message_bytes(work, tokens)))
        + _head_s(work, law)
        + law.request_s
        + boundaries * (law.stage_request_s * work.tp**0.5 + _message_bytes(work, tokens) / law.boundary_bandwidth)
    )


def token_s(work: OpCounts, law: RooflineParameters, context_tokens: Values) -> Values:
    """Return the time of one more token of each request, with so many tokens in each KV cache."""
    operations_s = 2 * work.layer_parameters * work.batch / work.tp / law.decode_flops
    kv_s = work.batch * context_tokens * work.kv_bytes / law.bandwidth
    layer_s = work.layer_time_ratio * (_together(_weights_s(work, law), operations_s, law.overlap) + kv_s + law.layer_s)
    message = _message_bytes(work, work.batch)
    return (
        work.layers * (layer_s + work.all_reduces * all_reduce_s(law, work.tp, message))
        + work.layers * law.host_layer_s / work.pp**law.host_pp_power
        + _head_s(work, law)
        + law.token_s
        + (work.pp - 1) * (law.boundary_s + message / law.boundary_bandwidth)
    )


def all_reduce_s(law: RooflineParameters, tp: Values, message_bytes: Values) -> Values:
    """Return the time to sum up a message over the GPUs of a layer; nothing at TP 1."""
    bandwidth = np.where(
        message_bytes > law.custom_limit,
        law.ring_bandwidth,
        np.where(message_bytes > law.one_shot_limit, law.two_shot_bandwidth, law.one_shot_bandwidth),
    )
    return (np.asarray(tp) > 1) * (law.all_reduce_s + message_bytes / bandwidth)


def _weights_s(work: OpCounts, law: RooflineParameters) -> Values:
    return work.layer_parameters * law.weight_bytes / work.tp / law.bandwidth


def _head_s(work: OpCounts, law: RooflineParameters) -> Values:
    return work.head_parameters * _FLOAT16_BYTES / work.tp / law.bandwidth


def _message_bytes(work: OpCounts, tokens: Values) -> Values:
    return tokens * work.hidden * _FLOAT16_BYTES


def _together(bytes_s: Values, operations_s: Values, overlap: Values) -> Values:
    """Return a smooth roofline: the more overlap, the nearer to the longer of the two."""
    return (bytes_s**overlap + operations_s**overlap) ** (1 / overlap)
