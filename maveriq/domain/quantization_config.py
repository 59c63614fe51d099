"""Reads how a checkpoint's weights are stored: `quantization_config`, and ModelOpt's `hf_quant_config.json`.

Embedding, norms, routers and gates of experts stay in 16 bits in all checkpoints, the output unless it is named. The
matrices of layers are quantised unless a list of exceptions names them, by patterns of several tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from maveriq.domain.config_fields import MAX_WIDTH, Config, Fields, brief
from maveriq.domain.matrices import Matrix
from maveriq.domain.weight_formats import (
    BITS_16,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    INT8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    WeightFormat,
    fp8_blocks,
    int4_groups,
)

_EXPERTS = "mlp.experts"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+|\*)(?:\.|$)?(.*)")
_EXPERT_NUMBER = re.compile(r"experts\.(\d+|\*)\.")
_MODULES = (
    (re.compile(r"^(block_sparse_moe|feed_forward|ffn|moe)(?=\.|$|\*)"), "mlp"),
    (re.compile(r"^(attn|attention)(?=\.|$|\*)"), "self_attn"),
    (re.compile(r"^mixer(?=\.[qkvo]_proj)"), "self_attn"),
    (re.compile(r"^mixer(?=\.(experts|shared_experts|gate|fc\d_latent_proj|(gate|up|down)_proj)(\.|$|\*))"), "mlp"),
    (re.compile(r"^mlp\.router(?=\.|$|\*)"), "mlp.gate"),
    (re.compile(r"^router(?=\.|$|\*)"), "mlp.gate"),
    (re.compile(r"^experts(?=\.|$|\*)"), "mlp.experts"),
    (re.compile(r"^(?:mlp\.)?(shared_expert|shared_mlp|share_expert)(?=\.|$|\*)"), "mlp.shared_experts"),
    (re.compile(r"kv_a_proj_with_mqa"), "kv_a_proj"),
    (re.compile(r"\.w1$"), ".gate_proj"),
    (re.compile(r"\.w3$"), ".up_proj"),
    (re.compile(r"\.w2$"), ".down_proj"),
)
_HEAD = ("lm_head", "head", "output")
_NOT_LAYERS = ("lm_head", "head", "embed", "embed_tokens", "model.embed_tokens", "vision_tower*", "mtp*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the matrices of a checkpoint are stored.

    Args:
        name: the format of most of them, by the names of `WeightType`; "" where nothing is quantised.
        default: how the matrices of layers are stored that nothing else names.
        experts_alone: whether `default` is the experts' alone.
        head: how the output is stored.
        kv_bits: bits of a value in the KV cache that the checkpoint was made for; 0 where it says nothing.
    """

    name: str = ""
    default: WeightFormat = BITS_16
    experts_alone: bool = False
    head: WeightFormat = BITS_16
    kv_bits: int = 0
    exceptions: _Names = field(default_factory=lambda: _Names(()))
    named: Mapping[str, WeightFormat] = field(default_factory=dict)

    def formats_of(self, layer: int, matrices: Iterable[Matrix]) -> tuple[tuple[str, WeightFormat], ...]:
        """Return how the matrices of a layer are stored, by name, those of 16 bits left out."""
        if not self.name:
            return ()
        found = ((matrix.name, self._format_of(layer, matrix)) for matrix in matrices)
        return tuple((name, stored) for name, stored in found if stored is not BITS_16)

    def _format_of(self, layer: int, matrix: Matrix) -> WeightFormat:
        module = matrix.name
        if matrix.keeps_16_bits:
            return BITS_16
        if self.exceptions.has(layer, module):
            return BITS_16
        if self.named:
            found = next(
                (self.named[name] for name in _parents(f"layers.{layer}.{module}") if name in self.named), None
            )
            if found is not None or self.default is BITS_16:
                return found or BITS_16
        if self.experts_alone and not module.startswith(_EXPERTS):
            return BITS_16
        return self.default


