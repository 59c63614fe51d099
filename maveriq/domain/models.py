"""Models: the shape of a decoder-only transformer, and how its numbers are stored.

The models maveriq knows by name, and models read from a Hugging Face `config.json` (`maveriq.domain.model_config`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import msgspec

from maveriq.compat import StrEnum
from maveriq.domain.attention import GroupedAttention
from maveriq.domain.decoder import Decoder, plain_decoder
from maveriq.domain.decoder_config import read_decoder
from maveriq.domain.feed_forward import DenseFeedForward
from maveriq.domain.model_config import parse_config, shape_of_decoder
from maveriq.errors import InputError, UnknownNameError, did_you_mean
from maveriq.files import data_path, exists, is_folder, read_regular_text
from maveriq.tables import read_toml
from maveriq.text import check_name, check_path


class WeightType(StrEnum):
    """How weights are stored. Order is the order of enumeration (SPEC 4).

    `FLOAT16` stands for any float of 16 bits, bfloat16 too; `INT4` for groups of AWQ's kind.
    """

    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"
    INT4_GPTQ = "int4_gptq"
    FP8 = "fp8"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"


class KvType(StrEnum):
    """How the KV cache is stored; `NATIVE` follows the activations, in 16 bits. INT8 is enumerated first."""

    INT8 = "int8"
    NATIVE = "native"
    FP8 = "fp8"


_SHAPE = (
    "layers", "hidden_size", "attention_heads", "kv_heads", "head_size", "intermediate_size", "vocab_size",
    "feed_forward_matrices", "all_reduces_per_layer",
)  # fmt: skip


_OF_SHAPE = plain_decoder(
    layers=1, hidden_size=1, vocab_size=1, attention=GroupedAttention(heads=1, kv_heads=1, head_size=1),
    feed_forward=DenseFeedForward(width=1),
)  # fmt: skip
"""Stands for the plain decoder that has the shape of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a model, as its Hugging Face `config.json` gives it.

    The counts describe a plain decoder: equal layers, full attention, a dense feed-forward part. `decoder` describes
    any. Who computes with the counts alone refuses a model that `why_not_plain` names.

    A feed-forward part has three matrices where it is gated, else two. A layer split by tensor
    parallelism is summed up over the GPUs twice, or once where attention and feed-forward part
    run side by side.

    Two models are equal where name, shape and configuration are: identity comes from the content.

    Args:
        name: by which profiles are found.
        architecture: the `model_type`, by which engines are found.
        head_size: numbers in a head's vector; 0 stands for hidden_size / attention_heads.
        context_tokens: the longest sequence, prompt and output together; None where the configuration names none.
        rope_type: how rotary positions are scaled; `default` where they are not, or where there are none.
        quantization: the weight type of a checkpoint that is quantised, "" for one that is not.
        config_json: the text of the configuration that the model was read from, "" for a known model.
        decoder: the structure; left out, the plain decoder of this shape. A copy of a plain model with other counts
            (`dataclasses.replace`) gets the decoder of those.

    Raises:
        InputError: a count is not positive, or the name cannot be used.
    """

    name: str
    architecture: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    feed_forward_matrices: int = 3
    all_reduces_per_layer: int = 2
    head_size: int = 0
    context_tokens: int | None = None
    rope_type: str = "default"
    quantization: str = ""
    config_json: str = field(default="", repr=False, hash=False)
    decoder: Decoder = field(default=_OF_SHAPE, repr=False)

    def __post_init__(self) -> None:
        check_name(self.name, "model", remedy="set _name_or_path in its config.json")
        for name in (*_SHAPE, "context_tokens"):
            value = getattr(self, name)
            if (name, value) in (("head_size", 0), ("context_tokens", None)):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"model {self.name!r}: {name} must be a positive whole number, not {value!r}")
        if not self.head_size:
            object.__setattr__(self, "head_size", max(1, self.hidden_size // self.attention_heads))
        if self.decoder is _OF_SHAPE or not self._is_shape_of(self.decoder):
            object.__setattr__(self, "decoder", self._plain_decoder())

    def _is_shape_of(self, decoder: Decoder) -> bool:
        shape = asdict(shape_of_decoder(decoder))
        if all(getattr(self, name) == value for name, value in shape.items()):
            return True
        if decoder.features():
            raise InputError(f"model {self.name!r}: its decoder ({', '.join(decoder.features())}) has another shape")
        return False

    def _plain_decoder(self) -> Decoder:
        return plain_decoder(
            layers=self.layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            attention=GroupedAttention(heads=self.attention_heads, kv_heads=self.kv_heads, head_size=self.head_size),
            feed_forward=DenseFeedForward(width=self.intermediate_size, matrices=self.feed_forward_matrices),
            parallel=self.all_reduces_per_layer == 1,
            context_tokens=self.context_tokens,
            rope_type=self.rope_type,
        )

    def why_not_plain(self) -> str | None:
        """Return what sets the model apart from a plain decoder, in one clause; None where nothing does."""
        features = self.decoder.features()
        return f"it has {' and '.join(features)}" if features else None

    def differences_from(self, other: ModelSpec) -> str:
        """Return what of the shape differs from another model's, such as "layers 40, not 32"; "" where nothing does."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in _SHAPE)
        different = ", ".join(f"{name} {mine}, not {others}" for name, mine, others in pairs if mine != others)
        if different or not (self.why_not_plain() or other.why_not_plain()) or self.decoder == other.decoder:
            return different
        mine, others = (", ".join(model.decoder.features()) or "a plain decoder" for model in (self, other))
        return f"{mine}, not {others}" if mine != others else "other layers"

    @property
    def unconverted(self) -> WeightType:
        """The type of the weights where nothing is converted: that of a quantised checkpoint, else float16."""
        known = [weights for weights in WeightType if weights == self.quantization]
        return known[0] if known else WeightType.FLOAT16

    def why_not_stored_as(self, weights: WeightType) -> str | None:
        """Return why the weights cannot be of this type: the checkpoint holds them quantised; None if they can."""
        if self.quantization in ("", weights):
            return None
        return f"its checkpoint holds {self.quantization} weights (quantization_config), not {weights}"

    def why_too_long(self, tokens: int) -> str | None:
        """Return why a sequence of so many tokens, prompt and output, does not fit the model; None if it does."""
        if self.context_tokens is None or tokens <= self.context_tokens:
            return None
        return f"a sequence of {tokens} tokens is longer than the {self.context_tokens} positions of {self.name}"


