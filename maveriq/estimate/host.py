"""The host of the GPUs: at which socket they hang, and which engines share a process."""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.domain.deployment import Configuration


def share_across(gpu_ids: Sequence[int], tp: int, gpus_per_socket: int) -> float:
    """Return the share of pipeline stages whose GPUs hang at several sockets."""
    stages = [gpu_ids[first : first + tp] for first in range(0, len(gpu_ids), tp)]
    return sum(len({gpu // gpus_per_socket for gpu in stage}) > 1 for stage in stages) / len(stages)


def in_shared_process(configuration: Configuration) -> bool:
    """Say whether an engine runs in the host process that all such engines share, and so has neighbours.

    One of several GPUs is started as processes of its own, one a GPU; it neither disturbs others nor
    is disturbed by them.
    """
    return configuration.gpus == 1
