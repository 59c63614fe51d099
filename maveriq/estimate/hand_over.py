"""How long a pipeline stage takes to hand the activations of a step to the next one, by size and link.

A message takes a fixed time, that of a send and a receive with their kernels, and its bytes over the link. The shares
of links within a node are those of collectives between two GPUs on A100, H100, B200 and L40S (aiconfigurator,
Apache-2.0): `python scripts/derive_hand_over.py` prints them. The figures of the network are assumed, not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from maveriq.domain.gpu_kinds import GpuSheet, Link

_NODE_US, _NETWORK_US = 15.0, 30.0
_NODE_SHARE = {Link.NVLINK: 0.28, Link.PCIE: 0.35}
_NETWORK_SHARE = 0.85
_VALUE_BYTES = 2
_BITS = 8


@dataclass(frozen=True, slots=True)
class Channel:
    """A way from one pipeline stage to the next: a fixed time, and bytes a second."""

    fixed_us: float
    gb_per_s: float

    def hand_over_us(self, tokens: float, hidden_size: int) -> float:
        """Return the time in which the 16-bit activations of `tokens` tokens pass."""
        return self.fixed_us + _VALUE_BYTES * tokens * hidden_size / (self.gb_per_s * 1e3)


def node_channel(gpu: GpuSheet) -> Channel:
    """Return the channel between two GPUs of a node."""
    return Channel(_NODE_US, _NODE_SHARE[gpu.link] * gpu.link_gb_s)


def network_channel(gbps: float) -> Channel:
    """Return the channel between two nodes whose network has so many Gbit/s in one direction."""
    return Channel(_NETWORK_US, _NETWORK_SHARE * gbps / _BITS)


UNKNOWN_NODE = Channel(0.0, math.inf)
"""Within a node of GPUs whose link is not known."""
