"""Did the cluster keep up? A mean latency means nothing without this beside it.

Only backlogs beyond chance count (`Backlog.beyond_chance`). A run is

- overloaded, if such a backlog stands when arrivals end, has lasted for a quarter of the arrivals'
  time or longer, is still at least half of its peak, and in the later half of that time the number
  waiting grew by over 1 % of the arrival rate;
- backlogged, if not, but such backlogs filled a tenth of the arrivals' time or more. Those shorter
  than a fiftieth of it do not count: the pause after a deploy, say, that drains at once;
- stable otherwise.

On simulated M/D/1 and M/M/1 queues of 50, 200 and 1,000 requests, 94 % or more of the runs at load
0.9 are called stable, and all at load 0.5. At load 1.3 all runs of 1,000 requests are called
overloaded; of 200 requests 95 % and 69 %, of 50 only 53 % and 31 %: chance can do as much there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.backlog import Backlog, Queue, queue_of
from maveriq.report.gpu_use import busiest_gpu
from maveriq.report.wording import share
from maveriq.units import MICROS_PER_SECOND

_BRIEF_SHARE = 0.02
_BACKLOGGED_SHARE = 0.1
_LASTING_SHARE = 0.25
_GROWING_SHARE = 0.01
_STANDING_SHARE = 0.5


class VerdictLabel(StrEnum):
    """Whether the cluster kept up with its requests."""

    STABLE = "stable"
    BACKLOGGED = "backlogged"
    OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verdict rests on.

    Args:
        arrival_rate_per_s: requests arriving per second in the later half of the arrivals' time.
        drift_per_s: growth of the number waiting in that half (least-squares slope).
        drift_share: that growth as a share of the arrival rate, by which the cluster fell behind.
        peak_waiting: most requests waiting at once while requests arrived.
        left_waiting: requests waiting when the last one had arrived.
        backlog_share: share of the arrivals' time with a backlog that counts, at most 1.
        worst_backlog_s: how long the longest backlog beyond chance lasted, until it had drained.
        busiest_gpu: the GPU that was busy longest while requests arrived; None if not sampled.
        busiest_gpu_share: its share of that time.
    """

    arrival_rate_per_s: float
    drift_per_s: float
    drift_share: float
    peak_waiting: int
    left_waiting: int
    backlog_share: float
    worst_backlog_s: float
    busiest_gpu: int | None
    busiest_gpu_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict, in one plain sentence with its numbers, and the evidence; None if nothing arrived."""

    label: VerdictLabel
    sentence: str
    evidence: Evidence | None


def judge(run: RunRecord, *, model: str | None = None) -> Verdict:
    """Return the verdict on a run, or on one model's requests in it. Refused requests do not count."""
    queue = queue_of(run, model=model)
    if queue is None:
        return Verdict(label=VerdictLabel.STABLE, sentence="No request was served: all were refused.", evidence=None)
    backlogs = [backlog for backlog in queue.backlogs() if backlog.beyond_chance]
    evidence = _evidence(run, queue, backlogs)
    label = _label(queue, backlogs, evidence)
    refused = int((run.requests.status == RequestStatus.REFUSED.value).sum()) if model is None else 0
    note = f" {refused:,} of {len(run.requests):,} requests were refused and count for nothing here." if refused else ""
    return Verdict(label=label, sentence=_sentence(label, evidence) + note, evidence=evidence)


def _evidence(run: RunRecord, queue: Queue, backlogs: list[Backlog]) -> Evidence:
    rate, drift = queue.later_half()
    counted_us = sum(b.duration_us for b in backlogs if b.duration_us >= _BRIEF_SHARE * queue.span_us)
    gpu_id, gpu_share = busiest_gpu(run.gpu_samples, until_us=int(queue.instants_us[-1])) or (None, None)
    return Evidence(
        arrival_rate_per_s=rate,
        drift_per_s=drift,
        drift_share=drift / rate if rate else 0.0,
        peak_waiting=queue.peak,
        left_waiting=queue.left,
        backlog_share=min(1.0, counted_us / queue.span_us),
        worst_backlog_s=max((b.duration_us for b in backlogs), default=0.0) / MICROS_PER_SECOND,
        busiest_gpu=gpu_id,
        busiest_gpu_share=gpu_share,
    )


def _label(queue: Queue, backlogs: list[Backlog], evidence: Evidence) -> VerdictLabel:
    unabated = any(
        backlog.stands
        and backlog.lasted_us >= _LASTING_SHARE * queue.span_us
        and queue.left >= _STANDING_SHARE * backlog.peak
        for backlog in backlogs
    )
    if unabated and evidence.drift_share > _GROWING_SHARE:
        return VerdictLabel.OVERLOADED
    return VerdictLabel.BACKLOGGED if evidence.backlog_share >= _BACKLOGGED_SHARE else VerdictLabel.STABLE


def _sentence(label: VerdictLabel, evidence: Evidence) -> str:
    others = max(0, evidence.left_waiting - 1)  # the last arrival itself waits at that instant
    left = f"{others:,} still waited" if others else "none still waited"
    match label:
        case VerdictLabel.STABLE:
            found = f"No backlog beyond chance: at most {evidence.peak_waiting:,} waited at once"
        case VerdictLabel.BACKLOGGED:
            found = (
                f"The cluster fell behind for {share(evidence.backlog_share)} of the time, at worst for "
                f"{evidence.worst_backlog_s:,.0f} s with up to {evidence.peak_waiting:,} waiting"
            )
        case VerdictLabel.OVERLOADED:
            found = (
                f"The cluster cannot keep up: of {evidence.arrival_rate_per_s:.3g} requests/s, "
                f"{evidence.drift_per_s:.3g}/s ({share(evidence.drift_share)}) were left waiting, "
                f"so latencies grow with the length of the run"
            )
        case _ as never:
            assert_never(never)
    return f"{found}; {left} when the last arrived.{_busiest(evidence)}"


def _busiest(evidence: Evidence) -> str:
    if evidence.busiest_gpu is None:
        return ""
    return f" The busiest GPU, {evidence.busiest_gpu}, worked {share(evidence.busiest_gpu_share)} of the time."
