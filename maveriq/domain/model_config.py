"""The one reader of a Hugging Face `config.json`: the shape of a decoder, or what in it maveriq does not model.

`parse_config` reads the text, `read_shape` the shape. Whatever would make weights, KV cache or operations differ from
those of a plain decoder (experts, latent attention, sliding windows, state-space layers, other inputs than text) is
refused by name. All commands and engines read models here, so they all give the same answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maveriq.domain.model_features import unmodelled_feature
from maveriq.errors import InputError

Config = Mapping[str, Any]
"""A parsed `config.json`."""

_MAX_DEPTH = 32
_FAMILY_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a decoder; fields as in `maveriq.domain.models.ModelSpec`."""

    architecture: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    feed_forward_matrices: int
    all_reduces_per_layer: int
    context_tokens: int | None
    rope_type: str
    quantization: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a `config.json` does not say but its family implies. Families that are not listed are built like llama.

    `widening` is the feed-forward width in multiples of the hidden size where the file names none, 0 if it must.
    `parallel` is the key that says whether attention and feed-forward part run side by side, with its default.
    """

    feed_forward_matrices: int = 3
    widening: int = 0
    parallel: tuple[str, bool] = ("", False)
    multi_query: bool = False


_PARALLEL = ("", True)
_FAMILIES: Mapping[str, _Family] = {
    "falcon": _Family(feed_forward_matrices=2, widening=4, parallel=("parallel_attn", True), multi_query=True),
    "gptj": _Family(feed_forward_matrices=2, widening=4, parallel=_PARALLEL),
    "codegen": _Family(feed_forward_matrices=2, widening=4, parallel=_PARALLEL),
    "gpt_neox": _Family(feed_forward_matrices=2, parallel=("use_parallel_residual", True)),
    "phi": _Family(feed_forward_matrices=2, parallel=_PARALLEL),
    "cohere": _Family(parallel=_PARALLEL),
    "stablelm": _Family(parallel=("use_parallel_residual", False)),
    "gpt_bigcode": _Family(feed_forward_matrices=2, widening=4, multi_query=True),
    **{name: _Family(feed_forward_matrices=2, widening=4) for name in ("gpt2", "gpt_neo", "openai-gpt", "bloom")},
    **{name: _Family(feed_forward_matrices=2) for name in ("opt", "mpt", "starcoder2", "persimmon", "nemotron")},
    **{name: _Family(feed_forward_matrices=2) for name in ("xglm", "biogpt")},
}
_OLD_FAMILY_NAMES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}

# Hugging Face names one thing differently per family. Each has the largest value that is taken for meant.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_WIDTH = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
_HEAD_SIZE = ("head_dim", "kv_channels", "attention_head_dim")
_CONTEXT = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length",
    "model_max_length",
)  # fmt: skip
_MAX_LAYERS, _MAX_WIDTH, _MAX_VOCABULARY, _MAX_CONTEXT = 10_000, 10_000_000, 100_000_000, 2**31

# Rotary positions of these types work up to `max_position_embeddings`; others multiply it by their factor.
_UNSCALED_ROPE = ("default", "llama3", "longrope", "su", "mrope")
_MAX_FACTOR = 1e6


def parse_config(text: str, where: str) -> dict[str, Any]:
    """Parse the text of a `config.json`.

    Args:
        text: the file's content.
        where: the file's name, for messages.

    Raises:
        InputError: it is not a JSON object, a key is written twice, a number is not finite, or it is nested too deeply.
    """

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{where}: key {twice!r} is written twice; leave one of them")
        return found

    try:
        config = json.loads(text, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a JSON object, not {type(config).__name__}")
    for path, value, depth in _values(config):
        if depth > _MAX_DEPTH:
            raise InputError(f"{where}: {path[:60]} is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: {path} must be a finite number, not {value}")
    return config


def _values(config: Config) -> Iterator[tuple[str, Any, int]]:
    """Yield every value with the path of its key and its depth, without recursion."""
    left: list[tuple[str, Any, int]] = [("", config, 0)]
    while left:
        path, value, depth = left.pop()
        yield path, value, depth
        if isinstance(value, dict):
            left += [(f"{path}.{key}" if path else key, inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(path, inner, depth + 1) for inner in value]


def read_shape(config: Config, where: str) -> Shape:
    """Return the shape of the decoder that a parsed `config.json` describes.

    Args:
        config: the parsed file.
        where: the file's name, for messages.

    Raises:
        InputError: a needed key is missing or wrong, or the model has a part that maveriq does not model.
    """
    reader = _Reader(config, where)
    architecture = family_name(config, where)
    feature = unmodelled_feature(config, architecture)
    if feature is not None:
        raise InputError(f"{where}: {feature}")
    family = _FAMILIES.get(architecture, _Family())
    layers = reader.count(_LAYERS, maximum=_MAX_LAYERS)
    hidden = reader.count(_HIDDEN, maximum=_MAX_WIDTH)
    heads = reader.count(_HEADS, maximum=_MAX_WIDTH)
    kv_heads = _kv_heads(reader, architecture, family, heads)
    embedded = config.get("word_embed_proj_dim")
    if embedded is not None and embedded != hidden:
        raise InputError(f"{where}: word_embed_proj_dim {_brief(embedded)} differs from the hidden size {hidden}, "
                         "which is not modelled")  # fmt: skip
    rope_type, context_tokens = _positions(reader)
    key, default = family.parallel
    return Shape(
        architecture=architecture,
        layers=layers,
        hidden_size=hidden,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_size=_head_size(reader, hidden, heads),
        intermediate_size=_intermediate_size(reader, architecture, family, hidden),
        vocab_size=reader.count(_VOCABULARY, maximum=_MAX_VOCABULARY),
        feed_forward_matrices=family.feed_forward_matrices,
        all_reduces_per_layer=1 if _is_parallel(config, key, default=default) else 2,
        context_tokens=context_tokens,
        rope_type=rope_type,
        quantization=_quantization(config, where),
    )


def family_name(config: Config, where: str) -> str:
    """Return a configuration's `model_type`, by its present name; "unknown" where there is none.

    Raises:
        InputError: it is not a name.
    """
    name = config.get("model_type")
    if name is None:
        return "unknown"
    if not isinstance(name, str) or not _FAMILY_NAME.fullmatch(name):
        raise InputError(f"{where}: model_type must be a name such as llama, not {_brief(name)}")
    return _OLD_FAMILY_NAMES.get(name, name)


def has_new_falcon_decoder(config: Config) -> bool:
    """Return whether a falcon has the decoder of falcon-40b, with several KV heads; RefinedWeb is its old name."""
    return bool(config.get("new_decoder_architecture")) or config.get("model_type") == "RefinedWeb"


def _is_parallel(config: Config, key: str, *, default: bool) -> bool:
    """Return whether attention and feed-forward part run side by side, so that a layer is summed up once."""
    value = config.get(key) if key else None
    return has_new_falcon_decoder(config) or (default if value is None else bool(value))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads numbers of a configuration; messages name the file and the key."""

    config: Config
    where: str

    def count(self, keys: Sequence[str], *, maximum: int) -> int:
        """Return what the first of these keys says.

        Raises:
            InputError: none is there.
        """
        found = self.optional_count(keys, maximum=maximum)
        if found is None:
            key_names = " or ".join(keys)
            raise InputError(f"{self.where}: no {key_names}; is it the config.json of a decoder-only model?")
        return found

    def optional_count(self, keys: Sequence[str], *, maximum: int) -> int | None:
        """Return what the keys that are there say, None if none is.

        Raises:
            InputError: it is not a positive whole number, or two keys say different things.
        """
        given = {key: self.checked(key, self.config[key], maximum) for key in keys if self.config.get(key) is not None}
        if len(set(given.values())) > 1:
            (first, value), (second, other), *_ = given.items()
            raise InputError(f"{self.where}: {first} is {value}, but {second} is {other}; leave one of them")
        return next(iter(given.values()), None)

    def checked(self, key: str, value: object, maximum: int) -> int:
        """Return a value that must be a positive whole number, up to `maximum`.

        Raises:
            InputError: it is not.
        """
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.where}: {key} must be a positive whole number, not {_brief(value)}")
        if value > maximum:
            raise InputError(f"{self.where}: {key} must be at most {maximum:,}, not {_brief(value)}")
        return value

    def part(self, key: str) -> Config:
        """Return an object within the configuration, empty if there is none.

        Raises:
            InputError: it is not an object.
        """
        value = self.config.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise InputError(f"{self.where}: {key} must be an object, not {_brief(value)}")
        return value


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _head_size(reader: _Reader, hidden: int, heads: int) -> int:
    size = reader.optional_count(_HEAD_SIZE, maximum=_MAX_WIDTH)
    if size is not None:
        return size
    if hidden % heads:
        raise InputError(
            f"{reader.where}: {heads} attention heads do not divide the hidden size {hidden}; give head_dim"
        )
    return hidden // heads


