"""The same run under several random draws of the phases in which the load of GPUs is sampled.

The recordings do not contain the phases, so the prediction is the mean over the draws.
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
    """Comparisons of several draws of a run with the recording; the first uses the seed of `maveriq sim`."""

    found: Sequence[Comparison]

    def errors(self, figure: str) -> list[float]:
        """Return the error of a figure over all requests in each draw; empty if the run lacks the figure."""
        errors = (comparison.overall.differences[figure].error for comparison in self.found)
        return [error for error in errors if error is not None]

    def service_errors(self, model: str) -> list[float]:
        """Return the error of a model's median service time in each draw."""
        errors = (comparison.models[model].differences["service-p50"].error for comparison in self.found)
        return [error for error in errors if error is not None]

    def sim(self, figure: str) -> float:
        """Return the simulated figure over all requests, as the mean over draws."""
        return fmean(
            value for comparison in self.found if (value := comparison.overall.differences[figure].sim) is not None
        )

    def on_recorded_gpus(self, endpoint_id: int) -> int:
        """Return in how many draws an endpoint has the recorded configuration on the recorded GPUs."""
        return sum(
            deployment.same_configuration and deployment.same_gpus
            for comparison in self.found
            for deployment in comparison.deployments
            if deployment.endpoint_id == endpoint_id
        )


def draw(system: ReplaySystem, sim: RunRecord, recorded: RunRecord, draws: int) -> Draws:
    """Simulate a system under `draws` draws; `sim` is the run of the system itself."""
    others = (simulate(other) for other in _redrawn(system, draws - 1))
    return Draws([compare(run, recorded) for run in (sim, *others)])


def _redrawn(system: ReplaySystem, draws: int) -> Iterator[ReplaySystem]:
    # The seed of the settings draws the phases. It also draws among replicas, but endpoints here have one each.
    for seed in range(draws):
        yield replace(system, settings=replace(system.settings, seed=seed))
