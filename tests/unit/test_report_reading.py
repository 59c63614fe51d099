"""Tables of a run folder: reading by column equals reading by row; unusual tables are read by row."""

import csv
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from record_fixtures import run_record, runs, single_server, table

from maveriq.domain.records import GpuSample, RunRecord
from maveriq.errors import InputError
from maveriq.report import reading
from maveriq.report.frames import requests_frame
from maveriq.report.reading import _request_columns, read_run
from maveriq.report.run_folder import RecordsFormat, write_run

TEXTS = {"model": {"tiny": 1}, "status": {"completed": 2, "refused": 3}, "reason": {"": 0, "not deployed": 1}}


def row_by_row(folder: Path) -> RunRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_arrow_table", lambda *_, **__: None)
        return read_run(folder)


def same(run: RunRecord, other: RunRecord) -> bool:
    names = run.requests.__slots__
    return run.gpu_samples == other.gpu_samples and all(
        np.array_equal(getattr(run.requests, name), getattr(other.requests, name)) for name in names
    )


@settings(max_examples=60, deadline=None)
@given(runs())
def test_reading_by_column_equals_reading_by_row(run: RunRecord) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_run(Path(scratch) / "run", run, {}, {})
        assert same(read_run(Path(scratch) / "run"), row_by_row(Path(scratch) / "run"))


@settings(max_examples=40, deadline=None)
@given(runs())
def test_requests_in_parquet_are_read_back_as_from_csv(run: RunRecord) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for records in RecordsFormat:
            write_run(Path(scratch) / records, run, {}, {}, records=records)
        assert same(read_run(Path(scratch) / "parquet"), read_run(Path(scratch) / "csv"))
        assert not (Path(scratch) / "parquet" / "requests.csv").exists()


def test_requests_in_parquet_have_the_cells_of_the_table(tmp_path: Path) -> None:
    run = single_server(np.array([1.0, 1.0, 2.0]), np.array([0.3, 1.1, 0.7]))
    write_run(tmp_path / "run", run, {}, {}, records=RecordsFormat.PARQUET)
    read, frame = pd.read_parquet(tmp_path / "run" / "requests.parquet"), requests_frame(run)
    pd.testing.assert_frame_equal(read.astype(frame.dtypes.to_dict()), frame)


def test_a_damaged_parquet_table_is_refused_in_one_line(tmp_path: Path) -> None:
    run = single_server(np.ones(3), np.full(3, 0.5))
    path = write_run(tmp_path / "run", run, {}, {}, records=RecordsFormat.PARQUET) / "requests.parquet"
    for content in (path.read_bytes()[:-9], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"requests\.parquet") as refused:
            read_run(tmp_path / "run")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("finish_us", [1, 999_999, 1_000_001, 86_400 * 10**6 + 7, 8_999_999_999_123_457])
def test_times_keep_every_microsecond(tmp_path: Path, finish_us: int) -> None:
    run = run_record(table([[1, 1, 1, 0, 0, -1, finish_us, 2, 0, 10, 6, finish_us]]))
    write_run(tmp_path / "run", run, {}, {})
    assert same(read_run(tmp_path / "run"), run)


@pytest.mark.parametrize("cells", ["nan,0,1,1", "0,0x1,1,1", "0,-1,1,1", "0,0,-1,1", "0,0,1,nan", "0,0,,1", "0,0,1"])
def test_wrong_gpu_samples_are_refused_with_their_line(tmp_path: Path, cells: str) -> None:
    sample = GpuSample(time_us=10, gpu_id=0, memory_bytes=1 << 30, busy_share=0.5)
    write_run(tmp_path / "run", run_record(table([]), gpu_samples=[sample]), {}, {})
    path = tmp_path / "run" / "gpus.csv"
    path.write_text(path.read_text().splitlines()[0] + f"\n{cells}\n")
    with pytest.raises(InputError, match=r"gpus\.csv', line 2"):
        read_run(tmp_path / "run")


def test_more_rows_than_are_read_at_once(tmp_path: Path) -> None:
    run = single_server(np.full(1000, 0.7), np.full(1000, 0.3))
    write_run(tmp_path / "run", run, {}, {})
    columns = _request_columns(tmp_path / "run" / "requests.csv", TEXTS)
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
def test_unusual_tables_are_read_by_row(tmp_path: Path, old: str, new: str) -> None:
    write_run(tmp_path / "run", single_server(np.full(3, 10.0), np.full(3, 1.0)), {}, {})
    path = tmp_path / "run" / "requests.csv"
    assert _request_columns(path, TEXTS) is not None
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert _request_columns(path, TEXTS) is None
    with pytest.raises(InputError, match=r"requests\.csv"):
        read_run(tmp_path / "run")


def test_missing_rows_are_detected(tmp_path: Path) -> None:
    write_run(tmp_path / "run", single_server(np.full(3, 10.0), np.full(3, 1.0)), {}, {})
    path = tmp_path / "run" / "requests.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"has 2 rows where run.json says 3"):
        read_run(tmp_path / "run")


def test_other_orders_of_columns_are_read_as_well(tmp_path: Path) -> None:
    run = run_record(table([[1, 1, 1, 0, 500_000, -1, 3_000_000, 2, 0, 10, 6, 0]]))
    write_run(tmp_path / "run", run, {}, {})
    path = tmp_path / "run" / "requests.csv"
    path.write_text("\n".join(",".join(reversed(line.split(","))) for line in path.read_text().splitlines()) + "\n")
    assert _request_columns(path, TEXTS) is None
    assert same(read_run(tmp_path / "run"), run)


@settings(max_examples=20, deadline=None)
@given(runs())
def test_runs_of_earlier_versions_have_no_steps(run: RunRecord) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        write_run(folder, run, {}, {})
        whole = read_run(folder)
        with (folder / "requests.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        with (folder / "requests.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(cells[:-1] for cells in rows)
        without = replace(whole, requests=replace(whole.requests, steps=np.zeros_like(whole.requests.steps)))
        assert same(read_run(folder), without)
        assert same(row_by_row(folder), without)