def model_from_hf_config(config_json: str, *, name: str, where: str) -> ModelSpec:
    """Read the text of a Hugging Face `config.json` into a `ModelSpec`.

    Args:
        config_json: the file's content.
        name: the model's name, by which profiles are found.
        where: the file's name, for messages.

    Raises:
        InputError: it is not such a file, or the model has a part that maveriq does not model.
    """
    return _spec_from(parse_config(config_json, where), name=name, where=where, config_json=config_json)


def _spec_from(
    config: Mapping[str, Any],
    *,
    name: str,
    where: str,
    config_json: str,
    modelopt: Mapping[str, Any] | None = None,
) -> ModelSpec:
    read = read_decoder(config, where, modelopt)
    return ModelSpec(
        name=name,
        architecture=read.architecture,
        quantization=read.quantization,
        config_json=config_json,
        decoder=read.decoder,
        **asdict(shape_of_decoder(read.decoder)),
    )


class _Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    architecture: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    feed_forward_matrices: int
    all_reduces_per_layer: int
    head_size: int = 0
    context_tokens: int | None = None
    source: str = ""


class CatalogueEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the catalogue knows of a model.

    Args:
        source: the page of the model.
        parameters: the published count.
        config: the keys of its `config.json` that say how it is built.
    """

    source: str
    parameters: int
    config: dict[str, Any]


@cache
def catalogue() -> Mapping[str, CatalogueEntry]:
    """Return the entries of the catalogue by name."""
    entries = read_toml(data_path("models.toml"), dict[str, CatalogueEntry], what="table of models")
    for entry in entries.values():
        if "kv_lora_rank" in entry.config:
            entry.config.setdefault("q_lora_rank", None)  # TOML has no null
    return MappingProxyType(entries)


class _KnownModels(Mapping[str, ModelSpec]):
    """The models of the catalogue, each read when it is first asked for: most commands need one."""

    def __init__(self) -> None:
        self._read: dict[str, ModelSpec] = {}

    def __getitem__(self, name: str) -> ModelSpec:
        found = self._read.get(name)
        if found is None:
            config = catalogue()[name].config
            found = _spec_from(config, name=name, where=f"catalogue entry {name!r}", config_json="")
            self._read[name] = found
        return found

    def __contains__(self, name: object) -> bool:
        return name in catalogue()

    def __iter__(self) -> Iterator[str]:
        return iter(catalogue())

    def __len__(self) -> int:
        return len(catalogue())


@cache
def known_models() -> Mapping[str, ModelSpec]:
    """Return the models of the catalogue by name."""
    return _KnownModels()


def read_models(path: Path) -> dict[str, ModelSpec]:
    """Read a table of shapes of plain decoders: what `maveriq profile` measured. The fields are those of `ModelSpec`.

    Raises:
        InputError: not such a table, or a count that is not positive.
    """
    specs: dict[str, ModelSpec] = {}
    for name, entry in read_toml(path, dict[str, _Entry], what="table of models").items():
        shape = msgspec.structs.asdict(entry)
        del shape["source"]
        specs[name] = ModelSpec(name=name, **shape)
    return specs


def shape_of(name: str) -> ModelSpec | None:
    """Return the known model of that name, or the one that a variant is named after.

    Pruned and tuned models keep the shape of the one they were made of and name it first:
    `llama-2-7b-wanda` has the shape of llama-2-7b.
    """
    known = known_models()
    bases = [known_name for known_name in known if name == known_name or name.startswith(f"{known_name}-")]
    return known[max(bases, key=len)] if bases else None


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.json)")


def load_model(name_or_path: str) -> ModelSpec:
    """Return a model by its catalogue name, or read it from a Hugging Face configuration.

    A model that is read is called by the last part of the configuration's `_name_or_path`, else
    by its folder.

    Args:
        name_or_path: a name of `known_models`, in any case, or the path of a `config.json` or of its folder.

    Raises:
        UnknownNameError: neither a known name nor a path.
        InputError: the file is missing, is not JSON, or does not describe a decoder-only model.
    """
    known = known_models()
    check_path(name_or_path, "model")
    path = Path(name_or_path)
    if name_or_path.casefold() in known and (name_or_path in known or not exists(path)):
        return known[name_or_path.casefold()]
    if _HUB_NAME.fullmatch(name_or_path) and not exists(path):
        raise InputError(
            f"model {name_or_path!r} is no folder, and nothing is downloaded; give the path of its config.json"
            f"{did_you_mean(path.name.casefold().removesuffix('-instruct'), known)}"
        )
    if not (path.suffix == ".json" or os.sep in name_or_path or exists(path)):
        hint = "or give the path of a Hugging Face config.json"
        raise UnknownNameError("model", name_or_path, known, hint)
    return _read_config(config_path(path))


def config_path(path: Path) -> Path:
    """Return the path of a `config.json` from its own path or that of its folder."""
    return path / "config.json" if is_folder(path) else path


_MAX_CONFIG_BYTES = 4 * 1024 * 1024


def _read_config(path: Path) -> ModelSpec:
    where = f"model configuration {str(path)!r}"
    text = read_regular_text(path, what="model configuration", max_bytes=_MAX_CONFIG_BYTES)
    config = parse_config(text, where)
    beside, modelopt = path.with_name("hf_quant_config.json"), None
    if exists(beside):
        beside_text = read_regular_text(beside, what="quantisation", max_bytes=_MAX_CONFIG_BYTES)
        modelopt = parse_config(beside_text, f"quantisation {str(beside)!r}")
    return _spec_from(config, name=model_name(config, path), where=where, config_json=text, modelopt=modelopt)


def model_name(config: Mapping[str, Any], path: Path) -> str:
    """Return what a model is called: by its parsed configuration, else by the folder of that file."""
    origin = config.get("_name_or_path")
    # A model saved from a local folder says "." or "./" there, which names nothing.
    last = PurePosixPath(origin).name if isinstance(origin, str) else ""
    return last or path.resolve().parent.name
