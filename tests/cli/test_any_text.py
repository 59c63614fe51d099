"""Any text gives a value or an InputError, never another exception."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testbed_fixtures import TABLES, put_testbed

from maveriq.domain.faults import parse_fault
from maveriq.domain.models import load_model
from maveriq.errors import InputError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.hardware_profile import load_profile
from maveriq.report.compare import parse_tolerances
from maveriq.tables import read_csv
from maveriq.testbed.recorded_runs import load_recorded_runs
from maveriq.testbed.replay import options_of, replay
from maveriq.workload.model_sets import load_model_set
from maveriq.workload.traces import load_trace, read_trace

PROFILE = load_profile("a6000-short")
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def pieces(*parts: str) -> st.SearchStrategy[str]:
    """Draw texts from nearly valid and invalid parts."""
    odd = ["", "nan", "-1", "1e999", "9" * 30, "\0", "é", '"', "'", "\n", "\r\n", ",", "=", "[", "]", "{", "#", "\x1f"]
    return st.lists(st.sampled_from([*parts, *odd]) | st.text(max_size=3), max_size=12).map("".join)


GZIP_START = b"\x1f\x8b\x08\0\0\0\0\0\0\3"
SCHEDULES = pieces("arrival_s,endpoint,prompt_tokens,output_tokens\n", "1,1,1,1\n", "0.5,1,", "service_s")
AZURES = pieces(
    "TIMESTAMP,ContextTokens,GeneratedTokens\n", "2023-11-16 18:17:03.97996,1,2\n", "2023-11-16 ", "+00:00,"
)
CLUSTERS = pieces('name = "x"\n', 'gpu = "A6000"\n', "count = 2\n", "used_gib = [1, 2]\n", "memory_gib = ", "1.5\n")
MODEL_SETS = pieces('name = "x"\n', "[[models]]\n", 'model = "gptj-6b"\n', "load_at = 0\n", 'objective = "min-cost"\n')
CONFIGS = pieces('{"num_hidden_layers": 2', ', "hidden_size": 8', ', "num_attention_heads": 2, "vocab_size": 5', "}")


def tolerate(read, *arguments) -> None:
    with contextlib.suppress(InputError):
        read(*arguments)


@QUICK
@given(text=SCHEDULES | AZURES | st.binary(max_size=40))
def test_traces(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    tolerate(read_trace, path)
    tolerate(lambda: [row.number("a") for row in read_csv(path, ("a",), what="table")])


@QUICK
@pytest.mark.parametrize(
    ("name", "read", "texts"),
    [("c.toml", cluster_from, CLUSTERS), ("m.toml", load_model_set, MODEL_SETS), ("m.json", load_model, CONFIGS)],
)
@given(data=st.data())
def test_files_with_keys(tmp_path: Path, name: str, read, texts, data: st.DataObject) -> None:
    path = tmp_path / name
    path.write_bytes(data.draw(texts | st.text(max_size=20)).encode(errors="surrogatepass"))
    tolerate(read, str(path))


@QUICK
@given(text=pieces("gpu=", "deployment=", "3", "@", "600", "s", ",for=", "120", "8", "x", "A6000", ".toml", "/"))
def test_command_line_values(text: str) -> None:
    for read in (parse_fault, cluster_from, load_trace, load_model_set, load_model):
        tolerate(read, text)


@QUICK
@given(text=pieces("mean", "queue-p95", "slo", "ks", "=", "10", "%", "pt", ",", " "))
def test_tolerances(text: str) -> None:
    tolerate(parse_tolerances, text)


@pytest.mark.heavy
@QUICK
@pytest.mark.parametrize("table", ["runs", "deployments", "scheduled", "completed"])
@given(data=st.data())
def test_recordings(tmp_path: Path, table: str, data: st.DataObject) -> None:
    """Draw a table with one cell replaced by any text."""
    name = next(name for name in TABLES if name.startswith(table))
    lines = TABLES[name].splitlines()
    row = data.draw(st.integers(1, len(lines) - 1))
    cells = lines[row].split(",")
    column = data.draw(st.integers(0, len(cells) - 1))
    changed = [*cells[:column], data.draw(pieces(*cells, "1 2", "0.5", "MaverIQ")), *cells[column + 1 :]]
    tolerate(import_all, put_testbed(tmp_path, **{table: (lines[row], ",".join(changed))}))


def import_all(testbed: Path) -> None:
    for recorded in load_recorded_runs(None, testbed):
        options_of(recorded.run)
        replay(recorded.record, PROFILE)


@QUICK
@given(start=st.sampled_from([b"", GZIP_START[:5], GZIP_START]), content=st.binary(max_size=40))
def test_packed_files(tmp_path: Path, start: bytes, content: bytes) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(start + content)
    tolerate(read_trace, path)
