"""`maveriq serve`: serve many models on one cluster over HTTP until SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maveriq.cli.options import with_options
from maveriq.cli.output import echo
from maveriq.exec.local_machine import EngineOptions
from maveriq.scenario.options import Options
from maveriq.text import escape_controls

if TYPE_CHECKING:
    import socket

    from maveriq.domain.models import ModelSpec
    from maveriq.estimate.estimator import Estimator
    from maveriq.exec.local_machine import LocalMachine
    from maveriq.policy.pinned import PinnedPlacementPolicy
    from maveriq.scenario.system import ServingSystem
    from maveriq.serve.access_log import AccessLog
    from maveriq.serve.profile_jobs import ProfileSettings
    from maveriq.serve.settings import ServeSettings
    from maveriq.serve.store import Store

_HTTP, _LIMITS, _ENGINES, _PROFILES = "HTTP", "Limits", "Engines", "Profiles of new models"
_MAX_LIMIT = 1_000_000

CLUSTER_OPTIONS = (
    "gpus", "profile", "policy", "packing_threshold", "queue", "max_wait_s", "router", "on_failure", "on_loss",
    "estimator", "service_times", "load_s", "seed",
)  # fmt: skip
"""The options of `maveriq run` that `maveriq serve` also takes."""


@with_options((Options, CLUSTER_OPTIONS), EngineOptions)
def serve(
    options: Options,
    engines: EngineOptions,
    *,
    models_folder: Annotated[
        Path | None, typer.Option(help="Folder from which models may be registered.", rich_help_panel=_ENGINES)
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="KIND|COMMAND",
            help="How engines batch unless a request says it: exclusive, vllm, or a command such as 'vllm serve "
            "--max-num-seqs 64'.",
            show_default="vllm with --backend vllm, else exclusive",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    state: Annotated[
        Path,
        typer.Option(help="State file that survives restarts; engine logs go next to it.", rich_help_panel=_ENGINES),
    ] = Path("maveriq-serve.db"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; all but loopback need a token.", rich_help_panel=_HTTP)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.", rich_help_panel=_HTTP)
    ] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the token; default: environment variable MAVERIQ_TOKEN.", rich_help_panel=_HTTP),
    ] = None,
    access_log: Annotated[
        Path | None,
        typer.Option(help="File that gets a line for each HTTP request; - for stderr.", rich_help_panel=_HTTP),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, max=_MAX_LIMIT, help="Requests in flight; more get 429.", rich_help_panel=_LIMITS)
    ] = 256,
    max_body_kib: Annotated[
        int, typer.Option(min=1, max=_MAX_LIMIT, help="Size of an HTTP body; more gets 413.", rich_help_panel=_LIMITS)
    ] = 1024,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, max=_MAX_LIMIT, help="Tokens of a prompt.", rich_help_panel=_LIMITS)
    ] = 32_768,
    max_output_tokens: Annotated[
        int, typer.Option(min=1, max=_MAX_LIMIT, help="Tokens of an output.", rich_help_panel=_LIMITS)
    ] = 4_096,
    grace_period_s: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e6, help="Time for running requests to finish at shutdown.", rich_help_panel=_LIMITS
        ),
    ] = 30.0,
    profile_on_register: Annotated[
        bool,
        typer.Option(
            "--profile-on-register",
            help="Measure each new model in the background, on GPUs that hold nothing.",
            rich_help_panel=_PROFILES,
        ),
    ] = False,
    profile_concurrently: Annotated[
        bool,
        typer.Option(
            "--profile-concurrently",
            help="Measure beside running engines, where memory is free; this slows them and what is measured.",
            rich_help_panel=_PROFILES,
        ),
    ] = False,
    profile_budget_s: Annotated[
        float,
        typer.Option(min=1, max=1e6, help="Most seconds that the plan of a profile takes.", rich_help_panel=_PROFILES),
    ] = 120.0,
    profile_gpus: Annotated[
        int, typer.Option(min=1, max=64, help="Most GPUs that a profile is measured on.", rich_help_panel=_PROFILES)
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=_HTTP)] = False,
) -> None:
    """Serve many models on one cluster over HTTP.

    Offers OpenAI's API for served models, /endpoints to deploy by intent, and /metrics
    for Prometheus. Listens on loopback unless there is a token. Ctrl-C or SIGTERM
    shuts down gracefully; the next start restores the endpoints.
    """
    from maveriq.errors import InputError
    from maveriq.exec.batching_spec import EngineChoice
    from maveriq.files import is_folder
    from maveriq.serve.auth import read_token
    from maveriq.serve.settings import ServeSettings

    if profile_concurrently and not profile_on_register:
        raise InputError("--profile-concurrently says how --profile-on-register measures; give both")
    profiling = _Profiling(profile_concurrently, profile_budget_s, profile_gpus) if profile_on_register else None
    if models_folder is not None and not is_folder(models_folder):
        raise InputError(f"--models-folder {str(models_folder)!r} is not a folder")
    settings = ServeSettings(
        token=read_token(token_file),
        models_folder=models_folder,
        max_in_flight=max_requests,
        max_body_bytes=max_body_kib * 1024,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        grace_period_s=grace_period_s,
        engine=EngineChoice.of(engines.name, engine),
    )
    _run_service(
        options,
        engines,
        settings,
        profiling,
        state=state,
        host=host,
        port=port,
        access_log=access_log,
        quiet=quiet,
    )


@dataclass(frozen=True, slots=True)
class _Profiling:
    """The options of profiles: `--profile-concurrently`, `--profile-budget-s`, `--profile-gpus`."""

    beside_engines: bool
    budget_s: float
    max_gpus: int


def _run_service(
    options: Options,
    engines: EngineOptions,
    settings: ServeSettings,
    profiling: _Profiling | None,
    *,
    state: Path,
    host: str,
    port: int,
    access_log: Path | None,
    quiet: bool,
) -> None:
    """Open the socket and the state file, then serve until a signal.

    Raises:
        InputError: an option, a file or an address that cannot be used.
        MaveriqError: the executor failed.
    """
    import asyncio

    from maveriq.cli.error_handler import extra
    from maveriq.exec.local_machine import LocalMachine, local_cluster
    from maveriq.scenario.build import build_live_system

    with extra("serve", needed_by="maveriq serve"):
        from maveriq.serve.access_log import AccessLog
        from maveriq.serve.server import listen
        from maveriq.serve.store import Store

    log_to_stderr(logging.ERROR if quiet else logging.WARNING)
    with contextlib.ExitStack() as resources:
        machine = resources.enter_context(contextlib.closing(LocalMachine(engines.name, engines.engine_python)))
        profiled: dict[str, tuple[ModelSpec, Estimator]] | None = None if profiling is None else {}
        if profiling is not None and options.profile == Options().profile:
            options = replace(options, profile=_profile_of_machine(machine, options.profile, _profiles_folder(state)))
        system, placements = build_live_system(
            options,
            wrap_estimator=machine.planning,
            make_cluster=local_cluster,
            engine_tokens=machine.engine_tokens,
            profiled=profiled,
        )
        profiles = None
        if profiling is not None and profiled is not None:
            profiles = _profile_settings(options, engines, machine, system, profiling, profiled, state)
        log = None
        if access_log is not None:
            log = AccessLog(None if str(access_log) == "-" else access_log)
            resources.callback(log.close)
        listener = resources.enter_context(contextlib.closing(listen(host, port, settings)))
        store = resources.enter_context(contextlib.closing(Store(state, kept_requests=settings.kept_requests)))
        serving = _serve(
            system,
            placements,
            engines,
            machine,
            settings,
            listener=listener,
            store=store,
            logs=state.with_suffix(".logs"),
            access_log=log,
            profiles=profiles,
            quiet=quiet,
        )
        asyncio.run(serving)


def _profiles_folder(state: Path) -> Path:
    return state.with_suffix(".profiles")


def _profile_of_machine(machine: LocalMachine, default: str, folder: Path) -> str:
    """Return the profile to begin with: on a CPU, which has no data sheet, one with its speeds, measured in a second.

    Raises:
        MaveriqError: it cannot be written.
    """
    from datetime import UTC, datetime

    import msgspec

    from maveriq import __version__
    from maveriq.estimate.profile_file import FORMAT, PROFILE_NAME, VERSION, EngineRecord, ProfileFile
    from maveriq.exec.local_machine import EMULATED
    from maveriq.files import written_whole
    from maveriq.profiling.machine import machine_record, measured_sheet

    if machine.backend == EMULATED or machine.meter is not None:
        return default
    path = folder / "machine" / PROFILE_NAME
    if not path.exists():
        for made in (folder, path.parent):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        record = machine_record(machine, kind=None, memory_gib=None)
        sheet = measured_sheet(record.cores, record.memory_gib)
        file = ProfileFile(
            format=FORMAT,
            version=VERSION,
            name="machine",
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            made_by=__version__,
            machine=msgspec.structs.replace(record, sheet=sheet),
            engine=EngineRecord(name=machine.backend),
            models=(),
            runs=(),
        )
        with written_whole(path, what="profile", overwrite=True) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
    return str(path)


def _profile_settings(
    options: Options,
    engines: EngineOptions,
    machine: LocalMachine,
    system: ServingSystem,
    profiling: _Profiling,
    profiled: dict[str, tuple[ModelSpec, Estimator]],
    state: Path,
) -> ProfileSettings:
    """Return how profiles are measured on the GPUs of a service.

    Raises:
        InputError: they are of several kinds.
    """
    from maveriq.errors import InputError
    from maveriq.estimate.cluster_profiles import profiles_for
    from maveriq.estimate.profile_file import MachineRecord
    from maveriq.exec.local_machine import EMULATED
    from maveriq.exec.profile_worker import EmulatedTimes
    from maveriq.serve.profile_jobs import ProfileSettings
    from maveriq.units import gib

    cluster, known = system.cluster, profiles_for(options.profile, options.gpus).main
    if len(cluster.kinds) > 1:
        raise InputError(
            f"--profile-on-register measures on GPUs of one kind, and the cluster has {', '.join(cluster.kinds)}; "
            "leave it out"
        )
    gpu = cluster.gpus[0]
    emulated = EmulatedTimes(
        gpus=options.gpus,
        profile=options.profile,
        service_times=options.service_times,
        time_scale=engines.time_scale,
    )
    return ProfileSettings(
        folder=_profiles_folder(state),
        profiled=profiled,
        machine=MachineRecord(
            kind=gpu.kind,
            memory_gib=gib(gpu.capacity_bytes),
            idle_gib=gib(gpu.idle_bytes),
            sheet=known.sheet,
        ),
        backend=engines.name,
        engine_python=engines.engine_python,
        devices=machine.devices(cluster),
        machine_gpus=() if machine.meter is None else tuple(i % len(machine.meter.gpus) for i in range(len(cluster))),
        node_gpus=cluster.largest_node(gpu.kind),
        prompt_tokens=system.prompt_tokens,
        max_gpus=min(profiling.max_gpus, cluster.largest_node(gpu.kind)),
        beside_engines=profiling.beside_engines,
        budget_s=profiling.budget_s,
        usd_per_gpu_hour=cluster.usd_per_hour(gpu),
        emulated=emulated if engines.name == EMULATED else None,
        seed=options.seed,
        has_measured=known.has_measured,
    )


async def _serve(
    system: ServingSystem,
    placements: PinnedPlacementPolicy,
    engines: EngineOptions,
    machine: LocalMachine,
    settings: ServeSettings,
    *,
    listener: socket.socket,
    store: Store,
    logs: Path,
    access_log: AccessLog | None,
    profiles: ProfileSettings | None,
    quiet: bool,
) -> None:
    from maveriq.errors import MaveriqError
    from maveriq.exec.batching_spec import live_batching_specs
    from maveriq.exec.executor import open_executor
    from maveriq.exec.model_files import ModelFiles
    from maveriq.serve.app import create_app
    from maveriq.serve.model_registry import ModelRegistry
    from maveriq.serve.server import serve, url_of

    models = ModelRegistry(store, folder=settings.models_folder, max_models=settings.max_models)

    def config_of(model: ModelSpec) -> Path | None:
        folder = models.folder_of(model)
        return folder and folder / "config.json"

    async with open_executor(
        system,
        backend=engines.name,
        time_scale=engines.time_scale,
        supervision=engines.supervision(),
        logs=logs,
        files=ModelFiles(config_of),
        devices=machine.devices(system.cluster),
        memory_probe=machine.memory_probe(),
        sampler=machine.sampler(system.cluster),
        python=machine.python_path,
        batching_of=None if system.live_engines is None else live_batching_specs(system.live_engines, engines.name),
    ) as executor:
        app = create_app(executor, store, settings, placements, models, access_log, profiles)

        def report_ready() -> None:
            _print_status(f"serving {system.cluster.name} on {url_of(listener)}; Ctrl-C stops it", quiet=quiet)

        await serve(app, listener, report_ready, fault=executor.internal_error)
        if executor.internal_error.done() and (fault := executor.internal_error.exception()) is not None:
            raise MaveriqError(f"the executor failed ({type(fault).__name__}: {fault}); all requests ended") from fault
    _print_status("stopped", quiet=quiet)


def _print_status(line: str, *, quiet: bool) -> None:
    if not quiet:
        with contextlib.suppress(OSError):  # the terminal is gone
            echo(line, err=True)


class EscapingFormatter(logging.Formatter):
    """Formats a log record with control characters escaped, and its message on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return escape_controls(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (as in logging)
        """Return the line of a record without its traceback."""
        return super().formatMessage(record).replace("\n", "\\n")


def log_to_stderr(level: int) -> None:
    """Let the root logger write to stderr."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("maveriq: %(message)s"))
    options: dict[str, Any] = {"level": level, "handlers": [handler]}
    logging.basicConfig(**options)
