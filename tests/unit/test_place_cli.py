"""`maveriq place`: valid and invalid problem files, and the output."""

import copy
import gzip
import json
import sys
from pathlib import Path

import pytest

from maveriq.cli.app import main
from maveriq.scenario.placement_problems import load_problem

GOOD = {
    "gpus": 2,
    "gpus_per_node": 8,
    "memory_bytes": 3e9,
    "models": [
        {"name": "a", "slo_s": 1.0, "rate_per_s": 1.0, "cv": None, "profile": "small"},
        {"name": "b", "profile": "small"},
    ],
    "profiles": {
        "small": [
            {"tp": 1, "pp": 1, "stage_latency_s": [0.1], "stage_weight_bytes": [2e9]},
            {"tp": 1, "pp": 2, "stage_latency_s": [0.06, 0.06], "stage_weight_bytes": [1e9, 1e9]},
        ]
    },
    "workload": "requests.csv",
    "search": {"policy": "alpaserve", "max_pp": 8, "max_tp": 4},
}
REQUESTS = "arrival_s,model,slo_s\n0.5,a,1\n0.5,b,1\n0.75,c,1\n"


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Write a problem, run the command, and return the exit code, stdout and stderr."""

    def run(problem=GOOD, requests=REQUESTS, *options: str):
        text = problem if isinstance(problem, str) else json.dumps(problem)
        (tmp_path / "problem.json").write_text(text)
        (tmp_path / "requests.csv").write_text(requests)
        monkeypatch.setattr(sys, "argv", ["maveriq", "place", str(tmp_path / "problem.json"), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def changed(path: str, value: object) -> dict:
    """Return the valid problem with one value changed, or removed with `...`; `path` is like models.0.name."""
    problem = copy.deepcopy(GOOD)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = problem
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return problem


def test_json_has_the_documented_keys(place) -> None:
    code, out, err = place(GOOD, REQUESTS, "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["groups"] == [{"tp": 1, "pp": 1, "models": [name]} for name in "ab"]
    assert answer["attainment"] == pytest.approx(2 / 3)
    assert answer["replicas"] == 2
    assert [sorted(candidate) for candidate in answer["candidates"]] == [["attainment", "score"]] * 3
    assert answer["search_s"] > 0
    assert answer["feasible"] is True


def test_the_table_shows_groups_candidates_and_what_was_left_out(place) -> None:
    code, out, _ = place(changed("search", {"policy": "alpaserve", "max_pp": 1, "max_tp": 1}))
    assert code == 0
    assert "Candidates: 1" in out
    assert "66.7 % of 3 requests" in out
    assert "2 x (TP 1 x PP 1)" in out
    code, out, _ = place(changed("memory_bytes", 1.0))
    assert "left out 2 of 2 models: a b" in out


def test_infeasible_is_a_result(place) -> None:
    code, out, _ = place({**changed("memory_bytes", 1.5e9), "search": {"policy": "alpaserve-star"}}, REQUESTS, "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["feasible"], answer["groups"], answer["score"]) == (False, [], None)
    assert "every model in every group" in answer["reason"]


def test_a_key_without_effect_is_reported(place) -> None:
    code, _, err = place(changed("search", {"policy": "round-robin", "max_pp": 4, "beam": 2}))
    assert code == 0
    assert err.splitlines() == [
        "maveriq: search.max_pp has no effect on round-robin", "maveriq: search.beam has no effect on round-robin",
    ]  # fmt: skip


def test_the_faster_of_two_measurements_of_a_shape_counts(tmp_path: Path) -> None:
    entry = {"tp": 1, "pp": 1, "stage_latency_s": [0.05], "stage_weight_bytes": [1e9]}
    (tmp_path / "problem.json").write_text(json.dumps(changed("profiles.small", [*GOOD["profiles"]["small"], entry])))
    (tmp_path / "requests.csv").write_text(REQUESTS)
    problem = load_problem(tmp_path / "problem.json").problem
    assert problem.models[0].profile.shapes[1, 1].stage_latency_s == (0.05,)


def test_requests_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "problem.json").write_text(json.dumps(changed("workload", "r.csv.gz")))
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(REQUESTS.encode()))
    assert load_problem(tmp_path / "problem.json").problem.demand.model_index.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("memory_bytes", 0, "memory_bytes"),
        ("memory_bytes", -1.0, "memory_bytes"),
        ("memory_bytes", True, "memory_bytes"),
        ("gpus", 0, "gpus"),
        ("gpus", 2.5, "gpus"),
        ("gpus", 10**9, "gpus"),
        ("gpus_per_node", 0, "gpus_per_node"),
        ("gpus", ..., "missing key `gpus`"),
        ("gpux", 8, "unknown key `gpux`"),
        ("search.colour", 8, "unknown key `colour` (in search)"),
        ("search.policy", "alpaserv", "unknown search.policy 'alpaserv'; did you mean 'alpaserve'"),
        ("search.fill", "full", "unknown search.fill 'full'"),
        ("search.max_pp", 0, "max_pp"),
        ("search", {"policy": "model-parallelism"}, "needs a group_size"),
        ("search", {"policy": "model-parallelism", "group_size": 3}, "cannot be cut into groups of 3"),
        ("search", {"policy": "alpaserve-star", "rule": "Z"}, "unknown search.rule 'Z'"),
        ("search.bucket", True, "rate_per_s of model 'b'"),
        ("models", [], "models"),
        ("models.1.name", "a", "model 'a' stands twice"),
        ("models.1.name", "", "name"),
        ("models.1.profile", "large", "profile 'large', which is missing from profiles (there are small)"),
        ("profiles", {}, "missing from profiles (there are none)"),
        ("profiles.small.1.stage_latency_s", [0.1], "tp 1, pp 2: stage_latency_s has 1 stages"),
        ("profiles.small.0.stage_weight_bytes", [1, 1], "tp 1, pp 1: stage_weight_bytes has 2 stages"),
        ("profiles.small.0.stage_weight_bytes", [0], "stage_weight_bytes"),
        ("profiles.small.0.stage_latency_s", [-0.1], "stage_latency_s"),
        ("profiles.small.0.stage_latency_s", [float("nan")], "not valid JSON"),
        ("profiles.small.0.stage_latency_s", ["0.1"], "stage_latency_s"),
        ("profiles.small.0.pp", 0, "pp"),
        ("workload", "nowhere.csv", "nowhere.csv' does not exist"),
        ("workload", "", "is a folder"),
    ],
)
def test_a_bad_problem_is_one_clear_line(place, path: str, value: object, words: str) -> None:
    problem = changed(path, value)
    if path == "search.bucket":
        problem["profiles"]["other"] = [{"tp": 1, "pp": 1, "stage_latency_s": [9], "stage_weight_bytes": [1]}]
        problem["models"][1]["profile"] = "other"
    code, out, err = place(problem)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert words in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gpus": NaN}', '{"gpus": 1e999}', "[" * 100_000, "\x00"])
def test_a_file_that_is_no_problem_gives_one_line(place, text: str) -> None:
    code, out, err = place(text)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "problem.json" in err


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ("", "is empty"),
        ("arrival_s,model,slo_s\n", "has a header but no row"),
        ("arrival_s,model\n0,a\n", "no column slo_s"),
        ("arrival_s,model,slo_s,colour\n0,a,1,red\n", "unknown column colour"),
        ("arrival_s,model,slo_s\n1,a,1\n0.5,a,1\n", "line 3: arrival_s 0.5 is before 1.0 of the row above"),
        ("arrival_s,model,slo_s\n-1,a,1\n", "line 2: arrival_s"),
        ("arrival_s,model,slo_s\n0,a,0\n", "line 2: slo_s must be positive"),
        ("arrival_s,model,slo_s\n0,a,nan\n", "line 2: slo_s"),
        ("arrival_s,model,slo_s\n0,a,inf\n", "line 2: slo_s must be a finite number"),
        ("arrival_s,model,slo_s\ninf,a,1\n", "line 2: arrival_s"),
        ("arrival_s,model,slo_s\n0,,1\n", "line 2: model is empty"),
        ("arrival_s,model,slo_s\n0,a\n", "line 2: 2 cells"),
        ("arrival_s,model,slo_s\nsoon,a,1\n", "line 2: arrival_s must be a number"),
        ('arrival_s,model,slo_s\n0,"a,1\n', "not a valid CSV"),
    ],
)
def test_a_bad_workload_is_one_clear_line(place, requests: str, words: str) -> None:
    code, out, err = place(GOOD, requests)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert words in line
    assert "requests.csv" in line


def test_long_searches_report_progress(place, monkeypatch: pytest.MonkeyPatch) -> None:
    import maveriq.cli.place as placing

    monkeypatch.setattr(placing, "_FIRST_LINE_S", 0.0)
    monkeypatch.setattr(placing, "_LINE_EVERY_S", 0.0)
    _, _, err = place(GOOD, REQUESTS)
    assert "3 of 3 candidates filled" in err.splitlines()[-1]
    for silent in ("--json", "--quiet"):
        assert place(GOOD, REQUESTS, silent)[2] == ""


TODAY = {
    "gpus": 8, "gpu": "H100", "workload": "requests.csv", "search": {"max_pp": 1},
    "models": [{"name": "a", "model": "llama-3.1-8b"}, {"name": "b", "model": "gpt-oss-20b"}],
}  # fmt: skip


def test_models_without_profiles_are_estimated_on_a_kind_of_gpu(place) -> None:
    code, out, err = place(TODAY, REQUESTS, "--json")
    assert code == 0, err
    assert sorted({name for group in json.loads(out)["groups"] for name in group["models"]}) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": None}, "memory_bytes is missing; give it, or a kind of GPU as gpu"),
        ({"gpu": None, "memory_bytes": 8e10}, "model 'a' has no profile; give one, or a kind of GPU as gpu"),
        ({"gpu": "H1000"}, "H1000"),
        ({"models": [{"name": "llama-9"}]}, "llama-9"),
        ({"models": [{"name": "x", "model": "deepseek-v3"}], "gpu": "A100"}, "A100-80GB-SXM computes no fp8"),
    ],
)
def test_models_that_cannot_be_estimated_are_named(place, changes: dict, message: str) -> None:
    code, out, err = place({key: value for key, value in (TODAY | changes).items() if value is not None})
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