def _kv_heads(reader: _Reader, architecture: str, family: _Family, heads: int) -> int:
    config = reader.config
    found = reader.optional_count(_KV_HEADS, maximum=_MAX_WIDTH)
    attention = reader.part("attn_config")  # of mpt
    # Falcon's `num_kv_heads` counts only in the new decoder; the old one has a single KV head
    # when `multi_query` is set, which is the default (transformers, FalconConfig).
    if has_new_falcon_decoder(config):
        kv_heads = heads if found is None else found
    elif config.get("multi_query", family.multi_query) or attention.get("attn_type") == "multiquery_attention":
        kv_heads = 1
    elif attention.get("attn_type") == "grouped_query_attention":
        kv_heads = reader.checked("attn_config.kv_n_heads", attention.get("kv_n_heads"), _MAX_WIDTH)
    elif config.get("multi_query_attention"):  # of chatglm
        kv_heads = reader.count(("multi_query_group_num",), maximum=_MAX_WIDTH)
    elif architecture == "falcon" or found is None:
        kv_heads = heads
    else:
        kv_heads = found
    if heads % kv_heads:
        key = next((key for key in _KV_HEADS if config.get(key) is not None), "KV heads")
        raise InputError(f"{reader.where}: {key} {kv_heads} must divide the {heads} attention heads")
    return kv_heads


