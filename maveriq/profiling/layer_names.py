"""The numbers of layers in the names of tensors and modules, such as model.layers.17.mlp.up_proj.weight."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

_LAYER_IN_NAME = re.compile(r"(?P<before>(?:^|.*\.)(?:layers|h|blocks|block)\.)(?P<layer>\d{1,5})(?P<after>\..*|$)")
_MAX_DIGITS = 5


def renamed_layers(value: Any, kept: Sequence[int]) -> Any:
    """Return a value (a quantisation's, say) in which the names of modules count the kept layers alone.

    Names of modules in layers that are not kept are left out of lists and objects.
    """
    if isinstance(value, dict):
        named = ((_renamed(key, kept), entry) for key, entry in value.items())
        return {key: renamed_layers(entry, kept) for key, entry in named if key is not None}
    if isinstance(value, list):
        entries = (renamed_layers(entry, kept) for entry in value)
        return [new for old, new in zip(value, entries, strict=True) if new is not None or old is None]
    return _renamed(value, kept) if isinstance(value, str) else value


def _renamed(name: str, kept: Sequence[int]) -> str | None:
    match = _LAYER_IN_NAME.fullmatch(name)
    if match is None:
        return name
    layer = int(match["layer"])
    return f"{match['before']}{kept.index(layer)}{match['after']}" if layer in kept else None


def numbered(names: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers that follow each prefix in dotted names: {"model.layers": {0, 1}} for model.layers.1.mlp.

    Only the first number of a name counts: experts are numbered within layers.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        split = split_name(name)
        if split is not None:
            found.setdefault(split[0], set()).add(split[1])
    return found


def split_name(name: str) -> tuple[str, int, str] | None:
    """Return what stands before the first number in a dotted name, the number, and what follows; None without one."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if not place or len(parts[place]) > _MAX_DIGITS:
        return None
    return ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])


def prefix_of(path: str, numbers: Mapping[str, Collection[int]], layers: int) -> str | None:
    """Return the prefix under which a checkpoint has the list of layers that a model calls `path`; None if none has.

    Files name the modules around the list differently from the model, or leave them out. So of the prefixes that all
    layers follow, the one that shares most of its parts with the path is meant.

    Args:
        path: the list's name in the model, such as model.language_model.layers.
        numbers: the numbers that follow each prefix in the checkpoint (`numbered`).
        layers: how many layers there are.
    """
    parts = set(path.split("."))
    shared = {
        prefix: len(parts & set(prefix.split("."))) / len(parts | set(prefix.split(".")))
        for prefix, found in numbers.items()
        if set(range(layers)) <= set(found)
    }
    if path in shared or not shared:
        return path if shared else None
    best = max(shared, key=lambda prefix: shared[prefix])
    return best if shared[best] > 0 or len(shared) == 1 else None
