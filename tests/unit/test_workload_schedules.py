"""Recorded schedules: exact round trips, and errors with their line."""

import numpy as np
import pytest

from maveriq.errors import InputError
from maveriq.workload.requests import Arrivals
from maveriq.workload.schedules import read_schedule, write_schedule

HEADER = "arrival_s,endpoint,prompt_tokens,output_tokens\n"
GOOD = "1.5,1,30,20\n"


def column(*values):
    return np.array(values, np.int64)


def arrivals(slo_us=(0, 0), service_us=None):
    return Arrivals(
        arrival_us=column(90_615_476, 999_999_999_999_999),
        endpoint_id=column(1, 2),
        prompt_tokens=column(51, 1),
        output_tokens=column(20, 400),
        slo_us=column(*slo_us),
        service_us=service_us,
    )


@pytest.mark.parametrize(
    "written",
    [arrivals(), arrivals(slo_us=(2_500_000, 0)), arrivals(slo_us=(1, 2), service_us=column(1_275_820, 1))],
    ids=["plain", "slo", "slo and service"],
)
def test_round_trip_is_exact(tmp_path, written):
    path = tmp_path / "schedule.csv"
    write_schedule(written, path)
    read = read_schedule(path).arrivals
    for name in ("arrival_us", "endpoint_id", "prompt_tokens", "output_tokens", "slo_us"):
        assert np.array_equal(getattr(read, name), getattr(written, name)), name
    assert (read.service_us is None) == (written.service_us is None)
    assert written.service_us is None or np.array_equal(read.service_us, written.service_us)


def test_file_looks_as_documented(tmp_path):
    write_schedule(arrivals(slo_us=(2_500_000, 0)), tmp_path / "schedule.csv")
    assert (tmp_path / "schedule.csv").read_text() == (
        "arrival_s,endpoint,prompt_tokens,output_tokens,slo_s\n"
        "90.615476,1,51,20,2.500000\n"
        "999999999.999999,2,1,400,0.000000\n"
    )


@pytest.mark.parametrize("where", ["nowhere/schedule.csv", "file/schedule.csv", "folder"])
def test_a_failed_write_leaves_no_file(tmp_path, where):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_schedule(arrivals(), tmp_path / where)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_older_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("precious")
    broken = arrivals()
    object.__setattr__(broken, "prompt_tokens", column(1))
    with pytest.raises(ValueError, match="zip"):
        write_schedule(broken, path, overwrite=True)
    assert path.read_text() == "precious"
    assert [left.name for left in tmp_path.iterdir()] == ["schedule.csv"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (GOOD + "1.4,1,30,20\n", "line 3: arrival_s 1.4 is before 1.5"),
        (GOOD + "-1,1,30,20\n", "line 3: arrival_s must be a finite number of at least 0"),
        (GOOD + "nan,1,30,20\n", "line 3: arrival_s must be a finite number"),
        (GOOD + "1e12,1,30,20\n", "line 3: arrival_s must be at most 1e+09"),
        (GOOD + "2,0,30,20\n", "line 3: endpoint must be a whole number from 1"),
        (GOOD + "2,llama-2-7b,30,20\n", "line 3: endpoint must be a number as in the first row"),
        ("1.5,llama-2-7b,30,20\n2,,30,20\n", "line 3: endpoint is empty; give the name of a model of the set"),
        (GOOD + "2,1.5,30,20\n", "line 3: endpoint must be a whole number"),
        (GOOD + "2,1,0,20\n", "line 3: prompt_tokens must be a whole number from 1"),
        (GOOD + "2,1,30,\n", "line 3: output_tokens must be a number, not ''"),
        (GOOD + "2,1,30\n", "line 3: 3 cells"),
        ("", "has a header but no row"),
    ],
)
def test_errors_name_their_line(tmp_path, rows, says):
    path = tmp_path / "schedule.csv"
    path.write_text(HEADER + rows)
    with pytest.raises(InputError) as refused:
        read_schedule(path)
    assert says in str(refused.value)


def test_service_must_take_time(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text(HEADER.replace("\n", ",service_s\n") + "1,1,30,20,0\n")
    with pytest.raises(InputError, match="line 2: service_s must be a finite number of at least 1e-06"):
        read_schedule(path)


NAMED = HEADER + "1.5,small,30,20\n2,large,31,21\n2,small,32,22\n"


def test_endpoints_may_be_names_of_models(tmp_path):
    (tmp_path / "schedule.csv").write_text(NAMED)
    schedule = read_schedule(tmp_path / "schedule.csv")
    assert schedule.endpoint_ids(["other", "large", "small"]).tolist() == [3, 2, 3]


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (["small", "larger"], "unknown endpoint of schedule 'schedule.csv' 'large'; did you mean 'larger'?"),
        (["small", "large", "small"], "has requests for 'small', which the model set has several times"),
    ],
)
def test_a_name_must_be_that_of_one_model(tmp_path, models, says):
    (tmp_path / "schedule.csv").write_text(NAMED)
    with pytest.raises(InputError) as refused:
        read_schedule(tmp_path / "schedule.csv").endpoint_ids(models)
    assert says in str(refused.value)
