"""The Python API: simulate, run, plan, place, load_run and compare, with tables as pandas DataFrames.

The functions take the options of the command line with underscores, and the command line calls these functions.
Heavy imports happen in the functions, so that `import maveriq` stays fast (docs/python.md).
"""

from __future__ import annotations

import contextlib
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from maveriq import __version__
from maveriq.domain.faults import notes_on_faults
from maveriq.errors import InputError, MaveriqError, cannot_write
from maveriq.files import as_path
from maveriq.planning import PlanOptions, rank_configurations
from maveriq.runs import Run, load_run, save_run
from maveriq.scenario.options import Options, options_from
from maveriq.scenario.routing import resolved_router

if TYPE_CHECKING:
    import pandas as pd

    from maveriq.domain.progress import Watcher
    from maveriq.domain.records import RunRecord
    from maveriq.exec.interrupt import InterruptHandler
    from maveriq.exec.local_machine import EngineOptions, LocalMachine
    from maveriq.exec.replay import ReplayResult, ReplaySettings
    from maveriq.exec.scratch_folder import ScratchFolder
    from maveriq.policy.alpaserve.problem import PlacementProblem, SearchSettings
    from maveriq.policy.alpaserve.search import PlacementSolution, SearchProgress
    from maveriq.report.compare import Comparison
    from maveriq.report.compare_many import ManyComparison
    from maveriq.scenario.build import Components
    from maveriq.scenario.system import ReplaySystem

_T = TypeVar("_T")


def simulate(
    options: Options | None = None,
    /,
    *,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    kernel: str = "auto",
    watcher: Watcher | None = None,
    notify: Callable[[str], None] | None = None,
    **changes: Any,
) -> Run:
    """Replay a workload on a simulated cluster, as `maveriq sim` does.

    Args:
        options: the options to start from; None takes the defaults.
        slo_ttft_ms: time to first token within which a request counts as goodput.
        slo_tpot_ms: time per output token within which a request counts as goodput.
        kernel: what simulates: "simpy", "fast" (compiled, with the same records), or "auto" for the one that suits.
        watcher: receives the progress of the run.
        notify: gets a sentence when something delays the run, such as compiling the fast kernel.
        changes: options by name, as on the command line with underscores. `policy`, `estimator`, `service_times`
            and `router` also take objects, and `policy` a placement rule (docs/extending.md).

    Raises:
        InputError: an option or a file that cannot be used.
    """
    from maveriq.exec.local_machine import local_cluster
    from maveriq.scenario.build import build_system
    from maveriq.scenario.defaults import choice
    from maveriq.sim.kernels import Kernel, choose_kernel, simulate_with

    _check_goodput_limits(slo_ttft_ms, slo_tpot_ms)
    wanted = choice(Kernel, "kernel", kernel)
    chosen, components = _options_and_components(options, changes)
    system = build_system(
        chosen,
        components=components,
        make_cluster=local_cluster,
        slo_ttft_s=None if slo_ttft_ms is None else slo_ttft_ms / 1e3,
        slo_tpot_s=None if slo_tpot_ms is None else slo_tpot_ms / 1e3,
    )
    resolved = _resolved(chosen, system, components)
    simulator = choose_kernel(system, wanted)
    record = simulate_with(simulator.kernel, system, watcher, notify=notify)
    libraries = ("numpy", "numba" if simulator.kernel is Kernel.FAST else "simpy")
    meta = _meta(resolved, system, components, record, kind="simulated", libraries=libraries)
    meta["notes"] += [simulator.note] if simulator.note else []
    return Run(
        record=record,
        meta=meta,
        options=resolved,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
    )


