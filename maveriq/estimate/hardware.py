"""Hardware profiles: everything measured on a kind of GPU that maveriq plans and simulates with.

A profile is a TOML file that names the tables beside it; those of the A6000 testbed lie in
`maveriq/data/a6000` and show the format.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.domain.catalog import known_models
from maveriq.domain.deployment import Configuration
from maveriq.domain.hardware import DispatchTiming, LoadWindow
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.embedded import data_path
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate import facts
from maveriq.estimate.facts import Facts, Layout, LoadedAs
from maveriq.estimate.fingerprints import FingerprintTable, Stored, read_exponents, read_fingerprints
from maveriq.tables import read_toml
from maveriq.units import Bytes, Micros, bytes_from_gib, micros

# The upper bound also keeps infinity out, which TOML can say.
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class _Dispatch(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    tick_ms: _NotNegative
    after_arrival_ms: _NotNegative
    after_release_ms: _NotNegative
    pause_s: _NotNegative


class _Run(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    drain_s: _NotNegative


class _LoadWindow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    samples: int
    sample_s: _Positive
    look_s: _Positive
    busy_percent: _NotNegative
    most_phase_s: _NotNegative = 0.0


class _Tables(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    load_fit: str
    exponents: str | None = None
    accuracy: str | None = None
    unsupported: str | None = None
    slo: str | None = None
    load_times: str | None = None
    calibrated: str | None = None
    measured: str | None = None


class _Hardware(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    kind: str
    memory_gib: _Positive
    idle_gib: _NotNegative
    dispatch: _Dispatch
    run: _Run
    load_window: _LoadWindow
    tables: _Tables


class _Profile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)]
    hardware: str
    fingerprints: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKind:
    """A kind of GPU: its memory, and what of it the driver holds while nothing is loaded."""

    name: str
    capacity_bytes: Bytes
    idle_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HardwareProfile:
    """What was measured on one kind of GPU with prompts of one length.

    Compared by identity, because its tables are large; load it once.

    Args:
        name: by which `--profile` knows it.
        gpu_kind: name of the kind of GPU.
        capacity_bytes: memory of one GPU.
        idle_bytes: of which so much is held while nothing is loaded.
        prompt_tokens: length of the prompts that the fingerprints were measured with.
        timing: what the testbed's dispatcher costs.
        drain_us: a run ends so long after its last arrival.
        load_window: how the testbed measures load.
        fingerprints: fingerprint constants and exponents, for estimators.
        facts: accuracy, unsupported configurations, SLOs, load times; better asked by the methods.
        calibrated: file of the calibrated estimator's figures, None where there is none.
        measured: table of whole models that were measured, None where there is none.
    """

    name: str
    gpu_kind: str
    capacity_bytes: Bytes
    idle_bytes: Bytes
    prompt_tokens: int
    timing: DispatchTiming
    drain_us: Micros
    load_window: LoadWindow
    fingerprints: FingerprintTable
    facts: Facts
    calibrated: Path | None = None
    measured: Path | None = None

    def accuracy(self, model_name: str, weights: WeightType, kv: KvType) -> float | None:
        """Return the accuracy in percent of the float16 model's, None where it was never measured."""
        return self.facts.accuracy.get(Stored(model_name, weights, kv))

    def supports(self, model_name: str, configuration: Configuration) -> bool:
        """Say whether a configuration runs on this hardware; False where it is known not to."""
        stored = Stored(model_name, configuration.weights, configuration.kv)
        return Layout(stored, configuration.tp, configuration.pp) not in self.facts.unsupported

    def load_time_s(self, model: ModelSpec, configuration: Configuration, gib_per_gpu: float) -> float:
        """Return the seconds from the deploy command to registration, engine already built.

        It is the middle of the measured range where this very case was measured, else the fit
        by the number of GPUs and the memory that the engine holds on the fullest of them.
        """
        seen = self.facts.load_times.get(
            LoadedAs(model.name, configuration.weights, configuration.tp, configuration.pp)
        )
        if seen is not None:
            return seen.middle
        return self.facts.load_fit.seconds(gpus=configuration.gpus, gib_per_gpu=gib_per_gpu)

    def slo_s(self, model_name: str, output_tokens: int) -> float | None:
        """Return the latency SLO of a request at scale 1, None where the model has none (SPEC 7)."""
        base = self.facts.slo.get(model_name)
        return None if base is None else base.ttft_s + base.tpot_s * output_tokens


def known_profiles() -> Mapping[str, Path]:
    """Return the files of the embedded profiles by name: `<folder>-<file's name after profile->`."""
    paths = sorted(data_path().glob("*/profile-*.toml"))
    return {f"{path.parent.name}-{path.stem.removeprefix('profile-')}": path for path in paths}


