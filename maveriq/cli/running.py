"""The work behind `maveriq run`: build, start engines, replay, measure, write, show."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from maveriq.cli.simulating import Output, default_folder, meta_of, report
from maveriq.errors import InputError, MaveriqError, UnknownNameError, cannot_write
from maveriq.exec.engines.catalog import BACKENDS
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.life import SupervisionSettings
from maveriq.exec.replay import Replayed, ReplaySettings, run_replay
from maveriq.report.engine_csv import engine_lines
from maveriq.report.folders import check_writable
from maveriq.report.live import make_view
from maveriq.report.reading import read_meta
from maveriq.scenario.build import build_scenario
from maveriq.scenario.options import Options
from maveriq.scenario.scenario import Scenario

_EMULATED = "emulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What a user says about engines; fields as the options of `maveriq run`.

    Raises:
        InputError: options that do not go together, or cannot be.
        UnknownNameError: no such backend.
    """

    backend: str | None
    real: bool
    time_scale: float
    start_timeout_s: float
    hang_s: float
    most_failures: int

    def __post_init__(self) -> None:
        for name in ("time_scale", "start_timeout_s", "hang_s"):
            value = getattr(self, name)
            if not 0 < value <= 1e6:  # nan too
                raise InputError(f"--{name.replace('_', '-')} must be positive and at most 1,000,000, not {value}")
        if self.most_failures < 1:
            raise InputError(f"--most-failures must be at least 1, not {self.most_failures}")
        self._check_backend()

    def _check_backend(self) -> None:
        if self.real and self.backend is not None:
            raise InputError(f"--real means TensorRT-LLM; leave it out to run on {self.backend!r}")
        if self.real:
            raise InputError("--real needs TensorRT-LLM, which is not installed here; try --backend torch or emulated")
        if self.backend is None:
            raise InputError(
                "say what to run on: --backend emulated (processes that take the estimated time, no GPU needed), "
                "--backend torch, or --real (TensorRT-LLM); without any engine, try maveriq sim"
            )
        if self.backend not in BACKENDS:
            raise UnknownNameError("backend", self.backend, BACKENDS)
        if self.time_scale != 1 and self.backend != _EMULATED:
            raise InputError(f"--time-scale {self.time_scale:g} is for emulated engines: real ones take their own time")

    @property
    def name(self) -> str:
        """The backend, once that is checked."""
        return self.backend or _EMULATED

    def supervision(self) -> SupervisionSettings:
        """Return how patient to be."""
        return SupervisionSettings(start_s=self.start_timeout_s, hang_s=self.hang_s, most_failures=self.most_failures)


def run_for_real(options: Options, engines: Engines, output: Output) -> None:
    """Replay on engines, write the run folder, show the results.

    Raises:
        InputError: bad input, or a folder that cannot be written.
        MaveriqError: the disk is full, or nothing could be deployed (the records are there all the same).
        KeyboardInterrupt: the user ended the run early (the records are there all the same).
    """
    scenario = build_scenario(options)
    folder = output.folder or _default_folder(options, engines)
    check_writable(folder)
    settings = ReplaySettings(time_scale=engines.time_scale, supervision=engines.supervision())
    with _scratch(folder) as scratch:
        logs = Path(scratch)
        interactive = sys.stdout.isatty() and sys.stderr.isatty()
        quiet = output.quiet or output.as_json
        with (
            ProcessLauncher(engines.name, logs=logs, devices=settings.devices) as launcher,
            make_view(Console(stderr=True), quiet=quiet, interactive=interactive) as view,
        ):
            replayed = run_replay(scenario, launcher, settings, None if quiet else view)

        def write_more(fresh: Path) -> None:
            shutil.copytree(logs, fresh / "engines")
            lines = engine_lines(replayed.engines, settings.devices)
            (fresh / "engines.csv").write_text("".join(lines), encoding="utf-8")

        report(
            replayed.record,
            output,
            folder,
            _meta(options, engines, scenario, replayed),
            more=write_more,
            last_line=_suggestion(options, folder),
        )
    if replayed.interrupted:
        raise KeyboardInterrupt


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a folder beside the run's for what engines print meanwhile.

    Raises:
        InputError: it cannot be made.
        MaveriqError: the disk is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{folder.name}-engines-", dir=folder.parent)
    except OSError as error:
        raise cannot_write(f"output folder {str(folder)!r}", error) from None


def _default_folder(options: Options, engines: Engines) -> Path:
    simulated = default_folder(options)
    return simulated.with_name(f"{simulated.name}-{engines.name}")


def _meta(options: Options, engines: Engines, scenario: Scenario, replayed: Replayed) -> dict[str, Any]:
    meta = meta_of(options, scenario, kind="run", libraries=("numpy", "msgspec"))
    if replayed.interrupted:
        meta["notes"].append(f"ended early by the user, at {replayed.record.ended_us / 1e6:.1f} s")
    meta["notes"] += replayed.notes
    more: dict[str, Any] = {"engines": asdict(engines)}
    if replayed.energy_j:
        more["energy_j"] = list(replayed.energy_j)
    return meta | more


def _suggestion(options: Options, folder: Path) -> str:
    """Return the command that compares this run with a simulated one, after the one that simulates it if need be."""
    simulated = default_folder(options)
    compare = shlex.join(["maveriq", "compare", str(simulated), str(folder)])
    if _is_simulation_of(options, simulated):
        return f"compare with the simulator: {compare}"
    return f"compare with the simulator: {shlex.join(['maveriq', 'sim', '--quiet', *_said(options)])} && {compare}"


def _is_simulation_of(options: Options, folder: Path) -> bool:
    try:
        meta = read_meta(folder)
    except MaveriqError:
        return False
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    return meta.get("kind") == "simulated" and meta.get("options") == said


def _said(options: Options) -> Iterator[str]:
    """Yield the options that differ from their defaults, as a user writes them."""
    usual = Options()
    for one in fields(options):
        value = getattr(options, one.name)
        if value == getattr(usual, one.name):
            continue
        name = f"--{one.name.replace('_', '-')}"
        if isinstance(value, bool):
            yield name
        else:
            for single in value if isinstance(value, tuple) else (value,):
                yield from (name, str(single))
