"""A service: what is registered and deployed, what is in flight, over the life of a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from maveriq.domain.progress import DeploymentStatus
from maveriq.errors import InputError
from maveriq.exec.live_cluster import EndpointRequest, LiveCluster
from maveriq.policy.pinned import PinnedPlacementPolicy, Plans
from maveriq.serve.errors import ApiError, bad_request, not_found
from maveriq.serve.metrics import Metrics
from maveriq.serve.model_registry import ModelRegistry, did_you_mean
from maveriq.serve.requests import RequestLifecycle
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store, StoredEndpoint, StoredModel, StoreError

_LOG = logging.getLogger(__name__)
_LAST_WORDS_S = 5.0
_UP = "up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An endpoint and the deployments that serve it."""

    stored: StoredEndpoint
    model: StoredModel
    deployments: tuple[DeploymentStatus, ...]

    @property
    def endpoint_id(self) -> int:
        """Its number."""
        return self.stored.endpoint_id

    @property
    def status(self) -> str:
        """`up` if any engine is, else what the first engine is; `waiting` before it is decided on."""
        statuses = [deployment.status for deployment in self.deployments]
        return _UP if _UP in statuses else (statuses or ["waiting"])[0]


class Service:
    """Serves one cluster from one state file. All of it is used from one event loop."""

    def __init__(
        self,
        cluster: LiveCluster,
        store: Store,
        settings: ServeSettings,
        placements: PinnedPlacementPolicy,
        models: ModelRegistry,
    ) -> None:
        """Connect the parts; `start` makes them work.

        Args:
            cluster: serves; it is closed by `stop`.
            store: remembers; it is closed by `stop`.
            settings: the limits.
            placements: the policy of `cluster`; it receives the overrides of endpoints.
            models: the registered models.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.models = models
        self.tracker = RequestLifecycle(cluster, store, self.metrics, maximum=settings.max_in_flight)
        self.store = store
        self.started_s = int(time.time())
        self._cluster = cluster
        self._placements = placements
        self._endpoints: dict[int, StoredEndpoint] = {}
        self._changing = asyncio.Lock()
        self._notes: set[asyncio.Task[None]] = set()
        self._stopping: asyncio.Task[None] | None = None
        self._end_grace_period = asyncio.Event()

    # Life

    async def start(self) -> None:
        """Bring back what was deployed, and end what an earlier life left open."""
        lost = await self.store.end_all_of_last_life()
        if lost:
            _LOG.warning("%d accepted requests had no end when the server stopped; they are marked failed", lost)
        await self.models.restore()
        for model in self.models:
            self.metrics.model_known(model.spec.name)
        self._placements.on_decision(self._note_plans)
        stored = await self.store.endpoints()
        # Those with a plan first, so that no new decision takes their place.
        for one in sorted(stored, key=lambda one: not one.plans):
            self._endpoints[one.endpoint_id] = one
            if one.plans:
                self._placements.pin(one.endpoint_id, one.plans)
            self._ask(one)
        self.metrics.watch(self._cluster.progress, self.tracker.__len__)

    async def stop(self) -> None:
        """Take nothing in any more, let what runs end within its time, stop all engines. May be called twice."""
        self.tracker.open = False
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    def end_grace_period(self) -> None:
        """Do not wait for what runs any longer."""
        self._end_grace_period.set()

    async def _stop(self) -> None:
        ends = [asyncio.create_task(self.tracker.drained()), asyncio.create_task(self._end_grace_period.wait())]
        await asyncio.wait(ends, timeout=self.settings.grace_period_s, return_when=asyncio.FIRST_COMPLETED)
        for one in ends:
            one.cancel()
        await self._cluster.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.tracker.drained(), _LAST_WORDS_S)
        await asyncio.gather(*self._notes, return_exceptions=True)
        self.store.close()

    # Endpoints

    async def unregister_model(self, model_id: int) -> None:
        """Take a model out of the register.

        Raises:
            ApiError: there is none of that number, or it is deployed.
        """
        async with self._changing:
            deployed = any(one.model_id == model_id for one in self._endpoints.values())
            await self.models.unregister(model_id, deployed=deployed)

    async def create_endpoint(self, model: StoredModel, request: EndpointRequest, placement: str) -> Endpoint:
        """Ask for a model to be served.

        Raises:
            ApiError: no such placement, too many endpoints, the server stops.
            StoreError: the state cannot be written.
        """
        async with self._changing:
            if not self.tracker.open:
                raise ApiError(503, "the server is stopping", code="server_stopping")
            if len(self._endpoints) >= self.settings.max_endpoints:
                told = f"{self.settings.max_endpoints} endpoints exist, which is the maximum; remove one first"
                raise ApiError(409, told, code="too_many_endpoints")
            self.models.by_id(model.model_id)  # it may have been forgotten meanwhile
            names = self._placements.by_name
            if placement and placement not in names:
                told = f"unknown placement {placement!r}{did_you_mean(placement, names)} (known: {', '.join(names)})"
                raise bad_request(told, "placement")
            endpoint_id = await self.store.add_endpoint(model.model_id, request, placement)
            stored = StoredEndpoint(
                endpoint_id=endpoint_id, model_id=model.model_id, request=request, placement=placement
            )
            self._endpoints[endpoint_id] = stored
            self.metrics.model_known(model.spec.name)
            self._ask(stored)
            return self._view(stored)

    async def remove_endpoint(self, endpoint_id: int) -> None:
        """Take an endpoint away: what runs is finished, what waits is refused.

        Raises:
            ApiError: there is none.
            StoreError: the state cannot be written.
        """
        async with self._changing:
            self.endpoint(endpoint_id)
            await self.store.remove_endpoint(endpoint_id)
            del self._endpoints[endpoint_id]
            self._placements.forget(endpoint_id)
            with contextlib.suppress(InputError):  # it never got so far
                self._cluster.remove(endpoint_id)

    def endpoint(self, endpoint_id: int) -> Endpoint:
        """Return an endpoint as it is now.

        Raises:
            ApiError: there is none.
        """
        if endpoint_id not in self._endpoints:
            raise not_found("endpoint", f"there is no endpoint {endpoint_id}; list them with GET /endpoints")
        return self._view(self._endpoints[endpoint_id])

    def endpoints(self) -> list[Endpoint]:
        """Return all endpoints, in the order of their numbers."""
        return [self._view(self._endpoints[endpoint_id]) for endpoint_id in sorted(self._endpoints)]

    def target(self, text: str) -> Endpoint:
        """Return the endpoint that is to serve a request for `MODEL` or `MODEL@ENDPOINT`.

        Of several endpoints of one model, one that is up and has the fewest requests in flight.

        Raises:
            ApiError: nothing of that name is deployed.
        """
        endpoints = self.endpoints()
        meant = [one for one in endpoints if text in (one.model.spec.name, address(one))]
        if not meant:
            names = {name for one in endpoints for name in (one.model.spec.name, address(one))}
            told = f"model {text!r} is not deployed{did_you_mean(text, names)}; GET /v1/models lists what is"
            raise not_found("model", told)
        return min(meant, key=lambda one: (one.status != _UP, self.tracker.waiting_for(one.endpoint_id)))

    def problems(self) -> list[str]:
        """Return what is not as it should be, in words; empty where all is well."""
        now = self._cluster.progress()
        told = [f"GPU {gpu.gpu_id} is down" for gpu in now.gpus if gpu.down]
        told += [
            f"endpoint {one.endpoint_id} ({one.model.spec.name}) is {one.status}"
            for one in self.endpoints()
            if one.status in ("down", "rejected")
        ]
        return told if self.tracker.store_works else [*told, "the state file cannot be written"]

    def _ask(self, stored: StoredEndpoint) -> None:
        if stored.placement:
            with contextlib.suppress(InputError):  # a name that this life of the service does not know: the usual one
                self._placements.place_by(stored.endpoint_id, stored.placement)
        self._cluster.deploy(stored.request, endpoint_id=stored.endpoint_id)

    def _view(self, stored: StoredEndpoint) -> Endpoint:
        deployments: Iterable[DeploymentStatus] = ()
        with contextlib.suppress(InputError):  # not decided on yet
            deployments = self._cluster.endpoint(stored.endpoint_id)
        return Endpoint(stored=stored, model=self.models.by_id(stored.model_id), deployments=tuple(deployments))

    def _note_plans(self, endpoint_id: int, plans: Plans) -> None:
        """Write down how an endpoint was deployed, without holding up whoever decided it."""

        async def note() -> None:
            try:
                await self.store.set_plans(endpoint_id, plans)
            except StoreError as error:
                _LOG.warning("endpoint %d may come back elsewhere after a restart: %s", endpoint_id, error)

        task = asyncio.get_running_loop().create_task(note())
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)


def address(endpoint: Endpoint) -> str:
    """Return the name that means this endpoint alone."""
    return f"{endpoint.model.spec.name}@{endpoint.endpoint_id}"
