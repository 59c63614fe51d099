"""maveriq plans, simulates and runs many LLMs on one GPU cluster, by intent.

::

    import maveriq

    run = maveriq.simulate(policy="hybrid", slo_scale=5)
    run.requests            # a pandas DataFrame

docs/python.md describes the functions. They load on first use, so that the import itself stays fast.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "Comparison",
    "ManyComparison",
    "Options",
    "PlacementResult",
    "Run",
    "SizeResult",
    "SweepResult",
    "__version__",
    "compare",
    "engine",
    "errors",
    "load_run",
    "load_sweep",
    "place",
    "plan",
    "run",
    "simulate",
    "size",
    "sweep",
]

if TYPE_CHECKING:
    from maveriq import engine, errors
    from maveriq.api import PlacementResult, compare, place, plan, run, simulate
    from maveriq.report.compare import Comparison
    from maveriq.report.compare_many import ManyComparison
    from maveriq.runs import Run, load_run
    from maveriq.scenario.options import Options
    from maveriq.sizing.size import SizeResult, size
    from maveriq.sweeps.run import SweepResult, load_sweep, sweep


_MODULES = {
    "Comparison": "maveriq.report.compare",
    "ManyComparison": "maveriq.report.compare_many",
    "Options": "maveriq.scenario.options",
    "Run": "maveriq.runs",
    "load_run": "maveriq.runs",
    "SizeResult": "maveriq.sizing.size",
    "size": "maveriq.sizing.size",
    "SweepResult": "maveriq.sweeps.run",
    "load_sweep": "maveriq.sweeps.run",
    "sweep": "maveriq.sweeps.run",
}
"""Where the public names are that maveriq.api does not define."""


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("engine", "errors"):
        return importlib.import_module(f"maveriq.{name}")
    if name in __all__:
        return getattr(importlib.import_module(_MODULES.get(name, "maveriq.api")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
