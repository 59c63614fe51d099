"""Reads the feed-forward part of every layer from a `config.json`: dense, or of experts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from maveriq.domain.config_fields import MAX_LAYERS, MAX_WIDTH, Fields, brief
from maveriq.domain.family_fields import FamilyFields
from maveriq.domain.feed_forward import DenseFeedForward, ExpertFeedForward, FeedForward
from maveriq.domain.model_features import EXPERT_KEYS, first_expert_key

_WIDTH = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "num_selected_experts", "moe_top_k",
    "moe_topk", "moe_k", "top_k_experts",
)  # fmt: skip
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
    "share_expert_dim",
)  # fmt: skip
_DENSE_FIRST = ("first_k_dense_replace", "moe_layer_start_index")


@dataclass(frozen=True, slots=True)
class FeedForwardReader:
    """Reads the feed-forward part of every layer.

    Args:
        reader: the fields.
        layers: the number of layers.
        hidden: the hidden size.
    """

    reader: FamilyFields
    layers: int
    hidden: int

    def kinds(self) -> list[FeedForward]:
        """Return the feed-forward part of every layer.

        Raises:
            InputError: a needed key is missing or wrong.
        """
        experts = self.experts()
        if experts is None:
            switch = self.reader.family.experts_switch
            if self.reader.family.experts and (not switch or self.reader.fields.flag(switch, default=False)):
                keys = " or ".join(EXPERT_KEYS[:3])
                raise self.reader.fields.refuse(f"{self.reader.architecture} has experts, but no {keys} says how many")
            return [self.dense()] * self.layers
        sparse = self._sparse_layers()
        dense = None if all(sparse) else self.dense()
        return [experts if has_experts or dense is None else dense for has_experts in sparse]

    def dense(self) -> DenseFeedForward:
        """Return the feed-forward part of layers without experts.

        Raises:
            InputError: a needed key is missing or wrong.
        """
        family = self.reader.family
        return DenseFeedForward(
            width=self._dense_width(),
            matrices=family.feed_forward_matrices,
            bias=self.reader.is_on(family.feed_forward_bias),
        )

    def _dense_width(self) -> int:
        reader = self.reader
        fields = reader.fields
        for key in (reader.family.dense_width, "dense_intermediate_size"):
            if key and fields.has(key):
                return fields.count((key,))
        if fields.has("expansion_ratio"):  # of mpt
            return self.hidden * fields.checked(
                "expansion_ratio", fields.config["expansion_ratio"], MAX_WIDTH // self.hidden
            )
        found = reader.optional_count(_WIDTH)
        if found is None:
            # GPT-J and falcon write nothing where the feed-forward part is four times as wide.
            return reader.family.widening * self.hidden if reader.family.widening else reader.count(_WIDTH)
        return found // 2 if reader.family.width_of_gate_too else found

    def experts(self) -> ExpertFeedForward | None:
        """Return the feed-forward part of layers with experts, None where there are none.

        Raises:
            InputError: a needed key is missing or wrong.
        """
        reader = self.reader
        family = reader.family
        switch, stated = family.experts_switch, reader.fields.first_key(EXPERT_KEYS)
        if switch and stated and not reader.fields.has(switch):
            raise reader.fields.refuse(f"{stated} is given, but no {switch} says if there are experts")
        if switch and not reader.fields.flag(switch, default=False):
            return None
        fields = next(
            (part for part in (reader.fields, reader.fields.part("ffn_config"), reader.fields.part("moe"))
             if part.first_key(EXPERT_KEYS)), reader.fields,
        )  # fmt: skip
        experts = fields.optional_count(EXPERT_KEYS, zero=True)
        if not experts or (experts == 1 and not family.experts):
            self._refuse_experts(None if experts is not None else first_expert_key(fields.config))
            return None
        if reader.known and not family.experts:
            self._refuse_experts(fields.first_key(EXPERT_KEYS))
        if not fields.first_key(_EXPERTS_PER_TOKEN):
            raise fields.refuse(f"experts ({fields.path}{fields.first_key(EXPERT_KEYS)}), but no "
                                f"{fields.path}num_experts_per_tok says how many a token passes")  # fmt: skip
        per_token = fields.count(_EXPERTS_PER_TOKEN)
        if per_token > experts:
            raise fields.refuse(f"{fields.path}{fields.first_key(_EXPERTS_PER_TOKEN)} {per_token} is more than the "
                                f"{experts} experts ({fields.first_key(EXPERT_KEYS)})")  # fmt: skip
        width = fields.count(_WIDTH if family.experts_use_width or fields is not reader.fields else _EXPERT_WIDTH)
        return ExpertFeedForward(
            experts=experts,
            experts_per_token=per_token,
            width=width,
            shared_width=self._dense_width() if family.experts_beside_dense else self._shared_width(width),
            matrices=family.feed_forward_matrices,
            bias=family.experts_bias,
            shared_bias=reader.is_on(family.feed_forward_bias),
            router_correction=family.router_correction,
            shared_gate=family.shared_gate,
            latent_size=fields.optional_count(("moe_latent_size",)) or 0 if family.layer_letters else 0,
            module="" if family.experts_beside_dense else "mlp",
        )

    def _refuse_experts(self, key: str | None) -> None:
        if key is not None and not self.reader.family.experts:
            raise self.reader.fields.refuse(f"experts ({key}) in a family without them, {self.reader.architecture}")

    def _shared_width(self, width: int) -> int:
        fields = self.reader.fields
        stated = fields.optional_count(_SHARED_WIDTH, zero=True)
        if stated is not None:
            return stated
        number = fields.optional_count(_SHARED_EXPERTS, zero=True, maximum=MAX_LAYERS)
        return width if self.reader.family.shared_like_expert else width * (number or 0)

    def _sparse_layers(self) -> list[bool]:
        """Return which layers have experts."""
        fields, layers = self.reader.fields, self.layers
        for key, sparse in (("moe_layers", True), ("mlp_only_layers", False), ("moe_layers_enum", True)):
            found = self._listed(key)
            if found is not None and key == "mlp_only_layers":
                step = fields.optional_count(("decoder_sparse_step",), maximum=MAX_LAYERS) or 1
                return [layer not in found and (layer + 1) % step == 0 for layer in range(layers)]
            if found is not None:
                return [(layer in found) == sparse for layer in range(layers)]
        kinds = fields.values("mlp_layer_types", length=layers)
        if kinds is not None:
            other = next((kind for kind in kinds if kind not in ("dense", "sparse")), None)
            if other is not None:
                raise fields.refuse(f"mlp_layer_types: {brief(other)} is neither dense nor sparse")
            return [kind == "sparse" for kind in kinds]
        steps = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval")
        if isinstance(fields.config.get("moe_layer_freq"), list):
            flags = fields.values("moe_layer_freq", length=layers) or []
            wrong = next((flag for flag in flags if flag not in (0, 1)), None)
            if wrong is not None:
                raise fields.refuse(f"moe_layer_freq: {brief(wrong)} is neither 0 nor 1")
            return [bool(flag) for flag in flags]
        first = fields.optional_count(_DENSE_FIRST, maximum=MAX_LAYERS, zero=True) or 0
        every = fields.optional_count(("moe_layer_freq",), maximum=MAX_LAYERS)
        if every is not None:
            return [layer >= first and layer % every == 0 for layer in range(layers)]
        step = fields.optional_count(steps, maximum=MAX_LAYERS) or 1
        end = fields.config.get("moe_layer_end_index")
        last = layers - 1 if end in (None, -1) else fields.checked("moe_layer_end_index", end, MAX_LAYERS, zero=True)
        return [first <= layer <= last and (layer + 1) % step == 0 for layer in range(layers)]

    def _listed(self, key: str) -> set[int] | None:
        """Return the layers that a list names, or a text with commas."""
        fields = self.reader.fields
        given: Any = fields.config.get(key)
        if isinstance(given, str) and re.fullmatch(r"\d{1,5}(,\d{1,5})*", given):
            given = [int(number) for number in given.split(",")]
            fields = Fields({key: given}, fields.where, fields.path)
        listed = fields.values(key)
        if listed is None:
            return None
        for layer in listed:
            if fields.checked(key, layer, MAX_LAYERS, zero=True) >= self.layers:
                raise fields.refuse(f"{key} names layer {layer}, but there are {self.layers} layers")
        return set(listed)
