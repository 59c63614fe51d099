"""The one reader of a decoder from a parsed Hugging Face `config.json`, whatever its family and the age of its keys.

What changes memory or time and is not modelled is refused by name (`maveriq.domain.model_features`). What a family
implies without saying so stands in `maveriq.domain.decoder_families`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from maveriq.domain.attention import Attention
from maveriq.domain.attention_config import AttentionReader
from maveriq.domain.config_fields import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_VOCABULARY,
    Config,
    Fields,
    brief,
    rope_parameters,
    rope_type_of,
)
from maveriq.domain.decoder import Decoder, LayerKind
from maveriq.domain.decoder_families import FAMILIES, OTHER_NAMES, Family, Switch
from maveriq.domain.family_fields import FamilyFields
from maveriq.domain.feed_forward import ExpertFeedForward, FeedForward
from maveriq.domain.feed_forward_config import FeedForwardReader
from maveriq.domain.model_features import TEXT_PARTS, other_inputs_of, unmodelled_feature
from maveriq.domain.quantization_config import Quantization, read_quantization
from maveriq.domain.vision_config import vision_parameters

# Hugging Face names one thing differently per family.
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_CONTEXT = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length",
    "model_max_length",
)  # fmt: skip
_GATED_ACTIVATIONS = ("silu", "swish", "swiglu")

# Rotary positions of these types work up to `max_position_embeddings`; others multiply it by their factor.
_UNSCALED_ROPE = ("default", "llama3", "longrope", "su", "mrope", "proportional")
_MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder as it was read, with what only its configuration knows.

    Args:
        architecture: the family by its present name; of a multimodal model, the name of the whole.
        decoder: the decoder.
        quantization: as what most of its weights are stored, by the names of `WeightType`; "" for 16 bits.
        text: the part of the configuration that describes it: the whole, or `text_config`.
    """

    architecture: str
    decoder: Decoder
    quantization: str
    text: Config


UNKNOWN = "unknown"
"""The family of a configuration that does not say it."""


def family_name(config: Config, where: str) -> str:
    """Return a configuration's `model_type`, by its present name; "unknown" where there is none.

    Raises:
        InputError: it is not a name.
    """
    name = Fields(config, where).name("model_type")
    if name is None:
        return UNKNOWN
    # A decoder within a multimodal configuration is called llama4_text, gemma3_text and so on.
    name = name.removesuffix("_text")
    return OTHER_NAMES.get(name, name)


def read_decoder(config: Config, where: str, modelopt: Config | None = None) -> DecoderConfig:
    """Return the decoder that a parsed `config.json` describes.

    Args:
        config: the parsed file.
        where: the file's name, for messages.
        modelopt: the parsed `hf_quant_config.json` beside it, in which ModelOpt says how weights are stored.

    Raises:
        InputError: a needed key is missing or wrong, or the model has a part that maveriq does not model.
    """
    key = next((key for key in TEXT_PARTS if config.get(key)), "")
    text = _text_part(config, key, where) if key else config
    architecture = _architecture(config, text, where)
    for part in (config, text) if key else (config,):
        feature = unmodelled_feature(part, architecture, FAMILIES.get(architecture))
        if feature is not None:
            raise Fields(config, where).refuse(feature)
    fields = Fields(text, where, f"{key}." if key else "")
    reader = _Reader(FamilyFields(fields, architecture, _family(fields, architecture), nested=bool(key)))
    quantization = read_quantization(config, where, modelopt)
    decoder = reader.decoder(quantization)
    others = other_inputs_of(config)
    vision = vision_parameters(config, where, decoder.hidden_size)
    if vision is not None:
        decoder = replace(decoder, other_inputs_parameters=vision)
    elif others:
        decoder = replace(decoder, not_counted=(*decoder.not_counted, f"the parts for other inputs ({others})"))
    # Engines are found by the name of the whole: a multimodal model is not the family of its decoder to them.
    whole = Fields(config, where).name("model_type") if key else None
    return DecoderConfig(architecture=whole or architecture, decoder=decoder, quantization=quantization.name, text=text)


def _architecture(config: Config, text: Config, where: str) -> str:
    """Return the family of the decoder: by its `model_type`, or by the class that `architectures` names.

    Raises:
        InputError: neither says it.
    """
    name = family_name(text if text.get("model_type") is not None else config, where)
    if name in FAMILIES:
        return name
    classes = text.get("architectures") or config.get("architectures")
    for given in classes if isinstance(classes, list) else ():
        plain = re.sub(r"For(CausalLM|ConditionalGeneration)$", "", str(given)).lower()
        family = next((family for family in FAMILIES if family.replace("_", "") == plain), None)
        if family is not None:
            return family
    if name == UNKNOWN:
        raise Fields(config, where).refuse("no model_type, and architectures names no known family")
    return name


