"""The tables of traces/ equal the output of their script, and their README is correct."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maveriq.files import traces_path
from maveriq.workload.model_sets import known_model_sets, load_model_set
from maveriq.workload.schedules import read_schedule
from maveriq.workload.trace_formats import read_requests
from maveriq.workload.traces import embedded_trace

SCRIPT = Path(__file__).parents[2] / "scripts" / "derive_traces.py"
README = traces_path("README.md").read_text(encoding="utf-8")


@pytest.mark.data
def test_the_script_derives_the_committed_tables(measured_data, tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), str(measured_data), "--out", str(tmp_path)], check=True)
    derived = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert derived == {path.name: path.read_bytes() for path in traces_path().glob("*.csv")}


@pytest.mark.data
def test_the_readme_names_the_public_files_by_their_checksums(measured_data):
    named = dict(re.findall(r"`(AzureLLMInferenceTrace_\w+\.csv)` \| [\d,]+ \| `([0-9a-f]{64})`", README))
    assert len(named) == 2
    for name, checksum in named.items():
        assert hashlib.sha256((measured_data / "azure" / name).read_bytes()).hexdigest() == checksum


@pytest.mark.parametrize(("name", "requests"), [("code", 8819), ("conversation", 19366)])
def test_embedded_counts_are_complete(name, requests):
    assert embedded_trace(name).requests_per_minute.sum() == requests


@pytest.mark.parametrize(("name", "models"), [("large", 4), ("regular", 8), ("twentyone", 21)])
def test_built_in_model_sets(name, models):
    models_of_set = load_model_set(name)
    assert models_of_set.name == name
    assert len(models_of_set.entries) == models


def test_listed_model_sets_exclude_clusters():
    assert known_model_sets() == ["large", "regular", "twentyone"]


def test_the_examples_of_the_readme_are_read(tmp_path):
    model_set, engine = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    azure, schedule = re.findall(r"```csv\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.toml").write_text(model_set, encoding="utf-8")
    (tmp_path / "mine.csv").write_text(schedule, encoding="utf-8")
    (tmp_path / "azure.csv").write_text(azure, encoding="utf-8")
    first = 'name = "continuous"\n[[models]]\nmodel = "qwen3-14b"\n'
    (tmp_path / "continuous.toml").write_text(first + engine, encoding="utf-8")
    assert load_model_set(str(tmp_path / "mine.toml")).load_at == (0, 5)
    assert [(entry.load_at, entry.batching) for entry in load_model_set(str(tmp_path / "continuous.toml")).entries] == [
        (None, "continuous")
    ]
    assert np.array_equal(read_schedule(tmp_path / "mine.csv").arrivals.slo_us, [2_500_000, 0])
    assert read_requests(tmp_path / "azure.csv").requests_per_minute.tolist() == [2]
