"""The work behind `maveriq run`: build, start engines, replay, measure, write, show."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from maveriq.cli.engine_site import Engines, Site
from maveriq.cli.local_gpus import cluster_here
from maveriq.cli.simulating import Output, default_folder, meta_of, report
from maveriq.domain.records import NOT_YET
from maveriq.errors import MaveriqError, cannot_write
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.model_files import ModelFiles
from maveriq.exec.replay import Interruption, Replayed, ReplaySettings, check_real, run_replay
from maveriq.report.live import make_view
from maveriq.report.reading import read_meta
from maveriq.report.run_folder import check_writable, engine_lines
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.scenario.system import ReplaySystem
from maveriq.workload.model_sets import load_model_set


def run_for_real(options: Options, engines: Engines, output: Output) -> None:
    """Replay on engines, write the run folder, show the results.

    Raises:
        InputError: bad input, or a folder that cannot be written.
        MaveriqError: the disk is full, or nothing could be deployed (the records are there all the same).
        KeyboardInterrupt: the user ended the run early (the records are there all the same).
    """
    folder = output.folder or _default_folder(options, engines)
    check_writable(folder)
    with contextlib.closing(Site(engines.name)) as site:
        scenario = build_system(options, wrap_estimator=site.planning, make_cluster=cluster_here)
        check_real(scenario)
        settings = ReplaySettings(
            time_scale=engines.time_scale,
            files=ModelFiles(load_model_set(options.models).configs().get),
            devices=site.devices(scenario.cluster),
            supervision=engines.supervision(),
            meter=site.meter,
            memory_probe=site.memory_probe(),
            sampler=site.sampler(scenario.cluster),
        )
        _run(_Job(options=options, engines=engines, output=output, folder=folder), scenario, settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What was asked for, and where it goes."""

    options: Options
    engines: Engines
    output: Output
    folder: Path


def _run(job: _Job, scenario: ReplaySystem, settings: ReplaySettings) -> None:
    output, folder = job.output, job.folder
    with Interruption() as interruption, _scratch(folder) as scratch:
        logs = Path(scratch) / "engines"
        logs.mkdir()
        interactive = sys.stdout.isatty() and sys.stderr.isatty()
        quiet = output.quiet or output.as_json
        with (
            ProcessLauncher(job.engines.name, logs=logs, devices=settings.devices) as launcher,
            make_view(Console(stderr=True), quiet=quiet, interactive=interactive) as view,
        ):
            replayed = run_replay(scenario, launcher, settings, None if quiet else view, interruption)

        def write_more(fresh: Path) -> None:
            shutil.move(logs, fresh)  # no copy: the disk may have no room for one
            lines = engine_lines(replayed.engines, settings.devices)
            (fresh / "engines.csv").write_text("".join(lines), encoding="utf-8")

        meta = _meta(job.options, job.engines, scenario, replayed)
        last_line = _suggestion(job.options, folder, meta)
        report(replayed.record, output, folder, meta, more=write_more, last_line=last_line)
    if interruption.came:
        raise KeyboardInterrupt
    lost = [one for one in replayed.record.deployments if one.plan is not None]
    if lost and all(one.ready_us == NOT_YET and one.status == "down" for one in lost):
        raise MaveriqError(f"no engine came up: {lost[0].reason}; records: {folder}")


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a folder beside the run's for what engines print meanwhile.

    Raises:
        InputError: it cannot be made.
        MaveriqError: the disk is full.
    """
    try:
        target = folder.expanduser().resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{target.name}-engines-", dir=target.parent)
    except OSError as error:
        raise cannot_write(f"output folder {str(folder)!r}", error) from None


def _default_folder(options: Options, engines: Engines) -> Path:
    simulated = default_folder(options)
    return simulated.with_name(f"{simulated.name}-{engines.name}")


def _meta(options: Options, engines: Engines, scenario: ReplaySystem, replayed: Replayed) -> dict[str, Any]:
    meta = meta_of(options, scenario, kind="run", libraries=("numpy", "msgspec"))
    if replayed.interrupted:
        meta["notes"].append(f"ended early by the user, at {replayed.record.ended_us / 1e6:.1f} s")
    meta["notes"] += replayed.notes
    more: dict[str, Any] = {"engines": asdict(engines)}
    if replayed.energy_j:
        more["energy_j"] = list(replayed.energy_j)
    return meta | more


def _suggestion(options: Options, folder: Path, meta: Mapping[str, Any]) -> str:
    """Return the command that compares this run with a simulated one, after the one that simulates it if need be."""
    simulated = default_folder(options)
    compare = shlex.join(["maveriq", "compare", str(simulated), str(folder)])
    if _is_simulation_of(meta, simulated):
        return f"compare with the simulator: {compare}"
    return f"compare with the simulator: {shlex.join(['maveriq', 'sim', '--quiet', *_said(options)])} && {compare}"


def _is_simulation_of(meta: Mapping[str, Any], folder: Path) -> bool:
    """Say whether a folder holds a simulation under the options of a run."""
    try:
        there = read_meta(folder)
    except MaveriqError:
        return False
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in meta["options"].items()}
    return there.get("kind") == "simulated" and there.get("options") == said


def _said(options: Options) -> Iterator[str]:
    """Yield the options that differ from their defaults, as a user writes them."""
    default = Options()
    for one in fields(options):
        value = getattr(options, one.name)
        if value == getattr(default, one.name):
            continue
        name = f"--{one.name.replace('_', '-')}"
        if isinstance(value, bool):
            yield name
        else:
            for single in value if isinstance(value, tuple) else (value,):
                yield from (name, str(single))
