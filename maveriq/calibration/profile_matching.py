"""Chooses the profile to compare a table of measurements with.

The fingerprints of a profile are measured at one prompt length. If the table or the user gives the
prompt length, the profile with the nearest one is used. Otherwise the profile whose estimates agree
best with the table's latencies is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from maveriq.calibration.evaluation import Answer, EvaluatedEstimator, compare_row
from maveriq.calibration.measurements import Measurement
from maveriq.errors import InputError
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import DEFAULT_PROFILE, HardwareProfile, known_profiles, load_profile


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileInput:
    """A profile, and the estimator made from it with the prompt length to use."""

    profile: HardwareProfile
    evaluated: EvaluatedEstimator


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTrial:
    """Median error of latency of a profile on a table, in percent, over the rows that all profiles can estimate.

    The median is None if it can estimate none of them.
    """

    profile: str
    prompt_tokens: int
    rows: int
    median: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileMatch:
    """The profiles that a table is compared with, and why.

    Args:
        inputs: profiles used for at least one row.
        estimator_of: returns the estimator for a row.
        why: a short reason for these profiles.
        lengths_in_table: the table has a column `prompt_tokens`.
        trials: errors of the candidates; empty if the prompt length or the user decided.
    """

    inputs: tuple[ProfileInput, ...]
    estimator_of: Callable[[Measurement], EvaluatedEstimator]
    why: str
    lengths_in_table: bool = False
    trials: tuple[ProfileTrial, ...] = ()


def match(
    rows: Sequence[Measurement],
    make: Callable[[HardwareProfile], Estimator],
    *,
    profile: str | None = None,
    prompt_tokens: int | None = None,
) -> ProfileMatch:
    """Choose the profile and prompt length that a table is compared with.

    Args:
        rows: rows of the table.
        make: makes an estimator from a profile.
        profile: the profile that the user chose; no other is considered.
        prompt_tokens: the prompt length that the user gave, for a table without that column.

    Raises:
        InputError: prompt tokens both in the table and given; a profile that cannot be used.
    """
    in_table = any(row.prompt_tokens for row in rows)
    if in_table and prompt_tokens is not None:
        raise InputError("the table has a column prompt_tokens; leave --prompt-tokens away")
    if profile is not None:
        only = _profile_input(load_profile(profile), make, prompt_tokens)
        why = "as requested"
        return ProfileMatch(inputs=(only,), estimator_of=lambda _: only.evaluated, why=why, lengths_in_table=in_table)
    candidates = [_profile_input(hardware, make, prompt_tokens) for hardware in _profiles_of_default_gpu()]
    if in_table or prompt_tokens is not None:
        return _nearest(rows, candidates, lengths_in_table=in_table)
    return _most_accurate(rows, candidates)


def _profile_input(
    profile: HardwareProfile, make: Callable[[HardwareProfile], Estimator], prompt_tokens: int | None
) -> ProfileInput:
    evaluated = EvaluatedEstimator(estimator=make(profile), prompt_tokens=prompt_tokens or profile.prompt_tokens)
    return ProfileInput(profile=profile, evaluated=evaluated)


def _profiles_of_default_gpu() -> list[HardwareProfile]:
    """Return the embedded profiles of the default's kind of GPU, the default first."""
    default = load_profile(DEFAULT_PROFILE)
    others = (load_profile(name) for name in known_profiles() if name != default.name)
    return [default, *(other for other in others if other.gpu_kind == default.gpu_kind)]


def _nearest(
    rows: Sequence[Measurement], candidates: Sequence[ProfileInput], *, lengths_in_table: bool
) -> ProfileMatch:
    """Choose for each row the profile with the nearest prompt length by ratio, because times scale with it."""

    def nearest(row: Measurement) -> ProfileInput:
        def distance(candidate: ProfileInput) -> float:
            prompt_tokens = row.prompt_tokens or candidate.evaluated.prompt_tokens
            return abs(math.log(prompt_tokens / candidate.profile.prompt_tokens))

        return min(candidates, key=distance)

    used = {candidate.profile.name: candidate for candidate in map(nearest, rows)}
    return ProfileMatch(
        inputs=tuple(used.values()),
        estimator_of=lambda row: nearest(row).evaluated,
        why="its prompts are the nearest",
        lengths_in_table=lengths_in_table,
    )


def _most_accurate(rows: Sequence[Measurement], candidates: Sequence[ProfileInput]) -> ProfileMatch:
    """Choose the profile with the smallest median latency error over the rows that all profiles can estimate.

    One profile serves the whole table: choosing per row would hide errors.
    """
    errors = [_latency_errors(rows, candidate.evaluated) for candidate in candidates]
    common = [index for index in range(len(rows)) if all(index in found for found in errors if found)]
    trials = [_trial(candidate, found, common) for candidate, found in zip(candidates, errors, strict=True)]

    def rank(index: int) -> tuple[float, int]:
        error = trials[index].median
        return (math.inf if error is None else error, -len(errors[index]))

    # The sort is stable, so the default wins a tie.
    best, *others = sorted(range(len(candidates)), key=rank)
    why = "no row tells the profiles apart"
    if trials[best].median is not None:
        error_texts = ", ".join(_error_text(trials[index]) for index in (best, *others) if trials[index].rows)
        why = f"off in latency by {error_texts} (medians)"
    only = candidates[best]
    return ProfileMatch(inputs=(only,), estimator_of=lambda _: only.evaluated, why=why, trials=tuple(trials))


def _latency_errors(rows: Sequence[Measurement], evaluated: EvaluatedEstimator) -> dict[int, float]:
    """Return the latency error in percent by row index, for rows that have an estimate."""
    answers = ((index, compare_row(row, evaluated)) for index, row in enumerate(rows))
    return {index: answer.latency_ape for index, answer in answers if isinstance(answer, Answer)}


def _trial(candidate: ProfileInput, errors: Mapping[int, float], common: Sequence[int]) -> ProfileTrial:
    known = [errors[index] for index in common if index in errors]
    return ProfileTrial(
        profile=candidate.profile.name,
        prompt_tokens=candidate.profile.prompt_tokens,
        rows=len(known),
        median=median(known) if known else None,
    )


def _error_text(trial: ProfileTrial) -> str:
    return f"{trial.median:.1f} % with {trial.profile}"