def run(
    options: Options | None = None,
    /,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    watcher: Watcher | None = None,
    **changes: Any,
) -> Run:
    """Replay a workload on engines that really run, as `maveriq run` does.

    Ctrl-C, SIGTERM and SIGHUP end the run early and in order: the returned run is `interrupted` and has all records up
    to then. It replaces no earlier run: where `out` holds one, it is saved under the next free name.

    Args:
        options: the options to start from; None takes the defaults.
        out: folder for the records and the engines' logs; None keeps no logs. `Run.folder` says where they are.
        overwrite: replace a run that is in `out`; else such a folder is refused before the run.
        slo_ttft_ms: time to first token within which a request counts as goodput.
        slo_tpot_ms: time per output token within which a request counts as goodput.
        watcher: receives the progress of the run.
        changes: options by name: those of `simulate`, and `backend`, `real`, `time_scale`, `start_timeout_s`,
            `hang_timeout_s`, `max_restarts` and `engine_python`, such as `{"trtllm": "/opt/trtllm/bin/python"}`.

    Raises:
        InputError: an option or a file that cannot be used, or a backend that cannot start here.
        MaveriqError: the disk is full.
    """
    from maveriq.exec.batching_spec import batching_specs, check_batching
    from maveriq.exec.local_machine import EMULATED, EngineOptions, LocalMachine, local_cluster
    from maveriq.exec.model_files import ModelFiles
    from maveriq.exec.replay import ReplaySettings, check_replayable
    from maveriq.report.run_folder import check_writable
    from maveriq.scenario.build import build_system
    from maveriq.workload.model_sets import load_model_set

    _check_goodput_limits(slo_ttft_ms, slo_tpot_ms)
    engine_values = {field.name: changes.pop(field.name) for field in fields(EngineOptions) if field.name in changes}
    engines = options_from(EngineOptions, engine_values)
    chosen, components = _options_and_components(options, changes)
    if out is not None:
        check_writable(as_path(out, "out"), overwrite=overwrite)
    with contextlib.closing(LocalMachine(engines.name, engines.engine_python)) as machine:
        system = build_system(
            chosen,
            components=components,
            wrap_estimator=machine.planning,
            make_cluster=local_cluster,
            engine_tokens=machine.engine_tokens,
        )
        check_replayable(system)
        if system.engines is not None:
            check_batching(system.engines, engines.name)
        settings = ReplaySettings(
            time_scale=engines.time_scale,
            files=ModelFiles(load_model_set(chosen.models).configs().get),
            devices=machine.devices(system.cluster),
            supervision=engines.supervision(),
            meter=machine.meter,
            memory_probe=machine.memory_probe(),
            sampler=machine.sampler(system.cluster),
            planned_times=engines.name == EMULATED,
            batching_of=None if system.engines is None or engines.name == EMULATED else batching_specs(system.engines),
        )
        with _interrupt_handler() as interrupt, _scratch_folder(out) as scratch:
            logs = scratch.path / "engines"
            logs.mkdir()
            replayed = _replay(system, machine, settings, logs, watcher, interrupt)
            finished = _finished_run(
                _resolved(chosen, system, components), system, components, engines, machine, replayed, settings,
                slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, interrupted=interrupt.interrupted,
            )  # fmt: skip
            if out is not None:
                replaces = overwrite and not finished.interrupted
                folder = save_run(finished, Path(out), logs=logs, overwrite=replaces)
                finished = replace(finished, folder=folder)
    return finished


def _replay(
    system: ReplaySystem,
    machine: LocalMachine,
    settings: ReplaySettings,
    logs: Path,
    watcher: Watcher | None,
    interrupt: InterruptHandler,
) -> ReplayResult:
    from maveriq.exec.launcher import ProcessLauncher
    from maveriq.exec.replay import run_replay

    with ProcessLauncher(machine.backend, logs=logs, devices=settings.devices, python=machine.python_path) as launcher:
        return _outside_event_loop(lambda: run_replay(system, launcher, settings, watcher, interrupt))


