"""The scheduled requests of MaverIQ's recorded runs, and those that maveriq draws from the same options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from maveriq.domain.deployments import Intent, Objective
from maveriq.testbed.recordings import RecordedRun, Scheduled, read_runs, read_scheduled
from maveriq.workload.build import build_workload
from maveriq.workload.options import WorkloadOptions

PUBLIC_FILES: Mapping[str, str] = MappingProxyType(
    {"code": "AzureLLMInferenceTrace_code.csv", "conversation": "AzureLLMInferenceTrace_conv.csv"}
)
"""Names of the public Azure files, by trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redrawn:
    """How many requests of a run maveriq draws as recorded: the same microsecond and the same model.

    `from_counts` draws from the embedded counts per minute, `from_public` from the public trace files.
    """

    run: str
    requests: int
    from_counts: int
    from_public: int


def redraw_all(data: Path) -> Iterator[Redrawn]:
    """Yield a comparison for each run of MaverIQ.

    Args:
        data: the folder of measured data.
    """
    scheduled = read_scheduled(data / "testbed")
    for run in read_runs(data / "testbed"):
        if run.by_maveriq:
            recorded = scheduled[run.name]
            yield Redrawn(
                run=run.name,
                requests=len(recorded.arrival_us),
                from_counts=_equal_requests(run, run.trace, recorded),
                from_public=_equal_requests(run, str(data / "azure" / PUBLIC_FILES[run.trace]), recorded),
            )


def _equal_requests(run: RecordedRun, trace: str, recorded: Scheduled) -> int:
    drawn = build_workload(
        WorkloadOptions(trace=trace, scale=run.scale, arrivals="published", models=run.model_set),
        intent=Intent(objective=Objective.MIN_COST),
        slo_of=lambda _model, _tokens: None,
    ).arrivals
    both = min(len(drawn), len(recorded.arrival_us))
    same_time = drawn.arrival_us[:both] == recorded.arrival_us[:both]
    same_model = drawn.endpoint_id[:both] == recorded.endpoint_id[:both]
    return int((same_time & same_model).sum())
