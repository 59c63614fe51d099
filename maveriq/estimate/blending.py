"""Corrects a computed time or memory by measurements: what was measured wins, the rest is sharpened by it.

What is computed is a sum of parts, such as layers and output matrix. Each part is multiplied by exp(g), where g is a
Gaussian process over the features of a configuration (`Features`) whose mean is zero: without measurements, g is zero
and the computed value stands. A measurement is the sum of its corrected parts, with noise. Its logarithm is linearised
in g at the most likely corrections (Gauss-Newton), so that measurements of one and of two layers tell the time of a
layer apart from the rest, and a whole model follows with an error (docs/decisions/0021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from maveriq.estimate.intervals import Interval
from maveriq.estimate.log_grid import Array

Numbers: TypeAlias = NDArray[np.int64]
"""Names as numbers."""

_ITERATIONS = 12
_LARGEST_STEP = 1.0  # of a correction in one iteration: a factor of e
_SETTLED = 1e-6
_DEVIATIONS_OF_90_PERCENT = 1.645


class Features(NamedTuple):
    """What makes corrections of two values alike.

    Args:
        phase: what is computed, such as the first token or a further one.
        model: the model's name.
        kind: the kind of layer that a part belongs to; "" where it belongs to none.
        stored_as: the format that the part depends on, of weights or of KV cache; "" where it depends on none.
        doublings: of the GPUs that share a layer: log2 of TP.
        log_rows: log of the tokens that a step computes.
        log_tokens: log of the tokens of a sequence.
    """

    phase: str
    model: str
    kind: str
    stored_as: str
    doublings: float
    log_rows: float
    log_tokens: float


class Term(NamedTuple):
    """A part of a computed value: its name, the value, and the features of its correction."""

    part: str
    value: float
    features: Features


class Computed(NamedTuple):
    """A computed value: the terms that add up to it, and what it is the value of, equal for equal questions alone."""

    terms: tuple[Term, ...]
    identity: str

    @property
    def total(self) -> float:
        """The computed value."""
        return sum(term.value for term in self.terms)


class Measured(NamedTuple):
    """What was measured in place of a computed value, and the standard deviation of its logarithm."""

    computed: Computed
    value: float
    noise: float


class Corrected(NamedTuple):
    """A corrected value, and the standard deviation of its logarithm."""

    value: float
    deviation: float

    @property
    def interval(self) -> Interval:
        """The factors between which the value lies in 90 of 100 cases."""
        margin = float(np.exp(_DEVIATIONS_OF_90_PERCENT * self.deviation))
        return Interval(1 / margin, margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Standard deviations of the corrections of one part, as logarithms, by what they have in common.

    Args:
        common: in all configurations.
        phase: of one phase against the others.
        size: over rows and tokens, smoothly.
        stored_as: of one pair of formats.
        stored_size: of one pair of formats, over rows and tokens.
        doubling: for each doubling of TP.
        model: of one model.
        kind: of one kind of layers of a model.
        local: of one configuration alone.
    """

    common: float = 0.6
    phase: float = 0.4
    size: float = 0.4
    stored_as: float = 0.3
    stored_size: float = 0.4
    doubling: float = 0.2
    model: float = 0.15
    kind: float = 0.1
    local: float = 0.02


DEVIATION = 0.03
"""Standard deviation of the logarithm of a whole value from the sum of its parts: caches, clocks, allocation."""

_ROWS_SCALE, _TOKENS_SCALE = 2.0, 3.0
"""Log sizes over which corrections stay alike: factors of 7 in rows and 20 in tokens."""


class _Columns(NamedTuple):
    """Features of many terms as columns; names as numbers, equal for equal names."""

    phase: Numbers
    model: Numbers
    kind: Numbers
    stored_as: Numbers
    doublings: Array
    log_rows: Array
    log_tokens: Array


class _Slot(NamedTuple):
    """The n-th term of every value: shares of the total, 0 where a value has fewer; the part and its features."""

    values: Array
    part: Numbers
    columns: _Columns


