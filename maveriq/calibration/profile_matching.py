"""Which profile a table of measurements is compared with: the one taken with prompts like the table's.

Fingerprints are taken with prompts of one length, and a table rarely says the length of its own. Where
it does, or the user does, the profile with the nearest prompts is taken; else the table's latencies tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from maveriq.calibration.evaluation import Answer, EvaluatedEstimator, Measurement, answered
from maveriq.errors import InputError
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile, known_profiles, load_profile

DEFAULT_PROFILE = "a6000-short"
"""The profile where nothing speaks for another; a table is compared with those of its kind of GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileInput:
    """A profile, the estimator it feeds, and the prompts that one is asked about."""

    profile: HardwareProfile
    subject: EvaluatedEstimator


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTrial:
    """How a profile did on a table: the median error of latency in percent, on rows that all profiles answer.

    The median is None where it answers none of them.
    """

    profile: str
    prompt_tokens: int
    rows: int
    median: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileMatch:
    """What the rows are compared with, and why.

    Args:
        fed: profiles that feed at least one row.
        subject_of: who answers a row.
        why: these profiles, in a few words.
        lengths_in_table: rows say their prompts themselves.
        tried: how profiles did; empty where nothing had to be found out.
    """

    fed: tuple[ProfileInput, ...]
    subject_of: Callable[[Measurement], EvaluatedEstimator]
    why: str
    lengths_in_table: bool = False
    tried: tuple[ProfileTrial, ...] = ()


def match(
    rows: Sequence[Measurement],
    make: Callable[[HardwareProfile], Estimator],
    *,
    profile: str | None = None,
    prompt_tokens: int | None = None,
) -> ProfileMatch:
    """Settle which profile feeds the estimator that a table is compared with, and about which prompts it is asked.

    Args:
        rows: of the table.
        make: returns the estimator that a profile feeds.
        profile: given by the user; no other is tried.
        prompt_tokens: given by the user, for a table without that column.

    Raises:
        InputError: prompt tokens both in the table and given; a profile that cannot be used.
    """
    in_table = any(row.prompt_tokens for row in rows)
    if in_table and prompt_tokens is not None:
        raise InputError("the table has a column prompt_tokens; leave --prompt-tokens away")
    if profile is not None:
        only = _fed(load_profile(profile), make, prompt_tokens)
        why = "as requested"
        return ProfileMatch(fed=(only,), subject_of=lambda _: only.subject, why=why, lengths_in_table=in_table)
    candidates = [_fed(hardware, make, prompt_tokens) for hardware in _of_the_usual_kind()]
    if in_table or prompt_tokens is not None:
        return _nearest(rows, candidates, lengths_in_table=in_table)
    return _likeliest(rows, candidates)


def _fed(
    profile: HardwareProfile, make: Callable[[HardwareProfile], Estimator], prompt_tokens: int | None
) -> ProfileInput:
    subject = EvaluatedEstimator(estimator=make(profile), prompt_tokens=prompt_tokens or profile.prompt_tokens)
    return ProfileInput(profile=profile, subject=subject)


def _of_the_usual_kind() -> list[HardwareProfile]:
    """Return the embedded profiles of the default's kind of GPU, the default first."""
    default = load_profile(DEFAULT_PROFILE)
    others = (load_profile(name) for name in known_profiles() if name != default.name)
    return [default, *(other for other in others if other.gpu_kind == default.gpu_kind)]


def _nearest(
    rows: Sequence[Measurement], candidates: Sequence[ProfileInput], *, lengths_in_table: bool
) -> ProfileMatch:
    """Take for each row the profile whose prompts are nearest by ratio: times grow in proportion to them."""

    def nearest(row: Measurement) -> ProfileInput:
        def distance(one: ProfileInput) -> float:
            asked = row.prompt_tokens or one.subject.prompt_tokens
            return abs(math.log(asked / one.profile.prompt_tokens))

        return min(candidates, key=distance)

    used = {one.profile.name: one for one in map(nearest, rows)}
    return ProfileMatch(
        fed=tuple(used.values()),
        subject_of=lambda row: nearest(row).subject,
        why="its prompts are the nearest",
        lengths_in_table=lengths_in_table,
    )


def _likeliest(rows: Sequence[Measurement], candidates: Sequence[ProfileInput]) -> ProfileMatch:
    """Take the profile that agrees best with the latencies of the table, by the median over rows that all answer.

    One profile is taken for the whole table, so that no row can pick what suits it.
    """
    errors = [_latency_errors(rows, one.subject) for one in candidates]
    common = [place for place in range(len(rows)) if all(place in found for found in errors if found)]
    tried = [_tried(one, found, common) for one, found in zip(candidates, errors, strict=True)]

    def rank(place: int) -> tuple[float, int]:
        off = tried[place].median
        return (math.inf if off is None else off, -len(errors[place]))

    # The first of equals: the default.
    best, *others = sorted(range(len(candidates)), key=rank)
    why = "no row tells the profiles apart"
    if tried[best].median is not None:
        offs = ", ".join(_off(tried[place]) for place in (best, *others) if tried[place].rows)
        why = f"off in latency by {offs} (medians)"
    only = candidates[best]
    return ProfileMatch(fed=(only,), subject_of=lambda _: only.subject, why=why, tried=tuple(tried))


def _latency_errors(rows: Sequence[Measurement], subject: EvaluatedEstimator) -> dict[int, float]:
    """Return the errors of latency in percent by the place of the row, of rows that have an answer."""
    answers = ((place, answered(row, subject)) for place, row in enumerate(rows))
    return {place: answer.latency_ape for place, answer in answers if isinstance(answer, Answer)}


def _tried(one: ProfileInput, errors: Mapping[int, float], common: Sequence[int]) -> ProfileTrial:
    known = [errors[place] for place in common if place in errors]
    return ProfileTrial(
        profile=one.profile.name,
        prompt_tokens=one.profile.prompt_tokens,
        rows=len(known),
        median=median(known) if known else None,
    )


def _off(one: ProfileTrial) -> str:
    return f"{one.median:.1f} % with {one.profile}"
