"""Models: the catalogue, and what was read of one model, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from maveriq.domain.decoder import Decoder
from maveriq.domain.models import CatalogueEntry, ModelSpec
from maveriq.domain.weight_formats import FORMATS
from maveriq.report.formatting import NONE
from maveriq.report.view import Column, Row, Table, number_column, row
from maveriq.units import gib

_KIB = 1024
_SHOWN_FORMATS = ("float16", "fp8", "int8", "int4", "nvfp4", "mxfp4")


def catalogue_table(models: Mapping[str, ModelSpec]) -> Table:
    """Return the models that maveriq knows by name."""
    columns = [
        Column("model"), number_column("parameters\nbillions"), number_column("a token\npasses"),
        number_column("KV KiB\na token"), number_column("positions"),
        Column("no plain decoder:\nit has", wrap="words", min_width=15),
    ]  # fmt: skip
    rows = [
        row(
            name, _billions(model.decoder.parameters()), _billions(model.decoder.active_parameters()),
            f"{model.decoder.kv_bytes_per_token() / _KIB:,.1f}", _count(model.context_tokens),
            ", ".join(model.decoder.features()),
        )
        for name, model in models.items()
    ]  # fmt: skip
    return Table("Models that maveriq knows by name", columns, rows, dense=True)


def catalogue_json(models: Mapping[str, ModelSpec], entries: Mapping[str, CatalogueEntry]) -> dict[str, Any]:
    """Return the catalogue for programs, with the published counts and their sources."""
    return {
        name: {
            **model_json(model),
            "source": entries[name].source,
            "published_parameters": entries[name].parameters,
        }
        for name, model in models.items()
    }


def model_table(model: ModelSpec) -> Table:
    """Return what was read of one model."""
    decoder = model.decoder
    cache = decoder.kv_cache()
    rows = [
        row("family", model.architecture),
        row("layers", f"{decoder.layers:,}: {_layers(decoder)}"),
        row("hidden size", f"{decoder.hidden_size:,}"),
        row("vocabulary", f"{decoder.vocab_size:,}, {'one matrix' if decoder.tied_embeddings else 'two matrices'}"),
        row("positions", f"{_count(model.context_tokens)}, rotary scaling {decoder.rope_type}"),
        row("parameters", f"{decoder.parameters():,}"),
        row("  a token passes", f"{decoder.active_parameters():,}"),
        *_other_inputs(decoder),
        row("KV cache, 16 bits", f"{cache.token_bytes:,} bytes a token"),
        *(row(f"  window of {window:,}", f"{size:,} of them, for no more tokens") for window, size in cache.windowed),
        *([row("  state", f"{cache.state_bytes:,} bytes a sequence")] if cache.state_bytes else []),
        row("weights as stored", f"{gib(decoder.weight_bytes()):,.2f} GiB ({model.quantization or '16 bits'})"),
        *(row(f"  as {name}", f"{gib(decoder.weight_bytes(FORMATS[name])):,.2f} GiB") for name in _SHOWN_FORMATS),
        row("beside a plain decoder", ", ".join(decoder.features()) or NONE),
        row("not counted", ", ".join(decoder.not_counted) or NONE),
    ]
    return Table(model.name, [Column("what"), Column("read", wrap="words")], rows)


def _other_inputs(decoder: Decoder) -> list[Row]:
    if not decoder.other_inputs_parameters:
        return []
    return [row("  for other inputs", f"{decoder.other_inputs_parameters:,}; only text is served")]


def model_json(model: ModelSpec) -> dict[str, Any]:
    """Return what was read of one model, for programs."""
    decoder = model.decoder
    cache = decoder.kv_cache()
    return {
        "family": model.architecture,
        "parameters": decoder.parameters(),
        "active_parameters": decoder.active_parameters(),
        "other_inputs_parameters": decoder.other_inputs_parameters,
        "kv_bytes_per_token": cache.token_bytes,
        "kv_cache": msgspec.to_builtins(cache),
        "stored_as": model.quantization or None,
        "stored_bytes": decoder.weight_bytes(),
        "weight_bytes": {name: decoder.weight_bytes(stored) for name, stored in FORMATS.items()},
        "context_tokens": model.context_tokens,
        "beside_a_plain_decoder": list(decoder.features()),
        "not_counted": list(decoder.not_counted),
        "decoder": msgspec.to_builtins(decoder),
    }


def _layers(decoder: Decoder) -> str:
    kinds = []
    for kind, number in decoder.kinds():
        parts = [type(part).__name__ for part in (kind.attention, kind.feed_forward) if part is not None]
        kinds.append(f"{number} x {' and '.join(parts)}")
    return ", ".join(kinds)


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:,.2f}"


def _count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"
