"""Kinds of GPU: what their data sheets say (`maveriq/data/gpus.toml`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Annotated

import msgspec

from maveriq.domain.weight_formats import WeightFormat
from maveriq.errors import UnknownNameError
from maveriq.files import data_path
from maveriq.tables import read_toml

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class Link(StrEnum):
    """What connects the GPUs of a node."""

    NVLINK = "nvlink"
    PCIE = "pcie"


class NumberFormat(StrEnum):
    """The format in which a matrix product is computed or its weights are stored."""

    BFLOAT16 = "bfloat16"
    FP8 = "fp8"
    FP8_BLOCK = "fp8_block"
    INT8 = "int8"
    INT4 = "int4"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"


_NAMED = {
    "float16": NumberFormat.BFLOAT16,
    "int8 with int8 activations": NumberFormat.INT8,
    "int4_gptq": NumberFormat.INT4,
    **{number_format.value: number_format for number_format in NumberFormat},
}


def number_format_of(stored: WeightFormat) -> NumberFormat | None:
    """Return the format in which products with weights stored like this are computed; None if it is not modelled."""
    found = _NAMED.get(stored.name)
    in_blocks = found is NumberFormat.FP8 and stored.block_inputs and stored.block_outputs
    return NumberFormat.FP8_BLOCK if in_blocks else found


_LEAST_CAPABILITY = {NumberFormat.FP8: 8.9, NumberFormat.FP8_BLOCK: 8.9, NumberFormat.NVFP4: 10.0}
"""The first generation that computes a format; weights of other formats are expanded to 16 bits where need be."""


class GpuSheet(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One kind of GPU.

    Args:
        memory_gib: memory as it is sold, GiB.
        usable_gib: memory that the driver reports to programs, GiB.
        bandwidth_gb_s: bandwidth of the memory, GB/s.
        multiprocessors: streaming multiprocessors (compute units).
        clock_ghz: the clock at which the tensor speed is stated, GHz.
        cache_mib: the cache (L2) between these and the memory, MiB; 0 where no kernel of it was measured.
        tflops: dense tensor TFLOP/s by format of the factors.
        link: what connects the GPUs of a node.
        link_gb_s: what a GPU sends and receives together over it, GB/s.
        gpus_per_node: GPUs of a usual node.
        power_w: largest power, W.
        compute_capability: NVIDIA's number of the generation, which says what kernels a GPU has.
        usd_per_hour: list price of one GPU, US dollars an hour.
        price_source: whose list price it is.
        source: where the other figures stand.
        value_bytes: bytes of a value of 16 bits as it is kept: 4 where they are computed with 32, as on a CPU.
        other_names: how it is also called; `H100` stands for the most common H100.
        name: the kind's name, from the table's key.
    """

    memory_gib: _Positive
    usable_gib: _Positive
    bandwidth_gb_s: _Positive
    multiprocessors: _Count
    clock_ghz: _Positive
    cache_mib: _NotNegative = 0.0
    tflops: dict[NumberFormat, _Positive]
    link: Link
    link_gb_s: _Positive
    gpus_per_node: _Count
    power_w: _Positive
    compute_capability: _Positive
    usd_per_hour: _Positive
    price_source: str
    source: str
    value_bytes: _Count = 2
    other_names: tuple[str, ...] = ()
    name: str = ""

    def __hash__(self) -> int:
        return hash(self.name)

    def peak_tflops(self, number_format: NumberFormat) -> float:
        """Return the dense tensor TFLOP/s for factors of a format; 16-bit speed where the GPU has no faster one."""
        key = NumberFormat.FP8 if number_format is NumberFormat.FP8_BLOCK else number_format
        return self.tflops.get(key, self.tflops[NumberFormat.BFLOAT16])

    def why_not_computed(self, number_format: NumberFormat) -> str | None:
        """Return why it cannot compute with a format, in one clause; None if it can."""
        needed = _LEAST_CAPABILITY.get(number_format, 0.0)
        if self.compute_capability >= needed:
            return None
        name = NumberFormat.FP8 if number_format is NumberFormat.FP8_BLOCK else number_format
        return (
            f"{self.name} computes no {name}: that takes compute capability {needed:.1f}, and it has "
            f"{self.compute_capability:.1f}"
        )


@cache
def gpu_sheets() -> Mapping[str, GpuSheet]:
    """Return the catalogue by name."""
    read = read_toml(data_path("gpus.toml"), dict[str, GpuSheet], what="table of GPUs")
    return MappingProxyType({name: msgspec.structs.replace(sheet, name=name) for name, sheet in read.items()})


def gpu_sheet(name: str) -> GpuSheet:
    """Return a kind of GPU by its name; case, spaces, hyphens and underscores do not matter, `H100` means H100-SXM.

    Raises:
        UnknownNameError: no kind has this name.
    """
    sheets = gpu_sheets()
    by_key = {_key(text): sheet.name for sheet in sheets.values() for text in (sheet.name, *sheet.other_names)}
    found = by_key.get(_key(name))
    if found is None:
        raise UnknownNameError("kind of GPU", name, sheets, "or give the profile of another kind with --profile FILE")
    return sheets[found]


_CARDS = {"pcie", "nvl"}
"""Words in a driver's name of a GPU that comes as a card; of those that also come as modules, these have none."""


def sheet_of_device(name: str) -> GpuSheet | None:
    """Return the kind of a GPU by its driver's name ("NVIDIA H100 80GB HBM3", "NVIDIA RTX A6000"); None if unknown."""
    words = set(re.split(r"[^a-z0-9]+", name.casefold()))
    words |= set() if words & _CARDS else {"sxm"}
    matching = [
        sheet for sheet in gpu_sheets().values() if set(re.split(r"[^a-z0-9]+", sheet.name.casefold())) <= words
    ]
    return max(matching, key=lambda sheet: len(sheet.name), default=None)


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