def _finished_run(
    options: Options,
    system: ReplaySystem,
    components: Components,
    engines: EngineOptions,
    machine: LocalMachine,
    replayed: ReplayResult,
    settings: ReplaySettings,
    *,
    slo_ttft_ms: float | None,
    slo_tpot_ms: float | None,
    interrupted: bool,
) -> Run:
    from maveriq.report.run_folder import process_lines

    meta = _meta(options, system, components, replayed.record, kind="run", libraries=("numpy", "msgspec"))
    if replayed.interrupted:
        meta["notes"].append(f"ended early by the user, at {replayed.record.ended_us / 1e6:.1f} s")
    meta["notes"] += replayed.notes
    if replayed.lag is not None:
        meta["notes"].append(replayed.lag.note())
        meta["control_lag"] = {**asdict(replayed.lag), "share": replayed.lag.share, "distorts": replayed.lag.distorts}
    meta["engines"] = {name: value for name, value in asdict(engines).items() if value not in (None, ())}
    if machine.python is not None:
        meta["engines"]["python"] = f"{machine.python.path} ({machine.python.version})"
    if interrupted:
        meta["interrupted"] = True
    if replayed.energy_j:
        meta["energy_j"] = list(replayed.energy_j)
    return Run(
        record=replayed.record,
        meta=meta,
        options=options,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        engine_processes_csv="".join(process_lines(replayed.engines, settings.devices)),
        interrupted=interrupted,
    )


@contextlib.contextmanager
def _interrupt_handler() -> Iterator[InterruptHandler]:
    """Handle Ctrl-C, SIGTERM and SIGHUP during a run; only the main thread may set signal handlers."""
    from maveriq.exec.interrupt import InterruptHandler

    interrupt = InterruptHandler()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    with interrupt:
        yield interrupt


