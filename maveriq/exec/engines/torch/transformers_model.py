"""Builds a model of transformers without weights, and takes a stage out of it.

The model is built on torch's meta device, so it takes no memory. `cut_stage` replaces the layers of other stages by
`AbsentLayer` and leaves their numbers as they are: some models choose a mask or a kind of layer by number.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from maveriq.exec.engines.torch.config import Shard, TransformersConfig, raise_unsupported

_NOT_READ = ("auto_map", "attn_implementation", "experts_implementation", "dtype", "torch_dtype")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict")
"""Keys of a `config.json` that name code to run or change what a model returns; so do those that begin with "_"."""


def build_model(config: TransformersConfig, dtype: torch.dtype, *, eager_experts: bool) -> Any:
    """Build a model for text generation on the meta device.

    Args:
        config: what to build.
        dtype: of parameters.
        eager_experts: whether experts compute one after the other, as quantised ones must.

    Raises:
        EngineError: transformers does not know the family, or refuses its configuration.
    """
    # Of a multimodal family the decoder alone: gemma3_text.
    text = f"{config.family}_text"
    name = text if text in CONFIG_MAPPING else config.model_type
    experts = {"experts_implementation": "eager"} if eager_experts else {}
    try:
        hf_config = CONFIG_MAPPING[name].from_dict(_safe(config.config))
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=False, **experts)
    except Exception as error:  # what transformers raises depends on the family
        line = " ".join(str(error).split())
        raise_unsupported(f"transformers cannot build this {name}: {type(error).__name__}: {line[:300]}")
    read = (hf_config.num_hidden_layers, hf_config.hidden_size, hf_config.vocab_size)
    if read != (config.layers, config.hidden, config.vocabulary):
        expected = f"{config.layers} layers, hidden size {config.hidden} and {config.vocabulary} tokens"
        raise_unsupported(f"transformers reads this {name} as {read[0]} layers, hidden size {read[1]} and {read[2]} "
                          f"tokens, not {expected}")  # fmt: skip
    return model.eval()


def _safe(config: Mapping[str, Any]) -> dict[str, Any]:
    left_out = (*_NOT_READ, *_OUTPUTS)
    return {key: _decoded(value) for key, value in config.items() if key not in left_out and not key.startswith("_")}


def _decoded(value: Any) -> Any:
    """Return a value with infinite numbers as transformers writes them: {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    infinite = isinstance(value, dict) and value.keys() == {"__float__"} and isinstance(value["__float__"], str)
    return float(value["__float__"]) if infinite else value


class AbsentLayer(nn.Module):  # type: ignore[misc]
    """Stands for a layer of another stage: it passes hidden states on.

    Some models take a layer's output as it is and some the first of a tuple. What comes out of absent layers before
    those of the stage is not used, so a tuple serves both kinds there. Later ones get the kind that the model takes.

    Attributes:
        returns_tuple: whether the model takes the first of a tuple.

    Args:
        layer: the layer; its plain attributes are kept, because models look at some.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, str | int | float) and name != "training":
                setattr(self, name, value)
        self.returns_tuple = True

    def forward(self, hidden_states: Any, *_: object, **__: object) -> Any:
        """Return the hidden states."""
        if isinstance(hidden_states, tuple) or not self.returns_tuple:
            return hidden_states
        return (hidden_states,)


def decoder_layers(model: Any, layers: int) -> nn.ModuleList:
    """Return the list of a model's layers.

    Raises:
        EngineError: there is not exactly one such list.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]  # fmt: skip
    if len(found) != 1:
        raise_unsupported(f"{type(model).__name__} has {len(found)} lists of {layers} layers, not one")
    return found[0]


def cut_stage(model: Any, layers: nn.ModuleList, shard: Shard) -> None:
    """Remove what other stages hold: their layers, the embedding and the output matrix.

    What else is outside of layers (norms, positions) is small and stays on every stage.
    """
    for number, layer in enumerate(layers):
        if number not in shard.layers:
            layers[number] = AbsentLayer(layer)
    if not shard.is_first_stage:
        model.get_input_embeddings().weight = None
    if not shard.is_last_stage:
        model.get_output_embeddings().weight = None
        model.get_output_embeddings().bias = None


def materialise_buffers(model: Any, device: torch.device) -> None:
    """Compute a new model's buffers, such as rotary frequencies, on a device."""
    for module in model.modules():
        buffers = list(module.named_buffers(recurse=False))
        for name, buffer in buffers:
            setattr(module, name, torch.zeros_like(buffer, device=device))
        if buffers:
            model._init_weights(module)  # noqa: SLF001  (what `from_pretrained` calls for such buffers)


def cache_argument(model: Any) -> str:
    """Return the name under which a model takes its KV cache; it has changed between releases of transformers."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
