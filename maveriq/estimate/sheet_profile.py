"""Hardware profiles of GPUs on which nothing was measured: what the data sheet says, and no delays of any testbed."""

from __future__ import annotations

from functools import cache

from maveriq.domain.cluster import DispatchTiming, LoadWindow
from maveriq.domain.gpu_kinds import GpuSheet
from maveriq.estimate.fingerprints import FingerprintTable
from maveriq.estimate.hardware_profile import IDLE_GIB, HardwareProfile, LoadFit, MeasuredFacts
from maveriq.units import bytes_from_gib, micros

_PROMPT_TOKENS = 512
_DRAIN_S = 300.0
# An engine's process starts in about 20 s; weights come from a local disk at 2 GB/s.
_LOAD_FIT = LoadFit(fixed_s=20.0, per_gpu_s=1.0, per_gib_s=0.5)


@cache
def sheet_profile(sheet: GpuSheet) -> HardwareProfile:
    """Return the profile of a kind of GPU that nothing was measured on."""
    return HardwareProfile(
        name=f"data sheet of {sheet.name}",
        gpu_kind=sheet.name,
        capacity_bytes=bytes_from_gib(sheet.usable_gib),
        idle_bytes=bytes_from_gib(IDLE_GIB),
        prompt_tokens=_PROMPT_TOKENS,
        timing=DispatchTiming(),
        drain_us=micros(_DRAIN_S),
        load_window=LoadWindow(),
        fingerprints=FingerprintTable(by_model={}, exponents={}),
        facts=MeasuredFacts(accuracy={}, unsupported=frozenset(), slo={}, load_times={}, load_fit=_LOAD_FIT),
    )