def _parents(name: str) -> Iterable[str]:
    """Yield a module's name and those of the modules it lies in, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


class _Names:
    """Patterns of module names: exact, with wildcards, regular expressions (`re:`), or the end of a name."""

    __slots__ = ("_ends", "_exact", "_patterns", "_patterns_of_layer", "_regular")

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact: set[str] = set()
        self._ends: set[str] = set()
        self._patterns: list[str] = []
        self._patterns_of_layer: dict[str, list[str]] = {}
        self._regular: list[re.Pattern[str]] = []
        for pattern in patterns:
            self._add(pattern)

    def _add(self, pattern: str) -> None:
        if pattern.startswith("re:"):
            self._regular.append(re.compile(pattern[3:]))
            return
        name = module_name(pattern)
        layer = re.match(r"layers\.(\d+)", name)
        if "*" not in name:
            (self._exact if layer else self._ends).add(name)
        elif layer and name[layer.end() : layer.end() + 1] == ".":
            self._patterns_of_layer.setdefault(layer[1], []).append(name)
        else:
            self._patterns.append(name)

    def has(self, layer: int, module: str) -> bool:
        """Return whether a module of a layer is named."""
        name = f"layers.{layer}.{module}"
        parents = list(_parents(name))
        if any(parent in self._exact for parent in parents):
            return True
        if any(module == end or module.endswith(f".{end}") or module.startswith(f"{end}.") for end in self._ends):
            return True
        for pattern in (*self._patterns, *self._patterns_of_layer.get(str(layer), ())):
            if any(fnmatchcase(parent, pattern) for parent in parents):
                return True
        # A fused matrix has one name in a checkpoint's own code, several in transformers.
        full = f"model.{name}".replace("mlp.experts.", "mlp.experts.0.")
        return any(regular.match(full) for regular in self._regular)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Names) and all(getattr(self, slot) == getattr(other, slot) for slot in self.__slots__)

    def __hash__(self) -> int:
        return hash(frozenset(self._exact))


def module_name(name: str) -> str:
    """Return a module's name as `Matrix.name` has it, behind its layer: `layers.3.mlp.experts.up_proj`."""
    found = _LAYER.fullmatch(name)
    layer, module = (f"layers.{found[1]}", found[2]) if found else ("", name)
    if found and not module:
        return layer + ("*" if name.endswith("*") and found[1] != "*" else "")
    module = _EXPERT_NUMBER.sub("experts.", module)
    for pattern, canonical in _MODULES:
        module = pattern.sub(canonical, module)
    separator = "" if module.startswith("*") and not found else "."
    joined = f"{layer}{separator if layer else ''}{module}"
    # modelopt writes layers.12* for a layer with all it has.
    return joined.replace(".*", "*", 1) if found and module == "*" and not name.endswith(".*") else joined


def read_quantization(config: Config, where: str, modelopt: Config | None = None) -> Quantization:
    """Return how the checkpoint's weights are stored.

    Args:
        config: the parsed `config.json`; a nested decoder's own entry counts too.
        where: the file's name, for messages.
        modelopt: the parsed `hf_quant_config.json` beside it.

    Raises:
        InputError: they are stored in a way that is not modelled.
    """
    fields = Fields(config, where).part("quantization_config")
    if not fields.config:
        for key in ("text_config", "llm_config", "language_config"):
            nested = Fields(config, where).part(key).part("quantization_config")
            fields = nested if nested.config else fields
    beside = Fields(modelopt or {}, where.replace("config.json", "hf_quant_config.json")).part("quantization")
    if not fields.config:
        if config.get("quantization_config") is not None:
            raise fields.refuse("quantization_config is empty; remove it where nothing is quantised")
        return _modelopt(beside) if beside.config else Quantization()
    method = fields.config.get("quant_method")
    if method in ("modelopt", "modelopt_fp4", "modelopt_mixed") or (method is None and fields.has("quant_algo")):
        return _modelopt(fields)
    if fields.has("quantized_layers") or fields.has("quant_algo"):
        return _modelopt(fields, within=_fp8(fields, config) if method == "fp8" else None)
    readers = {
        "fp8": lambda: _fp8(fields, config),
        "fbgemm_fp8": lambda: _whole(fields, FP8_PER_CHANNEL),
        "mxfp4": lambda: _experts(fields, MXFP4),
        "awq": lambda: _integers(fields, "int4", zero_points=True),
        "gptq": lambda: _integers(fields, "int4_gptq", zero_points=True),
        "compressed-tensors": lambda: _compressed(fields),
        "bitsandbytes": lambda: _bitsandbytes(fields),
    }
    if not isinstance(method, str) or method not in readers:
        raise fields.refuse(
            f"quantization_config: weights quantised by {brief(method)[:60]} are not modelled, only those by "
            f"{', '.join(readers)} and modelopt"
        )
    return readers[method]()


