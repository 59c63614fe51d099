"""Successful commands: output streams, JSON, and records."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_results import Maveriq, everything_in, put
from profile_fixtures import write_profile

from maveriq import __version__
from maveriq.domain.requests import RequestStatus
from maveriq.report.reading import read_run
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options

# Requests to both models of the set, long after they have loaded.
SCHEDULE = "arrival_s,endpoint,prompt_tokens,output_tokens\n600,1,10,20\n601,2,10,20\n700,1,10,20\n"
MODELS = (
    'name = "two"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n\n[[models]]\nmodel = "gptj-6b"\nload_at = 1\n'
    'objective = "min_latency"\n'
)
SIM = "sim --trace t.csv --models m.toml --out run --overwrite"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    put(tmp_path, {"t.csv": SCHEDULE, "m.toml": MODELS})


def strict_json(text: str) -> Any:
    """Parse JSON without NaN and infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def answer(maveriq: Maveriq, command: str) -> Any:
    """Return the --json output of a command, and check that stderr is empty."""
    ended = maveriq(f"{command} --json")
    assert (ended.code, ended.err) == (0, "")
    return strict_json(ended.out)


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("", ("sim", "plan", "fit", "compare", "trace", "testbed")),
        ("--help", ("sim", "plan", "fit", "compare", "trace", "testbed")),
        ("trace", ("show", "export", "check")),
        ("trace -h", ("show", "export", "check")),
        ("sim -h", ("--packing-threshold", "--fail", "--json")),
        ("plan --help", ("MODEL", "--slo-ms", "--explain")),
        ("serve --help", ("--backend", "--token-file", "--models-folder", "--grace-period-s")),
        ("console --help", ("--url", "--command")),
        ("fit --help", ("--evaluate",)),
        ("compare --help", ("RUN... REFERENCE", "--tolerance", "--plot", "--json")),
        ("testbed", ("import", "replay")),
        ("testbed import --help", ("--all", "--out", "--data")),
        ("trace export --help", ("--out",)),
        ("--version", (f"maveriq {__version__}",)),
    ],
)
def test_help_and_version_are_results(maveriq: Maveriq, command: str, shows: tuple[str, ...]) -> None:
    ended = maveriq(command)
    assert (ended.code, ended.err) == (0, "")
    assert [word for word in shows if word not in ended.out] == []


def test_python_m_maveriq_is_the_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "maveriq", "--version"], capture_output=True, text=True, timeout=300, check=True
    )
    assert (ended.stdout, ended.stderr) == (f"maveriq {__version__}\n", "")


# sim


def test_the_default_run_accounts_for_every_request(maveriq: Maveriq, tmp_path: Path) -> None:
    results = answer(maveriq, "sim")
    assert results["folder"] == "runs/hybrid-min-cost-large-code-0.4"
    counts = results["overall"]["counts"]
    assert counts["scheduled"] == 3508
    for result in (results["overall"], *results["models"].values()):
        ended = result["counts"].copy()
        assert ended.pop("scheduled") == sum(ended.values())
    assert sum(model["counts"]["scheduled"] for model in results["models"].values()) == 3508
    run = read_run(tmp_path / results["folder"])
    assert len(run.requests) == 3508
    assert (run.requests.status == RequestStatus.COMPLETED.value).sum() == counts["completed"]
    assert len(run.deployments) == len(results["deployments"]) == 4


def test_sim_prints_tables_and_leaves_a_folder(maveriq: Maveriq, tmp_path: Path) -> None:
    ended = maveriq(SIM)
    assert ended.code == 0
    assert "llama-2-7b" in ended.out
    assert ended.out.rstrip().endswith("records: run")
    assert "maveriq:" not in ended.err  # progress, no error
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "deployments.csv", "gpus.csv", "requests.csv", "run.json",
    ]  # fmt: skip


def test_sim_json_equals_the_records(maveriq: Maveriq, tmp_path: Path) -> None:
    results = answer(maveriq, SIM)
    assert results["folder"] == "run"
    assert {"saturation", "overall", "models", "gpus", "deployments"} < set(results)
    kept = strict_json((tmp_path / "run" / "run.json").read_text())
    led_to_it = {key: results.pop(key) for key in ("notes", "options", "trace")}
    assert led_to_it == {key: kept[key] for key in led_to_it}
    assert kept["summary"] == {key: value for key, value in results.items() if key != "folder"}
    assert kept["options"]["trace"] == "t.csv"
    assert kept["versions"]["maveriq"] == __version__
    assert [deployment["model"] for deployment in results["deployments"]] == ["llama-2-7b", "gptj-6b"]


def test_quiet_prints_nothing(maveriq: Maveriq) -> None:
    ended = maveriq(f"{SIM} --quiet")
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_a_run_replaces_a_run(maveriq: Maveriq, tmp_path: Path) -> None:
    answer(maveriq, SIM)
    first = everything_in(tmp_path)
    answer(maveriq, SIM)
    assert everything_in(tmp_path) == first
    answer(maveriq, f"{SIM} --intent min-latency")
    assert everything_in(tmp_path).keys() == first.keys()
    assert everything_in(tmp_path) != first


def test_a_name_that_looks_like_markup_is_printed_as_it_is(maveriq: Maveriq) -> None:
    ended = maveriq("sim --trace t.csv --models m.toml --out '[/red]'")
    assert ended.code == 0
    assert "records: [/red]" in ended.out


def test_options_accept_underscores(maveriq: Maveriq) -> None:
    dashes = answer(maveriq, f"{SIM} --intent min-gpu-cost --queue fifo-per-model")
    assert answer(maveriq, f"{SIM} --intent min_gpu_cost --queue fifo_per_model") == dashes


