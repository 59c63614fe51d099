"""What chance does to a run: the phases in which GPUs' loads are sampled are drawn again, nothing else is.

No description of a run says how they fell. The mean over draws is the prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from maveriq.domain.records import RunRecord
from maveriq.report.compare import Comparison, compare
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate


@dataclass(frozen=True, slots=True)
class Draws:
    """The same run under several draws, each compared with the recording; the first is that of `maveriq sim`."""

    found: Sequence[Comparison]

    def errors(self, figure: str) -> list[float]:
        """Return the errors of a figure of all requests, draw by draw; none where the run has no such figure."""
        errors = (one.overall.differences[figure].error for one in self.found)
        return [error for error in errors if error is not None]

    def service_errors(self, model: str) -> list[float]:
        """Return the errors of a model's median service time, draw by draw."""
        errors = (one.models[model].differences["service-p50"].error for one in self.found)
        return [error for error in errors if error is not None]

    def sim(self, figure: str) -> float:
        """Return the simulated figure of all requests, its mean over draws."""
        return fmean(value for one in self.found if (value := one.overall.differences[figure].sim) is not None)

    def on_recorded_gpus(self, endpoint_id: int) -> int:
        """Return in how many draws an endpoint has the recorded configuration on the recorded GPUs."""
        return sum(
            one.same_configuration and one.same_gpus
            for comparison in self.found
            for one in comparison.deployments
            if one.endpoint_id == endpoint_id
        )


def draw(scenario: ReplaySystem, sim: RunRecord, recorded: RunRecord, draws: int) -> Draws:
    """Return a scenario under so many draws; `sim` is what the scenario itself gives."""
    others = (simulate(other) for other in _redrawn(scenario, draws - 1))
    return Draws([compare(one, recorded) for one in (sim, *others)])


def _redrawn(scenario: ReplaySystem, draws: int) -> Iterator[ReplaySystem]:
    # The seed of the settings draws phases, and among replicas, of which endpoints here have one each.
    for seed in range(draws):
        yield replace(scenario, settings=replace(scenario.settings, seed=seed))