def _outside_event_loop(call: Callable[[], _T]) -> _T:
    """Call a function that starts an event loop; in a notebook, where one runs already, in another thread."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()


def _scratch_folder(out: str | Path | None) -> ScratchFolder:
    """Return a folder for engine logs during a run: next to the run's folder, so that they can be moved into it.

    Raises:
        InputError: it cannot be made.
        MaveriqError: the disk is full.
    """
    from maveriq.exec.scratch_folder import ScratchFolder

    try:
        if out is None:
            return ScratchFolder("maveriq-logs-")
        target = Path(out).expanduser().resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        return ScratchFolder(f".{target.name}-engines-", target.parent)
    except OSError as error:
        raise cannot_write(f"output folder {str(out)!r}", error) from None


def _check_goodput_limits(slo_ttft_ms: object, slo_tpot_ms: object) -> None:
    for name, value in (("slo-ttft-ms", slo_ttft_ms), ("slo-tpot-ms", slo_tpot_ms)):
        if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise InputError(f"--{name} must be a positive number of milliseconds, not {value!r:.60}")


_ESTIMATOR_MEMBERS = ("name", "why_not", "service", "memory")
_COMPONENTS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "policy": [("name", "decide")],
    "estimator": [_ESTIMATOR_MEMBERS],
    "service_times": [("name", "contention", "times_us"), _ESTIMATOR_MEMBERS],
    "router": [("choose", "committed")],
}
"""The options that take objects, and the members that such an object needs."""


def _options_and_components(options: Options | None, changes: Mapping[str, Any]) -> tuple[Options, Components]:
    """Return the options, and the objects that were given in place of names."""
    from maveriq.scenario.build import Components

    if not (options is None or isinstance(options, Options)):
        raise InputError(f"options must be a maveriq.Options, not {options!r:.60}; give single options by name")
    objects = {
        name: changes[name]
        for name in _COMPONENTS
        if name in changes and not (changes[name] is None or isinstance(changes[name], str))
    }
    named = {name: value for name, value in changes.items() if name not in objects}
    if _is_placement_rule(objects.get("policy")):
        objects["placement_rule"] = objects.pop("policy")
    for name, component in objects.items():
        if name != "placement_rule":
            _check_component(name, component)
    return options_from(Options, named, base=options), Components(**objects)


def _is_placement_rule(component: object) -> bool:
    return callable(component) and not isinstance(component, type) and not hasattr(component, "decide")


def _check_component(name: str, component: object) -> None:
    """Raise InputError unless an object has the members that its option needs."""
    choices = _COMPONENTS[name]
    has_members = any(all(hasattr(component, member) for member in members) for members in choices)
    if has_members and not isinstance(component, type):
        return
    wanted = " or ".join(f"an object with {', '.join(members)}" for members in choices)
    rule = ", or a placement rule (a function that orders GPUs)" if name == "policy" else ""
    raise InputError(f"{name} must be a name or {wanted}{rule}, not {component!r:.60}")


def _resolved(options: Options, system: ReplaySystem, components: Components) -> Options:
    """Return the options with the defaults of profile, cluster and trace, and the names of objects."""
    options, source, timing = system.options or options, system.workload.source, system.settings.timing
    return replace(
        options,
        **(source.options if source is not None else {}),
        tick_ms=timing.tick_us / 1e3,
        after_arrival_ms=timing.after_arrival_us / 1e3,
        after_release_ms=timing.after_release_us / 1e3,
        registration_delay_s=timing.registration_delay_us / 1e6,
        drain_s=system.drain_us / 1e6,
        estimator=system.estimator,
        on_loss=system.settings.on_loss.value,
        service_times=system.service_times.name,
        policy=system.policy.name if "policy" in components.replaced else options.policy,
        router=type(components.router).__name__
        if components.router is not None
        else resolved_router(options.router, system.workload.endpoints),
    )


def _meta(
    options: Options,
    system: ReplaySystem,
    components: Components,
    record: RunRecord,
    *,
    kind: str,
    libraries: Sequence[str],
) -> dict[str, Any]:
    """Return what led to a run: enough to repeat it, custom objects aside."""
    replaced, source = components.replaced, system.workload.source
    notes = [
        *([source.describe()] if source else []),
        *system.notes,
        *([f"objects were passed for: {', '.join(replaced)}"] if replaced else []),
        *notes_on_faults(system.faults, {deployment.deployment_id for deployment in record.deployments}),
    ]
    return {
        "kind": kind,
        "workload": system.workload.name,
        "notes": notes,
        **({"trace": source.to_dict()} if source else {}),
        "options": options.to_dict(),
        "seed": options.seed,
        "versions": {
            "maveriq": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
    }


@overload
def compare(sim: Run | str | Path, real: Run | str | Path, /) -> Comparison: ...
@overload
def compare(
    sim: Run | str | Path, real: Run | str | Path, third: Run | str | Path, /, *more: Run | str | Path
) -> ManyComparison: ...
def compare(*runs: Run | str | Path) -> Comparison | ManyComparison:
    """Compare runs with the last one of them, which they are judged by, as `maveriq compare` does.

    Args:
        runs: at least two, each as a `Run`, a folder or the name of a recorded run.

    Returns:
        A `Comparison` of two runs; a `ManyComparison` of more.

    Raises:
        InputError: fewer than two runs, or a run that cannot be read.
    """
    if len(runs) < 2:
        raise InputError(f"compare takes at least two runs, not {len(runs)}")
    loaded = [run if isinstance(run, Run) else load_run(run) for run in runs]
    names = [_ordinal(at) if isinstance(run, Run) else str(run) for at, run in enumerate(runs)]
    return compare_named(loaded, names)


def _ordinal(position: int) -> str:
    ordinals = ("first", "second", "third")
    return ordinals[position] if position < len(ordinals) else f"run {position + 1}"


def compare_named(runs: Sequence[Run], names: Sequence[str]) -> Comparison | ManyComparison:
    """Compare runs with the last one, under the names that stand in tables."""
    from maveriq.report.compare import compare as compare_records
    from maveriq.report.compare_many import compare_many
    from maveriq.report.run_labels import RunLabel

    kinds = [str(run.meta.get("kind", "")) for run in runs]
    labels = [RunLabel(name=Path(name).name or name, kind=kind) for name, kind in zip(names, kinds, strict=True)]
    if len(runs) == 2:
        pair = compare_records(runs[0].record, runs[1].record, labels=(labels[0], labels[1]))
        return replace(pair, reported=tuple(runs))
    return replace(compare_many([run.record for run in runs], labels), reported=tuple(runs))


def plan(model: str | Path, *, estimator: Any = None, explain: bool = False, **options: Any) -> pd.DataFrame:
    """Rank a model's configurations for an intent on an empty cluster, best first, as `maveriq plan` does.

    Args:
        model: a model's name, or the path of a Hugging Face config.json.
        estimator: the name of an estimator, or an estimator object.
        explain: add the rejected configurations, with the `reason`; also where no configuration meets the intent.
        options: the options of `maveriq plan` with underscores.

    Returns:
        One row per configuration: latencies in seconds, memory in GiB, accuracy in percent of float16.

    Raises:
        InputError: an option that cannot be used, or a model without a profile.
        MaveriqError: no configuration meets the intent, and `explain` is off.
    """
    import pandas as pd

    named = estimator is None or isinstance(estimator, str)
    if not named:
        _check_component("estimator", estimator)
    values = options | ({"estimator": estimator} if named else {})
    ranked = rank_configurations(model, options_from(PlanOptions, values), estimator=None if named else estimator)
    if ranked.failure and not explain:
        raise MaveriqError(f"{ranked.endpoint.model.name}: {ranked.failure}; explain=True returns every configuration")
    answer = ranked.to_dict()
    rows = [candidate | {"reason": ranked.ranking.note if ranked.failure else ""} for candidate in answer["candidates"]]
    if explain:
        rows += answer["rejected"]
    return pd.DataFrame(rows)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PlacementResult:
    """The answer of `place`: the problem, how it was searched, and the best placement (`solution.best`)."""

    problem: PlacementProblem
    settings: SearchSettings
    solution: PlacementSolution
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the solution in plain values, as `maveriq place --json` prints it."""
        from maveriq.report.placements import placement_json

        return placement_json(self.solution)

    def __repr__(self) -> str:
        solution, models, gpus = self.solution, len(self.problem.models), self.problem.gpus
        found = f"{len(solution.groups)} groups" if solution.feasible else solution.reason
        return f"<PlacementResult: {models} models on {gpus} GPUs, {found}>"


