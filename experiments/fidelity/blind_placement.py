"""How often placement by sampled load chooses the recorded GPUs.

The load is sampled from recorded executions, so that only the sampling is simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blind_rows import PlacementRow

from maveriq.control.utilization import recent_loads, sampling_phases_us
from maveriq.domain.cluster import GpuView, LoadWindow
from maveriq.domain.records import NOT_YET, RunRecord
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.policy.maveriq import hybrid, place_shards
from maveriq.scenario.options import Options
from maveriq.testbed.recordings import TESTBED_GPUS, RecordedPlan, find_testbed, read_requests, read_runs
from maveriq.testbed.run_records import run_record
from maveriq.units import MICROS_PER_SECOND, Micros, bytes_from_gib, gib

_RECENT_US = 180 * MICROS_PER_SECOND  # longer than any load window here


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """A recorded deployment: its plan, the free memory, and the earlier executions of each GPU."""

    requested_us: Micros
    plan: RecordedPlan
    free_gib: Sequence[float]
    spans: Sequence[Sequence[tuple[Micros, Micros]]]

    def gpus(self, window: LoadWindow, phases_us: Sequence[Micros], profile: HardwareProfile) -> frozenset[int]:
        """Return the GPUs that the hybrid rule chooses."""
        loads = recent_loads(self.spans, self.requested_us, window, phases_us)
        views = [
            GpuView(
                gpu_id=gpu_id,
                node=0,
                capacity_bytes=profile.capacity_bytes,
                free_bytes=bytes_from_gib(self.free_gib[gpu_id]),
                load=loads[gpu_id],
            )
            for gpu_id in range(TESTBED_GPUS)
        ]
        shards = [bytes_from_gib(amount) for amount in self.plan.gib_per_gpu]
        return frozenset(place_shards(shards, hybrid(Options().packing_threshold)(views)) or ())


def placement_rows(data: Path, profile: HardwareProfile, draws: int) -> Iterator[PlacementRow]:
    """Yield how often each sampler reproduces the recorded placements of MaverIQ: one without phases, two with."""
    decisions = list(_decisions(data, profile))
    window = profile.load_window
    for max_phase_us in (0, window.look_us, window.sample_us):
        sampler = replace(window, max_phase_us=max_phase_us)
        there = [_share_there(decision, sampler, draws if max_phase_us else 1, profile) for decision in decisions]
        yield PlacementRow(
            max_phase_s=max_phase_us / 1e6,
            draws=draws if max_phase_us else 1,
            deployments=len(there),
            expected=sum(there),
            always=sum(share == 1 for share in there),
            never=sum(share == 0 for share in there),
        )


def _share_there(decision: _Decision, window: LoadWindow, draws: int, profile: HardwareProfile) -> float:
    recorded = frozenset(decision.plan.gpu_ids)
    phases = (sampling_phases_us(window, TESTBED_GPUS, seed) for seed in range(draws))
    return sum(decision.gpus(window, drawn, profile) == recorded for drawn in phases) / draws


def _decisions(data: Path, profile: HardwareProfile) -> Iterator[_Decision]:
    testbed = find_testbed(data)
    runs = [run for run in read_runs(testbed) if run.by_maveriq]
    scheduled, completed = read_requests(testbed, [run.name for run in runs])
    for run in runs:
        recorded = run_record(run, scheduled[run.name], completed[run.name], profile)
        used_gib: Sequence[float] = (gib(profile.idle_bytes),) * TESTBED_GPUS
        for deployment in run.deployments:
            if deployment.plan:
                yield _Decision(
                    requested_us=deployment.requested_us,
                    plan=deployment.plan,
                    free_gib=[gib(profile.capacity_bytes) - used for used in used_gib],
                    spans=[list(_spans(recorded, gpu_id, deployment.requested_us)) for gpu_id in range(TESTBED_GPUS)],
                )
            used_gib = deployment.used_gib_after or used_gib


def _spans(recorded: RunRecord, gpu_id: int, now_us: Micros) -> Iterator[tuple[Micros, Micros]]:
    """Yield the recent executions of a GPU before an instant."""
    mine = {
        deployment.deployment_id
        for deployment in recorded.deployments
        if deployment.plan and gpu_id in deployment.plan.gpu_ids
    }
    table = recorded.requests
    columns = (table.deployment_id, table.start_us, table.finish_us)
    for deployment_id, start_us, finish_us in zip(*(column.tolist() for column in columns), strict=True):
        recent = start_us != NOT_YET and start_us < now_us and finish_us > now_us - _RECENT_US
        if deployment_id in mine and recent:
            yield start_us, min(finish_us, now_us)
