"""What simulates a run: SimPy, or the fast kernel where that gives the same records.

See docs/decisions/0025-fast-kernel.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from maveriq.control.queues import QueueDiscipline
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.deployments import Batching
from maveriq.domain.progress import Watcher
from maveriq.domain.records import RunRecord
from maveriq.errors import InputError
from maveriq.scenario.service_times import EstimatedServiceTimes, RecordedServiceTimes
from maveriq.scenario.system import ReplaySystem

MIN_REQUESTS = 30_000
"""Requests from which on the fast kernel is worth the start of numba."""

MIN_REQUESTS_TO_COMPILE = 1_000_000
"""Those from which on it is worth compiling in each process, where no folder to keep machine code in can be written."""

_NOTICE_AFTER_S = 1.0


class Kernel(StrEnum):
    """The kernels by name."""

    AUTO = "auto"
    FAST = "fast"
    SIMPY = "simpy"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """Which kernel simulates a run; `note` is what a reader of the results must know of it, "" for nothing."""

    kernel: Kernel
    note: str = ""


def choose_kernel(system: ReplaySystem, wanted: Kernel = Kernel.AUTO) -> KernelChoice:
    """Return the kernel for a run.

    Args:
        system: what is simulated.
        wanted: what the user asked for.

    Raises:
        InputError: the user asked for the fast kernel, and it does not cover the run.
    """
    if wanted is Kernel.SIMPY:
        return KernelChoice(kernel=Kernel.SIMPY)
    why_not = why_not_fast(system)
    if wanted is Kernel.FAST and why_not is not None:
        raise InputError(f"--kernel fast does not simulate {why_not}; leave --kernel out, or give --kernel simpy")
    requests = len(system.workload.arrivals)
    if why_not is None and wanted is Kernel.AUTO and MIN_REQUESTS <= requests < MIN_REQUESTS_TO_COMPILE:
        from maveriq.sim.fast_replay import keeps_machine_code  # late: imports numba

        if not keeps_machine_code():
            why_not = "this many requests where numba can write no folder that keeps machine code (NUMBA_CACHE_DIR)"
    if why_not is None and (wanted is Kernel.FAST or requests >= MIN_REQUESTS):
        return KernelChoice(kernel=Kernel.FAST, note="simulated by the fast kernel, whose records are those of SimPy")
    is_slow = requests >= MIN_REQUESTS and not _is_continuous(system)
    note = f"simulated by SimPy: the fast kernel does not simulate {why_not}" if is_slow else ""
    return KernelChoice(kernel=Kernel.SIMPY, note=note)


def why_not_fast(system: ReplaySystem) -> str | None:
    """Return what the fast kernel does not simulate of a run, None if it simulates all of it."""
    settings, workload, service_times = system.settings, system.workload, system.service_times
    reasons = (
        ("engines that batch continuously", _is_continuous(system)),
        ("faults (--fail)", bool(system.faults)),
        ("removals (--remove)", bool(system.removals)),
        (f"--queue {settings.discipline}", settings.discipline not in _DISCIPLINES),
        ("--router other than random", settings.router not in (None, RoutingRule.RANDOM)),
        ("closed loops and conversations", workload.reacts),
        ("--max-in-flight", system.max_in_flight is not None),
        ("priority requests", workload.arrivals.priority is not None and bool(workload.arrivals.priority.any())),
        (
            f"service times of {type(service_times).__name__}",
            type(service_times) not in (EstimatedServiceTimes, RecordedServiceTimes),
        ),
    )
    return next((what for what, applies in reasons if applies), None)


_DISCIPLINES = (QueueDiscipline.FIFO, QueueDiscipline.FIFO_PER_MODEL)


def _is_continuous(system: ReplaySystem) -> bool:
    return any(endpoint.batching is Batching.CONTINUOUS for endpoint in system.workload.endpoints)


def simulate_with(
    kernel: Kernel,
    system: ReplaySystem,
    watcher: Watcher | None = None,
    *,
    notify: Callable[[str], None] | None = None,
) -> RunRecord:
    """Simulate a run with a kernel that `choose_kernel` chose.

    Args:
        kernel: which one.
        system: what is simulated.
        watcher: receives the progress of the run.
        notify: gets a sentence if compiling the fast kernel takes long.
    """
    if kernel is not Kernel.FAST:
        from maveriq.sim.simulator import simulate  # late: imports SimPy

        return simulate(system, watcher)
    from maveriq.sim.fast_replay import FastReplay, load_kernel  # late: imports numba

    notice = threading.Timer(_NOTICE_AFTER_S, _notify_of_compiling, (notify,))
    notice.daemon = True
    notice.start()
    try:
        load_kernel()
    finally:
        notice.cancel()
    return FastReplay(system).run(watcher)


def _notify_of_compiling(notify: Callable[[str], None] | None) -> None:
    if notify is not None:
        notify("compiling the fast kernel, once after an installation; --kernel simpy does without")
