"""The runs to compare, read from a TOML file: model set, trace, rate scale, SLO scale and policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.scenario.options import Options
from maveriq.tables import read_toml

_Names = Annotated[list[str], msgspec.Meta(min_length=1)]
_Scales = Annotated[list[Annotated[float, msgspec.Meta(gt=0)]], msgspec.Meta(min_length=1)]


class Variant(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A policy with options of `maveriq sim`, under the name that tables show."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    policy: str = "hybrid"
    intent: str = "min-cost"
    float16_only: bool = False
    alpaserve_profile: str = "maveriq"
    alpaserve_as_published: bool = False
    alpaserve_star_rule: str = "F"
    router: str = "random"

    def options(self) -> dict[str, str | bool]:
        """Return the options by name."""
        options: dict[str, str | bool] = msgspec.structs.asdict(self)
        del options["name"]
        return options


class Comparison(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The values to combine: every combination is one run."""

    model_sets: _Names
    traces: _Names
    scales: _Scales
    slo_scales: _Scales
    policies: Annotated[list[Variant], msgspec.Meta(min_length=1)]
    estimator: str
    service_times: str

    def cases(self) -> Iterator[Case]:
        """Yield every case; the policies of one workload follow each other."""
        grid = product(self.model_sets, self.traces, self.scales, self.slo_scales, self.policies)
        for model_set, trace, scale, slo_scale, variant in grid:
            yield Case(
                model_set=model_set,
                trace=trace,
                scale=scale,
                slo_scale=slo_scale,
                variant=variant,
                estimator=self.estimator,
                service_times=self.service_times,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run to simulate. An SLO scale of 0 means no SLO."""

    model_set: str
    trace: str
    scale: float
    slo_scale: float
    variant: Variant
    estimator: str
    service_times: str

    def options(self) -> Options:
        """Return the options of the run.

        Raises:
            InputError: a number outside its range.
        """
        return Options(
            models=self.model_set,
            trace=self.trace,
            scale=self.scale,
            slo_scale=self.slo_scale,
            estimator=self.estimator,
            service_times=self.service_times,
            **self.variant.options(),  # type: ignore[arg-type]  # they have the fields of Options
        )


def load_comparison(path: Path) -> Comparison:
    """Read a comparison from a TOML file.

    Raises:
        InputError: the file is invalid; the message says where.
    """
    return read_toml(path, Comparison, what="comparison")
