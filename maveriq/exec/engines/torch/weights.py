"""The weights of a rank's shard.

A `WeightSource` returns whole tensors, one at a time, by the names that transformers gives them: random ones, or those
of a folder of safetensors files. `Parameters` cuts this rank's shard out of them, so that a rank never holds more than
its shard and one tensor. It brings the attention of every family into one form: one matrix of this rank's queries,
keys and values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch

from maveriq.errors import InputError
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.config import DecoderConfig, Family, Shard
from maveriq.exec.model_files import check_weights, read_model_file

Shape = tuple[int, ...]
T = TypeVar("T")
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_UNQUANTISED_DTYPES = ("F32", "F16", "BF16", "F64")


class WeightSource(Protocol):
    """Returns tensors by name."""

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Return a whole tensor of this shape, on the source's device and in its dtype.

        Raises:
            EngineError: there is no such tensor, or it has another shape.
        """


class RandomWeights:
    """Normally distributed weights. Seed and name fix a tensor, whatever the parallel configuration is."""

    def __init__(self, *, seed: int, initializer_range: float, device: torch.device, dtype: torch.dtype) -> None:
        self._seed = seed
        self._initializer_range = initializer_range
        self._device = device
        self._dtype = dtype

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Draw a matrix. Vectors are constant, as in a new model: 1 for norm weights, 0 for biases."""
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, value, device=self._device, dtype=self._dtype)
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(shape, device=self._device, dtype=self._dtype)
        return drawn.normal_(0.0, self._initializer_range, generator=generator)


class SafetensorsWeights:
    """The safetensors files of a model's folder, as `save_pretrained` writes them.

    Raises:
        EngineError: the folder holds no such files.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._files = _tensor_files(folder)

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Read one tensor."""
        file = self._files.get(name)
        if file is None:
            raise EngineError(FailureKind.ERROR, f"{self._folder}: no tensor {name}; is it this model's folder?")
        tensor: torch.Tensor = _with_open_file(self._folder, file, lambda opened: self._checked(opened, name, shape))
        return tensor.to(device=self._device, dtype=self._dtype)

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._files.keys()

    def read_at_most(self, name: str, elements: int) -> torch.Tensor:
        """Read one tensor of any shape of at most so many elements.

        Raises:
            EngineError: it has more.
        """

        def shape_of(opened: Any) -> Shape:
            return tuple(opened.get_slice(name).get_shape())

        shape = _with_open_file(self._folder, self._files[name], shape_of)
        if math.prod(shape) > elements:
            raise EngineError(
                FailureKind.ERROR, f"{self._folder}: {name} has shape {shape}, more than config.json says"
            )
        return self.read(name, shape)

    def _checked(self, opened: Any, name: str, shape: Shape) -> torch.Tensor:
        """Return a tensor. Shape and type are checked before it is read: a false header could name any size."""
        header = opened.get_slice(name)
        found, dtype = tuple(header.get_shape()), header.get_dtype()
        if found != shape:
            raise EngineError(FailureKind.ERROR, f"{self._folder}: {name} has shape {found}, config.json says {shape}")
        if dtype not in _UNQUANTISED_DTYPES:
            raise EngineError(
                FailureKind.UNSUPPORTED,
                f"{self._folder}: {name} is stored as {dtype}; this engine reads weights that are not quantised",
            )
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def _tensor_files(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor; paths in the index are cut to names, so that they stay in the folder."""
    try:
        check_weights(folder)
        index = read_model_file(folder, _INDEX_FILE, what="index of weights")
    except InputError as error:
        raise EngineError(FailureKind.ERROR, str(error)) from None
    if index is None:
        return _with_open_file(folder, _SINGLE_FILE, lambda opened: dict.fromkeys(opened.keys(), _SINGLE_FILE))
    try:
        return {name: Path(file).name for name, file in json.loads(index)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(FailureKind.ERROR, f"{folder / _INDEX_FILE} cannot be read: {error!r}") from None


def _with_open_file(folder: Path, file: str, use: Callable[[Any], T]) -> T:
    """Open a safetensors file and return `use(file)`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / file, framework="pt", device="cpu") as opened:
            return use(opened)
    except (OSError, SafetensorError) as error:
        raise EngineError(FailureKind.ERROR, f"weights {folder / file} cannot be read: {error}") from None
    except RuntimeError as error:
        if "mmap" not in str(error):  # out of memory
            raise
        raise EngineError(FailureKind.ERROR, f"weights {folder / file} cannot be read: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """The parameter names of a model family in transformers. `layer` is the prefix of a layer's names."""

    embedding: str
    final_norm: str
    layer: str
    queries_keys_values: tuple[str, ...]
    attention_out: str
    attention_norm: str
    feed_forward_norm: str
    feed_forward_in: tuple[str, ...]
    feed_forward_out: str


_NAMES: Mapping[Family, _Names] = MappingProxyType(
    {
        Family.LLAMA: _Names(
            embedding="model.embed_tokens",
            final_norm="model.norm",
            layer="model.layers.{}.",
            queries_keys_values=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attention_out="self_attn.o_proj",
            attention_norm="input_layernorm",
            feed_forward_norm="post_attention_layernorm",
            feed_forward_in=("mlp.gate_proj", "mlp.up_proj"),
            feed_forward_out="mlp.down_proj",
        ),
        Family.FALCON: _Names(
            embedding="transformer.word_embeddings",
            final_norm="transformer.ln_f",
            layer="transformer.h.{}.",
            queries_keys_values=("self_attention.query_key_value",),
            attention_out="self_attention.dense",
            attention_norm="input_layernorm",
            feed_forward_norm="post_attention_layernorm",
            feed_forward_in=("mlp.dense_h_to_4h",),
            feed_forward_out="mlp.dense_4h_to_h",
        ),
        Family.GPTJ: _Names(
            embedding="transformer.wte",
            final_norm="transformer.ln_f",
            layer="transformer.h.{}.",
            queries_keys_values=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            attention_out="attn.out_proj",
            attention_norm="ln_1",
            feed_forward_norm="",
            feed_forward_in=("mlp.fc_in",),
            feed_forward_out="mlp.fc_out",
        ),
    }
)

WeightAndBias = tuple[torch.Tensor, torch.Tensor | None]
"""A weight, and its bias if it has one."""


class Parameters:
    """Reads the parameters of a rank's shard."""

    def __init__(self, arch: DecoderConfig, shard: Shard, source: WeightSource) -> None:
        self._arch = arch
        self._shard = shard
        self._source = source
        self._names = _NAMES[arch.family]

    def embedding(self) -> torch.Tensor:
        """Return the whole embedding, [vocabulary, hidden]; it is not sharded."""
        return self._source.read(f"{self._names.embedding}.weight", (self._arch.vocabulary, self._arch.hidden))

    def output(self, embedding: torch.Tensor | None) -> WeightAndBias:
        """Return this rank's rows (tokens) of the output matrix; a view of the embedding where the two are tied.

        The bias is never tied.
        """
        arch = self._arch
        mine = _slice(self._shard.partition(arch.vocabulary))
        shape = (arch.vocabulary,)
        bias = _copy_of(self._source.read("lm_head.bias", shape)[mine]) if arch.output_bias else None
        if not arch.tie_word_embeddings:
            return _copy_of(self._source.read("lm_head.weight", (*shape, arch.hidden))[mine]), bias
        return (_copy_of(self.embedding()[mine]) if embedding is None else embedding[mine]), bias

    def final_norm(self) -> WeightAndBias:
        """Return the norm before the output matrix."""
        return self._norm(self._names.final_norm)

    def attention_norm(self, layer: int) -> WeightAndBias:
        """Return the norm before attention."""
        two = self._arch.feed_forward_norm and self._arch.parallel_attention
        return self._norm(self._of(layer, "ln_attn" if two else self._names.attention_norm))

    def feed_forward_norm(self, layer: int) -> WeightAndBias:
        """Return the norm before the feed-forward block, for models that have one.

        Of the models with parallel attention only falcon with two norms has one.
        """
        return self._norm(self._of(layer, "ln_mlp" if self._arch.parallel_attention else self._names.feed_forward_norm))

    def queries_keys_values(self, layer: int) -> WeightAndBias:
        """Return the rows of this rank's heads: queries, then keys, then values."""
        arch, names = self._arch, [self._of(layer, name) for name in self._names.queries_keys_values]
        kv = arch.kv_heads
        if len(names) > 1:
            counts = (arch.heads, kv, kv)
            pairs = [
                self._pair(name, count * arch.head_size, arch.hidden, bias=arch.attention_bias)
                for name, count in zip(names, counts, strict=True)
            ]
            biases = [bias for _, bias in pairs if bias is not None]
            return self._heads([weight for weight, _ in pairs]), self._heads(biases) if biases else None
        # Falcon fuses them into one matrix: per KV head its queries, its key, its value.
        rows = (arch.heads + 2 * kv) * arch.head_size
        weight, bias = self._pair(names[0], rows, arch.hidden, bias=arch.attention_bias)
        return self._heads(self._unfuse(weight)), None if bias is None else self._heads(self._unfuse(bias))

    def attention_out(self, layer: int) -> WeightAndBias:
        """Return the columns of this rank's heads, and the whole bias."""
        arch, name = self._arch, self._of(layer, self._names.attention_out)
        # GPT-J's attention never has biases; llama's and falcon's has them in all matrices or in none.
        weight, bias = self._pair(name, arch.hidden, arch.heads * arch.head_size, bias=arch.attention_bias)
        mine = self._shard.partition(arch.heads)
        return _copy_of(weight[:, mine.start * arch.head_size : mine.stop * arch.head_size]), bias

    def feed_forward_in(self, layer: int) -> WeightAndBias:
        """Return this rank's rows of the feed-forward width; for gated models the gate first."""
        arch, mine = self._arch, _slice(self._shard.partition(self._arch.intermediate))
        pairs = [
            self._pair(self._of(layer, name), arch.intermediate, arch.hidden, bias=arch.feed_forward_bias)
            for name in self._names.feed_forward_in
        ]
        biases = [bias[mine] for _, bias in pairs if bias is not None]
        return torch.cat([weight[mine] for weight, _ in pairs]), torch.cat(biases) if biases else None

    def feed_forward_out(self, layer: int) -> WeightAndBias:
        """Return this rank's columns of the feed-forward width, and the whole bias."""
        arch, name = self._arch, self._of(layer, self._names.feed_forward_out)
        weight, bias = self._pair(name, arch.hidden, arch.intermediate, bias=arch.feed_forward_bias)
        return _copy_of(weight[:, _slice(self._shard.partition(arch.intermediate))]), bias

    def _of(self, layer: int, name: str) -> str:
        return self._names.layer.format(layer) + name

    def _pair(self, name: str, outputs: int, inputs: int, *, bias: bool) -> WeightAndBias:
        weight = self._source.read(f"{name}.weight", (outputs, inputs))
        return weight, self._source.read(f"{name}.bias", (outputs,)) if bias else None

    def _norm(self, name: str) -> WeightAndBias:
        shape = (self._arch.hidden,)
        weight = self._source.read(f"{name}.weight", shape)
        return weight, None if self._arch.root_mean_square_norm else self._source.read(f"{name}.bias", shape)

    def _unfuse(self, fused: torch.Tensor) -> list[torch.Tensor]:
        arch = self._arch
        groups = fused.unflatten(0, (arch.kv_heads, arch.heads // arch.kv_heads + 2, arch.head_size))
        return [groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)]

    def _heads(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Return the rows of this rank's heads of queries, keys and values, concatenated."""
        size = self._arch.head_size
        shares = (self._shard.partition(self._arch.heads), *[self._shard.partition_kv_heads(self._arch.kv_heads)] * 2)
        return torch.cat([part[mine.start * size : mine.stop * size] for part, mine in zip(rows, shares, strict=True)])


def _slice(share: range) -> slice:
    return slice(share.start, share.stop)


def _copy_of(view: torch.Tensor) -> torch.Tensor:
    """Return a copy of a partial view, which would keep the whole tensor in memory."""
    return view.clone() if view.untyped_storage().nbytes() > view.nbytes else view