def queue_delays(maveriq: Maveriq, options: str) -> dict[str, float]:
    return answer(maveriq, f"{SIM} {options}")["overall"]["queue_s"]


def test_explicit_timing_overrides_no_dispatch_overhead(maveriq: Maveriq) -> None:
    assert queue_delays(maveriq, "--no-dispatch-overhead")["mean"] == 0
    assert queue_delays(maveriq, "--no-dispatch-overhead --after-arrival-ms 50")["mean"] == pytest.approx(0.05)
    assert queue_delays(maveriq, "")["mean"] > 0  # as the testbed's dispatcher


def test_a_fault_is_repeatable(maveriq: Maveriq) -> None:
    both = answer(maveriq, f"{SIM} --fail deployment=1@650s --fail deployment=2@500s")
    assert both["overall"]["counts"]["completed"] == 1
    fault_run = answer(maveriq, f"{SIM} --fail deployment=2@500s")
    assert fault_run["overall"]["counts"]["completed"] == 2


def test_recorded_service_times_serve(maveriq: Maveriq, tmp_path: Path) -> None:
    rows = [line + (",2.5" if line[0].isdigit() else ",service_s") for line in SCHEDULE.splitlines()]
    put(tmp_path, {"t.csv": "\n".join(rows) + "\n"})
    assert answer(maveriq, f"{SIM} --service-times recorded")["overall"]["service_s"]["mean"] == 2.5


def test_a_very_large_cluster_can_be_simulated(maveriq: Maveriq, tmp_path: Path) -> None:
    assert len(answer(maveriq, "plan gptj-6b --gpus 10000xA6000 --estimator paper")["candidates"]) > 100
    scenario = build_system(Options(gpus="10000xA6000"))
    instants = scenario.workload.arrivals.arrival_us[-1] / scenario.sample_us
    assert 50 < instants < 110  # times 10,000 GPUs


# plan


def test_plan_ranks(maveriq: Maveriq) -> None:
    ended = maveriq("plan llama-2-7b --top 3")
    assert (ended.code, ended.err) == (0, "")
    assert "TP 1 x PP 1" in ended.out
    ranking = answer(maveriq, "plan llama-2-7b")
    scores = [candidate["score"] for candidate in ranking["candidates"]]
    assert scores == sorted(scores)
    assert (ranking["model"], ranking["cluster"], ranking["note"]) == ("llama-2-7b", "8xA6000", "")
    assert answer(maveriq, "plan llama-2-7b --intent min_cost") == ranking


def test_plan_ranks_measured_configurations(maveriq: Maveriq, tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "gptj-6b,int8,native,2,1,1,16,0.010,0.002,0.25\n")
    ranking = answer(maveriq, f"plan gptj-6b --profile {profile} --gpus 2xcpu")
    assert [candidate["tp"] for candidate in ranking["candidates"]] == [2]
    ended = maveriq(f"plan llama-2-7b --profile {profile} --gpus 2xcpu")
    assert ended.code == 1
    assert "has measurements of gptj-6b" in ended.err


def test_plan_meets_an_slo(maveriq: Maveriq) -> None:
    ranking = answer(maveriq, "plan llama-2-7b --slo-ms 200")
    assert ranking["candidates"]
    assert all(candidate["latency_s"] < 0.2 for candidate in ranking["candidates"])


# trace


def test_exported_traces_can_be_checked_and_replayed(maveriq: Maveriq) -> None:
    exported = answer(maveriq, "trace export --out s.csv --scale 0.05")
    assert exported == {"file": "s.csv", "requests": answer(maveriq, "trace show --scale 0.05")["requests"]}
    checked = answer(maveriq, "trace check s.csv")
    assert (checked["kind"], checked["requests"]) == ("schedule", exported["requests"])
    replayed = answer(maveriq, "sim --trace s.csv")
    drawn = answer(maveriq, "sim --scale 0.05")
    assert replayed["overall"] == drawn["overall"]


@pytest.mark.parametrize("command", ["trace show", "trace check t.csv", "trace export --out s.csv"])
def test_trace_reports_its_result(maveriq: Maveriq, command: str) -> None:
    ended = maveriq(command)
    assert (ended.code, ended.err) == (0, "")
    assert "requests" in ended.out


# fit


def test_fit_compares(maveriq: Maveriq, tmp_path: Path) -> None:
    header = "model,tp,pp,layer_split,weight_dtype,int8_kv,output_tokens,batch_size,latency_s,memory_after_run_gib"
    put(tmp_path, {"m.csv": f"{header}\nllama-2-7b,1,1,32,float16,0,20,1,0.5,14\n"})
    errors = answer(maveriq, "fit --evaluate m.csv")
    assert (errors["estimator"], errors["profile"], errors["rows"]) == ("calibrated", "a6000-short", 1)
    assert errors["groups"][0]["latency"]["n"] == 1
    ended = maveriq("fit --evaluate m.csv")
    assert (ended.code, ended.err) == (0, "")
    assert "1 of 1 rows answered" in ended.out


# Output streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_can_be_printed_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    command = [sys.executable, "-m", "maveriq", "trace", "show", "t.csv", "--models", "m.toml"]
    ended = subprocess.run(
        command, capture_output=True, timeout=300, check=True, cwd=tmp_path, env={"PYTHONIOENCODING": encoding}
    )
    assert ended.stderr == b""
    assert "llama-2-7b" in ended.stdout.decode(encoding)


def test_output_may_be_closed(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m maveriq {SIM} --quiet >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=300, check=False, cwd=tmp_path).returncode == 0
    assert len(read_run(tmp_path / "run").requests) == 3