def _names(fields: Fields, keys: Iterable[str]) -> _Names:
    found: list[str] = []
    for key in keys:
        for name in fields.values(key) or ():
            if not isinstance(name, str):
                raise fields.refuse(f"{fields.path}{key} must name modules, not {brief(name)}")
            try:
                _Names([name])
            except re.error:
                raise fields.refuse(f"{fields.path}{key}: {brief(name)} is not a regular expression") from None
            found.append(name)
    return _Names(found)


_EXCEPTIONS = (
    "modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules",
)  # fmt: skip


def _whole(fields: Fields, stored: WeightFormat, **more: Any) -> Quantization:
    return Quantization(name=stored.name, default=stored, exceptions=_names(fields, _EXCEPTIONS), **more)


def _experts(fields: Fields, stored: WeightFormat) -> Quantization:
    return _whole(fields, stored, experts_alone=True)


def _fp8(fields: Fields, config: Config) -> Quantization:
    block = fields.config.get("weight_block_size")
    if block is None:
        return _whole(fields, FP8_PER_TENSOR)
    if not isinstance(block, list) or len(block) != 2:
        raise fields.refuse(f"{fields.path}weight_block_size must be two numbers, not {brief(block)}")
    outputs, inputs = (fields.checked("weight_block_size", size, MAX_WIDTH) for size in block)
    scale_bits = 8 if fields.config.get("scale_fmt") == "ue8m0" else 32
    found = _whole(fields, fp8_blocks(outputs, inputs, scale_bits))
    experts = config.get("expert_dtype")
    if experts is None:
        return found
    if experts != "fp4":
        raise fields.refuse(f"expert_dtype {brief(experts)} is not modelled, only fp4")
    return Quantization(
        name="mxfp4", default=found.default, exceptions=found.exceptions, named=_EveryLayer({_EXPERTS: MXFP4})
    )


class _EveryLayer(dict[str, WeightFormat]):
    """Formats of modules that are alike in every layer, looked up by a name with its layer."""

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, re.sub(r"^layers\.\d+\.", "", str(name)))

    def __getitem__(self, name: str) -> WeightFormat:
        return dict.__getitem__(self, re.sub(r"^layers\.\d+\.", "", name))


def _integers(fields: Fields, name: str, *, zero_points: bool) -> Quantization:
    bits = fields.optional_count(("bits", "w_bit", "num_bits"), maximum=64)
    group = fields.config.get("group_size", fields.config.get("q_group_size", 128))
    group = 0 if group == -1 else fields.checked("group_size", group, MAX_WIDTH)
    if bits == 8:
        return _whole(fields, INT8)
    if bits != 4:
        method = brief(fields.config.get("quant_method"))
        raise fields.refuse(f"quantization_config: {method} with {brief(bits)} bits is not modelled, only with 4 and 8")
    return _whole(fields, int4_groups(name, group, zero_points=zero_points))


def _bitsandbytes(fields: Fields) -> Quantization:
    four = fields.flag("load_in_4bit", default=False) or fields.flag("_load_in_4bit", default=False)
    eight = fields.flag("load_in_8bit", default=False) or fields.flag("_load_in_8bit", default=False)
    if four == eight:
        raise fields.refuse("quantization_config: bitsandbytes must say load_in_4bit or load_in_8bit")
    return _whole(fields, NF4 if four else INT8)


def _compressed(fields: Fields) -> Quantization:
    groups = list(fields.part("config_groups").config)
    if not groups:
        return _integers(fields, "int4", zero_points=False)  # written before there were groups
    found: dict[str, WeightFormat] = {}
    default = BITS_16
    for key in groups:
        group = fields.part("config_groups").part(key)
        stored = _group_format(group.part("weights"))
        if stored is INT8 and group.has("input_activations"):
            stored = replace(INT8, name="int8 with int8 activations")
        targets = group.values("targets") or ["Linear"]
        if "Linear" in targets:
            default = stored
        found |= {module_name(str(target)): stored for target in targets if target != "Linear"}
    named = {name: stored for name, stored in found.items() if name.startswith("layers.")}
    name = default.name if default is not BITS_16 else next(iter(found.values())).name
    return Quantization(name=name, default=default, named=named, exceptions=_names(fields, _EXCEPTIONS))


