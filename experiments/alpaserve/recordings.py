"""The recorded runs of the published system, and the options that simulate the same scenarios.

The recorded figures come from committed files: those of `experiments/published` and of recorded_slo.py. The name of a
run contains its scenario.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cases import Case, Variant

from maveriq.errors import InputError
from maveriq.estimate.registry import PAPER
from maveriq.tables import read_csv

_LATENCY_COLUMNS = (
    "run", "requests", "recorded_mean_s", "recorded_p95_s", "mean_error", "p95_error", "median_request_error",
)  # fmt: skip
SLO_COLUMNS = ("run", "scheduled", "completed", "met")
_NAME = re.compile(r"(?P<policy>[^_]+)_(?P<models>[^_]+)_(?P<intent>\w+)_(?P<trace>[^_]+)_(?P<scale>.+)_slo(?P<slo>.+)")
_INTENTS = {"min_cost": "min-cost", "min_lat": "min-latency", "min_mem": "min-memory"}
_POLICIES = {
    "AlpaServe": Variant(name="AlpaServe as published", policy="alpaserve", alpaserve_as_published=True),
    # The published AlpaServe* placements are the same with and without the published defect in model names.
    "AlpaServe-star": Variant(
        name="AlpaServe* (published table)", policy="alpaserve-star", alpaserve_profile="published"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The recorded figures of a run; `met_of_scheduled` is None if it had no SLOs."""

    run: str
    completed: int
    mean_latency_s: float
    met_of_scheduled: float | None

    def case(self) -> Case:
        """Return the scenario of the run.

        Raises:
            InputError: the name contains no scenario.
        """
        parts = _NAME.fullmatch(self.run)
        if parts is None:
            raise InputError(f"recorded run {self.run!r}: its name contains no scenario")
        return Case(
            model_set=parts["models"],
            trace=parts["trace"],
            scale=float(parts["scale"]),
            slo_scale=float(parts["slo"]),
            variant=_POLICIES.get(parts["policy"]) or _maveriq(parts["policy"], parts["intent"]),
            estimator=PAPER,
            service_times=PAPER,
        )


def _maveriq(policy: str, intent: str) -> Variant:
    name = f"{policy.replace('-FP16', ' float16')} {_INTENTS[intent]}"
    return Variant(name=name, intent=_INTENTS[intent], float16_only=policy.endswith("FP16"))


def read_recorded(latencies: Path, slo: Path) -> Iterator[Recorded]:
    """Yield the recorded runs.

    Args:
        latencies: results/queue_model.csv of `experiments/published`.
        slo: the CSV file of recorded_slo.py.

    Raises:
        InputError: a file is missing or invalid.
    """
    met = {
        row.text("run"): row.count("met") / row.count("scheduled", minimum=1)
        for row in read_csv(slo, SLO_COLUMNS, what="recorded SLOs")
    }
    for row in read_csv(latencies, _LATENCY_COLUMNS, what="results of the queue model"):
        run = row.text("run")
        if run != "largest":
            yield Recorded(
                run=run,
                completed=row.count("requests"),
                mean_latency_s=row.number("recorded_mean_s"),
                met_of_scheduled=met.get(run),
            )
