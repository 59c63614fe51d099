"""The paper's formulas (SPEC 3) solved for a few measured configurations of a whole model, without a fingerprint.

Latency is linear in L(1,1) and in what TP 2 takes beyond half of it; memory is linear in M(1,1) and in what TP 2 and
PP 2 add. A few measured configurations, also of a model that does not fit one GPU, determine these by least squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import nnls

from maveriq.estimate.fingerprints import Exponents, Line, ParallelLatency, parallel_memory_gib

Degrees: TypeAlias = tuple[int, int]
"""TP and PP."""

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FewConfigurations:
    """Latency and memory at any (TP, PP), from a few."""

    exponents: Exponents
    latency: Array
    memory: Array

    def latency_s(self, degrees: Degrees) -> float:
        """Return the latency in seconds."""
        return float(_latency_terms(degrees, self.exponents) @ self.latency)

    def memory_gib(self, degrees: Degrees) -> float:
        """Return the memory over all GPUs in GiB."""
        return float(_memory_terms(degrees) @ self.memory)


def solve(
    latency_s: Mapping[Degrees, float], memory_gib: Mapping[Degrees, float], exponents: Exponents
) -> FewConfigurations:
    """Solve the formulas for measured configurations, by nonnegative least squares of relative errors."""
    return FewConfigurations(
        exponents=exponents,
        latency=_solved([_latency_terms(at, exponents) for at in latency_s], list(latency_s.values())),
        memory=_solved([_memory_terms(at) for at in memory_gib], list(memory_gib.values())),
    )


def _solved(terms: list[Array], values: list[float]) -> Array:
    relative = np.array([term / value for term, value in zip(terms, values, strict=True)])
    solution, _ = nnls(relative, np.ones(len(values)))
    return np.asarray(solution)


def _latency_terms(degrees: Degrees, exponents: Exponents) -> Array:
    tp, pp = degrees
    one_second = Line(ttft_s=1.0, tpot_s=0.0)
    scaled = ParallelLatency.scaled(one_second, None, exponents, tp=tp, pp=pp)
    return np.array([scaled.at(1), scaled.tp_factor])


def _memory_terms(degrees: Degrees) -> Array:
    tp, pp = degrees
    return np.array(
        [
            1.0,
            parallel_memory_gib(0.0, 1.0, None, tp=tp, pp=pp),
            parallel_memory_gib(0.0, None, 1.0, tp=tp, pp=pp),
        ]
    )
