"""Shows the results of a run and names its folder; shared by `maveriq sim` and `maveriq run`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from maveriq.cli.options import OutputOptions
from maveriq.errors import MaveriqError
from maveriq.exec.local_machine import EngineOptions
from maveriq.report.live import ProgressView, make_view
from maveriq.report.results import results_view
from maveriq.report.run_folder import check_writable, free_folder
from maveriq.report.terminal import no_color, open_console
from maveriq.runs import Run
from maveriq.scenario.defaults import resolved, with_cluster_defaults
from maveriq.scenario.options import Options
from maveriq.workload.model_sets import known_model_sets
from maveriq.workload.options import DEFAULT_SCALE
from maveriq.workload.traces import SYNTHETIC, TRACES

_IN_NAME = ("policy", "intent", "models", "trace", "scale")  # options that every name has
_ENGINE_NOT_IN_NAME = ("backend", "real", "engine-python")  # the name has the backend; a path says little
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._=+@,-]")
_MAX_NAME = 160


def default_folder(options: Options, engines: EngineOptions | None = None) -> Path:
    """Return the folder of a run without `--out`: `runs/` and what distinguishes the run from others.

    The name has every option that differs from its default. Where it cannot (paths, long values), it ends with a
    digest of the options: runs with different options have different names.

    Args:
        options: of the run.
        engines: those of a run on engines; None for a simulation.
    """
    models = _stem(options.models, ".toml", known_model_sets())
    trace = _stem(options.trace, ".csv", TRACES)
    parts = [_policy_of(options), options.intent, models, trace]
    has_scale = options.rate is None and options.trace in TRACES and options.trace != SYNTHETIC
    if has_scale or (options.rate is None and options.scale is not None):
        parts.append(f"{DEFAULT_SCALE if options.scale is None else options.scale:g}")
    parts += ["-".join(filter(None, changed)) for changed in changed_options(options) if changed[0] not in _IN_NAME]
    if engines is not None:
        changed = [changed for changed in changed_options(engines) if changed[0] not in _ENGINE_NOT_IN_NAME]
        parts += [engines.name, *("-".join(filter(None, pair)) for pair in changed)]
    full = "-".join(parts)
    name = _NOT_IN_NAMES.sub("_", full.replace(os.sep, "_"))
    if name != full or len(name) > _MAX_NAME:
        digest = hashlib.sha256(repr((options, engines)).encode("utf-8", "surrogateescape")).hexdigest()
        name = f"{name[:_MAX_NAME]}-{digest[:8]}"
    return Path("runs") / name


def _stem(text: str, suffix: str, known: Collection[str]) -> str:
    """Return the name of a file in this folder without its suffix, unless a built-in one has that name; or the text.

    Other paths are returned with a separator, which no folder's name may have, so that the name gets a digest.
    """
    stem = text.removesuffix(suffix)
    if stem != text and stem not in known and os.sep not in text:
        return stem
    return text if text in known or text == f"{stem}{suffix}" else f".{os.sep}{text}"


def changed_options(options: Any) -> Iterator[tuple[str, str]]:
    """Yield name and value of the options that differ from their defaults; a flag has the value ""."""
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        for single in value if isinstance(value, tuple) else (value,):
            yield field.name.replace("_", "-"), "" if isinstance(single, bool) else str(single).removesuffix(".0")


def choose_folder(output: OutputOptions, default: Path) -> Path:
    """Return the folder for a run's records, and check that it can be written.

    Without `--out` and `--overwrite` it is the first of NAME, NAME-2, ... with nothing in it.

    Raises:
        InputError: it cannot be written, or has a run already and there is no `--overwrite`.
    """
    folder = output.out or (default if output.overwrite else free_folder(default))
    check_writable(folder, overwrite=output.overwrite)
    return folder


def _policy_of(options: Options) -> str:
    from maveriq.estimate.cluster_profiles import profiles_for
    from maveriq.exec.local_machine import local_cluster

    if options.policy is not None:
        return options.policy
    profiles = profiles_for(options.profile, options.gpus)
    return resolved(with_cluster_defaults(options, profiles.main, local_cluster(options.gpus, profiles)).policy)


def live_view(output: OutputOptions) -> ProgressView:
    """Return the view of a run's progress on stderr."""
    interactive = sys.stdout.isatty() and sys.stderr.isatty() and not no_color()
    return make_view(open_console(stderr=True), quiet=output.quiet or output.as_json, interactive=interactive)


def show_run(run: Run, output: OutputOptions, folder: Path, *, last_line: str = "") -> None:
    """Print the results of a run that is saved in a folder.

    Raises:
        MaveriqError: nothing could be deployed.
    """
    deployments = run.record.deployments
    if deployments and all(deployment.plan is None for deployment in deployments):
        raise MaveriqError(f"nothing could be deployed: {deployments[0].reason}; records: {folder}")
    if output.as_json:
        made_of = {name: run.meta[name] for name in ("options", "trace") if name in run.meta}
        answer = {"folder": str(folder), "notes": list(run.notes), **made_of, **run.to_dict()}
        typer.echo(json.dumps(answer, indent=2, allow_nan=False))
    elif not output.quiet:
        console = open_console()
        console.print(results_view(run.summary, run.saturation, deployments, width=console.width))
        for line in (*run.notes, f"records: {folder}", *([last_line] if last_line else [])):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
