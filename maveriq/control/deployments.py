"""A deployment's life: waiting, loading, up, down, removed or rejected."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from maveriq.control.load import BusyHistory
from maveriq.domain.deployment import DeploymentPlan
from maveriq.domain.intents import DeployAsk
from maveriq.domain.progress import DeploymentStatus
from maveriq.domain.records import NOT_YET, DeploymentRecord
from maveriq.domain.requests import Request
from maveriq.errors import InvariantError
from maveriq.units import Micros


class DeploymentState(StrEnum):
    """Where a deployment is."""

    WAITING = "waiting"  # planned, its memory reserved; loads at the first instant all its GPUs are idle
    LOADING = "loading"
    UP = "up"
    DOWN = "down"
    REMOVED = "removed"
    REJECTED = "rejected"


@dataclass(slots=True, kw_only=True)
class Deployment:
    """One deployment as the controller keeps it.

    `serves` says whether requests may wait for it: from its first registration until it is
    removed or lost. `returns` says, while it is down, whether it will be back. `alive` says
    whether there is an engine, loading or up, that somebody must stop; `open_failures` how many
    of its own failures are not mended (a failed GPU is not among them). `incarnation` counts the
    engines started for it, `execution_id` the executions: late words about earlier ones are told
    apart by them.
    """

    deployment_id: int
    ask: DeployAsk
    plan: DeploymentPlan | None
    state: DeploymentState
    busy: BusyHistory
    reason: str = ""
    gpu_ids: tuple[int, ...] = ()
    gpu_mask: int = 0
    ready_us: Micros = NOT_YET
    removed_us: Micros = NOT_YET
    serves: bool = False
    returns: bool = True
    open_failures: int = 0
    alive: bool = False
    incarnation: int = 0
    execution_id: int = 0
    running: tuple[Request, ...] = ()
    started_us: Micros = NOT_YET
    completed: int = 0

    @property
    def layout(self) -> DeploymentPlan:
        """The plan of a deployment that has one.

        Raises:
            InvariantError: the ask was rejected.
        """
        if self.plan is None:
            raise InvariantError(f"deployment {self.deployment_id} was rejected and has no plan")
        return self.plan

    @property
    def name(self) -> str:
        """Its number and model, for reasons and messages."""
        return f"deployment {self.deployment_id} ({self.ask.model.name})"

    @property
    def gone_for_good(self) -> bool:
        """Whether its engine failed and will not be back."""
        return self.state is DeploymentState.DOWN and not self.returns

    def engine_gone(self) -> bool:
        """Note that it has no engine any more; says whether there was one until now."""
        was_alive, self.alive = self.alive, False
        return was_alive

    def why_refused(self) -> str:
        """Return why a request for it is refused now."""
        match self.state:
            case DeploymentState.REJECTED:
                return f"{self.name} was rejected"
            case DeploymentState.REMOVED:
                return f"{self.name} was removed"
            case DeploymentState.DOWN:
                return f"{self.name} is down" + (", not for good" if self.returns else " for good")
            case _:
                return f"{self.name} is still {self.state}"

    def record(self) -> DeploymentRecord:
        """Return its row for the records."""
        return DeploymentRecord(
            deployment_id=self.deployment_id,
            ask=self.ask,
            plan=self.plan,
            ready_us=self.ready_us,
            removed_us=self.removed_us,
            status=self.state.value,
            reason=self.reason,
        )

    def status(self, waiting: int) -> DeploymentStatus:
        """Return what a live view shows of it."""
        return DeploymentStatus(
            deployment_id=self.deployment_id,
            model=self.ask.model.name,
            configuration=str(self.plan.configuration) if self.plan else "",
            layer_split=self.plan.layer_split if self.plan else (),
            gpu_ids=self.gpu_ids,
            status=self.state.value,
            waiting=waiting,
            completed=self.completed,
            reason=self.reason,
            restarts=max(0, self.incarnation - 1),
        )
