"""The engines' capability matrix, what of it is installed, and answers to "can it?", as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from maveriq.domain.models import ModelSpec
from maveriq.exec.capabilities import Arrangement, CapabilityRow, Device, EngineFacts, Installed, Machine, Refusal
from maveriq.report.formatting import NONE
from maveriq.report.tables import new_table
from maveriq.units import gib

Here = Mapping[str, Installed]
"""Engines as they are on this machine, by name."""


def matrix_table(engines: Mapping[str, EngineFacts]) -> Table:
    """Return the matrix: a row for each set of things that go together."""
    table = new_table("What engines can do")
    for header in ("engine", "models", "weights", "KV cache", "on", "TP", "PP"):
        table.add_column(header, no_wrap=header in ("engine", "on"), min_width=9 if header == "weights" else None)
    for name, facts in engines.items():
        for position, row in enumerate(facts.can):
            table.add_row(
                name if position == 0 else "",
                " ".join("any" if one == "*" else one for one in row.architectures),
                " ".join(row.weights),
                " ".join(row.kv),
                " ".join(device.value for device in row.devices),
                _tp(row),
                _pp(row),
                style="" if facts.started else "dim",
                end_section=position == len(facts.can) - 1,
            )
    return table


def _tp(row: CapabilityRow) -> str:
    maximum = f"up to {row.max_tp}" if row.max_tp else ""
    heads = "divides heads" if row.heads else "" if maximum else "any"
    groups = f"no cut groups of {row.group}" if row.group else ""
    return ", ".join(part for part in (maximum, heads, groups) if part)


def _pp(row: CapabilityRow) -> str:
    if row.max_pp == 1:
        return "1"
    return f"{f'up to {row.max_pp}, ' if row.max_pp else ''}{'also uneven' if row.uneven else 'equal stages'}"


def installed_table(engines: Mapping[str, EngineFacts], here: Here, machine: Machine) -> Table:
    """Return which engines can start on this machine, and what the others lack."""
    gpus = ", ".join(f"{gpu.name} ({gib(gpu.memory_bytes):.0f} GiB)" for gpu in machine.gpus)
    table = new_table(escape(f"Here: {gpus or 'no GPU'}"))
    table.add_column("engine", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    table.add_column("installed", overflow="fold")
    table.add_column("lacks", overflow="fold")
    for name, facts in engines.items():
        found = here[name]
        versions = ", ".join(f"{package} {version}" for package, version in found.versions.items())
        own = "comes with maveriq" if not facts.packages else NONE
        table.add_row(
            Text(name, style="green" if found.missing is None else "dim"),
            f"{facts.title} ({facts.version})" if facts.packages else facts.title,
            versions or own,
            Text(found.missing or ""),  # its brackets are no markup
        )
    return table


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
                "missing": here[name].missing,
            }
            for name, facts in engines.items()
        },
    }


def answers_table(model: ModelSpec, asked: Arrangement, device: Device, answers: Mapping[str, Refusal | None]) -> Table:
    """Return for each engine whether it can run a model as asked, or what comes nearest."""
    table = new_table(escape(f"{model.name} as {asked} on {device}"))
    table.add_column("engine", no_wrap=True)
    table.add_column("can")
    table.add_column("why not", overflow="fold")
    table.add_column("nearest that it can", overflow="fold")
    for name, refusal in answers.items():
        if refusal is None:
            table.add_row(name, Text("yes", style="green"), "", "")
        else:
            table.add_row(name, Text("no", style="red"), Text(refusal.reason), str(refusal.nearest or NONE))
    return table


def answers_json(
    model: ModelSpec, asked: Arrangement, device: Device, answers: Mapping[str, Refusal | None]
) -> dict[str, Any]:
    """Return the answers for programs."""
    return {
        "model": model.name,
        "device": device.value,
        "asked": _arrangement_json(asked),
        "engines": {
            name: {
                "can": refusal is None,
                "reason": refusal and refusal.reason,
                "nearest": refusal and refusal.nearest and _arrangement_json(refusal.nearest),
            }
            for name, refusal in answers.items()
        },
    }


def _arrangement_json(one: Arrangement) -> dict[str, Any]:
    cfg = one.configuration
    return {
        "tp": cfg.tp,
        "pp": cfg.pp,
        "layer_split": list(one.layer_split),
        "weights": cfg.weights.value,
        "kv": cfg.kv.value,
    }
