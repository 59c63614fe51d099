"""Placement problems from files: a JSON file, and a CSV file of requests beside it.

The JSON has `gpus, gpus_per_node, memory_bytes, models, profiles, workload, search`; the CSV has
`arrival_s, model, slo_s`. With `gpu`, a kind of GPU, models need no profile: physics estimates them; or what
`maveriq profile` measured, where the problem is read with that.
The further keys of the published problems (`id`, `expected`) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from maveriq.csv_columns import Batch, csv_batches, floats
from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.requests import DemandForecast
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.hardware_profile import HardwareProfile, load_gpu_kind
from maveriq.estimate.registry import default_estimator, make_estimator
from maveriq.estimate.sheet_profile import sheet_profile
from maveriq.policy.alpaserve.problem import (
    Fill,
    GroupShape,
    ModelProfile,
    PlacementModel,
    PlacementPolicy,
    PlacementProblem,
    SearchSettings,
    StageProfile,
    StarRule,
)
from maveriq.policy.alpaserve.profiles import profiles_from_estimator
from maveriq.tables import Row, check_header, read_json

_WHAT = "placement problem"
_REQUESTS = "workload"
_COLUMNS = ("arrival_s", "model", "slo_s")
_MAX_REQUESTS = 2_000_000

_Count = Annotated[int, msgspec.Meta(ge=1, le=4096)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Bytes = Annotated[float, msgspec.Meta(gt=0, le=1e18)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    tp: _Count
    pp: _Count
    stage_latency_s: list[_Seconds]
    stage_weight_bytes: list[_Bytes]


class _Model(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    profile: str | None = None
    model: str | None = None
    slo_s: _Seconds | None = None
    rate_per_s: _Seconds | None = None
    cv: _Seconds | None = None


class _Search(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    policy: str = PlacementPolicy.ALPASERVE.value
    fill: str | None = None
    beam: _Count | None = None
    group_size: _Count | None = None
    max_pp: _Count | None = None
    max_tp: _Count | None = None
    bucket: bool | None = None
    rule: str | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    gpus: _Count
    memory_bytes: _Bytes | None = None
    models: Annotated[list[_Model], msgspec.Meta(min_length=1)]
    profiles: dict[str, list[_Entry]] = {}
    workload: str
    gpu: str | None = None
    prompt_tokens: _Tokens = 512
    output_tokens: _Tokens = 128
    gpus_per_node: _Count = 8
    search: _Search = msgspec.field(default_factory=_Search)
    id: str = ""
    expected: msgspec.Raw = msgspec.Raw()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemFile:
    """A problem from a file, its search settings, and the keys that have no effect."""

    problem: PlacementProblem
    settings: SearchSettings
    without_effect: tuple[str, ...]


def load_problem(path: Path, hardware: HardwareProfile | None = None) -> ProblemFile:
    """Read a placement problem.

    Args:
        path: the JSON file.
        hardware: what was measured of the GPUs, in place of the file's `gpu`; None for that.

    Raises:
        InputError: a file is missing or wrong; the message names the key or the line.
    """
    file = read_json(path, _File, what=_WHAT)
    where = f"{_WHAT} {str(path)!r}"
    names = [model.name for model in file.models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: model {name!r} stands twice; give each model a name of its own")
    profiles = {name: _profile(name, entries, where) for name, entries in file.profiles.items()}
    memory_bytes = file.memory_bytes
    if memory_bytes is None and hardware is not None:
        memory_bytes = float(hardware.capacity_bytes)
    if memory_bytes is None and file.gpu is not None:
        memory_bytes = float(load_gpu_kind(file.gpu).capacity_bytes)
    if memory_bytes is None:
        raise InputError(f"{where}: memory_bytes is missing; give it, or a kind of GPU as gpu")
    problem = PlacementProblem(
        gpus=file.gpus,
        gpus_per_node=file.gpus_per_node,
        memory_bytes=memory_bytes,
        models=tuple(
            PlacementModel(name=model.name, profile=profile, rate_per_s=model.rate_per_s)
            for model in file.models
            for profile in [_profile_of(model, profiles, file, path, hardware)]
        ),
        demand=read_demand(path.parent / file.workload, names),
    )
    try:
        settings = _settings(file.search)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return ProblemFile(problem=problem, settings=settings, without_effect=_without_effect(file.search, settings))


def _profile_of(
    model: _Model,
    profiles: Mapping[str, ModelProfile],
    file: _File,
    path: Path,
    hardware: HardwareProfile | None,
) -> ModelProfile:
    """Return the profile that a model names, else the one that is estimated on the problem's GPUs."""
    where = f"{_WHAT} {str(path)!r}: model {model.name!r}"
    if model.profile is not None:
        if model.profile not in profiles:
            raise InputError(
                f"{where} has profile {model.profile!r}, which is missing from profiles "
                f"(there are {', '.join(sorted(profiles)) or 'none'})"
            )
        return profiles[model.profile]
    if hardware is None and file.gpu is None:
        raise InputError(f"{where} has no profile; give one, or a kind of GPU as gpu, to estimate it")
    name = model.model or model.name
    in_file = "/" in name or name.endswith(".json")
    spec = load_model(str(path.parent / name) if in_file else name)
    if hardware is None:
        hardware = sheet_profile(gpu_sheet(file.gpu or ""))
    estimator = make_estimator(default_estimator(hardware, [spec]), hardware, node_gpus=file.gpus_per_node)
    lengths = {"prompt_tokens": file.prompt_tokens, "output_tokens": file.output_tokens}
    (found,) = profiles_from_estimator([spec], estimator, gpus=file.gpus, **lengths)
    if not found.shapes:
        reason = estimator.why_not(spec, ParallelConfig(tp=1, pp=1, weights=spec.unconverted))
        raise InputError(f"{where} cannot run on {hardware.gpu_kind}: {reason or 'no shape is estimated'}")
    return found


