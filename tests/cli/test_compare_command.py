"""`maveriq compare` and `maveriq testbed`: success, and missed tolerances."""

import json
from pathlib import Path

import pytest
from command_results import Maveriq, everything_in
from testbed_fixtures import BASELINE, RUN, put_testbed

from maveriq.report.compare import UNITS
from maveriq.report.reading import read_meta, read_run
from maveriq.report.run_folder import RUN_FILES

REPLAYED, RECORDED = f"rep/{RUN}", f"rec/{RUN}"


@pytest.fixture(autouse=True)
def _testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_testbed(tmp_path / "data" / "testbed")
    monkeypatch.setenv("MAVERIQ_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def both(maveriq: Maveriq) -> None:
    assert maveriq(f"testbed import {RUN} --out rec").code == 0
    assert maveriq(f"testbed replay {RUN} --out rep").code == 0


def test_import_all(maveriq: Maveriq, tmp_path: Path) -> None:
    ended = maveriq("testbed import --all --out rec")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        f"rec/{RUN}: 3 of 5 requests completed, 1 refused, 1 unfinished",
        f"rec/{BASELINE}: 2 of 2 requests completed",
    ]
    for name in (RUN, BASELINE):
        assert {path.name for path in (tmp_path / "rec" / name).iterdir()} == {*RUN_FILES, "requests.csv"}
        assert len(read_run(tmp_path / "rec" / name).requests) in (5, 2)


def test_imported_runs_name_their_source_and_command(maveriq: Maveriq, tmp_path: Path) -> None:
    imported = maveriq(f"testbed import {RUN} --out rec --data data --json")
    [counts] = json.loads(imported.out)
    assert counts == {"folder": RECORDED, "completed": 3, "refused": 1, "failed": 0, "unfinished": 1}
    meta = read_meta(tmp_path / RECORDED)
    assert (meta["kind"], meta["source"]["run"], meta["source"]["policy"]) == ("recorded", RUN, "MaverIQ")
    assert (meta["options"]["policy"], meta["options"]["models"], meta["options"]["scale"]) == ("hybrid", "large", 0.1)
    assert meta["summary"]["overall"]["counts"]["scheduled"] == 5
    deployments = (tmp_path / RECORDED / "deployments.csv").read_text().splitlines()
    assert deployments[1].endswith(",2,2,32 28,int4,native,1,3 0 1 2,10.0000 10.0000 10.0000 10.0000,,38.000000")


def test_a_replay_differs_by_at_most_two_ticks(maveriq: Maveriq, both: None) -> None:
    ended = maveriq(f"compare {REPLAYED} {RECORDED} --tolerance mean=2%,p95=2%,request=2,service-p99=0,slo=0pt,ks=40")
    assert (ended.code, ended.err) == (0, "")
    for words in ("Errors by model", "Deployments", "equal", "Requests waiting", "matched by id", "MISSED"):
        assert (words in ended.out) == (words != "MISSED"), words
    assert max(map(len, ended.out.splitlines())) <= 80


def test_a_recorded_run_by_its_name_is_the_imported_folder(maveriq: Maveriq, both: None) -> None:
    by_name, by_folder = (json.loads(maveriq(f"compare {REPLAYED} {real} --json").out) for real in (RUN, RECORDED))
    assert by_name.pop("real") != by_folder.pop("real")
    # A folder has no endpoints of refused requests, and GPU memory in KiB.
    assert by_name == by_folder


def test_json_has_every_figure(maveriq: Maveriq, both: None) -> None:
    found = json.loads(maveriq(f"compare {REPLAYED} {RECORDED} --json --tolerance mean=2%").out)
    assert set(found["overall"]["differences"]) == set(UNITS) - {"ks", "request"}
    assert set(found["models"]) == {"llama-2-70b", "falcon-40b", "llama-2-7b"}
    assert (found["within_tolerance"], found["unmatched"]) == (True, "")
    assert found["checks"][0]["name"] == "mean"
    assert [deployment["same_gpus"] for deployment in found["deployments"]] == [True, True]
    assert found["sim_saturation"]["label"] == found["real_saturation"]["label"] == "stable"


