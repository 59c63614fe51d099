"""A placement rule: best fit. Fill the fullest GPUs first, so that others stay free for large models.

Try it with `maveriq sim --policy docs/examples/best_fit.py:best_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.domain.cluster import GpuView


def best_fit(gpus: Sequence[GpuView]) -> list[GpuView]:
    """Order the GPUs by free memory, least first; ties keep the order of ids.

    maveriq takes the shards of a plan, largest first, and puts each on the first GPU of this
    order that has room: the fullest one that still fits it.
    """
    return sorted(gpus, key=lambda gpu: gpu.free_bytes)
