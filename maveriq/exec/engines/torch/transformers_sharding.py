"""A rank's shard of the modules of a layer: by transformers' own plan, and quantised where asked for.

transformers says for each family how its matrices are split (`base_model_tp_plan`): by outputs, by inputs, or not at
all. Its own implementation wraps weights in DTensors. Here a rank keeps only its part of a matrix, in plain tensors, so
that the part can be quantised, and sums with the collectives of this engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from maveriq.domain.models import WeightType
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.collectives import Collectives
from maveriq.exec.engines.torch.config import Shard, TransformersConfig
from maveriq.exec.engines.torch.linear import Linear, make_linear
from maveriq.exec.engines.torch.weights import RandomWeights, WeightSource

_WHOLE = ("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "local_params")
"""Styles that leave a parameter whole on every rank; they matter in training alone."""
_COLUMN, _GATHERED = "colwise", ("colwise_gather_output", "colwise_rep")
_ROW, _SPLIT_ROW = "rowwise", ("rowwise_split_input", "rowwise_rep")
_PACKED, _SUMMED = "packed_colwise", ("moe_tp_experts", "all_reduce")
_KV_PROJECTIONS = re.compile(r"[kv]_proj")


class StageSum:
    """Sums the terms of the ranks of a stage, and adds the bias once."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def __call__(self, term: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of all ranks' terms, plus the bias."""
        total = self._collectives.all_reduce(term)
        return total if bias is None else total + bias


