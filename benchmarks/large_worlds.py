"""The worlds of the large runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The first so many models of the set `regular` on a cluster, under the default policy."""

    title: str
    gpus: str
    models: int


WORLDS = {
    "one": World(title="one model, one GPU", gpus="1xA6000", models=1),
    "four": World(title="four models, eight GPUs", gpus="8xA6000", models=4),
}
