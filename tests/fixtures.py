"""A small system for tests: a model, an estimator with round numbers, a policy with fixed placements."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maveriq.control.controller import Controller, ControllerSettings
from maveriq.control.deployment_manager import Deployment
from maveriq.domain.cluster import Cluster, ClusterView, Gpu
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.faults import Fault
from maveriq.domain.models import ModelSpec, WeightType
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import Request
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.policy.policy import Decision, Deploy, Rejection
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate
from maveriq.units import BYTES_PER_GIB, MICROS_PER_SECOND, Micros, duration_micros
from maveriq.workload.requests import Arrivals, Workload

MODEL = ModelSpec(
    name="tiny",
    architecture="llama",
    layers=8,
    hidden_size=64,
    attention_heads=8,
    kv_heads=8,
    intermediate_size=256,
    vocab_size=1000,
)
SHARD_BYTES = BYTES_PER_GIB


class TokenSeconds:
    """An estimator: an output token takes `token_s`, all else takes no time; a batch takes as long as one request."""

    name = "token-seconds"

    def __init__(self, token_s: float = 0.001) -> None:
        self.token_s = token_s

    def why_not(self, model, configuration):
        return None

    def service(self, model, configuration, *, prompt_tokens, output_tokens, batch):
        return ServiceEstimate(ttft_s=0.0, tpot_s=self.token_s, output_tokens=output_tokens)

    def memory(self, model, configuration):
        return configuration.gpus * SHARD_BYTES


@dataclass(frozen=True)
class FixedPlacement:
    """A policy that puts each endpoint on given GPUs (a list of them per replica), or rejects it."""

    gpus_of: dict[int, list[tuple[int, ...]]]
    batch_size: int = 1
    name: str = "fixed-placement"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        free = {gpu.gpu_id: gpu.free_bytes for gpu in view.gpus}
        replicas = self.gpus_of.get(endpoint.endpoint_id, [])
        if not replicas or any(free.get(gpu, 0) < SHARD_BYTES for gpus in replicas for gpu in gpus):
            return Rejection(reason="rejected by the test policy")
        return Deploy(plans=tuple(plan(gpus, self.batch_size) for gpus in replicas))


def plan(gpu_ids: Sequence[int], batch_size: int = 1) -> DeploymentPlan:
    return DeploymentPlan(
        model=MODEL,
        configuration=ParallelConfig(
            tp=1,
            pp=len(gpu_ids),
            weights=WeightType.FLOAT16,
            batch_size=batch_size,
            layer_split=(MODEL.layers - len(gpu_ids) + 1, *[1] * (len(gpu_ids) - 1)),
        ),
        gpu_ids=tuple(gpu_ids),
        gpu_bytes=(SHARD_BYTES,) * len(gpu_ids),
        est_latency_s=1.0,
        est_memory_bytes=SHARD_BYTES * len(gpu_ids),
    )


def cluster(gpus: int, gib: int = 8) -> Cluster:
    return Cluster(
        name=f"{gpus} test GPUs",
        gpus=tuple(Gpu(gpu_id=i, node=0, kind="test", capacity_bytes=gib * BYTES_PER_GIB) for i in range(gpus)),
    )


def endpoint_spec(endpoint_id: int, requested_us: Micros = 0) -> EndpointSpec:
    return EndpointSpec(
        endpoint_id=endpoint_id,
        model=MODEL,
        intent=Intent(objective=Objective.MIN_COST),
        requested_us=requested_us,
        prompt_tokens=1,
        output_tokens=1,
    )


def arrivals(times_us: Sequence[int], endpoints: Sequence[int], tokens: Sequence[int], slo_us: int = 0) -> Arrivals:
    count = len(times_us)
    return Arrivals(
        arrival_us=np.asarray(times_us, dtype=np.int64),
        endpoint_id=np.asarray(endpoints, dtype=np.int64),
        prompt_tokens=np.ones(count, dtype=np.int64),
        output_tokens=np.asarray(tokens, dtype=np.int64),
        slo_us=np.full(count, slo_us, dtype=np.int64),
    )


def scenario(
    requests: Arrivals,
    gpus_of: dict[int, list[tuple[int, ...]]],
    *,
    gpus: int = 4,
    settings: ControllerSettings | None = None,
    faults: tuple[Fault, ...] = (),
    load_us: Micros = 1,
    batch_size: int = 1,
    token_s: float = 0.001,
    requested_us: dict[int, Micros] | None = None,
    drain_us: Micros = 3_600 * MICROS_PER_SECOND,
) -> ReplaySystem:
    """Return a system whose requests take `token_s` per output token; by default all endpoints are requested at 0."""
    estimator = TokenSeconds(token_s)
    endpoints = tuple(
        endpoint_spec(endpoint_id, (requested_us or {}).get(endpoint_id, 0)) for endpoint_id in sorted(gpus_of)
    )
    return ReplaySystem(
        cluster=cluster(gpus),
        policy=FixedPlacement(gpus_of, batch_size),
        workload=Workload(name="test", endpoints=endpoints, arrivals=requests),
        settings=settings or ControllerSettings(),
        predict_service_time=predict_service_time,
        service_times=EstimatedServiceTimes(estimator),
        load_time=lambda _plan: load_us,
        faults=faults,
        drain_us=drain_us,
        sample_us=MICROS_PER_SECOND,
    )


def predict_service_time(deployment: Deployment, request: Request) -> Micros:
    """Return the true service time, so that the order of shortest job first is known."""
    return duration_micros(request.output_tokens / 1e3)


def run(*args, **kwargs) -> RunRecord:
    return simulate(scenario(*args, **kwargs))


def make_controller(
    gpus_of: dict[int, list[tuple[int, ...]]], *, gpus: int = 4, on_request_end=None, **settings
) -> Controller:
    """Return a controller for tests that call `handle` themselves."""
    return Controller(
        cluster(gpus),
        FixedPlacement(gpus_of),
        ControllerSettings(**settings),
        predict_service_time,
        on_request_end=on_request_end,
    )
