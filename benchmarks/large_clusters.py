"""The clusters of the large runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeCluster:
    """A cluster that serves the first `models` models of the set `regular`, under the default policy."""

    title: str
    gpus: str
    models: int


CLUSTERS = {
    "one": LargeCluster(title="one model, one GPU", gpus="1xA6000", models=1),
    "four": LargeCluster(title="four models, eight GPUs", gpus="8xA6000", models=4),
}
