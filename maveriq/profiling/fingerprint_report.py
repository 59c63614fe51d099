"""A fingerprint as a table and as a JSON value."""

from __future__ import annotations

from typing import Any

import msgspec

from maveriq.profiling.fingerprint import Fingerprint
from maveriq.report.view import Column, Table, number_column, row
from maveriq.units import gib


def fingerprint_table(fingerprint: Fingerprint) -> Table:
    """Return the kept layers, and sizes beside those of the whole model."""
    rows = [
        row(
            f"layer {place}",
            f"{layer.stands_for} of {fingerprint.full_layers}: {layer.kind} (layer {layer.source_index})",
            _millions(layer.parameters),
            _gib(layer.weight_bytes),
        )
        for place, layer in enumerate(fingerprint.layers)
    ]
    whole_gib = _gib(fingerprint.full_bytes)
    rows += [
        row("beside layers", "", _millions(fingerprint.extra_parameters), _gib(fingerprint.extra_bytes)),
        row(
            "fingerprint", _weights(fingerprint), _millions(fingerprint.parameters), _gib(fingerprint.weight_bytes),
            starts_section=True,
        ),
        row("whole model", fingerprint.architecture, _millions(fingerprint.full_parameters), whole_gib),
    ]  # fmt: skip
    columns = [
        Column("what"), Column("stands for", wrap="words", min_width=20), number_column("parameters\nmillions"),
        number_column("weights\nGiB"),
    ]  # fmt: skip
    return Table(f"Fingerprint of {fingerprint.model}", columns, rows)


def fingerprint_notes(fingerprint: Fingerprint) -> list[str]:
    """Return what there is to say beside the table, one line each."""
    rate_gb_s = fingerprint.weight_bytes / max(fingerprint.write_s, 1e-3) / 1e9
    whole_gib = _gib(fingerprint.full_bytes)
    return [
        f"on disk: {_gib(fingerprint.disk_bytes)} GiB",
        f"on GPUs, weights as stored: {_gib(fingerprint.weight_bytes)} GiB, of the whole model {whole_gib} GiB",
        f"to read the weights: {fingerprint.read_s:.2f} s, of the whole model {fingerprint.full_read_s:.2f} s",
        f"  at {rate_gb_s:.2f} GB/s, as they were written here; the start of an engine comes on top",
        *(f"note: {note}" for note in fingerprint.notes),
    ]


def fingerprint_json(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return all that there is to say, for programs."""
    values: dict[str, Any] = msgspec.to_builtins(fingerprint, enc_hook=str)
    return {
        **values,
        "parameters": fingerprint.parameters,
        "weight_bytes": fingerprint.weight_bytes,
        "read_s": fingerprint.read_s,
        "full_read_s": fingerprint.full_read_s,
    }


def _weights(fingerprint: Fingerprint) -> str:
    return f"random weights, seed {fingerprint.seed}" if fingerprint.random_weights else "the whole model's weights"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}"


def _gib(size: int) -> str:
    return f"{gib(size):,.3f}"