def _group_format(weights: Fields) -> WeightFormat:
    bits = weights.count(("num_bits",), maximum=64)
    kind = weights.config.get("type", "int")
    group = weights.optional_count(("group_size",))
    if kind == "float" and bits == 8:
        if weights.config.get("strategy") == "block":
            outputs, inputs = weights.values("block_structure", length=None) or (128, 128)
            return fp8_blocks(
                weights.checked("block_structure", outputs, MAX_WIDTH),
                weights.checked("block_structure", inputs, MAX_WIDTH),
            )
        return FP8_PER_TENSOR if weights.config.get("strategy") in (None, "tensor") else FP8_PER_CHANNEL
    if kind == "float" and bits == 4:
        return {16: NVFP4, 32: MXFP4}.get(group or 16, NVFP4)
    if kind == "int" and bits == 8:
        return INT8
    if kind == "int" and bits == 4:
        return int4_groups("int4", group or 0, zero_points=weights.config.get("symmetric") is False)
    raise weights.refuse(f"quantization_config: {brief(kind)} weights of {bits} bits are not modelled")


# ModelOpt's names of formats.
_ALGORITHMS: Mapping[str, WeightFormat] = {
    "FP8": FP8_PER_TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8_PER_CHANNEL,
    "FP8_PB_WO": fp8_blocks(128, 128),
    "FP8_PB_REAL": fp8_blocks(128, 128),
    "NVFP4": NVFP4,
    "NVFP4_AWQ": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "W4A8_NVFP4_FP8": NVFP4,
    "MXFP4": MXFP4,
    "W4A8_MXFP4_FP8": MXFP4,
    "MXFP8": MXFP8,
    "INT8_SQ": INT8,
    "W8A16": INT8,
    "W4A16": int4_groups("int4", 128, zero_points=False),
    "W4A16_AWQ": int4_groups("int4", 128, zero_points=False),
    "W4A8_AWQ": int4_groups("int4", 128, zero_points=False),
    "INT4_AWQ": int4_groups("int4", 128, zero_points=False),
}


def _modelopt(fields: Fields, within: Quantization | None = None) -> Quantization:
    """Read ModelOpt's entry; `within` is how matrices are stored that it does not name."""
    kv_bits = _kv_bits(fields)
    exceptions = _names(fields, _EXCEPTIONS)
    algorithm = fields.config.get("quant_algo")
    layers = fields.part("quantized_layers")
    if algorithm != "MIXED_PRECISION" and not layers.config:
        stored = _algorithm(fields, algorithm)
        return Quantization(name=stored.name, default=stored, exceptions=exceptions, kv_bits=kv_bits)
    named: dict[str, WeightFormat] = {}
    head = BITS_16
    counted: dict[str, int] = {}
    for module in layers.config:
        stored = _algorithm(layers.part(module), layers.part(module).config.get("quant_algo"))
        counted[stored.name] = counted.get(stored.name, 0) + 1
        if module in _HEAD:
            head = stored
        else:
            named[module_name(module)] = stored
    if not named:
        raise fields.refuse(f"{fields.path}quantized_layers names no layer, but quant_algo is MIXED_PRECISION")
    default = within.default if within else BITS_16
    if within is not None:
        exceptions = _names(fields, ("modules_to_not_convert",))  # the others speak of what is quantised further
    name = max(counted, key=lambda found: counted[found])
    return Quantization(name=name, default=default, exceptions=exceptions, named=named, head=head, kv_bits=kv_bits)


def _algorithm(fields: Fields, name: object) -> WeightFormat:
    if not isinstance(name, str) or name not in _ALGORITHMS:
        raise fields.refuse(f"{fields.path}quant_algo {brief(name)} is not modelled, only {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[name]


def _kv_bits(fields: Fields) -> int:
    stated = fields.config.get("kv_cache_quant_algo", fields.config.get("kv_cache_scheme"))
    if stated is None:
        return 0
    if isinstance(stated, dict):
        return fields.part("kv_cache_scheme").count(("num_bits",), maximum=16)
    known = {"FP8": 8, "INT8": 8, "NVFP4": 4}
    if not isinstance(stated, str) or stated not in known:
        raise fields.refuse(f"{fields.path}kv_cache_quant_algo {brief(stated)} is not modelled")
    return known[stated]