def place(
    problem: str | Path,
    *,
    profile: str | None = None,
    float64: bool = False,
    progress: Callable[[SearchProgress], None] | None = None,
) -> PlacementResult:
    """Search the best placement of models on GPUs as AlpaServe does, like `maveriq place`.

    Args:
        problem: the JSON file of the problem (docs/alpaserve.md).
        profile: what `maveriq profile` wrote, or another hardware profile: of models without one in the problem.
        float64: do not round stage times and SLOs to float32, as AlpaServe does.
        progress: is called during the search.

    Raises:
        InputError: the problem cannot be used.
    """
    from maveriq.estimate.fitted_profile import load_any_profile
    from maveriq.policy.alpaserve.search import search
    from maveriq.policy.alpaserve.simulator import warm_up
    from maveriq.scenario.placement_problems import load_problem

    hardware = None if profile is None else load_any_profile(profile)
    file = load_problem(as_path(problem, "problem"), hardware)
    settings = replace(file.settings, simulator=replace(file.settings.simulator, single_precision=not float64))
    warm_up()  # keeps compilation out of the reported search time
    return PlacementResult(
        problem=file.problem,
        settings=settings,
        solution=search(file.problem, settings, progress=progress),
        notes=tuple(f"search.{key} has no effect on {settings.policy}" for key in file.without_effect),
    )
