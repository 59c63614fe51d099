"""What an experiment is: systems under loads, which of them are compared, and why figures may differ.

Each experiment is a TOML file in the package's `data/experiments`. `systems.toml` beside them has what they share: the
options of every run, and the systems by name. A point is a system under a load: one simulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import msgspec

from maveriq.errors import InputError, UnknownNameError
from maveriq.files import data_path
from maveriq.sweeps.spec import Value
from maveriq.tables import read_toml

_WHAT = "definition of an experiment"
_SYSTEMS_FILE = "systems.toml"
_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], msgspec.Meta(min_length=1)]
_Scales = Annotated[tuple[float, ...], msgspec.Meta(min_length=1)]
_Shared = Mapping[str, Value]
Key: TypeAlias = tuple[str, str, str, str, float, float]
"""What identifies a recorded run: policy, intent, model set, trace, rate scale and SLO scale."""


class System(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A system that serves: options of `maveriq sim`, and what the recordings call it.

    Args:
        options: what differs from other systems.
        slo_scale: for which it plans where the load names none; 0 is none.
        recorded: its policy in recorded runs, "" where it has none.
        recorded_intent: likewise its intent.
        note: what a reader must know of it.
    """

    options: _Shared = {}
    slo_scale: float = 0.0
    recorded: str = ""
    recorded_intent: str = ""
    note: str = ""


class Systems(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The shared file: `options` of every run, and the systems by name."""

    options: _Shared
    systems: Mapping[str, System]


class Loads(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Loads: each rate scale, with each SLO scale where any is given; `systems` serve them, () for all."""

    models: _Text
    trace: _Text
    scales: _Scales
    slo_scales: tuple[float, ...] = ()
    systems: tuple[_Text, ...] = ()


class Compare(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Each system of `ours` is compared with each one of `against` by the figures `by`, under equal loads."""

    ours: _Texts
    against: _Texts
    by: _Texts


class Reason(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Why figures of a system differ from the published ones. Empty `systems` and `figures` stand for all."""

    why: _Text
    systems: tuple[_Text, ...] = ()
    figures: tuple[_Text, ...] = ()


class Definition(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One experiment.

    Args:
        title: of its tables and plots.
        question: what it answers, in a sentence.
        source: where the published figures are from.
        study: name of the study on published measurements that it is; then it has no loads.
        systems: their names.
        loads: what they serve.
        figures: shown of each run, see `maveriq.experiment.measures`.
        compare: what is compared.
        drawn: figures that have a panel in the plot; () for all that are shown.
        parity: the plot shows them simulated over recorded.
        reasons: why figures differ from published ones.
        notes: what a reader must know, a sentence each.
    """

    title: _Text
    question: _Text
    source: _Text
    study: str = ""
    systems: tuple[_Text, ...] = ()
    loads: tuple[Loads, ...] = ()
    figures: tuple[_Text, ...] = ()
    compare: tuple[Compare, ...] = ()
    drawn: tuple[_Text, ...] = ()
    parity: bool = False
    reasons: tuple[Reason, ...] = ()
    notes: tuple[_Text, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """What is served: a model set, a trace at a rate scale, and SLOs at a scale, which is 0 where systems choose."""

    models: str
    trace: str
    scale: float
    slo_scale: float = 0.0

    def __str__(self) -> str:
        slo = f", SLO {self.slo_scale:g}" if self.slo_scale else ""
        return f"{self.models} {self.trace} {self.scale:g}{slo}"


@dataclass(frozen=True, slots=True)
class Point:
    """A system under a load."""

    system: str
    load: Load

    def __str__(self) -> str:
        return f"{self.system}, {self.load}"


class Catalog:
    """The experiments that come with maveriq, with the systems that they share."""

    def __init__(self) -> None:
        folder = data_path("experiments")
        self.shared = read_toml(folder / _SYSTEMS_FILE, Systems, what=_WHAT)
        self._paths = {path.stem: path for path in sorted(folder.glob("*.toml")) if path.name != _SYSTEMS_FILE}

    @property
    def names(self) -> Sequence[str]:
        """The names of the experiments, sorted."""
        return tuple(self._paths)

    def read(self, name: str) -> Definition:
        """Return an experiment.

        Raises:
            UnknownNameError: there is none of this name, or it names an unknown system.
        """
        if name not in self._paths:
            raise UnknownNameError("experiment", name, self.names, hint="or all, or list")
        definition = read_toml(self._paths[name], Definition, what=_WHAT)
        self._check(name, definition)
        return definition

    def _check(self, name: str, definition: Definition) -> None:
        named = [
            *definition.systems,
            *(system for loads in definition.loads for system in loads.systems),
            *(system for compare in definition.compare for system in (*compare.ours, *compare.against)),
            *(system for reason in definition.reasons for system in reason.systems),
        ]
        for system in named:
            if system not in self.shared.systems:
                raise UnknownNameError(f"system of experiment {name}", system, self.shared.systems)
        if bool(definition.study) == bool(definition.loads):
            raise InputError(f"experiment {name}: give either a study or loads")

    def options(self, point: Point) -> dict[str, Value]:
        """Return the options of `maveriq sim` that differ from those that all runs share."""
        system, load = self.shared.systems[point.system], point.load
        return {
            **system.options,
            "models": load.models,
            "trace": load.trace,
            "scale": load.scale,
            "slo_scale": load.slo_scale or system.slo_scale,
        }

    def key(self, point: Point) -> Key | None:
        """Return what a recorded run of the point is known by, None where its system was not recorded."""
        system, load = self.shared.systems[point.system], point.load
        if not system.recorded:
            return None
        slo_scale = load.slo_scale or system.slo_scale
        return system.recorded, system.recorded_intent, load.models, load.trace, load.scale, slo_scale


def points_of(definition: Definition) -> Iterator[Point]:
    """Yield the points of an experiment, each once: load by load, in the order of the systems."""
    seen: dict[Point, None] = {}
    for loads in definition.loads:
        for scale in loads.scales:
            for slo_scale in loads.slo_scales or (0.0,):
                load = Load(loads.models, loads.trace, scale, slo_scale)
                seen.update(dict.fromkeys(Point(system, load) for system in loads.systems or definition.systems))
    yield from seen
