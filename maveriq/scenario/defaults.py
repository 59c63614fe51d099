"""The defaults that depend on the cluster: those of the published system on its own testbed, better ones elsewhere.

The published system queues all requests in one line, packs models onto GPUs that are in use, and breaks ties by
number. On its testbed a run reproduces that. Elsewhere, and in a live service, each deployment has a queue of its
own and models go to the least loaded, emptiest GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from maveriq.control.controller import OnLoss
from maveriq.control.queues import QueueDiscipline
from maveriq.domain.cluster import Cluster
from maveriq.errors import InvariantError, UnknownNameError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.policy.maveriq import TieBreak
from maveriq.scenario.options import Options


@dataclass(frozen=True, slots=True)
class _Defaults:
    policy: str
    queue: QueueDiscipline
    tie_break: TieBreak


_PUBLISHED = _Defaults("hybrid", QueueDiscipline.FIFO, TieBreak.GPU_ID)
_ELSEWHERE = _Defaults("llf", QueueDiscipline.FIFO_PER_MODEL, TieBreak.FREE_MEMORY)

_Choice = TypeVar("_Choice", bound=StrEnum)


def with_cluster_defaults(
    options: Options, profile: HardwareProfile, cluster: Cluster, *, live: bool = False
) -> Options:
    """Return the options with a policy, a queue discipline, a tie break and what follows a loss, where not named.

    Args:
        options: the user's options.
        profile: says which cluster is the published testbed.
        cluster: what the run or the service runs on.
        live: a service, which reproduces nothing.
    """
    defaults = _ELSEWHERE if live or not is_published_testbed(cluster, profile) else _PUBLISHED
    return replace(
        options,
        policy=defaults.policy if options.policy is None else options.policy,
        queue=defaults.queue.value if options.queue is None else options.queue,
        on_loss=(OnLoss.REPLACE if live else OnLoss.KEEP).value if options.on_loss is None else options.on_loss,
        tie_break=defaults.tie_break.value if options.tie_break is None else options.tie_break,
    )


def is_published_testbed(cluster: Cluster, profile: HardwareProfile) -> bool:
    """Return whether a cluster has exactly the GPUs of the testbed that the profile names, with nothing on them."""
    return bool(profile.published_testbed) and cluster.gpus == cluster_from(profile.published_testbed).gpus


def resolved(value: str | None) -> str:
    """Return an option that `with_cluster_defaults` has set.

    Raises:
        InvariantError: it has not.
    """
    if value is None:
        raise InvariantError("an option that depends on the cluster was not resolved")
    return value


def choice(kind: type[_Choice], what: str, text: str | None) -> _Choice:
    """Return the member of an enumeration that a resolved option names.

    Raises:
        UnknownNameError: no member has this name.
    """
    name = resolved(text)
    try:
        return kind(name)
    except ValueError:
        raise UnknownNameError(what, name, [member.value for member in kind]) from None