def _text_part(config: Config, key: str, where: str) -> Config:
    """Return the part of a multimodal configuration that describes the decoder."""
    text = dict(Fields(config, where).part(key).config)
    outer, inner = config.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if outer is not None and inner is not None and outer != inner:
        raise Fields(config, where).refuse(
            f"tie_word_embeddings is {brief(outer)}, but {key}.tie_word_embeddings is {brief(inner)}; leave one of them"
        )
    if inner is None:
        text["tie_word_embeddings"] = outer
    return text


def _family(fields: Fields, architecture: str) -> Family:
    """Return what the family implies. A family that is not known must be built like llama.

    Raises:
        InputError: nothing says how it is built.
    """
    known = FAMILIES.get(architecture)
    if known is not None:
        return known.variant.family if known.variant and known.variant.is_chosen(fields) else known
    activation = fields.config.get("hidden_act", fields.config.get("hidden_activation"))
    if activation not in _GATED_ACTIVATIONS:
        raise fields.refuse(
            f"model_type {architecture} is not known, and hidden_act {brief(activation)} does not say that its "
            "feed-forward parts are gated as llama's are"
        )
    return Family(qkv_bias=Switch(key="attention_bias"), output_bias=Switch(key="attention_bias"))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one decoder."""

    config: FamilyFields

    def decoder(self, quantization: Quantization) -> Decoder:
        """Read the decoder, whose matrices are stored as `quantization` says."""
        config = self.config
        fields, family = config.fields, config.family
        for key in family.stated:
            present = key in fields.config if key == "sliding_window" else fields.has(key)
            if not present and not (config.nested and key in family.part_defaults):
                raise fields.refuse(f"no {fields.path}{key}, which files of {config.architecture} have")
        parts = self._letters() if family.layer_letters else None
        layers = len(parts) if parts else config.count(_LAYERS, MAX_LAYERS)
        hidden = config.count(_HIDDEN)
        embedded = fields.config.get("word_embed_proj_dim")
        if embedded is not None and embedded != hidden:
            raise fields.refuse(f"word_embed_proj_dim {brief(embedded)} differs from the hidden size {hidden}, "
                                "which is not modelled")  # fmt: skip
        vocabulary = config.count(_VOCABULARY, MAX_VOCABULARY)
        rope_type, context = self._positions()
        attention = AttentionReader(config, layers, hidden, context)
        feed_forward = FeedForwardReader(config, layers, hidden)
        mixers: Sequence[Attention | None]
        widths: Sequence[FeedForward | None]
        if parts:
            mixers, widths = self._single_parts(parts, attention, feed_forward)
        else:
            mixers, widths = attention.kinds(), feed_forward.kinds()
        parallel = config.is_on(family.parallel)
        kinds = [
            self._layer(mixer, width, hidden, parallel=parallel) for mixer, width in zip(mixers, widths, strict=True)
        ]
        kinds = [
            replace(kind, formats=quantization.formats_of(layer, kind.weight_matrices(hidden)))
            for layer, kind in enumerate(kinds)
        ]
        distinct = tuple(dict.fromkeys(kinds))
        norms = (1 + family.embedding_norms) * family.norm_values * hidden
        return Decoder(
            hidden_size=hidden,
            vocab_size=vocabulary,
            tied_embeddings=fields.flag("tie_word_embeddings", default=family.tied),
            layer_kinds=distinct,
            layer_pattern=tuple(distinct.index(kind) for kind in kinds),
            context_tokens=context,
            rope_type=rope_type,
            learned_positions=context + family.extra_positions if context and family.learned_positions else 0,
            other_parameters=norms + (vocabulary if config.is_on(family.head_bias) else 0),
            head_format=quantization.head,
            kv_bits=quantization.kv_bits,
            not_counted=self._not_counted(context),
        )

    def _letters(self) -> str:
        """Return the part that each layer consists of, by the letters of `hybrid_override_pattern`."""
        fields = self.config.fields
        named = fields.values("layers_block_type")
        pattern = fields.config.get("hybrid_override_pattern")
        if named is not None:
            wrong = next((kind for kind in named if kind not in _LETTERS), None)
            if wrong is not None:
                raise fields.refuse(f"layers_block_type: {brief(wrong)} is none of {', '.join(_LETTERS)}")
            pattern = "".join(_LETTERS[kind] for kind in named)
        if not isinstance(pattern, str) or not re.fullmatch(r"[M*E-]{1,10000}", pattern):
            raise fields.refuse(f"hybrid_override_pattern must say M, *, E or - for every layer, not {brief(pattern)}")
        layers = fields.optional_count(_LAYERS, maximum=MAX_LAYERS)
        if layers is not None and layers != len(pattern):
            raise fields.refuse(f"num_hidden_layers is {layers}, but the pattern of layers has {len(pattern)}")
        return pattern

    def _single_parts(
        self, parts: str, attention: AttentionReader, feed_forward: FeedForwardReader
    ) -> tuple[Sequence[Attention | None], Sequence[FeedForward | None]]:
        """Return the parts of layers that are one part each."""
        mixers: dict[str, Attention] = {}
        widths: dict[str, FeedForward | None] = {}
        if "M" in parts:
            mixers["M"] = attention.state_space()
        if "*" in parts:
            mixers["*"] = attention.kinds()[0]
        if "E" in parts:
            for key in ("n_shared_experts", "moe_shared_expert_intermediate_size"):
                if not self.config.fields.has(key):
                    raise self.config.fields.refuse(f"layers with experts, but no {key}")
            widths["E"] = feed_forward.experts()
            if widths["E"] is None:
                raise self.config.fields.refuse("layers with experts, but no n_routed_experts says how many")
        if "-" in parts:
            widths["-"] = feed_forward.dense()
        return [mixers.get(part) for part in parts], [widths.get(part) for part in parts]

    def _layer(
        self, attention: Attention | None, feed_forward: FeedForward | None, hidden: int, *, parallel: bool
    ) -> LayerKind:
        family = self.config.family
        stated = self.config.fields.optional_count((family.norms_key,)) if family.norms_key else None
        norms = stated or (family.norms_in_parallel if parallel else 0) or family.norms
        vectors = norms * family.norm_values
        if isinstance(feed_forward, ExpertFeedForward):
            vectors += family.expert_norms + family.router_vectors
        return LayerKind(
            attention=attention,
            feed_forward=feed_forward,
            parallel=parallel,
            norm_parameters=vectors * hidden,
        )

    def _positions(self) -> tuple[str, int | None]:
        """Return the type of rotary positions, and the longest sequence, None where the file names none.

        Of several keys the smallest counts, as in vLLM.
        """
        fields = self.config.fields
        config = fields.config
        lengths = [fields.checked(key, config[key], MAX_CONTEXT) for key in _CONTEXT if fields.has(key)]
        if not lengths and self.config.nested:
            lengths = [value for key, value in self.config.family.part_defaults.items() if key in _CONTEXT]
        by_layer = bool(self.config.family.full_every) or fields.has("layer_types")
        parameters = rope_parameters(config, fields.where, by_layer=by_layer)
        kind = rope_type_of(parameters, fields.where)
        if not lengths or kind in _UNSCALED_ROPE or self.config.family.positions_are_scaled:
            return kind, min(lengths, default=None)
        length = min(lengths)
        original = parameters.get("original_max_position_embeddings")
        if kind.endswith("yarn") and original is not None:
            length = fields.checked("original_max_position_embeddings", original, MAX_CONTEXT)
        factor = parameters.get("factor", 1.0)
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor <= _MAX_FACTOR:
            raise fields.refuse(f"factor of the rotary positions must be a positive number, not {brief(factor)}")
        return kind, max(1, int(length * factor))

    def _not_counted(self, context: int | None) -> tuple[str, ...]:
        """Return what is in the checkpoint, or may be, and is not counted."""
        name = self.config.architecture
        notes: tuple[str, ...] = (
            () if self.config.known else (f"what family {name}, which is not known, may have beyond a llama",)
        )
        if self.config.family.learned_positions and context is None:
            notes += (f"learned positions, of which no {_CONTEXT[0]} says how many there are",)
        return notes + self._further_layers()

    def _further_layers(self) -> tuple[str, ...]:
        keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
        key = self.config.fields.first_key(keys)
        layers = self.config.fields.optional_count((key,), zero=True) if key else 0
        return (f"layers that predict further tokens ({key} {layers})",) if layers else ()
