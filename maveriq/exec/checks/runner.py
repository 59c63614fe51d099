"""Runs a list of checks one after the other, each with its own limit, and reports every result as it is known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from maveriq.errors import MaveriqError

Context = TypeVar("Context")


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a check ended, and in one line: what was seen, why it failed, or why this cannot be shown here."""

    status: Status
    text: str


def passed(text: str) -> Outcome:
    """Return that the check passed, and what was seen."""
    return Outcome(Status.PASSED, text)


def failed(reason: str) -> Outcome:
    """Return that the check failed."""
    return Outcome(Status.FAILED, reason)


def skipped(reason: str) -> Outcome:
    """Return that this backend or machine cannot show it, or that what it needs did not start."""
    return Outcome(Status.SKIPPED, reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check(Generic[Context]):
    """One check.

    Args:
        name: what is checked.
        proves: what a user knows if it passes.
        limit_s: real seconds that it may take; it has failed after that.
        run: does it. A `MaveriqError` is a failure too.
    """

    name: str
    proves: str
    limit_s: float
    run: Callable[[Context], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """How one check ended, and the real seconds that it took."""

    name: str
    proves: str
    outcome: Outcome
    seconds: float


async def run_checks(
    checks: Sequence[Check[Context]],
    context: Context,
    *,
    limit_s: float,
    on_result: Callable[[CheckResult], None],
) -> None:
    """Run all checks in order. One that fails does not stop the others.

    Args:
        checks: what to run.
        context: passed to each.
        limit_s: real seconds for all of them; checks that are left then fail without running.
        on_result: receives each result as soon as it is known.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + limit_s
    for check in checks:
        started_s = loop.time()
        left_s = deadline_s - started_s
        if left_s <= 0:
            outcome = failed(f"not run: all checks together may take {limit_s:g} s, which are over")
        else:
            outcome = await _outcome(check, context, min(left_s, check.limit_s))
        on_result(CheckResult(name=check.name, proves=check.proves, outcome=outcome, seconds=loop.time() - started_s))


async def _outcome(check: Check[Context], context: Context, limit_s: float) -> Outcome:
    try:
        async with asyncio.timeout(limit_s):
            return await check.run(context)
    except TimeoutError:
        return failed(f"not done within {limit_s:.0f} s")
    except MaveriqError as error:
        return failed(str(error))
    except Exception as error:  # the other checks still say something
        return failed(f"{type(error).__name__}: {error}")
