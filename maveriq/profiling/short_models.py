"""The short models that a profile is measured with: some layers of a model, as engines load them."""

from __future__ import annotations

import json
from dataclasses import replace

from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError
from maveriq.estimate.observations import with_layers
from maveriq.exec.model_files import ModelFiles
from maveriq.profiling.plan import Layers

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def short_model(model: ModelSpec, layers: Layers, files: ModelFiles) -> ModelSpec:
    """Return the model with some of its layers, and the configuration that an engine loads.

    Args:
        model: the whole model.
        layers: its layers, numbered from 0.
        files: knows the model's configuration.

    Raises:
        InputError: the layers are not alike.
    """
    if len(layers) == model.layers:
        return model
    if len(model.decoder.layer_kinds) > 1:
        raise InputError(f"{model.name}: short models of decoders whose layers differ cannot be made yet")
    config = json.loads(files.config_json(model))
    key = next((key for key in _LAYER_KEYS if key in config), None)
    if key is None:
        raise InputError(f"{model.name}: its config.json does not say how many layers it has under a known key")
    return replace(with_layers(model, layers), config_json=json.dumps({**config, key: len(layers)}))
