"""DataFrames of a run: the same values as in the CSV files of its folder."""

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from record_fixtures import deployment, rejected, run_record, runs, table

from maveriq.domain.records import DEPLOYMENT_COLUMNS, GPU_COLUMNS, NOT_YET, REQUEST_COLUMNS, GpuSample
from maveriq.report.frames import deployments_frame, gpus_frame, requests_frame
from maveriq.report.requests_csv import request_lines
from maveriq.report.run_folder import write_run
from maveriq.units import BYTES_PER_GIB

S = 1_000_000
RUN = run_record(
    table(
        [
            [1, 1, 1, 0, 500_000, 1 * S, 3 * S, 2, 0, 10, 6, 3 * S],
            [2, 2, 2, 7, 3 * S, NOT_YET, 6 * S + 7, 2, 0, 10, 1, 4 * S],
            [3, 2, 0, 2 * S, NOT_YET, NOT_YET, NOT_YET, 3, 1, 10, 5, 4 * S],
            [4, 1, 1, 3 * S, 6 * S, NOT_YET, 7 * S, 4, 2, 10, 5, 0],
        ]
    ),
    deployments=[
        deployment(1, slo_s=2.5),
        deployment(2, model="big", endpoint_id=2, gpu_ids=(2,), note="misses its SLO"),
        rejected(3, model="huge", endpoint_id=3, reason="fits nowhere"),
    ],
    models={1: "tiny", 2: "big", 3: "huge"},
    gpu_samples=[GpuSample(time_us=10 * S, gpu_id=g, memory_bytes=g * BYTES_PER_GIB, busy_share=0.25) for g in (0, 1)],
    ended_us=20 * S,
)
EMPTY = run_record(table([]), deployments=[], models={}, gpu_samples=[], ended_us=1)


def from_csv(path: Path, like: pd.DataFrame) -> pd.DataFrame:
    texts = {name: "str" for name, dtype in like.dtypes.items() if pd.api.types.is_string_dtype(dtype)}
    frame = pd.read_csv(path, dtype=texts)
    return frame.fillna(dict.fromkeys(texts, "")).astype(like.dtypes.to_dict())


def test_frames_have_the_values_of_the_files(tmp_path):
    write_run(tmp_path / "run", RUN, {}, {})
    frames = {"requests": requests_frame(RUN), "deployments": deployments_frame(RUN), "gpus": gpus_frame(RUN)}
    for name, frame in frames.items():
        expected = from_csv(tmp_path / "run" / f"{name}.csv", frame)
        pd.testing.assert_frame_equal(frame, expected, rtol=1e-9, atol=1e-6)


def test_request_frame_has_types_to_compute_with():
    frame = requests_frame(RUN)
    assert tuple(frame.columns) == REQUEST_COLUMNS
    assert frame["latency_s"].mean() == pytest.approx((3 + 6) / 2)
    assert frame["slo_met"].tolist()[:3] == [True, False, False]
    assert frame["slo_met"].isna().tolist() == [False, False, False, True]
    assert frame["deployment_id"].isna().tolist() == [False, False, True, False]
    assert frame.groupby("model")["latency_s"].max().to_dict() == {"big": 6.0, "tiny": 3.0}


def test_frames_of_an_empty_run_have_all_columns():
    assert tuple(requests_frame(EMPTY).columns) == REQUEST_COLUMNS
    assert tuple(deployments_frame(EMPTY).columns) == DEPLOYMENT_COLUMNS
    assert tuple(gpus_frame(EMPTY).columns) == GPU_COLUMNS


@given(runs())
def test_empty_cells_are_missing_values_in_frames(run):
    lines = "".join(request_lines(run)).splitlines()
    empty = [[cell == "" for cell in line.split(",")] for line in lines[1:] if '"' not in line]
    frame = requests_frame(run)
    missing = (frame.isna() | (frame == "").fillna(False)).to_numpy()  # noqa: FBT003
    if len(empty) == len(frame):
        assert missing.tolist() == empty
