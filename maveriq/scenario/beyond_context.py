"""Requests longer than their model's context: refused, except in replays of the published traces on their testbed.

An engine has no positions for them. The published system served them all the same, so its profile says that replays of
the traces that come with maveriq do too, with a note that counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import numpy as np

from maveriq.domain.models import ModelSpec
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.scenario.defaults import choice
from maveriq.scenario.options import Options
from maveriq.workload.requests import Workload
from maveriq.workload.traces import SYNTHETIC, TRACES


class BeyondContext(StrEnum):
    """What happens to a request that is longer than its model's context."""

    REFUSE = "refuse"
    SERVE = "serve"


def refuses_long_requests(options: Options, profile: HardwareProfile, *, live: bool = False) -> bool:
    """Return whether requests longer than their model's context are refused.

    Args:
        options: the user's options.
        profile: says whether its testbed served such requests.
        live: a service, which replays no published trace.

    Raises:
        UnknownNameError: the option names neither.
    """
    if options.beyond_context is None:
        published = options.trace in TRACES and options.trace != SYNTHETIC
        return live or not published or not profile.serves_beyond_context
    return choice(BeyondContext, "--beyond-context", options.beyond_context) is BeyondContext.REFUSE


def note_on_engine_tokens(
    workload: Workload, engine_tokens: Callable[[ModelSpec], int | None] | None
) -> tuple[str, ...]:
    """Return a note with the number of requests of which the engines keep too few tokens, if there are any.

    Those longer than their model's context are not counted: `note_on_long_requests` does.
    """
    arrivals, longer, limits = workload.arrivals, 0, set()
    tokens = arrivals.prompt_tokens + arrivals.output_tokens
    for endpoint in workload.endpoints:
        kept = engine_tokens(endpoint.model) if engine_tokens else None
        if kept is None:
            continue
        mine = tokens[arrivals.endpoint_id == endpoint.endpoint_id]
        context = endpoint.model.context_tokens or np.iinfo(np.int64).max
        found = int(np.count_nonzero((mine > kept) & (mine <= context)))
        longer += found
        limits |= {kept} if found else set()
    if not longer:
        return ()
    kept_of_one = " or ".join(f"{kept:,}" for kept in sorted(limits))
    count = f"{longer:,} of {len(arrivals):,} requests"
    return (
        f"{count} are longer than the {kept_of_one} tokens that the engine's KV cache keeps of one, and are refused",
    )


def note_on_long_requests(options: Options, profile: HardwareProfile, workload: Workload) -> tuple[str, ...]:
    """Return a note with the number of requests longer than their model's context, if there are any."""
    arrivals, longer = workload.arrivals, 0
    tokens = arrivals.prompt_tokens + arrivals.output_tokens
    for endpoint in workload.endpoints:
        if endpoint.model.context_tokens is not None:
            mine = arrivals.endpoint_id == endpoint.endpoint_id
            longer += int(np.count_nonzero(tokens[mine] > endpoint.model.context_tokens))
    if not longer:
        return ()
    count = f"{longer:,} of {len(arrivals):,} requests are longer than their model's context"
    if refuses_long_requests(options, profile):
        return (f"{count} and are refused; --beyond-context serve serves them",)
    return (f"{count} and are served; --beyond-context refuse refuses them",)
