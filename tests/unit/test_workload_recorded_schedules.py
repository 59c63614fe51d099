"""The workload of every recorded MaverIQ run is reproduced to the microsecond."""

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from maveriq.domain.deployments import Intent, Objective
from maveriq.units import micros
from maveriq.workload.build import WorkloadOptions, build_workload

pytestmark = pytest.mark.data
INTENT = Intent(objective=Objective.MIN_COST)
PUBLIC_FILES = {"code": "AzureLLMInferenceTrace_code.csv", "conversation": "AzureLLMInferenceTrace_conv.csv"}


def rows(path: Path) -> list[dict[str, str]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(text.decode().splitlines()))


@pytest.fixture(scope="module")
def scheduled(measured_data):
    by_run = defaultdict(list)
    for row in rows(measured_data / "testbed" / "scheduled.csv.gz"):
        by_run[row["run"]].append((micros(float(row["scheduled_s"])), int(row["model_id"])))
    return by_run


@pytest.fixture(scope="module")
def maveriq_runs(measured_data):
    runs = [run for run in rows(measured_data / "testbed" / "runs.csv") if run["policy"].startswith("MaverIQ")]
    assert len(runs) == 11
    return runs


@pytest.mark.parametrize("source", ["embedded", "public file"])
def test_scheduled_requests_equal_the_recorded_ones(source, measured_data, maveriq_runs, scheduled):
    for run in maveriq_runs:
        trace = run["trace"] if source == "embedded" else str(measured_data / "azure" / PUBLIC_FILES[run["trace"]])
        options = WorkloadOptions(
            trace=trace, scale=float(run["rate_scale"]), arrivals="published", models=run["model_set"]
        )
        drawn = build_workload(options, intent=INTENT, slo_of=lambda _model, _tokens: None).arrivals
        expected = np.array(scheduled[run["run"]])
        assert np.array_equal(drawn.arrival_us, expected[:, 0]), run["run"]
        assert np.array_equal(drawn.endpoint_id, expected[:, 1]), run["run"]


def test_deploys_equal_the_recorded_ones(measured_data, maveriq_runs):
    recorded = defaultdict(list)
    for row in rows(measured_data / "testbed" / "deployments.csv"):
        recorded[row["run"]].append((int(row["model_id"]), row["model"], micros(float(row["deploy_s"]))))
    for run in maveriq_runs:
        options = WorkloadOptions(scale=float(run["rate_scale"]), models=run["model_set"])
        endpoints = build_workload(options, intent=INTENT, slo_of=lambda _model, _tokens: None).endpoints
        assert [
            (endpoint.endpoint_id, endpoint.model.name, endpoint.requested_us) for endpoint in endpoints
        ] == recorded[run["run"]]