def _intermediate_size(reader: _Reader, architecture: str, family: _Family, hidden: int) -> int:
    if architecture == "mpt":
        ratio = reader.config.get("expansion_ratio", 4)
        return hidden * reader.checked("expansion_ratio", ratio, _MAX_WIDTH // hidden)
    found = reader.optional_count(_WIDTH, maximum=_MAX_WIDTH)
    if architecture == "qwen" and found is not None:
        return found // 2  # qwen's first generation counts gate and feed-forward part together
    # GPT-J and falcon write nothing where the feed-forward part is four times as wide.
    if found is None and family.widening:
        return family.widening * hidden
    return reader.count(_WIDTH, maximum=_MAX_WIDTH) if found is None else found


def rope_parameters(config: Config, where: str) -> Config:
    """Return the parameters of rotary positions: `rope_parameters`, or `rope_scaling` before transformers 5.

    Raises:
        InputError: they are not an object, or differ from layer to layer.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise InputError(f"{where}: {key} must be an object, not {_brief(given)}")
    if any(isinstance(value, dict) for value in given.values()):
        raise InputError(f"{where}: {key} differs from layer to layer, which is not modelled")
    return given


def rope_type_of(parameters: Config, where: str) -> str:
    """Return the type of rotary positions, `default` where they are not scaled.

    Raises:
        InputError: it is not a name.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or not _FAMILY_NAME.fullmatch(kind):
        raise InputError(f"{where}: the type of rotary positions must be a name such as linear, not {_brief(kind)}")
    return kind


def _positions(reader: _Reader) -> tuple[str, int | None]:
    """Return the type of rotary positions, and the longest sequence, None where the file names none.

    Of several keys the smallest counts, as in vLLM.
    """
    config = reader.config
    lengths = [reader.checked(key, config[key], _MAX_CONTEXT) for key in _CONTEXT if config.get(key) is not None]
    parameters = rope_parameters(config, reader.where)
    kind = rope_type_of(parameters, reader.where)
    if not lengths or kind in _UNSCALED_ROPE:
        return kind, min(lengths, default=None)
    length = min(lengths)
    original = parameters.get("original_max_position_embeddings")
    if kind.endswith("yarn") and original is not None:
        length = reader.checked("original_max_position_embeddings", original, _MAX_CONTEXT)
    factor = parameters.get("factor", 1.0)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor <= _MAX_FACTOR:
        raise InputError(f"{reader.where}: factor of the rotary positions must be a positive number, "
                         f"not {_brief(factor)}")  # fmt: skip
    return kind, max(1, int(length * factor))


# How a checkpoint's weights are quantised: by `quant_method` and `_form`, and how maveriq calls such weights.
_QUANTIZED: Mapping[tuple[str, str], str] = {
    ("gptq", "4 bits"): "int4_gptq",
    ("awq", "4 bits"): "int4",
    ("compressed-tensors", "4 bits"): "int4",
    ("compressed-tensors", "8 bits"): "int8",
}


def _quantization(config: Config, where: str) -> str:
    """Return as what weights the checkpoint is quantised, "" if it is not.

    Raises:
        InputError: maveriq knows no such weights.
    """
    given = config.get("quantization_config")
    if not given:
        return ""
    if not isinstance(given, dict):
        raise InputError(f"{where}: quantization_config must be an object, not {_brief(given)}")
    method, form = str(given.get("quant_method")), _form(given)
    found = _QUANTIZED.get((method, form))
    if found is None:
        how = f"{method} with {form}" if form else method
        known = ", ".join(f"{known_method} with {known_form}" for known_method, known_form in _QUANTIZED)
        raise InputError(
            f"{where}: quantization_config: weights quantised by {how[:80]} are not modelled, only those by {known}"
        )
    return found


def _form(quantization: Config) -> str:
    """Return the bits of a quantised weight as text, and whether they are floats or activations are quantised too."""
    bits = quantization.get("bits", quantization.get("w_bit", quantization.get("num_bits")))
    if bits is not None:
        return f"{_brief(bits)} bits"
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and isinstance(weights.get("num_bits"), int):
            floats = " (floats)" if weights.get("type") == "float" else ""
            activations = " and quantised activations" if group.get("input_activations") else ""
            return f"{weights['num_bits']} bits{floats}{activations}"
    return ""
