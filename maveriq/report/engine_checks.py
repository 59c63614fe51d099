"""Results of `maveriq engines check` as a line each, as a table, and as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from maveriq.exec.checks.runner import CheckResult, Status
from maveriq.report.view import Column, Table, Text, number_column, row

_STYLES = {Status.PASSED: "green", Status.FAILED: "bold red", Status.SKIPPED: "dim"}
_NAME_WIDTH = 42


def result_line(result: CheckResult) -> Text:
    """Return one result as a line."""
    outcome = result.outcome
    return Text.of(
        (f"{outcome.status:<7}", _STYLES[outcome.status]),
        f"  {result.seconds:6.1f} s  {result.name:<{_NAME_WIDTH}}  {outcome.text}",
    )


def results_table(backend: str, results: Sequence[CheckResult]) -> Table:
    """Return all results, with what each check proves; the lines showed what was seen."""
    columns = [
        Column("check", wrap="words"),
        Column("result"),
        number_column("s"),
        Column("proves", wrap="words"),
    ]
    rows = [
        row(
            result.name,
            Text(result.outcome.status.value, _STYLES[result.outcome.status]),
            f"{result.seconds:.1f}",
            result.proves,
        )
        for result in results
    ]
    return Table(f"Engines of {backend}: {_counts(results)}", columns, rows)


def _counts(results: Sequence[CheckResult]) -> str:
    found = Counter(result.outcome.status for result in results)
    seconds = sum(result.seconds for result in results)
    return ", ".join(f"{found[status]} {status.value}" for status in Status) + f", {seconds:.0f} s"


def results_json(
    backend: str, gpu_ids: Sequence[int], results: Sequence[CheckResult], *, interrupted: bool
) -> dict[str, Any]:
    """Return all results for programs. `passed` is whether all checks ended and none failed."""
    failures = any(result.outcome.status is Status.FAILED for result in results)
    return {
        "backend": backend,
        "gpus": list(gpu_ids),
        "passed": not failures and not interrupted,
        "interrupted": interrupted,
        "seconds": round(sum(result.seconds for result in results), 3),
        "checks": [
            {
                "name": result.name,
                "proves": result.proves,
                "result": result.outcome.status.value,
                "text": result.outcome.text,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }
