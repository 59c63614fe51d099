"""Kinds of GPU: the catalogue, and what is known of one, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from maveriq.domain.gpu_kinds import GpuSheet, Link, NumberFormat
from maveriq.report.formatting import NONE
from maveriq.report.view import Column, Table, number_column, row

_LINKS = {Link.NVLINK: "NVLink", Link.PCIE: "PCIe"}
_SHOWN_FORMATS = {NumberFormat.BFLOAT16: "16 bits", NumberFormat.FP8: "fp8"}


def gpu_catalogue_table(sheets: Mapping[str, GpuSheet]) -> Table:
    """Return the kinds of GPU that maveriq knows by name."""
    columns = [
        Column("\nGPU"), number_column("mem.\nGiB"), number_column("mem.\nGB/s"),
        *(number_column(f"TFLOP/s\n{name}") for name in _SHOWN_FORMATS.values()),
        Column("link\nGB/s"), number_column("node\nGPUs"), number_column("\nW"), number_column("$ an\nhour"),
    ]  # fmt: skip
    rows = [
        row(
            name, f"{sheet.memory_gib:g}", f"{sheet.bandwidth_gb_s:,g}",
            *(_tflops(sheet, number_format) for number_format in _SHOWN_FORMATS), _link(sheet),
            str(sheet.gpus_per_node), f"{sheet.power_w:,g}", f"{sheet.usd_per_hour:.2f}",
        )
        for name, sheet in sheets.items()
    ]  # fmt: skip
    return Table("GPUs that maveriq knows by name", columns, rows, dense=True)


def gpu_catalogue_json(sheets: Mapping[str, GpuSheet]) -> dict[str, Any]:
    """Return the catalogue for programs."""
    return {name: gpu_json(sheet) for name, sheet in sheets.items()}


def gpu_table(sheet: GpuSheet) -> Table:
    """Return what is known of one kind of GPU."""
    rows = [
        row("other names", ", ".join(sheet.other_names) or NONE),
        row("memory", f"{sheet.memory_gib:g} GiB, {sheet.usable_gib:g} GiB of them for programs"),
        row("memory bandwidth", f"{sheet.bandwidth_gb_s:,g} GB/s"),
        row("multiprocessors", f"{sheet.multiprocessors:,} at {sheet.clock_ghz:g} GHz"),
        *(row(f"dense TFLOP/s, {number_format}", f"{speed:,g}") for number_format, speed in sheet.tflops.items()),
        row("link in a node", f"{_link(sheet)} GB/s, both directions together"),
        row("GPUs of a node", str(sheet.gpus_per_node)),
        row("power", f"{sheet.power_w:,g} W"),
        row("compute capability", f"{sheet.compute_capability:.1f}"),
        row("list price", f"${sheet.usd_per_hour:.2f} an hour ({sheet.price_source})"),
        row("source", sheet.source),
    ]
    return Table(sheet.name, [Column("what"), Column("known", wrap="words")], rows)


def gpu_json(sheet: GpuSheet) -> dict[str, Any]:
    """Return what is known of one kind of GPU, for programs."""
    values: dict[str, Any] = msgspec.to_builtins(sheet)
    del values["name"]
    return values


def _tflops(sheet: GpuSheet, number_format: NumberFormat) -> str:
    speed = sheet.tflops.get(number_format)
    return NONE if speed is None else f"{speed:,.0f}"


def _link(sheet: GpuSheet) -> str:
    return f"{_LINKS[sheet.link]} {sheet.link_gb_s:,g}"
