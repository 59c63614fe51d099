"""Placement problems for tests: small ones by hand, random ones, and all placements of tiny ones."""

import itertools
import math
from collections.abc import Iterator, Sequence

import hypothesis.strategies as st
import numpy as np

from maveriq.domain.requests import DemandForecast
from maveriq.policy.alpaserve.problem import (
    Group,
    GroupShape,
    ModelProfile,
    Placement,
    PlacementModel,
    PlacementProblem,
    StageProfile,
    candidate_shapes,
    gpu_bytes,
    normal_form,
)
from maveriq.units import BYTES_PER_GIB

SHAPES = tuple(GroupShape(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4))


def profile(latency_s: float = 0.1, size_gib: float = 2.0, shapes: Sequence[GroupShape] = SHAPES) -> ModelProfile:
    """Return a model without communication cost, which splits evenly."""
    return ModelProfile(
        shapes={
            shape: StageProfile(
                stage_latency_s=(latency_s / shape.gpus,) * shape.pp,
                stage_weight_bytes=(size_gib * BYTES_PER_GIB / shape.gpus,) * shape.pp,
            )
            for shape in shapes
        }
    )


def demand(requests: Sequence[tuple[float, int, float]], models: int) -> DemandForecast:
    """Return a forecast of requests given as (arrival, model, SLO)."""
    arrival_s, model_index, slo_s = zip(*requests, strict=True)
    return DemandForecast(
        models=tuple(f"m{model}" for model in range(models)),
        arrival_s=np.array(arrival_s, np.float64),
        model_index=np.array(model_index, np.int64),
        slo_s=np.array(slo_s, np.float64),
    )


def problem(
    profiles: Sequence[ModelProfile],
    requests: Sequence[tuple[float, int, float]],
    *,
    gpus: int = 1,
    memory_gib: float = 4.0,
    rates: Sequence[float] | None = None,
) -> PlacementProblem:
    return PlacementProblem(
        gpus=gpus,
        gpus_per_node=8,
        memory_bytes=memory_gib * BYTES_PER_GIB,
        models=tuple(
            PlacementModel(name=f"m{model}", profile=model_profile, rate_per_s=rates[model] if rates else None)
            for model, model_profile in enumerate(profiles)
        ),
        demand=demand(requests, len(profiles)),
    )


@st.composite
def problems(draw, max_gpus: int = 6, max_models: int = 5, max_requests: int = 40) -> PlacementProblem:
    """Draw problems with models that do not run in all shapes, and requests without a model."""
    models = draw(st.integers(1, max_models))
    profiles = [
        profile(
            draw(st.sampled_from([0.05, 0.1, 0.25, 1.0])),
            draw(st.sampled_from([0.5, 1.0, 1.7, 3.0])),
            draw(st.sampled_from([SHAPES, SHAPES[1:], SHAPES[::2]])),
        )
        for _ in range(models)
    ]
    requests = draw(
        st.lists(
            st.tuples(
                st.floats(0, 3, width=32), st.integers(-1, models - 1), st.sampled_from([0.05, 0.2, 0.6, math.inf])
            ),
            min_size=1,
            max_size=max_requests,
        )
    )
    return problem(
        profiles,
        sorted(requests),
        gpus=draw(st.integers(1, max_gpus)),
        memory_gib=draw(st.sampled_from([0.4, 2.0, 3.0, 5.0])),
    )


@st.composite
def placements(draw, of: PlacementProblem) -> Placement:
    """Draw placements, which may not fit."""
    groups = draw(
        st.lists(
            st.tuples(st.sampled_from(SHAPES), st.sets(st.integers(0, len(of.models) - 1))), min_size=1, max_size=6
        )
    )
    return tuple(Group(shape, tuple(sorted(hosted))) for shape, hosted in groups)


def all_placements(of: PlacementProblem) -> Iterator[Placement]:
    """Yield every placement of the group shapes that the search tries, in normal form (for tiny problems)."""
    everything = range(len(of.models))
    subsets = [hosted for size in range(len(everything) + 1) for hosted in itertools.combinations(everything, size)]
    for shapes in candidate_shapes(of.gpus, of.gpus_per_node, max_pp=8, max_tp=8):
        options = [
            [group for hosted in subsets if gpu_bytes(group := Group(shape, hosted), of) <= of.memory_bytes]
            for shape in shapes
        ]
        yield from {normal_form(groups) for groups in itertools.product(*options)}
