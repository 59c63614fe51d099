"""The service behind the HTTP API: its models, its endpoints, its requests in flight, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from maveriq.domain.progress import DeploymentStatus
from maveriq.errors import InputError, did_you_mean
from maveriq.exec.live_cluster import EndpointRequest, LiveCluster
from maveriq.files import is_folder
from maveriq.policy.pinned import PinnedPlacementPolicy, Plans
from maveriq.serve.errors import ApiError, bad_request, not_found
from maveriq.serve.history import SAMPLE_EVERY_S, ClusterHistory, RecentRequests
from maveriq.serve.job_writer import StoreError
from maveriq.serve.metrics import Metrics
from maveriq.serve.model_registry import ModelRegistry
from maveriq.serve.profile_jobs import ProfileJobs, ProfileSettings
from maveriq.serve.requests import RequestLifecycle
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store, StoredEndpoint, StoredModel

ServiceStatus: TypeAlias = Literal["ready", "degraded", "stopping"]

_LOG = logging.getLogger(__name__)
_FINAL_STATUSES_S = 5.0  # to store final statuses after the engines have stopped
_UP = "up"
_NEAREST_TO_UP = (_UP, "loading", "waiting", "down", "removed", "rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A snapshot of an endpoint and the deployments that serve it."""

    stored: StoredEndpoint
    model: StoredModel
    deployments: tuple[DeploymentStatus, ...]
    waiting: int = 0  # requests that wait with it for the profile of its model

    @property
    def endpoint_id(self) -> int:
        """The ID of the endpoint."""
        return self.stored.endpoint_id

    @property
    def address(self) -> str:
        """The model name that addresses this endpoint only: `MODEL@ENDPOINT_ID`."""
        return f"{self.model.spec.name}@{self.endpoint_id}"

    @property
    def reason(self) -> str:
        """Why it or its deployments are not up."""
        if self.stored.request.wait_for_profile and not self.deployments:
            return "waits for the profile of its model"
        return "; ".join(deployment.reason for deployment in self.deployments if deployment.reason)

    @property
    def status(self) -> str:
        """`up` if a deployment is up, else that of the one nearest to it; `waiting` before there is one."""
        statuses = [deployment.status for deployment in self.deployments]
        return min(statuses, key=_NEAREST_TO_UP.index, default="waiting")