@pytest.mark.parametrize("form", ["", "--json"])
def test_a_missed_tolerance_is_exit_code_1_after_the_results(maveriq: Maveriq, both: None, form: str) -> None:
    ended = maveriq(f"compare {REPLAYED} {RECORDED} --tolerance mean=0.0001%,p95=50% {form}")
    assert ended.code == 1
    assert ended.err == "maveriq: out of tolerance: mean\n"
    if form:
        assert [check["met"] for check in json.loads(ended.out)["checks"]] == [False, True]
    else:
        assert "MISSED" in ended.out


def test_runs_without_matching_requests_are_reported(maveriq: Maveriq, both: None) -> None:
    ended = maveriq(f"compare {REPLAYED} {BASELINE}")
    assert ended.code == 0
    assert "cannot be matched one by one (5 requests against 2): distributions only" in " ".join(ended.out.split())
    assert "different" in ended.out


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_plot(maveriq: Maveriq, both: None, tmp_path: Path, name: str) -> None:
    before = everything_in(tmp_path)
    ended = maveriq(f"compare {REPLAYED} {RECORDED} --plot {name}")
    assert ended.code == 0
    assert f"plot: {name}" in ended.out
    assert everything_in(tmp_path).keys() - before.keys() == {name}
    assert (tmp_path / name).stat().st_size > 5_000


def test_a_plot_that_cannot_be_written_leaves_no_files(maveriq: Maveriq, both: None, tmp_path: Path) -> None:
    before = everything_in(tmp_path)
    ended = maveriq(f"compare {REPLAYED} {RECORDED} --plot nowhere/a.png")
    assert ended.code == 2
    assert "plot 'nowhere/a.png' cannot be written" in ended.only_line
    assert everything_in(tmp_path) == before


def test_all_runs_are_checked_before_any_is_written(maveriq: Maveriq, tmp_path: Path) -> None:
    (tmp_path / "rec" / BASELINE).mkdir(parents=True)
    (tmp_path / "rec" / BASELINE / "notes.txt").write_text("mine")
    ended = maveriq("testbed import --all --out rec")
    assert ended.code == 2
    assert "holds files that are no run" in ended.only_line
    assert not (tmp_path / RECORDED).exists()


def test_a_run_name_needs_the_recordings(
    maveriq: Maveriq, both: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAVERIQ_DATA", str(tmp_path / "nowhere"))
    ended = maveriq(f"compare {REPLAYED} {RUN}")
    assert ended.code == 2
    assert f"run folder '{RUN}' does not exist" in ended.only_line
    monkeypatch.setenv("MAVERIQ_DATA", str(tmp_path / "data"))
    ended = maveriq(f"compare {REPLAYED} MaverIQ_tin")
    assert "or give the folder of a run" in ended.only_line


def test_runs_are_labelled_by_name_and_kind(maveriq: Maveriq, both: None) -> None:
    ended = maveriq(f"compare {REPLAYED} {RECORDED}")
    lines = ended.out.splitlines()
    assert lines[:2] == [f"replayed {REPLAYED}", f"recorded {RECORDED}"]
    assert "#1" in ended.out  # the folders have the same name
    assert " real" not in ended.out
    labels = json.loads(maveriq(f"compare {REPLAYED} {RECORDED} --json").out)["labels"]
    assert labels == [{"name": RUN, "kind": "replayed"}, {"name": RUN, "kind": "recorded"}]


def test_more_than_two_runs_are_compared_with_the_last(maveriq: Maveriq, both: None) -> None:
    ended = maveriq(f"compare {REPLAYED} {BASELINE} {RECORDED} --tolerance mean=2%")
    assert ended.code == 1
    assert ended.err == f"maveriq: out of tolerance: mean of {BASELINE}\n"
    for words in ("All requests", "Errors against", "Mean latency by model, s", "recorded"):
        assert words in ended.out, words
    assert max(map(len, ended.out.splitlines()[3:])) <= 80
    found = json.loads(maveriq(f"compare {REPLAYED} {BASELINE} {RECORDED} --json").out)
    assert [run["kind"] for run in found["runs"]] == ["replayed", "recorded", "recorded"]
    assert (found["reference"], len(found["comparisons"])) == (RECORDED, 2)
    assert found["comparisons"][0]["overall"]["differences"]["mean"]["error"] == pytest.approx(0, abs=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("a", "compare takes at least two runs, not only 'a'"),
        ("a b c --plot x.png", "--plot draws two runs, not 3"),
    ],
)
def test_runs_that_cannot_be_compared(maveriq: Maveriq, arguments: str, words: str) -> None:
    ended = maveriq(f"compare {arguments}")
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.only_line
