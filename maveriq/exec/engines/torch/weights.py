"""Where weights come from: drawn at random by name, or read from a folder of safetensors files.

Both give whole tensors one at a time, by the names that transformers gives them, so that a rank never holds more than
its part of the model and one tensor.

Linear layers: dense, and weight-only quantised to 8 or 4 bits.

A quantised layer keeps only the small form. It is expanded a slice at a time while it is used, so that peak memory
grows by a slice (which stays in a GPU's cache), not by a matrix.
The parameters of a rank's part, cut out of the whole tensors of transformers' models.

Every family's attention is brought into one form: queries, keys and values of this rank's heads, one matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.functional import linear

from maveriq.domain.models import WeightType
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.config import DecoderConfig, Family, RankSlice

Shape = tuple[int, ...]
T = TypeVar("T")
_ONLY_FILE = "model.safetensors"
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types of weights that are what they say; codes of 8 bits mean nothing without the scales beside them."""


class Source(Protocol):
    """Gives tensors by name."""

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Return a whole tensor of this shape, on the source's device and of its type.

        Raises:
            EngineError: there is none, or its shape is another.
        """


class RandomSource:
    """Weights of a normal distribution; however the model is split, the same seed and name give the same tensor."""

    def __init__(self, *, seed: int, spread: float, device: torch.device, dtype: torch.dtype) -> None:
        self._seed = seed
        self._spread = spread
        self._device = device
        self._dtype = dtype

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Draw a matrix; vectors are those of a fresh model: 1 for the weights of norms, 0 for biases."""
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, value, device=self._device, dtype=self._dtype)
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(shape, device=self._device, dtype=self._dtype)
        return drawn.normal_(0.0, self._spread, generator=generator)