def load_profile(name_or_path: str) -> HardwareProfile:
    """Read a hardware profile with its tables, and check that they belong together.

    Args:
        name_or_path: a name of `known_profiles`, or the path of a profile's TOML file.

    Raises:
        UnknownNameError: neither a known name nor a path.
        InputError: a file is missing or wrong, or a model's tables have gaps.
    """
    known = known_profiles()
    path = known.get(name_or_path, Path(name_or_path))
    if name_or_path not in known and not (path.suffix == ".toml" or os.sep in name_or_path):
        raise UnknownNameError("profile", name_or_path, known, "or give the path of a profile's TOML file")
    profile = read_toml(path, _Profile, what="profile")
    folder = path.parent
    hardware = _read_hardware(folder / profile.hardware)
    tables = (folder / profile.hardware).parent
    fingerprints = FingerprintTable(
        constants=read_fingerprints(folder / profile.fingerprints) if profile.fingerprints else {},
        exponents=read_exponents(tables / hardware.tables.exponents) if hardware.tables.exponents else {},
    )
    read_facts = _read_facts(tables, hardware.tables)
    _check_names(read_facts.model_names(), {*known_models(), *fingerprints.models()})
    _check_coverage(profile.name, fingerprints, read_facts)
    return HardwareProfile(
        name=profile.name,
        gpu_kind=hardware.kind,
        capacity_bytes=bytes_from_gib(hardware.memory_gib),
        idle_bytes=bytes_from_gib(hardware.idle_gib),
        prompt_tokens=profile.prompt_tokens,
        timing=_timing(hardware.dispatch),
        drain_us=micros(hardware.run.drain_s),
        load_window=_load_window(hardware.load_window),
        fingerprints=fingerprints,
        facts=read_facts,
        calibrated=tables / hardware.tables.calibrated if hardware.tables.calibrated else None,
        measured=tables / hardware.tables.measured if hardware.tables.measured else None,
    )


def load_gpu_kind(name: str) -> GpuKind:
    """Return a kind of GPU that comes with maveriq; upper and lower case are the same.

    Raises:
        UnknownNameError: there is no such kind.
    """
    kinds = {}
    for path in sorted(data_path().glob("*/hardware.toml")):
        read = _read_hardware(path)
        kinds[read.kind] = GpuKind(
            name=read.kind, capacity_bytes=bytes_from_gib(read.memory_gib), idle_bytes=bytes_from_gib(read.idle_gib)
        )
    for kind in kinds.values():
        if kind.name.casefold() == name.casefold():
            return kind
    raise UnknownNameError("kind of GPU", name, kinds)


def _read_hardware(path: Path) -> _Hardware:
    return read_toml(path, _Hardware, what="hardware description")


def _read_facts(folder: Path, tables: _Tables) -> Facts:
    return Facts(
        accuracy=facts.read_accuracy(folder / tables.accuracy) if tables.accuracy else {},
        unsupported=facts.read_unsupported(folder / tables.unsupported) if tables.unsupported else frozenset(),
        slo=facts.read_slo(folder / tables.slo) if tables.slo else {},
        load_times=facts.read_load_times(folder / tables.load_times) if tables.load_times else {},
        load_fit=facts.read_load_fit(folder / tables.load_fit),
    )


def _timing(dispatch: _Dispatch) -> DispatchTiming:
    return DispatchTiming(
        tick_us=micros(dispatch.tick_ms / 1e3),
        after_arrival_us=micros(dispatch.after_arrival_ms / 1e3),
        after_release_us=micros(dispatch.after_release_ms / 1e3),
        pause_us=micros(dispatch.pause_s),
    )


def _load_window(window: _LoadWindow) -> LoadWindow:
    return LoadWindow(
        samples=window.samples,
        sample_us=micros(window.sample_s),
        look_us=micros(window.look_s),
        busy_share=window.busy_percent / 100,
        most_phase_us=micros(window.most_phase_s),
    )


def _check_names(named: Collection[str], known: Collection[str]) -> None:
    """Refuse a table that speaks of a model nobody knows: a slip of the pen would hide its figures."""
    for name in sorted(set(named) - set(known)):
        raise UnknownNameError("model", name, known, "in the tables of the hardware profile")


def _check_coverage(name: str, fingerprints: FingerprintTable, read_facts: Facts) -> None:
    for stored in fingerprints.constants:
        what = f"profile {name!r}: {stored.model} has fingerprints with {stored.weights} weights and {stored.kv} KV"
        if (stored.weights, stored.kv) not in fingerprints.exponents:
            raise InputError(f"{what}, but the table of exponents has no row for these types; add one")
        if stored not in read_facts.accuracy:
            remedy = "add one, with percent left empty if it was never measured"
            raise InputError(f"{what}, but the accuracy table has no row for it; {remedy}")
