"""The Python API: simulate, run, plan, place, load_run and compare, with tables as pandas DataFrames.

The functions take the options of the command line with underscores, and the command line calls these functions.
Heavy imports happen in the functions, so that `import maveriq` stays fast (docs/python.md).
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from maveriq import __version__
from maveriq.errors import InputError, MaveriqError, cannot_write
from maveriq.scenario.options import Options, check_ranges, option, options_from

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from maveriq.domain.cluster import Cluster
    from maveriq.domain.deployments import EndpointSpec
    from maveriq.domain.progress import Watcher
    from maveriq.domain.records import RunRecord
    from maveriq.exec.local_machine import EngineOptions
    from maveriq.exec.replay import Interruption, Replayed, ReplaySettings
    from maveriq.policy.alpaserve.problem import PlacementProblem, SearchSettings
    from maveriq.policy.alpaserve.search import PlacementSolution, SearchProgress
    from maveriq.policy.configuration import Ranking
    from maveriq.report.compare import Comparison
    from maveriq.report.metrics import Summary
    from maveriq.report.saturation import Saturation
    from maveriq.scenario.build import Components
    from maveriq.scenario.system import ReplaySystem

_T = TypeVar("_T")

_RESULT, _LIMITS = "Model", "Configuration"
_MAX_TOKENS, _MAX_BATCH = 10_000_000, 10_000


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Run:
    """What one run did, simulated or real. Pickles; `save` and `load_run` keep it in a folder.

    Args:
        record: every request, deployment and GPU sample.
        meta: what led to it, as in run.json: kind, workload, notes, options, seed, versions.
        options: the options with their defaults resolved; None where another version of maveriq wrote the folder.
        slo_ttft_ms: time to first token within which a request counts as goodput.
        slo_tpot_ms: time per output token within which a request counts as goodput.
        engines_csv: engines.csv of a run on engines, "" without one.
        interrupted: Ctrl-C or SIGTERM ended the run early.
    """

    record: RunRecord
    meta: Mapping[str, Any]
    options: Options | None
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    engines_csv: str = ""
    interrupted: bool = False

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request, with the columns of requests.csv."""
        from maveriq.report.frames import requests_frame

        return requests_frame(self.record)

    @cached_property
    def deployments(self) -> pd.DataFrame:
        """One row per deployment, with the columns of deployments.csv."""
        from maveriq.report.frames import deployments_frame

        return deployments_frame(self.record)

    @cached_property
    def gpus(self) -> pd.DataFrame:
        """One row per GPU and sample, with the columns of gpus.csv."""
        from maveriq.report.frames import gpus_frame

        return gpus_frame(self.record)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row for the whole run ("all") and one per model; seconds, shares and GiB s as the columns say."""
        import pandas as pd

        rows = {"all": self.summary.overall, **self.summary.models}
        return pd.DataFrame({name: _metrics_row(metrics) for name, metrics in rows.items()}).T

    @cached_property
    def summary(self) -> Summary:
        """Latency, SLO attainment, goodput, throughput and cost, of the run and of each model."""
        from maveriq.report.metrics import summarise

        return summarise(self.record, slo_ttft_s=_seconds(self.slo_ttft_ms), slo_tpot_s=_seconds(self.slo_tpot_ms))

    @cached_property
    def saturation(self) -> Saturation:
        """Whether the cluster kept up with the requests, and the evidence."""
        from maveriq.report.saturation import assess_saturation

        return assess_saturation(self.record)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know."""
        return tuple(self.meta["notes"])

    def to_dict(self) -> dict[str, Any]:
        """Return saturation, summary and deployments in plain values, as `--json` prints them."""
        from maveriq.report.run_folder import summary_to_json

        return summary_to_json(self.summary, self.saturation, self.record.deployments)

    def save(self, path: str | Path) -> None:
        """Write a run folder, whole or not at all. A run folder or an empty folder of that name is replaced.

        Raises:
            InputError: the folder cannot be written, or holds something else.
            MaveriqError: the disk is full.
        """
        self._save(Path(path))

    def _save(self, folder: Path, logs: Path | None = None) -> None:
        """Write a run folder; the folder of engine logs moves into it."""
        from maveriq.report.run_folder import write_run

        def write_engines(fresh: Path) -> None:
            if logs is not None:
                shutil.move(logs, fresh)  # a copy would need the space twice
            if self.engines_csv:
                (fresh / "engines.csv").write_text(self.engines_csv, encoding="utf-8")

        write_run(folder, self.record, self.to_dict(), self.meta, more=write_engines)

    def plot(self) -> Figure:
        """Return a matplotlib figure: the latency of each request, and the requests waiting, over time."""
        from maveriq.report.run_plot import run_figure

        return run_figure(self.record, title=str(self.meta["workload"]))

    def __repr__(self) -> str:
        counts = self.summary.overall.counts
        return (
            f"<Run {self.meta['kind']}: {self.meta['workload']}, {counts.completed:,} of {counts.scheduled:,} requests "
            f"completed, {self.saturation.label.value}>"
        )

    def _repr_html_(self) -> str:
        """Return the metrics of the run as HTML, for notebooks."""
        heading = f"<p><b>{escape(str(self.meta['workload']))}</b>: {escape(self.saturation.sentence)}</p>"
        table: str = self.metrics.to_html(float_format="{:.3f}".format, na_rep="", border=0)
        return heading + table

    def __getstate__(self) -> dict[str, Any]:
        """Leave the computed tables out of pickles."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def _metrics_row(metrics: Any) -> dict[str, float]:
    counts, row = metrics.counts, {}
    row["requests"], row["completed"] = counts.scheduled, counts.completed
    for name in ("latency_s", "queue_s", "service_s", "user_ttft_s", "tpot_s"):
        figures = getattr(metrics, name)
        for which in ("mean", "p50", "p95", "p99"):
            column = f"{name.removeprefix('user_').removesuffix('_s')}_{which}_s"
            row[column] = float("nan") if figures is None else getattr(figures, which)
    row["slo_attainment"] = float("nan") if metrics.slo is None else metrics.slo.over_scheduled
    row["goodput"] = float("nan") if metrics.goodput is None else metrics.goodput.share
    row["throughput_per_s"] = float("nan") if metrics.throughput_per_s is None else metrics.throughput_per_s
    row["cost_gib_s_mean"] = float("nan") if metrics.cost_gib_s is None else metrics.cost_gib_s.mean
    row["gpu_hours"] = metrics.operational_cost_gpu_hours
    return row


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def simulate(
    options: Options | None = None,
    /,
    *,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    watcher: Watcher | None = None,
    **changes: Any,
) -> Run:
    """Replay a workload on a simulated cluster, as `maveriq sim` does.

    Args:
        options: the options to start from; None takes the defaults.
        slo_ttft_ms: time to first token within which a request counts as goodput.
        slo_tpot_ms: time per output token within which a request counts as goodput.
        watcher: receives the progress of the run.
        changes: options by name, as on the command line with underscores. `policy`, `estimator`, `service_times`
            and `router` also take objects (docs/extending.md).

    Raises:
        InputError: an option or a file that cannot be used.
    """
    from maveriq.exec.local_machine import local_cluster
    from maveriq.scenario.build import build_system
    from maveriq.sim.simulator import simulate as simulate_system

    _check_goodput_limits(slo_ttft_ms, slo_tpot_ms)
    chosen, components = _options_and_components(options, changes)
    system = build_system(chosen, components=components, make_cluster=local_cluster)
    resolved = _resolved(chosen, system, components)
    return Run(
        record=simulate_system(system, watcher),
        meta=_meta(resolved, system, components, kind="simulated", libraries=("numpy", "simpy")),
        options=resolved,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
    )


def run(
    options: Options | None = None,
    /,
    *,
    out: str | Path | None = None,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    watcher: Watcher | None = None,
    **changes: Any,
) -> Run:
    """Replay a workload on engines that really run, as `maveriq run` does.

    Ctrl-C ends the run early and in order: the returned run is `interrupted` and has all records up to then.

    Args:
        options: the options to start from; None takes the defaults.
        out: folder for the records and the engines' logs; None keeps no logs.
        slo_ttft_ms: time to first token within which a request counts as goodput.
        slo_tpot_ms: time per output token within which a request counts as goodput.
        watcher: receives the progress of the run.
        changes: options by name: those of `simulate`, and `backend`, `real`, `time_scale`, `start_timeout_s`,
            `hang_timeout_s` and `max_restarts`.

    Raises:
        InputError: an option or a file that cannot be used, or a backend that cannot start here.
        MaveriqError: the disk is full.
    """
    from maveriq.exec.local_machine import EngineOptions, LocalMachine, local_cluster
    from maveriq.exec.model_files import ModelFiles
    from maveriq.exec.replay import ReplaySettings, check_real
    from maveriq.report.run_folder import check_writable
    from maveriq.scenario.build import build_system
    from maveriq.workload.model_sets import load_model_set

    _check_goodput_limits(slo_ttft_ms, slo_tpot_ms)
    engine_values = {one.name: changes.pop(one.name) for one in fields(EngineOptions) if one.name in changes}
    engines = options_from(EngineOptions, engine_values)
    chosen, components = _options_and_components(options, changes)
    if out is not None:
        check_writable(Path(out))
    with contextlib.closing(LocalMachine(engines.name)) as machine:
        system = build_system(
            chosen, components=components, wrap_estimator=machine.planning, make_cluster=local_cluster
        )
        check_real(system)
        settings = ReplaySettings(
            time_scale=engines.time_scale,
            files=ModelFiles(load_model_set(chosen.models).configs().get),
            devices=machine.devices(system.cluster),
            supervision=engines.supervision(),
            meter=machine.meter,
            memory_probe=machine.memory_probe(),
            sampler=machine.sampler(system.cluster),
        )
        with _interruption() as interruption, _scratch_folder(out) as scratch:
            logs = Path(scratch) / "engines"
            logs.mkdir()
            replayed = _replay(system, engines, settings, logs, watcher, interruption)
            finished = _finished_run(
                _resolved(chosen, system, components), system, components, engines, replayed, settings,
                slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, interrupted=interruption.came,
            )  # fmt: skip
            if out is not None:
                finished._save(Path(out), logs)  # noqa: SLF001
    return finished


def _replay(
    system: ReplaySystem,
    engines: EngineOptions,
    settings: ReplaySettings,
    logs: Path,
    watcher: Watcher | None,
    interruption: Interruption,
) -> Replayed:
    from maveriq.exec.launcher import ProcessLauncher
    from maveriq.exec.replay import run_replay

    with ProcessLauncher(engines.name, logs=logs, devices=settings.devices) as launcher:
        return _outside_event_loop(lambda: run_replay(system, launcher, settings, watcher, interruption))


def _finished_run(
    options: Options,
    system: ReplaySystem,
    components: Components,
    engines: EngineOptions,
    replayed: Replayed,
    settings: ReplaySettings,
    *,
    slo_ttft_ms: float | None,
    slo_tpot_ms: float | None,
    interrupted: bool,
) -> Run:
    from maveriq.report.run_folder import engine_lines

    meta = _meta(options, system, components, kind="run", libraries=("numpy", "msgspec"))
    if replayed.interrupted:
        meta["notes"].append(f"ended early by the user, at {replayed.record.ended_us / 1e6:.1f} s")
    meta["notes"] += replayed.notes
    meta["engines"] = asdict(engines)
    if replayed.energy_j:
        meta["energy_j"] = list(replayed.energy_j)
    return Run(
        record=replayed.record,
        meta=meta,
        options=options,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        engines_csv="".join(engine_lines(replayed.engines, settings.devices)),
        interrupted=interrupted,
    )


@contextlib.contextmanager
def _interruption() -> Iterator[Interruption]:
    """Handle Ctrl-C and SIGTERM during a run; only the main thread may set signal handlers."""
    from maveriq.exec.replay import Interruption

    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    with interruption:
        yield interruption


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


def _scratch_folder(out: str | Path | None) -> tempfile.TemporaryDirectory[str]:
    """Return a folder for engine logs during a run: next to the run's folder, so that they can be moved into it.

    Raises:
        InputError: it cannot be made.
        MaveriqError: the disk is full.
    """
    if out is None:
        return tempfile.TemporaryDirectory(prefix="maveriq-engines-")
    try:
        target = Path(out).expanduser().resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{target.name}-engines-", dir=target.parent)
    except OSError as error:
        raise cannot_write(f"output folder {str(out)!r}", error) from None


def _check_goodput_limits(slo_ttft_ms: float | None, slo_tpot_ms: float | None) -> None:
    for name, value in (("slo-ttft-ms", slo_ttft_ms), ("slo-tpot-ms", slo_tpot_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} must be a positive number of milliseconds, not {value}")


_COMPONENTS = ("policy", "estimator", "service_times", "router")


def _options_and_components(options: Options | None, changes: Mapping[str, Any]) -> tuple[Options, Components]:
    """Return the options, and the objects that were given in place of names."""
    from maveriq.scenario.build import Components

    objects = {
        name: changes[name]
        for name in _COMPONENTS
        if name in changes and not (changes[name] is None or isinstance(changes[name], str))
    }
    named = {name: value for name, value in changes.items() if name not in objects}
    return options_from(Options, named, base=options), Components(**objects)


def _resolved(options: Options, system: ReplaySystem, components: Components) -> Options:
    """Return the options with the defaults that depend on the profile, and the names of objects."""
    return replace(
        options,
        estimator=system.estimator,
        service_times=system.service_times.name,
        policy=system.policy.name if components.policy is not None else options.policy,
        router=type(components.router).__name__ if components.router is not None else options.router,
    )


def _meta(
    options: Options, system: ReplaySystem, components: Components, *, kind: str, libraries: Sequence[str]
) -> dict[str, Any]:
    """Return what led to a run: enough to repeat it, custom objects aside."""
    custom = [name for name in _COMPONENTS if getattr(components, name) is not None]
    notes = [*system.notes, *([f"objects were passed for: {', '.join(custom)}"] if custom else [])]
    return {
        "kind": kind,
        "workload": system.workload.name,
        "notes": notes,
        "options": asdict(options),
        "seed": options.seed,
        "versions": {
            "maveriq": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
    }


def load_run(path: str | Path, *, data: str | Path | None = None) -> Run:
    """Read a run folder, or a recorded run of the published testbed by its name.

    Args:
        path: the folder, or the name of a recorded run.
        data: the folder of recordings; None takes MAVERIQ_DATA.

    Raises:
        InputError: there is no such run, or its files do not fit together.
    """
    from maveriq.files import exists, measured_data_path
    from maveriq.report.reading import read_meta, read_run

    folder = Path(path)
    if not exists(folder):
        if data is None and measured_data_path() is None:
            raise InputError(
                f"run {str(path)!r} is no folder; name one, or the folder of recorded runs with --data or MAVERIQ_DATA"
            )
        return _recorded_run(str(path), data)
    record, meta = read_run(folder), read_meta(folder)
    summary = meta.pop("summary", {})
    meta = {"kind": "", "workload": folder.name, "notes": []} | meta
    return Run(
        record=record,
        meta=meta,
        options=_options_of(meta),
        slo_ttft_ms=_milliseconds(summary.get("slo_ttft_s")),
        slo_tpot_ms=_milliseconds(summary.get("slo_tpot_s")),
    )


def _recorded_run(name: str, data: str | Path | None) -> Run:
    from maveriq.testbed.recorded_runs import load_recorded_runs, meta_of_recorded

    (recorded,) = load_recorded_runs([name], None if data is None else Path(data), hint="or give the folder of a run")
    meta = meta_of_recorded(recorded.run, replayed=False)
    return Run(record=recorded.record, meta=meta, options=_options_of(meta))


def _options_of(meta: Mapping[str, Any]) -> Options | None:
    try:
        return options_from(Options, meta["options"])
    except (InputError, KeyError, TypeError):  # written by another version
        return None


def compare(sim: Run | str | Path, real: Run | str | Path) -> Comparison:
    """Compare a run with the run that it is judged by, as `maveriq compare` does.

    Args:
        sim: the run to judge, as a `Run`, a folder or the name of a recorded run.
        real: the run to measure it by.

    Raises:
        InputError: a run that cannot be read.
    """
    from maveriq.report.compare import compare as compare_records

    runs = [one if isinstance(one, Run) else load_run(one) for one in (sim, real)]
    return compare_records(*(one.record for one in runs))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The options of `maveriq plan`.

    Raises:
        InputError: a number out of range.
    """

    intent: str = option("min-cost", "min-cost, min-latency, min-memory, or min-gpu-cost.", _RESULT)
    slo_ms: float | None = option(None, "Upper limit of a whole request's latency.", _RESULT)
    min_accuracy: float = option(0.0, "Least accuracy, in percent of the float16 model's.", _RESULT)
    float16_only: bool = option(False, "No quantised weights.", _RESULT)  # noqa: FBT003
    gpus: str = option("8xA6000", "The cluster: 8xA6000, a TOML file, or local.", _RESULT)
    prompt_tokens: int | None = option(
        None, "Length of a typical prompt.", _RESULT, shown="the profile's", minimum=1, maximum=_MAX_TOKENS
    )
    output_tokens: int = option(20, "Length of a typical output.", _RESULT, minimum=1, maximum=_MAX_TOKENS)
    batch_size: int = option(1, "Largest batch of an engine.", _RESULT, minimum=1, maximum=_MAX_BATCH)
    estimator: str | None = option(None, "The estimator: calibrated, paper, or measured.", _RESULT, shown="calibrated")
    profile: str = option("a6000-short", "Hardware profile: a6000-short, a6000-long, or a TOML file.", _RESULT)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPlan:
    """The configurations of a model, ranked for an intent; `failure` says why none meets it, "" where one does."""

    endpoint: EndpointSpec
    ranking: Ranking
    cluster: Cluster
    estimator: str
    failure: str
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking in plain values, as `maveriq plan --json` prints it."""
        from maveriq.report.plans import ranking_json

        return {"estimator": self.estimator, **ranking_json(self.endpoint, self.ranking, self.cluster)}


def rank_configurations(model: str | Path, options: PlanOptions, *, estimator: Any = None) -> RankedPlan:
    """Return the ranking behind `plan`.

    Args:
        model: a model's name, or the path of a Hugging Face config.json.
        options: the intent and the cluster.
        estimator: an estimator object to plan with instead of the one that the options name.

    Raises:
        InputError: an option that cannot be used, or a model without a profile.
    """
    from maveriq.domain.cluster import ClusterState
    from maveriq.domain.deployments import EndpointSpec, Intent, Objective
    from maveriq.domain.models import load_model
    from maveriq.estimate.hardware_profile import load_profile
    from maveriq.estimate.registry import MEASURED, default_estimator, make_estimator, note_on_default
    from maveriq.exec.local_machine import local_cluster
    from maveriq.policy.configuration import rank

    profile = load_profile(options.profile)
    cluster = local_cluster(options.gpus, profile)
    spec = load_model(str(model))
    name = options.estimator or default_estimator(profile)
    # Estimators with a table of their own report themselves which models they know.
    if estimator is None and name != MEASURED and spec.name not in profile.fingerprints.models():
        raise InputError(
            f"model {spec.name!r} has no fingerprint in profile {profile.name!r} (it has "
            f"{', '.join(sorted(profile.fingerprints.models()))}); measure one and give it with --profile FILE"
        )
    endpoint = EndpointSpec(
        endpoint_id=1,
        model=spec,
        intent=Intent(
            objective=Objective.named(options.intent),
            slo_s=_seconds(options.slo_ms),
            min_accuracy=options.min_accuracy,
            float16_only=options.float16_only,
        ),
        requested_us=0,
        prompt_tokens=profile.prompt_tokens if options.prompt_tokens is None else options.prompt_tokens,
        output_tokens=options.output_tokens,
        batch_size=options.batch_size,
    )
    view = ClusterState(cluster).view([0.0] * len(cluster))
    planner = estimator or make_estimator(name, profile)
    ranking = rank(endpoint, view, planner, profile.accuracy)
    return RankedPlan(
        endpoint=endpoint,
        ranking=ranking,
        cluster=cluster,
        estimator=planner.name,
        failure=ranking.note if ranking.candidates else ranking.why_empty(),
        note=None if estimator or options.estimator else note_on_default(profile),
    )


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
    values = options | ({"estimator": estimator} if named else {})
    ranked = rank_configurations(model, options_from(PlanOptions, values), estimator=None if named else estimator)
    if ranked.failure and not explain:
        raise MaveriqError(f"{ranked.endpoint.model.name}: {ranked.failure}; explain=True returns every configuration")
    answer = ranked.to_dict()
    rows = [one | {"reason": ranked.ranking.note if ranked.failure else ""} for one in answer["candidates"]]
    if explain:
        rows += answer["left_out"]
    return pd.DataFrame(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
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


def place(
    problem: str | Path, *, float64: bool = False, progress: Callable[[SearchProgress], None] | None = None
) -> PlacementResult:
    """Search the best placement of models on GPUs as AlpaServe does, like `maveriq place`.

    Args:
        problem: the JSON file of the problem (docs/alpaserve.md).
        float64: do not round stage times and SLOs to float32, as AlpaServe does.
        progress: is called during the search.

    Raises:
        InputError: the problem cannot be used.
    """
    from maveriq.policy.alpaserve.search import search
    from maveriq.policy.alpaserve.simulator import warm_up
    from maveriq.scenario.placement_problems import load_problem

    file = load_problem(Path(problem))
    settings = replace(file.settings, simulator=replace(file.settings.simulator, single_precision=not float64))
    warm_up()  # keeps compilation out of the reported search time
    return PlacementResult(
        problem=file.problem,
        settings=settings,
        solution=search(file.problem, settings, progress=progress),
        notes=tuple(f"search.{key} has no effect on {settings.policy}" for key in file.without_effect),
    )