class FolderSource:
    """The safetensors files of a model's folder, as `save_pretrained` writes them.

    Raises:
        EngineError: the folder holds none.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._files = _files_of_tensors(folder)

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Read one tensor."""
        file = self._files.get(name)
        if file is None:
            raise EngineError(FailureKind.ERROR, f"{self._folder}: no tensor {name}; is it this model's folder?")
        tensor = _opened(self._folder, file, lambda opened: opened.get_tensor(name))
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise EngineError(FailureKind.ERROR, f"{self._folder}: {name} has shape {found}, config.json says {shape}")
        if tensor.dtype not in _PLAIN:
            what = (
                f"{self._folder}: {name} is stored as {tensor.dtype}; this engine reads weights that are not quantised"
            )
            raise EngineError(FailureKind.UNSUPPORTED, what)
        return tensor.to(device=self._device, dtype=self._dtype)


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Return the file of each tensor. Only files of this folder: an index must not lead elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _opened(folder, _ONLY_FILE, lambda opened: dict.fromkeys(opened.keys(), _ONLY_FILE))
    try:
        return {name: Path(file).name for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(FailureKind.ERROR, f"{index} cannot be read: {error!r}") from None


def _opened(folder: Path, file: str, use: Callable[[Any], T]) -> T:
    """Return what `use` makes of an open file of tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / file, framework="pt", device="cpu") as opened:
            return use(opened)
    except (OSError, SafetensorError) as error:
        raise EngineError(FailureKind.ERROR, f"weights {folder / file} cannot be read: {error}") from None


_SLICE_ELEMENTS = MappingProxyType({"cpu": 2**18, "cuda": 2**24})
"""On a CPU a slice should fit its cache: five times as fast as whole matrices, twice as fast as torch's int8 kernel."""
_MIN_SCALE = 1e-7  # so that rows of zeroes stay zeroes, and 16 bits hold it
_GROUP_SIZES = (128, 64, 32, 16, 8, 4, 2)


class Linear(Protocol):
    """y = x W' + b over the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it; [..., inputs] to [..., outputs]."""

    @property
    def size_bytes(self) -> int:
        """Memory of what it keeps."""


class DenseLinear:
    """Weights [outputs, inputs] as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return linear(x, self._weight, self._bias)

    @property
    def size_bytes(self) -> int:
        """Memory of weights and bias."""
        return sum(part.nbytes for part in (self._weight, self._bias) if part is not None)


class Int8Linear:
    """Weights as whole numbers from -127 to 127, times one scale per output."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._codes = torch.empty_like(weight, dtype=torch.int8)
        self._scale = weight.new_empty(len(weight))
        self._bias = bias
        for part in _slices(weight, weight.shape[1]):
            scale = weight[part].abs().amax(dim=1, keepdim=True).float().clamp_min(_MIN_SCALE) / 127
            self._codes[part] = (weight[part] / scale).round_()
            self._scale[part] = scale.squeeze(1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(self._codes))
        for part in _slices(self._codes, x.shape[-1]):
            # Scaled before the product, which would overflow 16 bits.
            y[:, part] = linear(rows, self._codes[part].to(x.dtype).mul_(self._scale[part, None]))
        y = y if self._bias is None else y + self._bias
        return y.view(*x.shape[:-1], -1)

    @property
    def size_bytes(self) -> int:
        """Memory of codes, scales and bias."""
        return sum(part.nbytes for part in (self._codes, self._scale, self._bias) if part is not None)


class Int4Linear:
    """Weights as whole numbers from 0 to 15, two in a byte, with a scale and an offset per group of inputs.

    A group is the largest power of two up to 128 that divides the inputs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        outputs, inputs = weight.shape
        group = next(size for size in _GROUP_SIZES if inputs % size == 0)
        self._packed = torch.empty(outputs, inputs // 2, device=weight.device, dtype=torch.uint8)
        self._scale = weight.new_empty(outputs, inputs // group, 1)
        self._low = weight.new_empty(outputs, inputs // group, 1)
        self._bias = bias
        for part in _slices(weight, inputs):
            grouped = weight[part].unflatten(1, (-1, group)).float()
            low, high = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)
            scale = ((high - low) / 15).clamp_min(_MIN_SCALE)
            codes = ((grouped - low) / scale).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
            # One byte holds numbers of the two halves of a row, so that expanding it is a concatenation.
            self._packed[part] = codes[:, : inputs // 2] | codes[:, inputs // 2 :] << 4
            self._scale[part], self._low[part] = scale, low

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(self._packed))
        for part in _slices(self._packed, x.shape[-1]):
            y[:, part] = linear(rows, self._expand(part, x.dtype))
        y = y if self._bias is None else y + self._bias
        return y.view(*x.shape[:-1], -1)

    def _expand(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        packed, scale = self._packed[part], self._scale[part]
        half = packed.shape[1]
        weight = torch.empty(len(packed), 2 * half, device=packed.device, dtype=dtype)
        weight[:, :half] = packed & 15
        weight[:, half:] = packed >> 4
        weight.view(len(packed), scale.shape[1], -1).mul_(scale).add_(self._low[part])
        return weight

    @property
    def size_bytes(self) -> int:
        """Memory of codes, scales, offsets and bias."""
        parts = (self._packed, self._scale, self._low, self._bias)
        return sum(part.nbytes for part in parts if part is not None)


def make_linear(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Return a layer that stores this weight [outputs, inputs] as `kind` (a `WeightType`); odd rows stay in 8 bits."""
    if kind == WeightType.FLOAT16:
        return DenseLinear(weight, bias)
    if kind == WeightType.INT4 and weight.shape[1] % 2 == 0:
        return Int4Linear(weight, bias)
    return Int8Linear(weight, bias)


def _slices(weight: torch.Tensor, inputs: int) -> list[slice]:
    """Return slices of the rows of a matrix with so many inputs, as large as its device likes."""
    step = max(1, _SLICE_ELEMENTS[weight.device.type] // inputs)
    return [slice(start, start + step) for start in range(0, len(weight), step)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What transformers calls the parts of a family; those of a layer after `layer`, which takes its number."""

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

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""A weight and its bias."""


class Parameters:
    """Reads the parameters of a rank's part."""

    def __init__(self, arch: DecoderConfig, part: RankSlice, source: Source) -> None:
        self._arch = arch
        self._part = part
        self._source = source
        self._names = _NAMES[arch.family]

    def embedding(self) -> torch.Tensor:
        """Return all of it, [vocabulary, hidden]: a rank looks up whole rows."""
        return self._source.read(f"{self._names.embedding}.weight", (self._arch.vocabulary, self._arch.hidden))

    def output(self, embedding: torch.Tensor | None) -> Pair:
        """Return this rank's share of the output matrix, by tokens; a view of the embedding where it is tied to it.

        The bias is never tied.
        """
        arch = self._arch
        mine = _slice(self._part.share(arch.vocabulary))
        shape = (arch.vocabulary,)
        bias = _own(self._source.read("lm_head.bias", shape)[mine]) if arch.output_bias else None
        if not arch.tied:
            return _own(self._source.read("lm_head.weight", (*shape, arch.hidden))[mine]), bias
        return (_own(self.embedding()[mine]) if embedding is None else embedding[mine]), bias

    def final_norm(self) -> Pair:
        """Return the norm before the output matrix."""
        return self._norm(self._names.final_norm)

    def attention_norm(self, layer: int) -> Pair:
        """Return the norm before attention."""
        two = self._arch.feed_forward_norm and self._arch.parallel
        return self._norm(self._of(layer, "ln_attn" if two else self._names.attention_norm))

    def feed_forward_norm(self, layer: int) -> Pair:
        """Return the norm before the feed-forward part, where it has its own (beside attention only falcon's has)."""
        return self._norm(self._of(layer, "ln_mlp" if self._arch.parallel else self._names.feed_forward_norm))

    def queries_keys_values(self, layer: int) -> Pair:
        """Return the rows of this rank's heads, those of queries first, then keys, then values."""
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
        # Falcon's one matrix: per KV head its queries, its key, its value.
        rows = (arch.heads + 2 * kv) * arch.head_size
        weight, bias = self._pair(names[0], rows, arch.hidden, bias=arch.attention_bias)
        return self._heads(self._unfuse(weight)), None if bias is None else self._heads(self._unfuse(bias))

    def attention_out(self, layer: int) -> Pair:
        """Return the columns of this rank's heads; the bias whole."""
        arch, name = self._arch, self._of(layer, self._names.attention_out)
        # GPT-J's attention has no bias anywhere, llama's and falcon's everywhere or nowhere.
        weight, bias = self._pair(name, arch.hidden, arch.hidden, bias=arch.attention_bias)
        mine = self._part.share(arch.heads)
        return _own(weight[:, mine.start * arch.head_size : mine.stop * arch.head_size]), bias

    def feed_forward_in(self, layer: int) -> Pair:
        """Return the rows of this rank's share of the width; of a gated one the gate's first."""
        arch, mine = self._arch, _slice(self._part.share(self._arch.intermediate))
        pairs = [
            self._pair(self._of(layer, name), arch.intermediate, arch.hidden, bias=arch.feed_forward_bias)
            for name in self._names.feed_forward_in
        ]
        biases = [bias[mine] for _, bias in pairs if bias is not None]
        return torch.cat([weight[mine] for weight, _ in pairs]), torch.cat(biases) if biases else None

    def feed_forward_out(self, layer: int) -> Pair:
        """Return the columns of this rank's share of the width; the bias whole."""
        arch, name = self._arch, self._of(layer, self._names.feed_forward_out)
        weight, bias = self._pair(name, arch.hidden, arch.intermediate, bias=arch.feed_forward_bias)
        return _own(weight[:, _slice(self._part.share(arch.intermediate))]), bias

    def _of(self, layer: int, name: str) -> str:
        return self._names.layer.format(layer) + name

    def _pair(self, name: str, outputs: int, inputs: int, *, bias: bool) -> Pair:
        weight = self._source.read(f"{name}.weight", (outputs, inputs))
        return weight, self._source.read(f"{name}.bias", (outputs,)) if bias else None

    def _norm(self, name: str) -> Pair:
        shape = (self._arch.hidden,)
        weight = self._source.read(f"{name}.weight", shape)
        return weight, None if self._arch.root_mean_square_norm else self._source.read(f"{name}.bias", shape)

    def _unfuse(self, fused: torch.Tensor) -> list[torch.Tensor]:
        arch = self._arch
        groups = fused.unflatten(0, (arch.kv_heads, arch.heads // arch.kv_heads + 2, arch.head_size))
        return [groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)]

    def _heads(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Return this rank's heads of queries, keys and values."""
        size = self._arch.head_size
        shares = (self._part.share(self._arch.heads), *[self._part.kv_share(self._arch.kv_heads)] * 2)
        return torch.cat([part[mine.start * size : mine.stop * size] for part, mine in zip(rows, shares, strict=True)])


def _slice(share: range) -> slice:
    return slice(share.start, share.stop)


def _own(view: torch.Tensor) -> torch.Tensor:
    """Return memory of its own, unless it is all of a tensor anyway: a view would keep the rest alive."""
    return view.clone() if view.untyped_storage().nbytes() > view.nbytes else view