class Names:
    """Numbers for names (mutable): equal names have equal numbers, whatever asked first."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """Return the number of a name."""
        return self._numbers.setdefault(name, len(self._numbers))


class Design:
    """The features of many computed values, as arrays: what covariances are computed from.

    Args:
        values: the computed values.
        names: numbers of names; two designs are compared by the same.
    """

    def __init__(self, values: Sequence[Computed], names: Names) -> None:
        self.totals = np.array([value.total for value in values])
        self.slots = [
            _slot([value.terms[number] if number < len(value.terms) else None for value in values], names)
            for number in range(max((len(value.terms) for value in values), default=0))
        ]
        self.keys = np.array([names.number(f"value {value.identity}") for value in values], dtype=np.int64)

    def shares(self, corrections: Sequence[Array] | None = None) -> list[Array]:
        """Return the share of each slot in the values, whose parts have these corrections; None for none."""
        parts = [slot.values for slot in self.slots]
        if corrections is not None:
            parts = [part * np.exp(correction) for part, correction in zip(parts, corrections, strict=True)]
        total = sum(parts)
        return [part / total for part in parts]


def _slot(terms: Sequence[Term | None], names: Names) -> _Slot:
    empty = Features("", "", "", "", 0.0, 0.0, 0.0)
    features = [term.features if term else empty for term in terms]

    def named(column: str) -> Numbers:
        return np.array([names.number(f"{column} {getattr(each, column)}") for each in features], dtype=np.int64)

    def numbers(column: str) -> Array:
        return np.array([getattr(each, column) for each in features], dtype=np.float64)

    return _Slot(
        values=np.array([term.value if term else 0.0 for term in terms]),
        part=np.array([names.number(f"part {term.part if term else ''}") for term in terms], dtype=np.int64),
        columns=_Columns(
            phase=named("phase"),
            model=named("model"),
            kind=named("kind"),
            stored_as=named("stored_as"),
            doublings=numbers("doublings"),
            log_rows=numbers("log_rows"),
            log_tokens=numbers("log_tokens"),
        ),
    )


class Kernel:
    """How corrections vary together.

    Args:
        names: numbers of names.
        by_part: the scales of parts that have others than the usual ones.
        deviation: of a whole value from the sum of its parts.
    """

    def __init__(self, names: Names, by_part: Mapping[str, Scales], deviation: float = DEVIATION) -> None:
        self.deviation = deviation
        known = {names.number(f"part {part}"): scales for part, scales in by_part.items()}
        self._known, self._usual = known, Scales()

    def between(self, left: _Slot, right: _Slot) -> Array:
        """Return the covariance of the corrections of two slots; 0 between different parts."""
        if not np.intersect1d(left.part, right.part).size:
            return np.zeros((len(left.part), len(right.part)))
        same_part = left.part[:, None] == right.part[None, :]
        variances = {
            field.name: np.array(
                [getattr(self._known.get(int(part), self._usual), field.name) ** 2 for part in left.part]
            )[:, None]
            for field in fields(Scales)
        }
        mine, others = left.columns, right.columns

        def same(column: str) -> NDArray[np.bool_]:
            return np.asarray(getattr(mine, column)[:, None] == getattr(others, column)[None, :])

        alike = _matern(mine.log_rows, others.log_rows, _ROWS_SCALE) * _matern(
            mine.log_tokens, others.log_tokens, _TOKENS_SCALE
        )
        phase, model, stored = same("phase"), same("model"), same("stored_as")
        kind = model & same("kind")
        doublings = np.minimum(mine.doublings[:, None], others.doublings[None, :])
        of_phase = (
            variances["phase"]
            + variances["size"] * alike
            + stored * (variances["stored_as"] + variances["stored_size"] * alike)
            + variances["doubling"] * doublings
            + model * variances["model"] * (0.5 + 0.5 * alike)
            + kind * variances["kind"] * (0.5 + 0.5 * alike)
            + kind
            * stored
            * (mine.doublings[:, None] == others.doublings[None, :])
            * variances["local"]
            * (alike > _SAME)
        )
        return np.asarray(same_part * (variances["common"] + phase * of_phase))

    def covariance(
        self, left: Design, right: Design, left_shares: Sequence[Array], right_shares: Sequence[Array]
    ) -> Array:
        """Return the covariance of the logarithms of values, linearised at these shares."""
        total = self.deviation**2 * (left.keys[:, None] == right.keys[None, :])
        for mine, mine_share in zip(left.slots, left_shares, strict=True):
            for other, other_share in zip(right.slots, right_shares, strict=True):
                total = total + mine_share[:, None] * other_share[None, :] * self.between(mine, other)
        return np.asarray(total)


_SAME = 1 - 1e-9


def _matern(left: Array, right: Array, scale: float) -> Array:
    """Return the Matérn correlation of order 3/2: continuous, and once differentiable."""
    distance = np.sqrt(3.0) * np.abs(left[:, None] - right[None, :]) / scale
    return np.asarray((1 + distance) * np.exp(-distance))


class Blend:
    """Corrects computed values by measurements of the same quantity.

    Args:
        measured: the measurements.
        by_part: the scales of parts that have others than the usual ones.
        deviation: of a whole value from the sum of its parts.
    """

    def __init__(
        self, measured: Sequence[Measured], by_part: Mapping[str, Scales], deviation: float = DEVIATION
    ) -> None:
        self._names = Names()
        self._kernel = Kernel(self._names, by_part, deviation)
        self._design = Design([each.computed for each in measured], self._names)
        if not measured:
            return
        logs = np.log([each.value for each in measured])
        noise = np.array([each.noise for each in measured]) ** 2
        corrections = [np.zeros(len(measured)) for _ in self._design.slots]
        blocks = [[self._kernel.between(mine, other) for other in self._design.slots] for mine in self._design.slots]
        same_value = deviation**2 * (self._design.keys[:, None] == self._design.keys[None, :])
        for _ in range(_ITERATIONS):
            shares = self._design.shares(corrections)
            values = sum(slot.values * np.exp(g) for slot, g in zip(self._design.slots, corrections, strict=True))
            known = same_value + np.diag(noise)
            for number, row in enumerate(blocks):
                for other, block in enumerate(row):
                    known = known + shares[number][:, None] * shares[other][None, :] * block
            residual = logs - np.log(values) + sum(s * g for s, g in zip(shares, corrections, strict=True))
            weights = np.linalg.solve(known, residual)
            updated = [sum(block @ (shares[other] * weights) for other, block in enumerate(row)) for row in blocks]
            steps = [
                np.clip(new - old, -_LARGEST_STEP, _LARGEST_STEP) for new, old in zip(updated, corrections, strict=True)
            ]
            corrections = [old + step for old, step in zip(corrections, steps, strict=True)]
            if max(float(np.abs(step).max()) for step in steps) < _SETTLED:
                break
        self._shares, self._weights = shares, weights
        self._inverse = np.linalg.inv(known)

    def corrected(self, computed: Computed) -> Corrected:
        """Return a value corrected by the measurements."""
        design = Design([computed], self._names)
        if not len(self._design.totals):
            own = self._kernel.covariance(design, design, design.shares(), design.shares())
            return Corrected(computed.total, float(np.sqrt(own[0, 0])))
        corrections = self._corrections(design)
        parts = [slot.values * np.exp(g) for slot, g in zip(design.slots, corrections, strict=True)]
        shares = design.shares(corrections)
        cross = self._kernel.covariance(design, self._design, shares, self._shares)[0]
        own = self._kernel.covariance(design, design, shares, shares)[0, 0]
        # A deviation of exactly this value from its parts was measured with it.
        deviation = float(self._kernel.deviation**2 * (design.keys[0] == self._design.keys) @ self._weights)
        variance = max(0.0, float(own - cross @ self._inverse @ cross))
        value = sum(float(part[0]) for part in parts) * math.exp(deviation)
        return Corrected(value, float(np.sqrt(variance)))

    def corrected_terms(self, computed: Computed) -> tuple[float, ...]:
        """Return the terms of a value as the measurements correct them; what a whole has beyond its parts is left out.

        The terms may be a choice of parts that were measured in different values.
        """
        if not len(self._design.totals):
            return tuple(term.value for term in computed.terms)
        corrections = self._corrections(Design([computed], self._names))
        return tuple(
            term.value * float(np.exp(correction[0]))
            for term, correction in zip(computed.terms, corrections, strict=True)
        )

    def _corrections(self, design: Design) -> list[Array]:
        """Return the most likely correction of each part, as a logarithm."""
        return [
            np.asarray(
                sum(
                    self._kernel.between(slot, other) @ (share * self._weights)
                    for other, share in zip(self._design.slots, self._shares, strict=True)
                )
            )
            for slot in design.slots
        ]
