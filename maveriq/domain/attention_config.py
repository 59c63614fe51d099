"""Reads the attention of every layer from a `config.json`: its heads, latent vectors and windows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from maveriq.domain.attention import Attention, DeltaNet, GroupedAttention, LatentAttention, StateSpace
from maveriq.domain.config_fields import MAX_CONTEXT, MAX_LAYERS, brief
from maveriq.domain.decoder_families import QueryKeyNorm
from maveriq.domain.family_fields import FamilyFields

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "num_attention_groups")
_HEAD_SIZE = ("head_dim", "kv_channels", "attention_head_dim")
_FULL, _WINDOWED, _CHUNKED, _LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"


@dataclass(frozen=True, slots=True)
class AttentionReader:
    """Reads the attention of every layer.

    Args:
        reader: the fields.
        layers: the number of layers.
        hidden: the hidden size.
        context: the longest sequence; None where nothing limits it.
    """

    reader: FamilyFields
    layers: int
    hidden: int
    context: int | None

    def kinds(self) -> Sequence[Attention]:
        """Return the attention of every layer.

        Raises:
            InputError: a needed key is missing or wrong.
        """
        reader = self.reader
        heads = reader.count(_HEADS)
        latent = reader.fields.first_key(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim"))
        if latent and reader.known and not reader.family.latent:
            raise reader.fields.refuse(f"latent attention ({latent}) in a family without it, {reader.architecture}")
        if latent or reader.family.latent:
            return self._latent_layers(heads)
        kv_heads = self._kv_heads(heads)
        head_size = self._head_size(heads)
        attention = GroupedAttention(
            heads=heads, kv_heads=kv_heads, head_size=head_size, vectors=self._vectors(heads, kv_heads, head_size),
            bias=reader.is_on(reader.family.qkv_bias), output_bias=reader.is_on(reader.family.output_bias),
            output_gate=reader.is_on(reader.family.output_gate),
        )  # fmt: skip
        full = self._full(attention)
        kinds, window = self._layer_types()
        linear = self._delta_net() if _LINEAR in kinds else None
        windowed = replace(attention, window=window) if window else attention
        by_type = {_FULL: full, _LINEAR: linear, _WINDOWED: windowed, _CHUNKED: windowed}
        return [by_type[kind] or full for kind in kinds]

    def _full(self, attention: GroupedAttention) -> GroupedAttention:
        """Return the attention of layers without a window, where these have other heads than the others."""
        family, fields = self.reader.family, self.reader.fields
        if not family.full_head_size:
            return attention
        head_size = fields.count((family.full_head_size,))
        if fields.has(family.full_kv_heads) and not fields.has(family.full_key_is_value):
            raise fields.refuse(f"{family.full_kv_heads} is given, but no {family.full_key_is_value} says if it counts")
        shared = fields.flag(family.full_key_is_value, default=False)
        kv_heads = fields.optional_count((family.full_kv_heads,)) if shared else None
        kv_heads = kv_heads or attention.kv_heads
        if attention.heads % kv_heads:
            raise fields.refuse(f"{family.full_kv_heads} {kv_heads} must divide the {attention.heads} attention heads")
        return replace(
            attention, head_size=head_size, value_head_size=head_size, kv_heads=kv_heads, key_is_value=shared,
            vectors=self._vectors(attention.heads, kv_heads, head_size),
        )  # fmt: skip

    def _delta_net(self) -> DeltaNet:
        fields = self.reader.fields
        return DeltaNet(
            key_heads=fields.count(("linear_num_key_heads",)),
            value_heads=fields.count(("linear_num_value_heads",)),
            key_size=fields.count(("linear_key_head_dim",)),
            value_size=fields.count(("linear_value_head_dim",)),
            convolution=fields.count(("linear_conv_kernel_dim",)),
        )

    def _latent_layers(self, heads: int) -> list[LatentAttention]:
        fields, latent = self.reader.fields, self._latent(heads)
        if not self.reader.family.indexer:
            return [latent] * self.layers
        indexed = replace(
            latent,
            index_heads=fields.count(("index_n_heads",)),
            index_size=fields.count(("index_head_dim",)),
            index_tokens=fields.count(("index_topk",)),
        )
        # Layers that share the choice of another have no indexer, but attend to as few tokens.
        shared = replace(indexed, index_heads=0)
        kinds = fields.values("indexer_types", length=self.layers)
        if kinds is None and (fields.optional_count(("index_topk_freq",)) or 1) > 1:
            raise fields.refuse("index_topk_freq says that layers share an indexer, but no indexer_types says which")
        kinds = kinds or ["full"] * self.layers
        other = next((kind for kind in kinds if kind not in ("full", "shared")), None)
        if other is not None:
            raise fields.refuse(f"indexer_types: {brief(other)} is neither full nor shared")
        return [indexed if kind == "full" else shared for kind in kinds]

    def state_space(self) -> StateSpace:
        """Return the state-space part of layers that have one.

        Raises:
            InputError: a needed key is missing or wrong.
        """
        fields = self.reader.fields
        return StateSpace(
            heads=fields.count(("mamba_num_heads",)),
            head_size=fields.count(("mamba_head_dim",)),
            groups=fields.count(("n_groups",)),
            state_size=fields.count(("ssm_state_size",)),
            convolution=fields.count(("conv_kernel",)),
            bias=fields.flag("mamba_proj_bias", default=False) or fields.flag("use_bias", default=False),
            convolution_bias=fields.flag("use_conv_bias", default=True),
        )

    def _latent(self, heads: int) -> LatentAttention:
        fields = self.reader.fields
        if "q_lora_rank" not in fields.config:
            raise fields.refuse("no q_lora_rank beside kv_lora_rank; write null where queries have no latent vector")
        query_rank = fields.optional_count(("q_lora_rank",))
        return LatentAttention(
            heads=heads,
            query_rank=query_rank or 0,
            kv_rank=fields.count(("kv_lora_rank",)),
            nope_size=fields.count(("qk_nope_head_dim",)),
            rope_size=fields.count(("qk_rope_head_dim",)),
            value_size=fields.count(("v_head_dim",)),
            bias=self.reader.is_on(self.reader.family.qkv_bias),
        )

    def _vectors(self, heads: int, kv_heads: int, head_size: int) -> int:
        family, fields = self.reader.family, self.reader.fields
        norm = family.query_key_norm
        if family.query_key_norm_key and not fields.flag(family.query_key_norm_key, default=False):
            norm = QueryKeyNorm.NONE
        size = {QueryKeyNorm.HEAD: 2 * head_size, QueryKeyNorm.ALL_HEADS: (heads + kv_heads) * head_size}
        values = family.query_key_norm_values or max(1, family.norm_values)
        return size.get(norm, 0) * values + (heads if family.sinks else 0)

    def _head_size(self, heads: int) -> int:
        size = self.reader.optional_count(_HEAD_SIZE)
        if size is not None or self.reader.family.head_size:
            return size or self.reader.family.head_size
        if self.hidden % heads:
            raise self.reader.fields.refuse(
                f"{heads} attention heads do not divide the hidden size {self.hidden}; give head_dim"
            )
        return self.hidden // heads

    def _kv_heads(self, heads: int) -> int:
        reader = self.reader
        fields = reader.fields
        attention = fields.part("attn_config")  # of mpt and dbrx
        kind = attention.config.get("attn_type")
        if reader.family.kv_heads_stated and not attention.has("kv_n_heads"):
            kv_heads = reader.count(_KV_HEADS)
        # Where `multi_query` is set, as it is by default in some families, no other key counts.
        elif fields.flag("multi_query", default=reader.family.multi_query) or kind == "multiquery_attention":
            kv_heads = 1
        elif kind == "grouped_query_attention" or attention.has("kv_n_heads"):
            kv_heads = attention.count(("kv_n_heads",))
        elif fields.flag("multi_query_attention", default=False):  # of chatglm
            kv_heads = fields.count(("multi_query_group_num",))
        elif reader.family.multi_query:
            kv_heads = heads
        else:
            kv_heads = reader.optional_count(_KV_HEADS) or heads
        if heads % kv_heads:
            key = fields.first_key(_KV_HEADS) or "KV heads"
            raise fields.refuse(f"{key} {kv_heads} must divide the {heads} attention heads")
        return kv_heads

    def _layer_types(self) -> tuple[list[str], int | None]:
        """Return the type of every layer, and the window of those that have one; None where no sequence is longer."""
        fields, family = self.reader.fields, self.reader.family
        kinds = fields.values("layer_types", length=self.layers)
        if kinds is None and family.delta_net_but_every:
            every = fields.optional_count(("full_attention_interval",), maximum=MAX_LAYERS)
            every = every or family.delta_net_but_every
            return [_LINEAR if (layer + 1) % every else _FULL for layer in range(self.layers)], None
        if kinds is None:
            window = self._window()
            kinds = self._pattern() if window else [_FULL] * self.layers
        elif any(kind in (_WINDOWED, _CHUNKED) for kind in kinds):
            window = self._window(stated=True)
        else:
            window = None
        known = (_FULL, _WINDOWED, _CHUNKED, *((_LINEAR,) if family.delta_net_but_every else ()))
        other = next((kind for kind in kinds if kind not in known), None)
        if other is not None:
            raise fields.refuse(f"layers of type {brief(other)} (layer_types) are not modelled")
        if window is not None and self.context is not None and window >= self.context:
            window = None
        return kinds, window

    def _window(self, *, stated: bool = False) -> int | None:
        """Return the window that the file or the family names; `stated` where the types of layers say it is there."""
        family, fields = self.reader.family, self.reader.fields
        switch = family.window_switch or "use_sliding_window"
        on = fields.flag(switch, default=not family.window_switch)
        if not on and not stated:
            return None
        keys = ("sliding_window", "sliding_window_size", "attention_chunk_size")
        for key in keys:
            value = fields.config.get(key)
            if value is None or value == -1:
                continue
            window = fields.checked(key, value, MAX_CONTEXT)
            if stated or family.has_windows or (self.context is not None and window >= self.context):
                return window
            raise fields.refuse(
                f"a sliding window ({key} {window}) in a family without one, {self.reader.architecture}, and no "
                "layer_types says which layers have it"
            )
        null = any(key in fields.config for key in keys)
        if family.window_default and not null:
            return family.window_default
        if stated:
            raise fields.refuse("layer_types has layers with a sliding window, but no sliding_window says how long")
        return None

    def _pattern(self) -> list[str]:
        """Return which layers have the window, where no list says so."""
        family, fields = self.reader.family, self.reader.fields
        if family.window_list:
            # An empty list stands for the family's rule.
            flags = fields.values(family.window_list)
            if flags is not None:
                flags = fields.values(family.window_list, length=self.layers) or []
                return [_WINDOWED if flag else _FULL for flag in flags]
        if family.full_every:
            every = self._full_every()
            return [_FULL if (layer + 1) % every == 0 else _WINDOWED for layer in range(self.layers)]
        first = 0
        if family.first_window_layer:
            first = fields.count((family.first_window_layer,), maximum=MAX_LAYERS)
        return [_FULL if layer < first else _WINDOWED for layer in range(self.layers)]

    def _full_every(self) -> int:
        """Return the length of the groups of layers, of which the last has no window."""
        family, fields = self.reader.family, self.reader.fields
        pattern = fields.config.get("sliding_window_pattern")
        if isinstance(pattern, str) and re.fullmatch(r"L+G", pattern):
            return len(pattern)
        keys = ("sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval")
        return fields.optional_count(keys, maximum=MAX_LAYERS) or family.full_every