class Service:
    """Serves one cluster from one state file. All methods are called from one event loop."""

    def __init__(
        self,
        cluster: LiveCluster,
        store: Store,
        settings: ServeSettings,
        placements: PinnedPlacementPolicy,
        models: ModelRegistry,
        profiles: ProfileSettings | None = None,
    ) -> None:
        """Connect the parts; `start` makes them work.

        Args:
            cluster: runs the requests; `stop` closes it.
            store: the state that survives a restart; `stop` closes it.
            settings: the limits.
            placements: the policy of `cluster`; it receives the overrides of endpoints.
            models: the registered models.
            profiles: how profiles of new models are measured; None to measure none.
        """
        self.settings = settings
        self.profiles = ProfileJobs(cluster, profiles)
        self.store = store
        self.models = models
        self.metrics = Metrics()
        self.recent = RecentRequests()
        self.history = ClusterHistory()
        self.requests = RequestLifecycle(
            cluster, store, self.metrics, self.recent, max_in_flight=settings.max_in_flight
        )
        self.started_s = int(time.time())
        self.cluster = cluster
        self._placements = placements
        self._endpoints: dict[int, StoredEndpoint] = {}
        self._changing = asyncio.Lock()  # held while models or endpoints change
        self._dangling: list[str] = []  # missing files and rows that the state file refers to
        self._plan_writes: set[asyncio.Task[None]] = set()
        self._sampling: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._grace_period_ended = asyncio.Event()

    # Start and stop

    async def start(self) -> None:
        """Restore models and endpoints, and fail the requests that a crash interrupted.

        Raises:
            StoreError: the state file cannot be read or written.
        """
        interrupted = await self.store.fail_interrupted_requests()
        if interrupted:
            _LOG.warning("%d requests were in flight when the server last stopped; they are marked failed", interrupted)
        await self.models.restore()
        for model in self.models:
            self.metrics.add_model(model.spec.name)
            if model.folder and not is_folder(Path(model.folder)):
                self._dangling.append(f"model {model.spec.name}: its folder {model.folder!r} is gone")
        self.profiles.restore(self.models)
        self._placements.on_decision(self._store_plans)
        # Endpoints with plans first, so that new decisions do not take their GPUs.
        model_ids = {model.model_id for model in self.models}
        for stored in sorted(await self.store.endpoints(), key=lambda stored: not stored.plans):
            if stored.model_id not in model_ids:
                self._dangling.append(
                    f"endpoint {stored.endpoint_id} is left out: the state file has no model {stored.model_id}"
                )
                continue
            self._endpoints[stored.endpoint_id] = stored
            if stored.plans:
                self._placements.pin(stored.endpoint_id, stored.plans)
            self._deploy(stored)
        for problem in self._dangling:
            _LOG.warning("%s", problem)
        self.metrics.add_cluster(self.cluster.progress, self.requests.__len__)
        if self.profiles.enabled:
            self.metrics.add_profiles(self.profiles)
        self.history.add(self.cluster.progress(), time.time())
        self._sampling = asyncio.create_task(self._sample())

    async def stop(self) -> None:
        """Refuse new requests, let requests in flight end within the grace period, stop all engines.

        It may be called twice.
        """
        self.requests.open = False
        self.models.refuse_prompts()
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    def end_grace_period(self) -> None:
        """Let `stop` continue without waiting for requests in flight."""
        self._grace_period_ended.set()

    async def _stop(self) -> None:
        await self.profiles.close()
        waits = [asyncio.create_task(self.requests.drained()), asyncio.create_task(self._grace_period_ended.wait())]
        await asyncio.wait(waits, timeout=self.settings.grace_period_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._sampling is not None:
            self._sampling.cancel()
        await self.cluster.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.requests.drained(), _FINAL_STATUSES_S)
        await asyncio.gather(*self._plan_writes, return_exceptions=True)
        self.store.close()

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            self.history.add(self.cluster.progress(), time.time())

    @property
    def status(self) -> ServiceStatus:
        """Whether it serves."""
        if not self.requests.open:
            return "stopping"
        return "degraded" if self.problems() else "ready"

    # Models and endpoints

    async def register_model(self, name: str, *, profile: bool | None = None) -> StoredModel:
        """Register a model, and measure a profile of it: `profile` says whether, None by what was measured already.

        A model that is registered is measured only if it is asked for.

        Raises:
            ApiError: as `ModelRegistry.register`, or the server measures no profiles.
        """
        if profile and not self.profiles.enabled:
            raise bad_request("this server measures no profiles; start it with --profile-on-register", "profile")
        known = self.models.find(name)
        model = await self.models.register(name)
        is_new = known is None and self.profiles.state(model.model_id) is None
        if profile or (profile is None and is_new and self.profiles.is_wanted_for(model)):
            self.profiles.request(model)
        return model

    async def profile_model(self, model_id: int) -> StoredModel:
        """Measure a registered model, again if it was measured; see `register_model`."""
        return await self.register_model(self.models.by_id(model_id).spec.name, profile=True)

    async def cancel_profile(self, model_id: int) -> None:
        """Give up the profile of a model.

        Raises:
            ApiError: there is no such model, or its profile is not under way.
        """
        model = self.models.by_id(model_id)
        if not self.profiles.is_open(model_id):
            raise ApiError(409, f"no profile of {model.spec.name} is being measured", code="no_profile")
        await self.profiles.cancel(model_id)

    async def unregister_model(self, model_id: int) -> None:
        """Remove a model from the registry.

        Raises:
            ApiError: there is no such model, or it has endpoints.
        """
        async with self._changing:
            has_endpoints = any(stored.model_id == model_id for stored in self._endpoints.values())
            model = self.models.by_id(model_id)
            await self.models.unregister(model_id, has_endpoints=has_endpoints)
            await self.profiles.forget(model)

    async def create_endpoint(self, model: StoredModel, request: EndpointRequest, placement: str) -> Endpoint:
        """Create an endpoint; `placement` is the name of its placement policy, or empty for the server's.

        Raises:
            ApiError: there is no such placement, there are too many endpoints, or the server is stopping.
            StoreError: the state file cannot be written.
        """
        async with self._changing:
            if not self.requests.open:
                raise ApiError(503, "the server is stopping", code="server_stopping")
            if len(self._endpoints) >= self.settings.max_endpoints:
                message = f"{self.settings.max_endpoints} endpoints exist, which is the maximum; remove one first"
                raise ApiError(409, message, code="too_many_endpoints")
            self.models.by_id(model.model_id)  # raises if it was unregistered in the meantime
            request = replace(
                request, wait_for_profile=request.wait_for_profile and self.profiles.is_open(model.model_id)
            )
            names = self._placements.by_name
            if placement and placement not in names:
                hint = did_you_mean(placement, names)
                raise bad_request(f"unknown placement {placement!r}{hint} (known: {', '.join(names)})", "placement")
            endpoint_id = await self.store.add_endpoint(model.model_id, request, placement)
            stored = StoredEndpoint(
                endpoint_id=endpoint_id, model_id=model.model_id, request=request, placement=placement
            )
            self._endpoints[endpoint_id] = stored
            self.metrics.add_model(model.spec.name)
            self._deploy(stored)
            return self._snapshot(stored)

    async def remove_endpoint(self, endpoint_id: int) -> None:
        """Remove an endpoint: running requests finish, waiting requests are refused.

        Raises:
            ApiError: there is no such endpoint.
            StoreError: the state file cannot be written.
        """
        async with self._changing:
            self.endpoint(endpoint_id)
            await self.store.remove_endpoint(endpoint_id)
            del self._endpoints[endpoint_id]
            self._placements.forget(endpoint_id)
            with contextlib.suppress(InputError):  # the cluster has not seen it yet
                self.cluster.remove(endpoint_id)

    def endpoint(self, endpoint_id: int) -> Endpoint:
        """Return a snapshot of an endpoint.

        Raises:
            ApiError: there is no such endpoint.
        """
        if endpoint_id not in self._endpoints:
            raise not_found("endpoint", f"there is no endpoint {endpoint_id}; list them with GET /endpoints")
        return self._snapshot(self._endpoints[endpoint_id])

    def endpoints(self) -> list[Endpoint]:
        """Return snapshots of all endpoints, ordered by ID."""
        return [self._snapshot(self._endpoints[endpoint_id]) for endpoint_id in sorted(self._endpoints)]

    def endpoint_for(self, name: str) -> Endpoint:
        """Return the endpoint for a request to `MODEL` or `MODEL@ENDPOINT_ID`.

        Among several endpoints of a model: one that is up and has the fewest requests in flight.

        Raises:
            ApiError: no endpoint has this name.
        """
        endpoints = self.endpoints()
        matches = [endpoint for endpoint in endpoints if name in (endpoint.model.spec.name, endpoint.address)]
        if not matches:
            names = {name for endpoint in endpoints for name in (endpoint.model.spec.name, endpoint.address)}
            hint = did_you_mean(name, names)
            raise not_found("model", f"model {name!r} is not deployed{hint}; GET /v1/models lists those that are")
        return min(
            matches,
            key=lambda endpoint: (endpoint.status != _UP, self.requests.in_flight_at(endpoint.endpoint_id)),
        )

    def problems(self) -> list[str]:
        """Return what is wrong, one sentence each; empty if the service is healthy."""
        problems = [f"GPU {gpu.gpu_id} is down" for gpu in self.cluster.progress().gpus if gpu.down]
        problems += [
            f"endpoint {endpoint.endpoint_id} ({endpoint.model.spec.name}) is {endpoint.status}"
            for endpoint in self.endpoints()
            if endpoint.status in ("down", "rejected")
        ]
        store_problem = self.store.problem()
        if store_problem:
            problems.append(store_problem)
        elif not self.requests.store_works:
            problems.append("the state file cannot be written")
        return [*problems, *self._dangling]

    def _deploy(self, stored: StoredEndpoint) -> None:
        if stored.placement:
            with contextlib.suppress(InputError):  # a restored endpoint whose placement no longer exists: the default
                self._placements.place_by(stored.endpoint_id, stored.placement)
        model_id = stored.model_id if stored.request.wait_for_profile and not stored.plans else 0
        self.cluster.deploy(stored.request, endpoint_id=stored.endpoint_id, after_profile=model_id)
        if model_id and not self.profiles.is_open(model_id):  # it ended while the server was down, or before
            self.cluster.end_profile(model_id, self.profiles.why_given_up(model_id))

    def _snapshot(self, stored: StoredEndpoint) -> Endpoint:
        deployments: Iterable[DeploymentStatus] = ()
        with contextlib.suppress(InputError):  # the policy has not decided yet
            deployments = self.cluster.endpoint(stored.endpoint_id)
        return Endpoint(
            stored=stored,
            model=self.models.by_id(stored.model_id),
            deployments=tuple(deployments),
            waiting=0 if deployments else self.requests.in_flight_at(stored.endpoint_id),
        )

    def _store_plans(self, endpoint_id: int, plans: Plans) -> None:
        """Store the plans of an endpoint in the background."""

        async def write() -> None:
            try:
                await self.store.set_plans(endpoint_id, plans)
            except StoreError as error:
                _LOG.warning("endpoint %d may move to other GPUs after a restart: %s", endpoint_id, error)

        task = asyncio.get_running_loop().create_task(write())
        self._plan_writes.add(task)
        task.add_done_callback(self._plan_writes.discard)
