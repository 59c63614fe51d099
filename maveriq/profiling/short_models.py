"""The short models that a profile is measured with: some layers of a model, with the model's own weights if it has any.

Models of equal layers need no files: the configuration says fewer layers, and engines read only the weights that they
need. Where layers differ, or an engine reads whole folders, it is written (`maveriq.profiling.fingerprint`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maveriq.domain.model_config import parse_config
from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError
from maveriq.estimate.observations import with_layers
from maveriq.exec.model_files import ModelFiles, read_model_file
from maveriq.profiling.plan import Layers
from maveriq.profiling.reduced_config import LAYER_COUNTS

_INDEX_FILE = "model.safetensors.index.json"
_READS_WHAT_IT_NEEDS = ("torch",)
"""Engines that read only the tensors of the layers that a configuration has."""


@dataclass(frozen=True, slots=True)
class ShortModels:
    """Makes short models.

    Args:
        config_paths: path of the `config.json` of each model that has files.
        backend: the engine.
        folder: an existing folder, in which models are written that engines cannot read otherwise.
    """

    config_paths: Mapping[ModelSpec, Path]
    backend: str
    folder: Path

    def make(self, model: ModelSpec, layers: Layers) -> tuple[ModelSpec, ModelFiles]:
        """Return the model with some of its layers, and the files that an engine loads.

        Raises:
            InputError: its weights are incomplete, or no configuration of its family has such layers alone.
            MaveriqError: it must be written, and torch or transformers is missing, or the disk is too small.
        """
        path = self.config_paths.get(model)
        files = ModelFiles(self.config_paths.get)
        own_weights = bool(files.weights_folder(model))
        if len(layers) == model.layers:
            return model, files
        alike = len(model.decoder.layer_kinds) == 1 and layers == tuple(range(len(layers)))
        if path is not None and own_weights and not (alike and self.backend in _READS_WHAT_IT_NEEDS):
            return self._written(model, layers, path)
        config = _with_fewer(model, layers, files) if alike else _with_chosen(model, layers, files)
        short = replace(with_layers(model, layers), config_json=json.dumps(config))
        return short, ModelFiles(lambda _: path)

    def _written(self, model: ModelSpec, layers: Layers, path: Path) -> tuple[ModelSpec, ModelFiles]:
        from maveriq.profiling.fingerprint import write_fingerprint

        out = self.folder / f"{model.name}-{'-'.join(map(str, layers))}"
        written = out / "config.json"
        if not written.exists():
            write_fingerprint(path, layers=len(layers), out=out, chosen=layers)
        config = written.read_text(encoding="utf-8")
        return replace(with_layers(model, layers), config_json=config), ModelFiles(lambda _: written)


def _with_fewer(model: ModelSpec, layers: Sequence[int], files: ModelFiles) -> dict[str, object]:
    """Return the configuration with fewer layers of one kind."""
    config = json.loads(files.config_json(model))
    counts = [key for key in LAYER_COUNTS if key in config]
    if not counts:
        raise InputError(f"{model.name}: its config.json names no number of layers ({', '.join(LAYER_COUNTS)})")
    lists = {
        key: value[: len(layers)]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == model.layers and "layer" in key
    }
    return {**config, **lists, **dict.fromkeys(counts, len(layers))}


def _with_chosen(model: ModelSpec, layers: Layers, files: ModelFiles) -> dict[str, object]:
    """Return the configuration with these layers alone."""
    from maveriq.profiling.fingerprint import reduce_layers

    where = f"model {model.name!r}"
    config = parse_config(files.config_json(model), where)
    return dict(reduce_layers(config, len(layers), where=where, chosen=layers).config)


def check_complete(model: ModelSpec, config_path: Path) -> None:
    """Check that all files of weights are there that a model's index names.

    Raises:
        InputError: one is missing: a download that was not allowed or not finished.
    """
    folder = config_path.parent
    text = read_model_file(folder, _INDEX_FILE, what="index of weights")
    if text is None:
        return
    try:
        named = sorted(set(map(str, json.loads(text)["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"index of weights {str(folder / _INDEX_FILE)!r} has no weight_map; get it again") from None
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{model.name}: {len(missing)} of {len(named)} files of weights are missing from {str(folder)!r}, first "
            f"{missing[0]!r}; get them (a gated model must be granted first), or remove {_INDEX_FILE} to measure "
            "random weights"
        )
