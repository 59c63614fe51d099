"""Where the files of models lie: their own configurations, and weights if there are any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError
from maveriq.exec.modelconfig import config_json
from maveriq.tables import read_text


class ModelFiles:
    """What engines are told of models.

    Args:
        config_path: says where the configuration of a model lies, None for one that is known by its shape alone.
    """

    def __init__(self, config_path: Callable[[ModelSpec], Path | None] = lambda _model: None) -> None:
        self._config_path = config_path

    def config(self, model: ModelSpec) -> str:
        """Return a model's own configuration, else one of its shape.

        Where its own has gone it is empty: its engine then fails by itself, without bringing others down.
        """
        path = self._config_path(model)
        if path is None:
            return config_json(model)
        try:
            return read_text(path, what="model configuration")
        except InputError:
            return "{}"

    def weights_folder(self, model: ModelSpec) -> str:
        """Return the folder of its configuration if there are weights in it, else nothing: then they are random."""
        path = self._config_path(model)
        return str(path.parent.resolve()) if path is not None and any(path.parent.glob("*.safetensors")) else ""
