"""What engines can run, which are installed, and whether they can run a model, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.exec.capabilities import CapabilityRow, EngineFacts, Installed, Machine, Refusal
from maveriq.exec.device import Device
from maveriq.report.formatting import NONE
from maveriq.report.view import Column, Row, Table, Text, row
from maveriq.units import gib

Here = Mapping[str, Installed]
"""Engines as they are on this machine, by name."""


def matrix_table(engines: Mapping[str, EngineFacts]) -> Table:
    """Return the capability matrix: a row for each set of capabilities that go together."""
    columns = [
        Column("engine"),
        Column("models", wrap="words"),
        Column("weights", wrap="words", min_width=9),
        Column("KV cache", wrap="words"),
        Column("on", wrap="words"),
        Column("TP", wrap="words"),
        Column("PP", wrap="words"),
        Column("known", wrap="words"),
    ]
    rows = [
        _matrix_row(name if position == 0 else "", capability, dim=not facts.started)
        for name, facts in engines.items()
        for position, capability in enumerate(facts.can)
    ]
    return Table("What engines can do", columns, rows)


def _matrix_row(name: str, capability: CapabilityRow, *, dim: bool) -> Row:
    return row(
        name,
        " ".join("any" if architecture == "*" else architecture for architecture in capability.architectures),
        " ".join(capability.weights),
        " ".join(capability.kv),
        _devices(capability),
        _tp(capability),
        _pp(capability),
        f"{capability.status.value} {capability.version}",
        style="dim" if dim else "",
        starts_section=bool(name),
    )


def _devices(row: CapabilityRow) -> str:
    generation = f" {row.min_compute_capability:.1f}+" if row.min_compute_capability else ""
    return " ".join(f"{device.value}{generation if device is Device.CUDA else ''}" for device in row.devices)


def _tp(row: CapabilityRow) -> str:
    maximum = f"up to {row.max_tp}" if row.max_tp else ""
    heads = "divides heads" if row.heads else "" if maximum else "any"
    groups = f"whole groups of {row.group}" if row.group else ""
    return ", ".join(part for part in (maximum, heads, groups) if part)


def _pp(row: CapabilityRow) -> str:
    if row.max_pp == 1:
        return "1"
    return f"{f'up to {row.max_pp}, ' if row.max_pp else ''}{'also uneven' if row.uneven else 'equal stages'}"


def installed_table(engines: Mapping[str, EngineFacts], here: Here, machine: Machine) -> Table:
    """Return which engines can start on this machine, and what the others lack."""
    gpus = ", ".join(f"{gpu.name} ({gib(gpu.memory_bytes):.0f} GiB)" for gpu in machine.gpus)
    columns = [
        Column("engine"),
        *(Column(header, wrap="fold") for header in ("what it is", "batches", "installed", "lacks")),
    ]
    rows = [_installed_row(name, facts, here[name]) for name, facts in engines.items()]
    return Table(f"Here: {gpus or 'no GPU'}", columns, rows)


def _installed_row(name: str, facts: EngineFacts, found: Installed) -> Row:
    versions = ", ".join(f"{package} {version}" for package, version in found.versions.items())
    if found.python is not None:
        versions += f" in {found.python.parent.parent}"
    return row(
        Text(name, "green" if found.missing is None else "dim"),
        f"{facts.title} ({facts.version})" if facts.packages else facts.title,
        "continuously, or one at a time" if facts.continuous else "one at a time",
        versions or (NONE if facts.packages else "comes with maveriq"),
        found.missing or "",
    )


def matrix_json(engines: Mapping[str, EngineFacts], here: Here, machine: Machine) -> dict[str, Any]:
    """Return the matrix with its sources and what is installed, for programs."""
    return {
        "here": {
            "gpus": [
                {"uuid": gpu.uuid, "name": gpu.name, "memory_gib": gib(gpu.memory_bytes), "slice": gpu.is_slice}
                for gpu in machine.gpus
            ],
            "no_gpus": machine.no_gpus or None,
        },
        "engines": {
            name: {
                **msgspec.to_builtins(facts),
                "installed": here[name].versions,
                "python": None if here[name].python is None else str(here[name].python),
                "missing": here[name].missing,
            }
            for name, facts in engines.items()
        },
    }


def answers_table(
    model: ModelSpec, requested: ParallelConfig, device: Device, answers: Mapping[str, Refusal | None]
) -> Table:
    """Return for each engine whether it can run a model as requested, or the nearest thing that it can run."""
    columns = [
        Column("engine"),
        Column("can", wrap="words"),
        Column("why not", wrap="fold"),
        Column("nearest it can run", wrap="fold"),
    ]
    rows = [
        row(name, Text("yes", "green"), "", "")
        if refusal is None
        else row(name, Text("no", "red"), refusal.reason, refusal.describe_nearest() or NONE)
        for name, refusal in answers.items()
    ]
    return Table(f"{model.name} as {requested.describe(model.layers)} on {device}", columns, rows)


def answers_json(
    model: ModelSpec, requested: ParallelConfig, device: Device, answers: Mapping[str, Refusal | None]
) -> dict[str, Any]:
    """Return the answers for programs."""
    return {
        "model": model.name,
        "device": device.value,
        "requested": _config_json(requested, model),
        "engines": {
            name: {
                "can": refusal is None,
                "reason": refusal and refusal.reason,
                "nearest": refusal and refusal.nearest and _config_json(refusal.nearest, model),
            }
            for name, refusal in answers.items()
        },
    }


def _config_json(cfg: ParallelConfig, model: ModelSpec) -> dict[str, Any]:
    return {
        "tp": cfg.tp,
        "pp": cfg.pp,
        "layer_split": list(cfg.layers_per_stage(model.layers)),
        "weights": cfg.weights.value,
        "kv": cfg.kv.value,
    }