class PairSum(StageSum):
    """The sum of a layer whose two parts are added: the first term waits for the second, so one all-reduce is enough.

    The first call returns zeros, the second the sum of both.
    """

    def __init__(self, collectives: Collectives) -> None:
        super().__init__(collectives)
        self._waiting: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def __call__(self, term: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return zeros for the first part of a layer, and for the second the sum of all ranks' terms of both."""
        if self._waiting is None:
            self._waiting = (term, bias)
            return torch.zeros_like(term)
        (first, first_bias), self._waiting = self._waiting, None
        total = super().__call__(term + first, bias)
        return total if first_bias is None else total + first_bias


class ColumnLinear(nn.Module):  # type: ignore[misc]
    """This rank's outputs of a linear layer; those of all ranks if `gather` is given."""

    def __init__(self, matrix: Linear, gather: Collectives | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self._gather = gather

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs]."""
        y = self.matrix(x)
        return y if self._gather is None else torch.cat(self._gather.all_gather(y), dim=-1)


class RowLinear(nn.Module):  # type: ignore[misc]
    """A linear layer of which this rank has some inputs: its term is summed over the stage.

    Args:
        inputs: the inputs to take where `forward` is given all of them, None where it is given this rank's.
    """

    def __init__(self, matrix: Linear, bias: torch.Tensor | None, total: StageSum, inputs: slice | None) -> None:
        super().__init__()
        self.matrix = matrix
        self._bias = bias
        self._total = total
        self._inputs = inputs

    @property
    def bias_bytes(self) -> int:
        """Memory of the bias."""
        return 0 if self._bias is None else int(self._bias.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs]."""
        return self._total(self.matrix(x if self._inputs is None else x[..., self._inputs]), self._bias)


class QuantizedExperts:
    """The matrices of all experts, quantised; an index returns that of one expert, expanded."""

    def __init__(self, kind: str, weights: torch.Tensor) -> None:
        self.dtype = weights.dtype
        self.device = weights.device
        self.shape = weights.shape
        self._experts = [make_linear(kind, weight) for weight in weights]

    def __getitem__(self, expert: Any) -> torch.Tensor:
        """Return the matrix [outputs, inputs] of an expert."""
        return self._experts[int(expert)].expanded(self.dtype)

    @property
    def size_bytes(self) -> int:
        """Memory of the codes and scales."""
        return sum(expert.size_bytes for expert in self._experts)


def plan_of(model: Any, tp: int) -> Mapping[str, str]:
    """Return how the parts of a model's layers are split, by name within the base model with `*` for numbers.

    Raises:
        EngineError: they are to be split, and transformers has no plan.
    """
    plan = dict(model.config.base_model_tp_plan or {})
    if tp > 1 and not {_ROW, *_SPLIT_ROW} & set(plan.values()):
        raise EngineError(
            FailureKind.UNSUPPORTED, f"transformers has no tensor-parallel plan for {model.config.model_type}"
        )
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoader:
    """Loads this rank's shard of layers.

    Args:
        config: of the whole model.
        shard: which part this rank holds.
        kind: a `WeightType`, of matrices.
        plan: of `plan_of`.
        prefix: the name of the base model, which the plan leaves out.
        source: of weights.
        collectives: sums over the stage.
    """

    config: TransformersConfig
    shard: Shard
    kind: str
    plan: Mapping[str, str]
    prefix: str
    source: WeightSource
    collectives: Collectives

    def load(self, layer: nn.Module, name: str) -> int:
        """Load a layer of this name and return the memory of its weights.

        Raises:
            EngineError: weights cannot be read, or a part of the layer cannot be split or quantised.
        """
        total = (PairSum if self.config.parallel_attention else StageSum)(self.collectives)
        size_bytes = 0
        for path, module in list(layer.named_modules()):
            full = f"{name}.{path}" if path else name
            if isinstance(module, nn.Linear | Conv1D) and (self.shard.tp > 1 or self.kind != WeightType.FLOAT16):
                replaced, size = self._linear(module, full, total)
                parent, _, attribute = path.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, replaced)
                size_bytes += size
                continue
            size_bytes += self._parameters(module, full)
            if self.shard.tp > 1:
                self._hook(module, full)
        return size_bytes

    def _style(self, name: str) -> str:
        """Return how a module or parameter is split, "" if it is not."""
        if self.shard.tp == 1:
            return ""
        within = re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(f"{self.prefix}."))
        style = self.plan.get(within, "")
        return "" if style in _WHOLE else style

    def _linear(self, module: Any, name: str, total: StageSum) -> tuple[nn.Module, int]:
        weight, bias = self._read_linear(module, name)
        outputs, inputs = weight.shape
        style = self._style(name)
        if not style:
            matrix = make_linear(self.kind, weight, bias)
            return ColumnLinear(matrix), matrix.size_bytes
        if style == _COLUMN or style in _GATHERED:
            mine = self._outputs(name, outputs, style)
            matrix = make_linear(self.kind, weight[mine].clone(), None if bias is None else bias[mine].clone())
            return ColumnLinear(matrix, None if style == _COLUMN else self.collectives), matrix.size_bytes
        if style == _ROW or style in _SPLIT_ROW:
            mine = self._equal(name, inputs)
            matrix = make_linear(self.kind, weight[:, mine].clone())
            row = RowLinear(matrix, bias, total, mine if style in _SPLIT_ROW else None)
            return row, matrix.size_bytes + row.bias_bytes
        raise self._unknown(style, name)

    def _read_linear(self, module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight [outputs, inputs] and bias."""
        weight = self.source.read(f"{name}.weight", tuple(module.weight.shape))
        bias = None if module.bias is None else self.source.read(f"{name}.bias", tuple(module.bias.shape))
        return (weight.T.contiguous() if isinstance(module, Conv1D) else weight), bias

    def _outputs(self, name: str, outputs: int, style: str) -> slice:
        """Return this rank's outputs; with fewer KV heads than ranks, several ranks hold the same head."""
        kv_heads = self.config.kv_heads
        if style != _COLUMN or kv_heads >= self.shard.tp or not _KV_PROJECTIONS.search(name):
            return self._equal(name, outputs)
        (head,) = self.shard.partition_kv_heads(kv_heads)
        size = outputs // kv_heads
        return slice(head * size, (head + 1) * size)

    def _equal(self, name: str, count: int) -> slice:
        if count % self.shard.tp:
            raise EngineError(
                FailureKind.UNSUPPORTED, f"TP {self.shard.tp} does not divide the width {count} of {name}"
            )
        mine = self.shard.partition(count)
        return slice(mine.start, mine.stop)

    def _parameters(self, module: nn.Module, name: str) -> int:
        """Load what a module holds itself, and return its memory."""
        size_bytes = 0
        for key, parameter in list(module.named_parameters(recurse=False)):
            whole = self.source.read(f"{name}.{key}", tuple(parameter.shape))
            value = self._split_parameter(whole, f"{name}.{key}")
            if parameter.ndim == 3 and self.kind != WeightType.FLOAT16 and not isinstance(module, nn.Conv1d):
                experts = self._quantized_experts(module, f"{name}.{key}", value)
                delattr(module, key)
                setattr(module, key, experts)
                size_bytes += experts.size_bytes
            else:
                setattr(module, key, nn.Parameter(value, requires_grad=False))
                size_bytes += value.nbytes
        return size_bytes + _load_buffers(module, name, self.source)

    def _split_parameter(self, whole: torch.Tensor, name: str) -> torch.Tensor:
        """Return this rank's part of a parameter; of the matrices of experts [experts, outputs, inputs]."""
        style = self._style(name)
        if not style:
            return whole
        if style == _ROW and whole.ndim > 1:
            return whole[..., self._equal(name, whole.shape[-1])].clone()
        if style == _COLUMN:
            rows = -2 if whole.ndim > 1 else -1
            mine = self._equal(name, whole.shape[rows])
            return (whole[..., mine, :] if whole.ndim > 1 else whole[mine]).clone()
        if style == _PACKED and whole.ndim > 1:
            halves = whole.unflatten(-2, (2, -1))  # gate and up
            mine = self._equal(name, halves.shape[-2])
            return halves[..., mine, :].flatten(-3, -2).clone()
        raise self._unknown(style, name)

    def _quantized_experts(self, module: Any, name: str, weights: torch.Tensor) -> QuantizedExperts:
        if getattr(module, "is_transposed", True):
            raise EngineError(
                FailureKind.UNSUPPORTED,
                f"weights {self.kind}: {name} is not a list of matrices [outputs, inputs]; ask for float16",
            )
        return QuantizedExperts(self.kind, weights)

    def _unknown(self, style: str, name: str) -> EngineError:
        return EngineError(
            FailureKind.UNSUPPORTED,
            f"TP {self.shard.tp}: transformers splits {name} by {style!r}, which this engine does not",
        )

    def _hook(self, module: Any, name: str) -> None:
        """Sum what a module returns if the plan says so, and tell attention how many queries share a KV head here."""
        if self._style(name) in _SUMMED:
            module.register_forward_hook(lambda _module, _inputs, output: self.collectives.all_reduce(output))
        if hasattr(module, "num_key_value_groups") and self.config.kv_heads < self.shard.tp:
            module.num_key_value_groups = self.config.heads // self.shard.tp


def load_whole(module: nn.Module, name: str, source: WeightSource) -> int:
    """Load what a module that is not split holds itself, and return its memory."""
    size_bytes = 0
    for key, parameter in list(module.named_parameters(recurse=False)):
        value = source.read(f"{name}.{key}", tuple(parameter.shape))
        setattr(module, key, nn.Parameter(value, requires_grad=False))
        size_bytes += value.nbytes
    return size_bytes + _load_buffers(module, name, source)


def _load_buffers(module: Any, name: str, source: WeightSource) -> int:
    """Load the buffers that are part of the weights of a folder; a new model has computed its own."""
    size_bytes = 0
    for key, buffer in list(module.named_buffers(recurse=False)):
        if key in module.state_dict():
            if not isinstance(source, RandomWeights):
                setattr(module, key, source.read(f"{name}.{key}", tuple(buffer.shape)))
            size_bytes += getattr(module, key).nbytes
    return size_bytes
