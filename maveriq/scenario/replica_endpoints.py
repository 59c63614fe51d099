"""Static placements whose requests are drawn with their replicas, as in the published AlpaServe runs.

There each replica is an endpoint of its own, to which requests are addressed: no router chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

import numpy as np

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import EndpointSpec
from maveriq.errors import InputError
from maveriq.policy.alpaserve.policy import StaticPlacementPolicy, why_no_room
from maveriq.policy.policy import Decision, Deploy, Policy, Rejection
from maveriq.scenario.options import Options
from maveriq.units import MICROS_PER_SECOND, duration_micros
from maveriq.workload.arrivals import LOAD_SHIFT_S
from maveriq.workload.model_sets import load_model_set
from maveriq.workload.replica_draw import replica_draw
from maveriq.workload.requests import Workload
from maveriq.workload.schedules import Schedule
from maveriq.workload.traces import SyntheticLoad, load_trace


@dataclass(frozen=True, slots=True)
class OneReplicaPerEndpoint:
    """A static placement with one endpoint per replica; `entry_of` has the original endpoint of each."""

    placed: StaticPlacementPolicy
    entry_of: Sequence[EndpointSpec]

    @property
    def name(self) -> str:
        """The name of the policy."""
        return self.placed.name

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the replica of an endpoint."""
        entry = self.entry_of[endpoint.endpoint_id - 1]
        # An idle view, because on the real one the replicas that are up would not fit again.
        idle = ClusterView(gpus=tuple(replace(gpu, free_bytes=gpu.capacity_bytes) for gpu in view.gpus))
        decision = self.placed.decide(entry, idle)
        if not isinstance(decision, Deploy):
            return decision
        first = 1 + self.entry_of.index(entry)
        plan = decision.plans[endpoint.endpoint_id - first]
        no_room = why_no_room(plan, {gpu.gpu_id: gpu.free_bytes for gpu in view.gpus})
        return Rejection(reason=no_room) if no_room else Deploy(plans=(plan,))


def one_endpoint_per_replica(
    policy: StaticPlacementPolicy, endpoints: Sequence[EndpointSpec]
) -> tuple[OneReplicaPerEndpoint, tuple[EndpointSpec, ...]]:
    """Return the policy and the endpoints of a placement in which each replica is an endpoint.

    The published driver numbers every entry, each further replica, and one for a model that is left out; each is asked
    for 90 s after the one before it.
    """
    entry_of = tuple(
        chain.from_iterable(repeat(endpoint, max(1, policy.replicas(endpoint.endpoint_id))) for endpoint in endpoints)
    )
    split = tuple(
        replace(
            endpoint,
            endpoint_id=endpoint_id,
            requested_us=endpoint.requested_us
            + (endpoint_id - endpoint.endpoint_id) * LOAD_SHIFT_S * MICROS_PER_SECOND,
        )
        for endpoint_id, endpoint in enumerate(entry_of, start=1)
    )
    return OneReplicaPerEndpoint(policy, entry_of), split


def with_published_requests(policy: Policy, workload: Workload, options: Options) -> tuple[Policy, Workload]:
    """Return a static placement and its workload with the requests that the published driver drew for it.

    Raises:
        InputError: another policy, a workload that is not drawn from an Azure trace as published, a part of one, or
            outputs of several lengths.
    """
    what = "--alpaserve-requests-as-published"
    if not isinstance(policy, StaticPlacementPolicy):
        raise InputError(f"{what} applies to alpaserve and alpaserve-star, not to {policy.name!r}; leave it out")
    trace, source, arrivals = load_trace(options.trace), workload.source, workload.arrivals
    if source is None or source.options.get("arrivals") != "published" or isinstance(trace, (SyntheticLoad, Schedule)):
        raise InputError(f"{what} needs published arrivals; give --trace code or conversation")
    if options.limit is not None or options.duration_s is not None:
        raise InputError(f"{what} draws whole runs; leave --limit and --duration-s out")
    if len(np.unique(arrivals.output_tokens)) > 1:
        raise InputError(f"{what} needs outputs of one length; give --output-tokens NUMBER")
    draw = replica_draw(
        trace.requests_per_minute,
        scale=source.options["scale"],
        load_at=load_model_set(options.models).load_at,
        replicas=[policy.replicas(endpoint.endpoint_id) for endpoint in workload.endpoints],
        seed=options.seed,
    )
    split_policy, endpoints = one_endpoint_per_replica(policy, workload.endpoints)
    slo_us = [0, *(duration_micros(endpoint.intent.slo_s or 0.0) for endpoint in endpoints)]
    arrivals = replace(
        arrivals,
        arrival_us=draw.arrival_us,
        endpoint_id=draw.endpoint_id,
        slo_us=np.array(slo_us, np.int64)[draw.endpoint_id],
    )
    return split_policy, replace(workload, endpoints=endpoints, arrivals=arrivals)