def _profile(name: str, entries: Sequence[_Entry], where: str) -> ModelProfile:
    shapes: dict[GroupShape, StageProfile] = {}
    for entry in entries:
        for key in ("stage_latency_s", "stage_weight_bytes"):
            if len(getattr(entry, key)) != entry.pp:
                raise InputError(
                    f"{where}: profile {name!r}, tp {entry.tp}, pp {entry.pp}: {key} has {len(getattr(entry, key))} "
                    f"stages; give one number for each of the {entry.pp} stages"
                )
        shape = GroupShape(entry.tp, entry.pp)
        profile = StageProfile(
            stage_latency_s=tuple(entry.stage_latency_s), stage_weight_bytes=tuple(entry.stage_weight_bytes)
        )
        # Of two measurements of one shape the one with the faster slowest stage counts.
        if shape not in shapes or profile.slowest_stage_s < shapes[shape].slowest_stage_s:
            shapes[shape] = profile
    return ModelProfile(shapes=shapes)


def _settings(search: _Search) -> SearchSettings:
    keys = msgspec.structs.asdict(search)
    for key, kind in (("policy", PlacementPolicy), ("fill", Fill), ("rule", StarRule)):
        if keys[key] is not None:
            keys[key] = _choice(key, keys[key], kind)
    keys["star_rule"] = keys.pop("rule")
    return SearchSettings(**{key: value for key, value in keys.items() if value is not None})


def _choice(key: str, text: str, kind: type[Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UnknownNameError(f"search.{key}", text, [choice.value for choice in kind]) from None


_USED_BY: Mapping[str, tuple[PlacementPolicy, ...]] = {
    "fill": tuple(policy for policy in PlacementPolicy if policy is not PlacementPolicy.ROUND_ROBIN),
    "group_size": (PlacementPolicy.MODEL_PARALLELISM,),
    "max_pp": (PlacementPolicy.ALPASERVE, PlacementPolicy.ALPASERVE_STAR),
    "max_tp": (PlacementPolicy.ALPASERVE, PlacementPolicy.ALPASERVE_STAR),
    "rule": (PlacementPolicy.ALPASERVE_STAR,),
}


def _without_effect(search: _Search, settings: SearchSettings) -> tuple[str, ...]:
    """Return the given keys that the policy ignores."""
    idle = [key for key, users in _USED_BY.items() if getattr(search, key) is not None and settings.policy not in users]
    if search.beam is not None and settings.fill is not Fill.BEAM:
        idle.append("beam")
    return tuple(idle)


def read_demand(path: Path, models: Sequence[str]) -> DemandForecast:
    """Read requests from a CSV file with the columns arrival_s, model, slo_s, in order of time.

    An empty slo_s is no SLO: such a request is served wherever its model is placed. A model that
    is not among `models` makes a request that fails.

    Raises:
        InputError: the file or a row is wrong; the message names the line.
    """
    position = {name: index for index, name in enumerate(models)}
    parts: list[tuple[np.ndarray[Any, Any], ...]] = []
    requests, last_s = 0, 0.0

    def choose(header: list[str]) -> Sequence[str]:
        check_header(header, _COLUMNS, (), f"{_REQUESTS} {str(path)!r}")
        return _COLUMNS

    for batch in csv_batches(path, choose, what=_REQUESTS):
        parts.append(batch.converted(partial(_converted, position=position, last_s=last_s), _RowCheck(last_s)))
        last_s = float(parts[-1][0][-1])
        requests += len(batch.lines)
        if requests > _MAX_REQUESTS:
            raise InputError(f"{batch.where} has more than {_MAX_REQUESTS:,} requests; give a part of it")
    arrival_s, model_index, slo_s = (np.concatenate(column) for column in zip(*parts, strict=True))
    return DemandForecast(models=tuple(models), arrival_s=arrival_s, model_index=model_index, slo_s=slo_s)


def _converted(batch: Batch, *, position: Mapping[str, int], last_s: float) -> tuple[np.ndarray[Any, Any], ...]:
    """Return arrivals, positions of models (-1 for an unknown one) and SLOs of a batch.

    Raises:
        ValueError: something is wrong with one of them.
    """
    arrival_s = floats(batch.columns["arrival_s"])
    slo_s = floats(cell or "inf" for cell in batch.columns["slo_s"])
    names = batch.columns["model"]
    if not (np.isfinite(arrival_s).all() and (slo_s > 0).all() and "inf" not in batch.columns["slo_s"] and all(names)):
        raise ValueError("a value is out of range")
    if arrival_s[0] < last_s or (arrival_s[1:] < arrival_s[:-1]).any():
        raise ValueError("arrival_s goes back")
    return arrival_s, np.array([position.get(name, -1) for name in names], np.int64), slo_s


class _RowCheck:
    """Checks rows one by one, in their order, from a last arrival on."""

    def __init__(self, last_s: float) -> None:
        self._last_s = last_s

    def __call__(self, row: Row) -> None:
        arrival_s = row.number("arrival_s", minimum=0)
        row.text("model")
        if row.cells["slo_s"] and row.number("slo_s") <= 0:
            raise InputError(f"{row.where}: slo_s must be positive, not {row.cells['slo_s']!r}")
        if arrival_s < self._last_s:
            raise InputError(
                f"{row.where}: arrival_s {arrival_s!r} is before {self._last_s!r} of the row above; sort by time"
            )
        self._last_s = arrival_s
