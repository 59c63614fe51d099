"""A hardware profile out of measurements: a folder for `--profile`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from maveriq.domain.models import ModelSpec
from maveriq.estimate.measured import COLUMNS, OPTIONAL_COLUMNS
from maveriq.profiling.measure import Measured
from maveriq.report.requests_csv import csv_cell
from maveriq.report.run_folder import write_folder

PROFILE_FILES = ("profile.toml", "hardware.toml", "load_fit.toml", "measured.csv", "models.toml")
"""What makes a folder a profile of measurements."""

_NOT_SHAPE = ("name", "rope_type", "quantization", "config_json", "decoder")

_HARDWARE = """\
# Written by `maveriq profile`. Engines are dispatched to without a tick, as maveriq's own executor does.
kind = {kind}
memory_gib = {memory_gib}
idle_gib = {idle_gib}

[dispatch]
tick_ms = 0.0
after_arrival_ms = 0.0
after_release_ms = 0.0
registration_delay_s = 0.0

[run]
drain_s = 300.0

[load_window]
samples = 120
sample_s = 1.0
look_s = 0.166667
busy_percent = 1.0

[tables]
load_fit = "load_fit.toml"
measured = "measured.csv"
models = "models.toml"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured on: a kind of GPU, or what plays one; memory in GiB."""

    kind: str
    memory_gib: float
    idle_gib: float


def write_profile(folder: Path, machine: Machine, measured: Sequence[Measured], *, overwrite: bool = False) -> Path:
    """Write profile.toml, hardware.toml, load_fit.toml, measured.csv and models.toml, whole or not at all.

    Returns where they are: see `maveriq.report.run_folder.write_folder`, also for `overwrite`.

    Raises:
        InputError: the folder cannot be written, or holds something else.
    """
    prompt_tokens = min(result.case.prompt_tokens for result in measured)
    load_s = median(result.start_s for result in measured)
    texts = {
        "profile.toml": (
            "# Written by `maveriq profile`.\n"
            f'name = {_quoted(folder.resolve().name)}\nprompt_tokens = {prompt_tokens}\nhardware = "hardware.toml"\n'
        ),
        "hardware.toml": _HARDWARE.format(
            kind=_quoted(machine.kind), memory_gib=machine.memory_gib, idle_gib=machine.idle_gib
        ),
        "load_fit.toml": (
            "# Seconds from the command to an engine that serves: the median of those measured.\n"
            f"fixed_s = {load_s:.3f}\nper_gpu_s = 0.0\nper_gib_s = 0.0\n"
        ),
        "measured.csv": "\n".join([",".join(COLUMNS + OPTIONAL_COLUMNS), *map(_line, measured), ""]),
        "models.toml": "\n".join(
            [
                "# Written by `maveriq profile`: what was measured. Another model of the same name is refused.",
                *map(_shape, {result.model.name: result.model for result in measured}.values()),
            ]
        ),
    }

    def fill(fresh: Path) -> None:
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")

    return write_folder(folder, fill, files=PROFILE_FILES, overwrite=overwrite)


def _quoted(text: str) -> str:
    """Return a string as TOML writes it."""
    return json.dumps(text, ensure_ascii=False)


def _shape(model: ModelSpec) -> str:
    """Return a model's shape as a table of `maveriq.domain.models.read_models`."""
    values = {name: value for name, value in asdict(model).items() if value is not None and name not in _NOT_SHAPE}
    lines = (f"{name} = {_quoted(value) if isinstance(value, str) else value}" for name, value in values.items())
    return "\n".join([f"\n[{_quoted(model.name)}]", *lines, ""])


def _line(result: Measured) -> str:
    configuration, case = result.configuration, result.case
    cells = (
        csv_cell(result.model.name), configuration.weights.value, configuration.kv.value, configuration.tp,
        configuration.pp, case.batch, case.prompt_tokens, f"{result.ttft_s:.6f}", f"{result.tpot_s:.6f}",
        f"{result.memory_gib:.6f}", case.output_tokens, result.model.layers,
    )  # fmt: skip
    return ",".join(map(str, cells))
