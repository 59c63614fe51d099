"""The routing rule that `--router` names, checked against the engines that it is to route to."""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.control.router import DEFAULT_RULES
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.deployments import Batching, EndpointSpec
from maveriq.errors import InputError
from maveriq.scenario.defaults import choice


def routing_rule(name: str | None, endpoints: Sequence[EndpointSpec] = ()) -> RoutingRule | None:
    """Return the rule of a name; None where none is named.

    Args:
        name: what the user gave.
        endpoints: those that requests are routed for; none for exclusive engines that are not known yet.

    Raises:
        UnknownNameError: there is no such rule.
        InputError: it goes by something that the engines do not have.
    """
    if name is None:
        return None
    rule = choice(RoutingRule, "router", name)
    batchings = {endpoint.batching for endpoint in endpoints} or {Batching.EXCLUSIVE}
    if rule.sees_kv_cache and Batching.EXCLUSIVE in batchings:
        raise InputError(
            f"--router {rule} goes by the KV caches of engines that batch continuously, and exclusive engines keep "
            "none between requests; give another --router"
        )
    if rule.predicts_service_time and Batching.CONTINUOUS in batchings:
        raise InputError(
            f"--router {rule} adds up the times of requests that run one after the other, and engines that batch "
            f"continuously run them together; give --router {RoutingRule.LEAST_OUTSTANDING}"
        )
    return rule


def resolved_router(name: str | None, endpoints: Sequence[EndpointSpec]) -> str | None:
    """Return the router of a run by name; None where exclusive and continuous engines have different ones."""
    if name is not None:
        return name
    rules = {DEFAULT_RULES[endpoint.batching].value for endpoint in endpoints}
    return rules.pop() if len(rules) == 1 else None
