"""The continuous engines of a service, whose endpoints come and go."""

from __future__ import annotations

from dataclasses import dataclass, replace

from maveriq.domain.deployments import EndpointSpec
from maveriq.errors import InputError
from maveriq.scenario.continuous_engines import ContinuousEngines
from maveriq.workload.model_sets import ContinuousSettings, named_configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEngines:
    """Keeps the settings of the engines of each endpoint (mutable).

    Args:
        engines: makes engines; it looks `settings` up.
        settings: by endpoint.
    """

    engines: ContinuousEngines
    settings: dict[int, ContinuousSettings]

    def add(self, endpoint: EndpointSpec, settings: ContinuousSettings, *, whole_command: bool) -> EndpointSpec:
        """Keep the settings of an endpoint's engines, and return the endpoint with what they say of it.

        Settings that contradict each other are found when the policy decides, which then rejects the endpoint.
        """
        self.settings[endpoint.endpoint_id] = settings
        configuration, pattern = named_configuration(endpoint.model, settings, whole_command=whole_command)
        named = replace(endpoint, configuration=configuration, pattern=pattern)
        try:
            resolved = self.engines.resolved(named)
        except InputError:
            return named
        return replace(named, memory_share=resolved.memory_share, sequence_tokens=resolved.max_model_len)

    def remove(self, endpoint_id: int) -> None:
        """Forget an endpoint."""
        self.settings.pop(endpoint_id, None)
