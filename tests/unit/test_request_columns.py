"""requests.csv by column gives what it gives row by row, and gives way where anything is unusual."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from strategies_records import run_record, runs, single_server, table

from maveriq.domain.records import RunRecord
from maveriq.errors import InputError
from maveriq.report import reading
from maveriq.report.reading import read_columns, read_run
from maveriq.report.run_folder import write_run

TEXTS = {"model": {"tiny": 1}, "status": {"completed": 2, "refused": 3}, "reason": {"": 0, "not deployed": 1}}


def row_by_row(folder: Path) -> RunRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_columns", lambda _path, _texts: None)
        return read_run(folder)


def same(one: RunRecord, other: RunRecord) -> bool:
    names = one.requests.__slots__
    return all(np.array_equal(getattr(one.requests, name), getattr(other.requests, name)) for name in names)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_both_ways_give_the_same(run: RunRecord) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_run(Path(scratch) / "run", run, {}, {})
        assert same(read_run(Path(scratch) / "run"), row_by_row(Path(scratch) / "run"))


def test_more_rows_than_are_read_at_once(tmp_path: Path) -> None:
    run = single_server(np.full(1000, 0.7), np.full(1000, 0.3))
    write_run(tmp_path / "run", run, {}, {})
    columns = read_columns(tmp_path / "run" / "requests.csv", TEXTS)
    assert columns is not None
    assert np.array_equal(columns["finish_s"], run.requests.finish_us)
    assert same(read_run(tmp_path / "run"), run)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1,1,tiny", "1,1,other"),
        ("1,1,tiny", "x,1,tiny"),
        ("1,1,tiny", "-1,1,tiny"),
        ("1,1,tiny", ",1,tiny"),
        ("1,1,tiny", "1,0x1,tiny"),
        ("1,1,tiny", "1,0,tiny"),
        ("1,1,tiny", f"{'9' * 16},1,tiny"),
        (",10.000000,", ",nan,"),
        (",10.000000,", ",-1,"),
        (",10.000000,", ",1e300,"),
        ("completed", "done"),
        ("slo_met", "met"),
        ("1,1,tiny", '1,1,"tiny'),
        ("1,1,tiny", "1,tiny"),
        ("request_id", "é"),
    ],
)
def test_what_is_unusual_is_left_to_the_other_way(tmp_path: Path, old: str, new: str) -> None:
    write_run(tmp_path / "run", single_server(np.full(3, 10.0), np.full(3, 1.0)), {}, {})
    path = tmp_path / "run" / "requests.csv"
    assert read_columns(path, TEXTS) is not None
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert read_columns(path, TEXTS) is None
    with pytest.raises(InputError, match=r"requests\.csv"):
        read_run(tmp_path / "run")


def test_rows_that_are_missing_are_noticed(tmp_path: Path) -> None:
    write_run(tmp_path / "run", single_server(np.full(3, 10.0), np.full(3, 1.0)), {}, {})
    path = tmp_path / "run" / "requests.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"has 2 rows where run.json says 3"):
        read_run(tmp_path / "run")


def test_other_orders_of_columns_are_read_as_well(tmp_path: Path) -> None:
    run = run_record(table([[1, 1, 1, 0, 500_000, -1, 3_000_000, 2, 0, 10, 6, 0]]))
    write_run(tmp_path / "run", run, {}, {})
    path = tmp_path / "run" / "requests.csv"
    path.write_text("\n".join(",".join(reversed(one.split(","))) for one in path.read_text().splitlines()) + "\n")
    assert read_columns(path, TEXTS) is None
    assert same(read_run(tmp_path / "run"), run)
