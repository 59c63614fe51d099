"""Run folders: writing, reading, and folders that are not replaced."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from record_fixtures import REASONS, deployment, rejected, run_record, single_server, table

from maveriq.domain.records import DEPLOYMENT_COLUMNS, GPU_COLUMNS, NOT_YET, REQUEST_COLUMNS, GpuSample
from maveriq.errors import InputError, InvariantError, MaveriqError
from maveriq.report.reading import read_meta, read_run
from maveriq.report.run_folder import RUN_FILES, check_writable, write_folder, write_run
from maveriq.units import BYTES_PER_GIB

S = 1_000_000
ROWS = [
    [1, 1, 1, 0, 500_000, 1 * S, 3 * S, 2, 0, 10, 6, 3 * S],
    [2, 2, 2, 7, 3 * S, NOT_YET, 6 * S + 7, 2, 0, 10, 1, 4 * S],
    [3, 2, 0, 2 * S, NOT_YET, NOT_YET, NOT_YET, 3, 1, 10, 5, 4 * S],
    [4, 1, 1, 3 * S, 6 * S, NOT_YET, 7 * S, 4, 2, 10, 5, 0],
    [5, 1, 1, 4 * S, 8 * S, 8 * S + 1, NOT_YET, 5, 0, 10, 5, 9 * S],
]
RUN = run_record(
    table(ROWS),
    deployments=[
        deployment(1, slo_s=2.5),
        deployment(2, model='big, "quoted"', endpoint_id=2, gpu_ids=(2,), note="misses its SLO"),
        rejected(3, model="huge", endpoint_id=3, reason="fits nowhere, not even here"),
    ],
    models={1: "tiny", 2: 'big, "quoted"', 3: "huge"},
    gpu_samples=[GpuSample(time_us=10 * S, gpu_id=g, memory_bytes=g * BYTES_PER_GIB, busy_share=0.25) for g in (0, 1)],
    ended_us=20 * S,
)
META = {"seed": 42, "config": {"gpus": list(range(8)), "scale": 0.4}}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", RUN, {"saturation": "stable"}, META)
    return tmp_path / "run"


def test_requests_follow_the_schema(folder):
    rows = rows_of(folder / "requests.csv")
    assert tuple(rows[0]) == REQUEST_COLUMNS
    assert rows[0] == {
        "request_id": "1", "endpoint": "1", "deployment_id": "1", "model": "tiny", "arrival_s": "0.000000",
        "start_s": "0.500000", "first_token_s": "1.000000", "finish_s": "3.000000", "status": "completed", "reason": "",
        "prompt_tokens": "10", "cached_tokens": "0", "output_tokens": "6", "preemptions": "0",
        "queue_s": "0.500000", "service_s": "2.500000",
        "latency_s": "3.000000", "ttft_s": "1.000000", "tpot_s": "0.400000", "slo_s": "3.000000", "slo_met": "1",
        "steps": "",
    }  # fmt: skip
    assert rows[1]["model"] == 'big, "quoted"'
    assert (rows[1]["slo_met"], rows[1]["latency_s"], rows[1]["ttft_s"], rows[1]["tpot_s"]) == ("0", "6.000000", "", "")


def test_missing_values_are_empty_cells(folder):
    _, _, refused, failed, unfinished = rows_of(folder / "requests.csv")
    filled = {key: value for key, value in refused.items() if value}
    assert filled == {
        "request_id": "3", "endpoint": "2", "cached_tokens": "0", "preemptions": "0",
        "model": 'big, "quoted"', "arrival_s": "2.000000", "status": "refused",
        "reason": "not deployed", "prompt_tokens": "10", "output_tokens": "5", "slo_s": "4.000000", "slo_met": "0",
    }  # fmt: skip
    assert (failed["start_s"], failed["finish_s"], failed["latency_s"]) == ("6.000000", "7.000000", "")
    assert (failed["slo_s"], failed["slo_met"], failed["reason"]) == ("", "", REASONS[2])
    assert (unfinished["first_token_s"], unfinished["finish_s"], unfinished["slo_met"]) == ("8.000001", "", "0")


def test_deployments_and_gpus_follow_the_schema(folder):
    first, second, third = rows_of(folder / "deployments.csv")
    assert tuple(first) == DEPLOYMENT_COLUMNS
    assert (first["intent"], first["slo_s"], first["gpus"], first["layer_split"]) == (
        "min-cost",
        "2.500000",
        "0 1",
        "4",
    )
    assert (first["gib_per_gpu"], first["ready_s"], first["removed_s"]) == ("3.0000 3.0000", "26.500000", "")
    assert (second["model"], second["reason"]) == ('big, "quoted"', "misses its SLO")
    assert (third["status"], third["reason"]) == ("rejected", "fits nowhere, not even here")
    assert third["tp"] == third["gpus"] == third["ready_s"] == ""
    gpus = rows_of(folder / "gpus.csv")
    assert tuple(gpus[0]) == GPU_COLUMNS
    assert gpus[1] == {"time_s": "10.000000", "gpu": "1", "memory_gib": "1.000000", "busy_share": "0.250000"}


def test_run_json_keeps_the_order_and_is_readable(folder):
    text = (folder / "run.json").read_text()
    assert list(json.loads(text)) == ["seed", "config", "summary", "record"]
    assert '"gpus": [0, 1, 2, 3, 4, 5, 6, 7]' in text
    assert read_meta(folder) == {**META, "summary": {"saturation": "stable"}}


def test_a_run_folder_round_trips(folder):
    back = read_run(folder)
    for name in back.requests.__slots__:
        assert np.array_equal(getattr(back.requests, name), getattr(RUN.requests, name)), name
    assert back.deployments == RUN.deployments
    assert back.gpu_samples == RUN.gpu_samples
    assert (back.models, back.ended_us) == (RUN.models, RUN.ended_us)


def test_more_rows_than_are_written_at_once(tmp_path):
    run = single_server(np.ones(20_000), np.full(20_000, 0.9))
    write_run(tmp_path / "run", run, {}, {})
    assert np.array_equal(read_run(tmp_path / "run").requests.finish_us, run.requests.finish_us)


def test_an_empty_run_round_trips(tmp_path):
    write_run(tmp_path / "run", run_record(table([])), {}, {})
    assert len(read_run(tmp_path / "run").requests) == 0


def test_the_same_run_gives_the_same_bytes(folder, tmp_path):
    write_run(tmp_path / "again", RUN, {"saturation": "stable"}, META)
    for name in (*RUN_FILES, "requests.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_an_empty_folder_and_a_run_folder_are_replaced(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", folder):
        check_writable(target, overwrite=True)
        write_run(target, replace(RUN, ended_us=21 * S), {}, {}, overwrite=True)
        assert read_run(target).ended_us == 21 * S
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]


def test_parents_are_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    write_run(tmp_path / "a" / "b", RUN, {}, {})
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {*RUN_FILES, "requests.csv"}


@pytest.mark.parametrize("write", [check_writable, lambda target: write_run(target, RUN, {}, {}, overwrite=True)])
def test_a_folder_that_is_no_run_is_not_replaced(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is a file; name a folder"):
        write(tmp_path / "file")
    with pytest.raises(InputError, match=r"holds files that are no run \(notes.txt"):
        write(tmp_path / "folder")
    with pytest.raises(InputError, match=r"would lie in .*, which is a file"):
        write(tmp_path / "file" / "below")
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [check_writable, lambda target: write_run(target, RUN, {}, {}, overwrite=True)])
def test_an_unwritable_folder(write):
    with pytest.raises(InputError, match="cannot be written") as caught:
        write(Path("/proc/run"))
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_no_files(folder, tmp_path):
    before = (folder / "run.json").read_bytes()
    with pytest.raises(InvariantError, match=r"cannot be written to run\.json"):
        write_run(folder, RUN, {"share": float("nan")}, {}, overwrite=True)
    with pytest.raises(InvariantError):
        write_run(tmp_path / "new", RUN, {}, {"seed": object()})

    def full_disk(fresh: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(MaveriqError, match="No space left") as caught:
        write_folder(folder, full_disk, overwrite=True)
    assert caught.value.exit_code == 1  # a full disk is no input error
    assert (folder / "run.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_reasons_that_a_spreadsheet_would_run_read_back(folder, tmp_path):
    reasons = ("", "=HYPERLINK(1)", "@sum", "'=1", "it's -1")
    rows = replace(RUN.requests, reasons=reasons, reason=np.arange(len(RUN.requests)) % len(reasons))
    write_run(tmp_path / "other", replace(RUN, requests=rows), {}, {})
    text = (tmp_path / "other" / "requests.csv").read_text()
    assert ",=" not in text
    assert ",@" not in text
    assert np.array_equal(read_run(tmp_path / "other").requests.reason, rows.reason)
    (tmp_path / "other" / "requests.csv").write_text(text.replace("\n", "\r\n"))  # read row by row
    assert np.array_equal(read_run(tmp_path / "other").requests.reason, rows.reason)


def spoil(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("requests.csv", "0.500000,1.000000", "x,1.000000", "line 2: start_s must be a number, not 'x'"),
        ("requests.csv", "completed", "done", "run.json knows no status 'done'"),
        ("requests.csv", "1,1,tiny", "1,1,other", "run.json knows no model 'other'"),
        ("requests.csv", "slo_met", "slo", "no column slo_met"),
        ("gpus.csv", "10.000000,1,1.000000,0.250000\n", "", "has 1 rows where run.json says 2"),
        ("run.json", '"ended_us": ', '"ended_us": "soon", "x": ', "is not what maveriq writes"),
        ("run.json", '"record"', '"records"', "is not what maveriq writes"),
    ],
)
def test_a_damaged_folder_is_refused_with_file_and_line(folder, name, old, new, message):
    spoil(folder, name, old, new)
    with pytest.raises(InputError, match=name) as caught:
        read_run(folder)
    assert message in str(caught.value)


def test_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_run(tmp_path / "absent")
