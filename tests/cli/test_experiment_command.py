"""`maveriq experiment` and `maveriq data`: what they list and refuse, and what they do without measured data."""

import json
from pathlib import Path

import pytest
from command_results import Maveriq

from maveriq.experiment.definition import Catalog, points_of


def test_the_list_says_how_many_runs_each_experiment_has(maveriq: Maveriq) -> None:
    listed = json.loads(maveriq("experiment list --json").out)
    catalog = Catalog()
    assert [each["name"] for each in listed] == list(catalog.names)
    assert {each["name"]: each["runs"] for each in listed} == {
        name: len(list(points_of(catalog.read(name)))) for name in catalog.names
    }


def test_measured_experiments_say_what_they_lack(
    maveriq: Maveriq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MAVERIQ_DATA", str(tmp_path / "data"))
    ended = maveriq("experiment profiling --json")
    [answer] = json.loads(ended.out)
    assert ended.code == 0
    assert answer["verdict"].startswith("Not compared: folder ")
    assert "maveriq data status" in answer["verdict"]
    assert {figure["published"] for figure in answer["figures"]} >= {3.8, 18, 2.5}
    assert {figure["simulated"] for figure in answer["figures"]} == {None}
    assert [path.name for path in (tmp_path / "evaluation" / "profiling").iterdir()] == ["experiment.json"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("experiment larg", "unknown experiment 'larg'; did you mean 'large'?"),
        ("experiment large --data nowhere", "folder 'nowhere' does not exist"),
        ("data status --data nowhere", "folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line(maveriq: Maveriq, command: str, says: str) -> None:
    ended = maveriq(command)
    assert ended.code == 2
    assert says in ended.only_line


def test_data_status_names_repository_checksum_and_commands(maveriq: Maveriq, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    by_name = {each["name"]: each for each in json.loads(maveriq("data status --data data --json").out)}
    azure = by_name["azure"]
    assert azure["repository"] == "https://github.com/Azure/AzurePublicDataset"
    assert {file["state"] for file in azure["files"]} == {"missing"}
    assert all(len(file["sha256"]) == 64 for file in azure["files"])
    assert any(line.startswith("git clone ") for line in azure["unpack"])
    assert not azure["complete"]
