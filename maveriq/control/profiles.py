"""Profiles that are measured beside what is served: the GPUs that they hold, and what waits for their results.

A profile run starts when GPUs are free for it, and gives them back when a deployment has no room otherwise. An
endpoint may wait for a profile before the policy decides on it; its requests wait with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from maveriq.control.events import ProfileRequested
from maveriq.domain.cluster import ClusterState, GpuView
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.requests import Request
from maveriq.units import Bytes


@dataclass(slots=True)
class ProfileQueue:
    """Profiles that wait for GPUs, those that hold some, and the endpoints and requests that wait for a profile.

    Args:
        state: the memory of the cluster. A profile holds memory there under minus its number.
    """

    state: ClusterState
    _waiting: dict[int, ProfileRequested] = field(default_factory=dict)
    _running: dict[int, ProfileRequested] = field(default_factory=dict)
    _held: dict[int, dict[int, Bytes]] = field(default_factory=dict)  # memory of running ones by GPU
    _endpoints: dict[int, tuple[EndpointSpec, int]] = field(default_factory=dict)  # with their profile
    _requests: dict[int, dict[int, Request]] = field(default_factory=dict)  # of these endpoints

    # GPUs

    def request(self, profile: ProfileRequested) -> None:
        """Queue a profile for GPUs; one that is known already keeps its place."""
        if profile.profile_id not in self._running:
            self._waiting.setdefault(profile.profile_id, profile)

    def end(self, profile_id: int) -> None:
        """Forget a profile, and free what it holds."""
        self._waiting.pop(profile_id, None)
        if self._running.pop(profile_id, None) is not None:
            self._release(profile_id)

    def start_waiting(self, gpus: Iterable[GpuView]) -> list[tuple[int, tuple[int, ...]]]:
        """Reserve GPUs for the profiles that wait, in their order, and return those that got some with the GPUs.

        Args:
            gpus: the GPUs that are up.
        """
        views, started = tuple(gpus), []
        for profile_id, profile in list(self._waiting.items()):
            shares = self._room(profile, views)
            if shares is None:
                continue
            self.state.reserve(-profile_id, shares)
            self._running[profile_id] = self._waiting.pop(profile_id)
            self._held[profile_id] = shares
            started.append((profile_id, tuple(sorted(shares))))
        return started

    def _room(self, profile: ProfileRequested, views: Collection[GpuView]) -> dict[int, Bytes] | None:
        """Return the bytes that a profile takes of each of its GPUs, all on one node; None if they do not fit.

        Without `beside_engines` it takes GPUs that hold nothing, whole, so that nothing is placed on them meanwhile.
        Policies fill GPUs from the first one, so the last ones are taken.
        """
        fitting: dict[int, list[tuple[int, float, int]]] = {}
        for view in views:
            free = self.state.free_bytes(view.gpu_id)
            if free < profile.bytes_per_gpu or (view.tenants and not profile.beside_engines):
                continue
            if any(view.gpu_id in shares for shares in self._held.values()):
                continue
            fitting.setdefault(view.node, []).append((view.tenants, view.load, -view.gpu_id))
        for node in sorted(fitting, reverse=True):
            if len(fitting[node]) >= profile.gpus:
                gpu_ids = [-number for _, _, number in sorted(fitting[node])[: profile.gpus]]
                whole = not profile.beside_engines
                return {gpu_id: self.state.free_bytes(gpu_id) if whole else profile.bytes_per_gpu for gpu_id in gpu_ids}
        return None

    @property
    def any_waiting(self) -> bool:
        """Whether a profile waits for GPUs."""
        return bool(self._waiting)

    @property
    def holding(self) -> Mapping[int, Mapping[int, Bytes]]:
        """The memory that each running profile holds, by GPU."""
        return self._held

    def revoke(self, gpu_ids: Collection[int]) -> list[int]:
        """Take these GPUs from the profiles that hold them, which wait again, and return these profiles."""
        revoked = [profile_id for profile_id, shares in self._held.items() if shares.keys() & set(gpu_ids)]
        for profile_id in revoked:
            self._waiting[profile_id] = self._running.pop(profile_id)
            self._release(profile_id)
        return revoked

    def _release(self, profile_id: int) -> None:
        del self._held[profile_id]
        self.state.release(-profile_id)

    # What waits for a profile

    def add_endpoint(self, endpoint: EndpointSpec, profile_id: int) -> None:
        """Let an endpoint wait until a profile has ended."""
        self._endpoints[endpoint.endpoint_id] = (endpoint, profile_id)
        self._requests[endpoint.endpoint_id] = {}

    def is_waiting(self, endpoint_id: int) -> bool:
        """Return whether an endpoint waits for a profile."""
        return endpoint_id in self._endpoints

    def endpoints_of(self, profile_id: int) -> Iterator[EndpointSpec]:
        """Yield the endpoints that wait for a profile, in the order in which they were added."""
        yield from [endpoint for endpoint, awaited in self._endpoints.values() if awaited == profile_id]

    def add_request(self, request: Request) -> None:
        """Let a request wait with its endpoint."""
        self._requests[request.endpoint_id][request.request_id] = request

    def remove_request(self, request_id: int) -> bool:
        """Forget a request, and return whether it waited."""
        return any(waiting.pop(request_id, None) is not None for waiting in self._requests.values())

    def remove_endpoint(self, endpoint_id: int) -> list[Request]:
        """Return the requests of an endpoint that waits no longer, in the order of arrival."""
        self._endpoints.pop(endpoint_id, None)
        return list(self._requests.pop(endpoint_id, {}).values())
