"""Distributions that options name: `512`, `uniform:512-1536`, `lognormal:200,0.5`, `exponential:5`, `gamma:5,2`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from maveriq.errors import InputError, did_you_mean
from maveriq.streams import generator

FORMS = "uniform:LOW-HIGH, lognormal:MEDIAN,SIGMA, exponential:MEAN, gamma:MEAN,CV"
"""How distributions are written, for messages and helps."""

_NUMBER = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_PAIR = re.compile(rf"({_NUMBER})[,-]({_NUMBER})")
_DRAWS_FOR_MEDIAN = 100_001
_MAX_SPREAD = 10.0  # of a logarithm, or as a multiple of the mean; beyond, nearly all draws are 0


class Distribution(Protocol):
    """A distribution of numbers that are not negative."""

    @property
    def median(self) -> float:
        """What half of the draws exceed."""

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        """Return so many draws (float64)."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same number."""

    value: float

    @property
    def median(self) -> float:
        """The number."""
        return self.value

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray[Any, Any]:  # noqa: ARG002
        """Return the number so many times."""
        return np.full(count, self.value)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Equally likely between two ends; where `whole`, only whole numbers, both ends among them."""

    low: float
    high: float
    whole: bool

    @property
    def median(self) -> float:
        """The middle."""
        return (self.low + self.high) / 2

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        """Return so many draws."""
        if self.whole:
            return stream.integers(int(self.low), int(self.high), count, endpoint=True).astype(np.float64)
        return stream.uniform(self.low, self.high, count)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """The logarithm is normal, with the standard deviation `sigma`."""

    median: float
    sigma: float

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        """Return so many draws."""
        drawn: np.ndarray[Any, Any] = self.median * np.exp(self.sigma * stream.standard_normal(count))
        return drawn


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma of a mean and a coefficient of variation (standard deviation by mean); 1 is exponential."""

    mean: float
    cv: float

    @property
    def median(self) -> float:
        """The median of many draws, since it has no closed form; always the same."""
        return float(np.median(self.draw(generator(0, "median of gamma"), _DRAWS_FOR_MEDIAN)))

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        """Return so many draws."""
        shape = self.cv**-2
        return stream.gamma(shape, self.mean / shape, count)


def parse_distribution(text: str, option: str, *, whole: bool, minimum: float, maximum: float) -> Distribution:
    """Return the distribution that a text describes.

    Args:
        text: a number, or one of `FORMS`. SIGMA is the standard deviation of the logarithm, CV the standard deviation
            as a multiple of the mean.
        option: what it is for, for messages.
        whole: only whole numbers are meant; others are rounded where they are used.
        minimum: the least that a fixed number, an end, a median or a mean may be.
        maximum: the most.

    Raises:
        InputError: the text describes none, or a number is out of range.
    """
    name, colon, rest = text.strip().partition(":")
    kind = name.strip().lower() if colon else "fixed"
    numbers = _numbers(rest if colon else name)
    if len(numbers) != _NUMBERS.get(kind):
        near = did_you_mean(kind, _NUMBERS) if colon else ""
        article = "a whole number" if whole else "a number"
        raise InputError(f"{option} must be {article} or {FORMS}, not {text[:80]!r}{near}")
    spread = numbers.pop() if kind in _WITH_SPREAD else 0.0
    if not all(minimum <= number <= maximum for number in numbers):
        raise InputError(f"{option}: the numbers of {text[:80]!r} must lie from {minimum:g} to {maximum:,.0f}")
    if whole and kind in ("fixed", "uniform") and not all(number.is_integer() for number in numbers):
        raise InputError(f"{option}: {text[:80]!r} must have whole numbers")
    if kind in _WITH_SPREAD and not 0 < spread <= _MAX_SPREAD:
        raise InputError(f"{option}: the second number of {text[:80]!r} must be above 0 and at most {_MAX_SPREAD:g}")
    if kind == "uniform" and numbers[1] < numbers[0]:
        raise InputError(f"{option}: {text[:80]!r} ends before it starts; write uniform:LOW-HIGH")
    return _made(kind, numbers, spread, whole=whole)


_NUMBERS = {"fixed": 1, "uniform": 2, "lognormal": 2, "exponential": 1, "gamma": 2}
_WITH_SPREAD = ("lognormal", "gamma")


def _made(kind: str, numbers: list[float], spread: float, *, whole: bool) -> Distribution:
    if kind == "uniform":
        return Uniform(numbers[0], numbers[1], whole)
    if kind == "lognormal":
        return Lognormal(numbers[0], spread)
    if kind == "gamma":
        return Gamma(numbers[0], spread)
    return Gamma(numbers[0], 1.0) if kind == "exponential" else Fixed(numbers[0])


def _numbers(text: str) -> list[float]:
    """Return the numbers of a text such as 5, 1-3 or 200,0.5; none if it is no such text."""
    plain = re.sub(r"\s", "", text)
    if re.fullmatch(_NUMBER, plain):
        return [float(plain)]
    pair = _PAIR.fullmatch(plain)
    return [float(pair[1]), float(pair[2])] if pair else []
