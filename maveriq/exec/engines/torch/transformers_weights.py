"""Weights of a folder under the names that transformers' modules have.

A folder may hold older names, or the matrices of experts one by one where the module has one tensor for all.
transformers knows how to convert each family (`conversion_mapping`); this module applies it to the tensors that a rank
needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.config import raise_unsupported
from maveriq.exec.engines.torch.weights import SafetensorsWeights, Shape, WeightSource

_EXPERT_OPERATIONS = (MergeModulelist, Concatenate)


def source_for(model: Any, source: WeightSource) -> WeightSource:
    """Return a source that reads by the names of a model's parameters; random weights have no other names."""
    return ConvertedWeights(model, source) if isinstance(source, SafetensorsWeights) else source


@dataclass(slots=True)
class _Origin:
    """Where a parameter comes from: tensors of the folder by the pattern they match, and what makes one of them."""

    names: dict[str, list[str]] = field(default_factory=dict)
    converter: Any = None


class ConvertedWeights:
    """The weights of a folder by the names of a model's parameters.

    Args:
        model: of transformers, whole, without weights.
        source: the folder.

    Raises:
        EngineError: transformers converts this family's weights in a way that cannot be done one tensor at a time.
    """

    def __init__(self, model: Any, source: SafetensorsWeights) -> None:
        self._source = source
        transforms = get_model_conversion_mapping(model)
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
        wanted = model.state_dict()
        self._origins: dict[str, _Origin] = {}
        for name in _in_natural_order(source.names):
            # The decoder of a multimodal model: language_model.model.layers, or model.language_model.layers.
            own = re.sub(r"(^|\.)language_model\.", r"\1", name)
            target, pattern = rename_source_key(own, renamings, converters, model.base_model_prefix, wanted)
            if target not in wanted:
                continue
            origin = self._origins.setdefault(target, _Origin())
            origin.names.setdefault(pattern or "", []).append(name)
            if pattern is not None:
                origin.converter = next(one for one in converters if pattern in one.source_patterns)

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Return a whole tensor of this shape.

        Raises:
            EngineError: there is no such tensor, or it has another shape.
        """
        origin = self._origins.get(name)
        if origin is None:
            return self._source.read(name, shape)  # says that there is none
        if origin.converter is None:
            return self._source.read(origin.names[""][0], shape)
        operations = origin.converter.operations
        if not all(isinstance(operation, _EXPERT_OPERATIONS) for operation in operations):
            kinds = ", ".join(type(operation).__name__ for operation in operations)
            raise_unsupported(f"{name}: its weights are converted by {kinds}; save them with transformers 5 first")
        parts: Any = {
            pattern: [self._source.read_at_most(part, math.prod(shape)) for part in names]
            for pattern, names in origin.names.items()
        }
        for operation in operations:
            parts = operation.convert(
                parts,
                source_patterns=origin.converter.source_patterns,
                target_patterns=origin.converter.target_patterns,
            )
        (tensor,) = parts.values()
        if tuple(tensor.shape) != shape:
            raise EngineError(
                FailureKind.ERROR, f"{name} has shape {tuple(tensor.shape)} in the folder, config.json says {shape}"
            )
        converted: torch.Tensor = tensor
        return converted


def _in_natural_order(names: Iterable[str]) -> list[str]:
    """Return names in an order in which expert 2 is before expert 10."""
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )
