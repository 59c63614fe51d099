"""Files that are too large to be read whole, such as the weekly Azure traces of 2024: the first part is replayed."""

from pathlib import Path

import numpy as np
import pytest

from maveriq.domain.deployments import Intent, Objective
from maveriq.errors import InputError
from maveriq.workload import trace_formats
from maveriq.workload.build import WorkloadOptions, build_workload
from maveriq.workload.requests import Workload

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = [
    f"2024-05-10 {second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.25,{second % 900 + 7},{second % 90 + 1}\n"
    for second in range(40_000)
]


def build(path: Path, **options: object) -> Workload:
    (path.parent / "one.toml").write_text('name = "one"\n[[models]]\nmodel = "llama-2-7b"\n')
    return build_workload(
        WorkloadOptions(trace=str(path), models=str(path.parent / "one.toml"), **options),  # type: ignore[arg-type]
        intent=Intent(objective=Objective.MIN_COST),
        slo_of=lambda _model, _tokens: None,
    )


@pytest.fixture
def week(tmp_path: Path) -> Path:
    """A file of 3 GiB that can be read for 40,000 rows; then come zeros, which the disk does not hold."""
    path = tmp_path / "week.csv"
    path.write_text(HEAD + "".join(ROWS))
    with path.open("r+b") as file:
        file.truncate(3 << 30)
    return path


@pytest.mark.parametrize(
    ("options", "requests"),
    [
        ({"limit": 100}, 100),
        ({"limit": 20_000}, 20_000),
        ({"duration_s": 3600}, 3600),
        ({"duration_s": 3600, "limit": 50_000}, 3600),
        ({"duration_s": 3600, "scale": 2}, 7200),
        ({"duration_s": 16_384}, 16_384),
    ],
)
def test_the_first_part_of_a_large_file(week: Path, options: dict[str, float], requests: int) -> None:
    part = build(week, **options)
    small = week.with_name("small.csv")
    small.write_text(HEAD + "".join(ROWS[: requests + 1_000]))
    whole = build(small, **options)
    assert len(part.arrivals) == requests
    for column in ("arrival_us", "endpoint_id", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(part.arrivals, column), getattr(whole.arrivals, column)), column
    assert part.source is not None
    assert part.source.requests_in_trace is None
    assert part.source.dropped == {}
    assert part.source.remarks == ("the file is large, and read only as far as needed",)


def test_more_than_can_be_read_is_refused(week: Path) -> None:
    with pytest.raises(InputError, match=r"week\.csv"):
        build(week)
    with pytest.raises(InputError, match=r"week\.csv"):
        build(week, limit=100, arrivals="published")  # redrawn from all of the file


def test_the_message_says_how_to_take_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.csv").write_text(HEAD + "".join(ROWS[:2_000]))
    monkeypatch.setattr(trace_formats, "_MAX_REQUESTS", 1_000)
    with pytest.raises(InputError, match=r"more than 1,000 requests; take the first part of it with --limit or --dur"):
        build(tmp_path / "long.csv")
