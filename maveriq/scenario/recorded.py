"""What to tell maveriq to run a recorded run again from its description alone."""

from __future__ import annotations

from maveriq.errors import UnknownNameError
from maveriq.estimate.catalog import PAPER
from maveriq.scenario.options import Options
from maveriq.workload.testbed import RecordedRun

_POLICIES = {"MaverIQ": "hybrid", "MaverIQ-FP16": "hybrid", "AlpaServe": "alpaserve", "AlpaServe*": "alpaserve-star"}


def options_of(run: RecordedRun) -> Options:
    """Return the options of a recorded run; MaverIQ planned with the paper's estimator and placed with hybrid (SPEC 5).

    The requests of AlpaServe's runs were drawn in another way (SPEC 7), so that these options give
    its trace, but not its very requests.

    Raises:
        UnknownNameError: a policy that maveriq does not have.
    """
    if run.policy not in _POLICIES:
        raise UnknownNameError("policy of a recorded run", run.policy, _POLICIES)
    return Options(
        policy=_POLICIES[run.policy],
        intent=run.intent or "min-cost",
        float16_only=run.float16_only,
        trace=run.trace,
        scale=run.scale,
        models=run.model_set,
        slo_scale=run.slo_scale,
        plan_with=PAPER,
    )
