"""Where runs are saved: no run is replaced unasked, and different options give different folders."""

import json
import threading
from pathlib import Path

import pytest
from command_results import Maveriq, put

from maveriq.cli.results import default_folder
from maveriq.exec.local_machine import EngineOptions
from maveriq.report.run_folder import free_folder, write_folder
from maveriq.scenario.options import Options

HEAD = "arrival_s,endpoint,prompt_tokens,output_tokens\n"
ONE = 'name = "one"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n'
SIM = "sim --trace t.csv --models m.toml -q"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    put(tmp_path, {"t.csv": f"{HEAD}300,1,10,20\n", "m.toml": ONE})


def seed_of(folder: Path) -> int:
    seed: int = json.loads((folder / "run.json").read_text())["seed"]
    return seed


def test_a_second_run_takes_the_next_name(maveriq: Maveriq, tmp_path: Path) -> None:
    for _ in range(2):
        assert maveriq(SIM).code == 0
    assert maveriq(f"{SIM} --seed 7").code == 0
    assert maveriq(f"{SIM} --overwrite").code == 0
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == [
        "hybrid-min-cost-m-t", "hybrid-min-cost-m-t-2", "hybrid-min-cost-m-t-seed-7",
    ]  # fmt: skip


def test_a_named_folder_is_replaced_only_when_asked(maveriq: Maveriq, tmp_path: Path) -> None:
    assert maveriq(f"{SIM} --out mine").code == 0
    refused = maveriq(f"{SIM} --out mine --seed 7")
    assert refused.code == 2
    assert "exists already" in refused.only_line
    assert "--overwrite" in refused.only_line
    assert seed_of(tmp_path / "mine") == 42
    assert maveriq(f"{SIM} --out mine --seed 7 --overwrite").code == 0
    assert seed_of(tmp_path / "mine") == 7


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(), "hybrid-min-cost-large-code-0.4"),
        (Options(scale=0.2, seed=7), "hybrid-min-cost-large-code-0.2-seed-7"),
        (Options(trace="t.csv", float16_only=True), "hybrid-min-cost-large-t-float16-only"),
        (Options(trace="code.csv"), "hybrid-min-cost-large-code.csv"),
        (Options(fail=("gpu=3@600s", "gpu=4@600s")), "hybrid-min-cost-large-code-0.4-fail-gpu=3@600s-fail-gpu=4@600s"),
    ],
)
def test_names_say_what_differs(options: Options, name: str) -> None:
    assert default_folder(options) == Path("runs") / name


def test_names_of_runs_on_engines() -> None:
    engines = EngineOptions(backend="emulated", time_scale=0.02, engine_python=("emulated=/opt/python",))
    name = "hybrid-min-cost-large-code-0.4-emulated-time-scale-0.02"
    assert default_folder(Options(), engines) == Path("runs") / name


def test_different_options_have_different_names() -> None:
    options = [
        Options(trace="a/t.csv"), Options(trace="b/t.csv"), Options(trace="a_t.csv"), Options(trace="t.csv"),
        Options(trace="t"), Options(models="a/large.toml"), Options(models="large.toml"), Options(),
        Options(policy="a.py:f"), Options(policy="a.py_f"), Options(trace="\x1b.csv"), Options(trace="\x1c.csv"),
        *(Options(fail=tuple(f"gpu={number}@600s" for number in range(count))) for count in range(1, 60)),
    ]  # fmt: skip
    names = [default_folder(each).name for each in options]
    assert len(set(names)) == len(names)
    assert all(len(name) < 180 and name.isprintable() and "/" not in name for name in names)


def test_folders_written_at_the_same_time_all_stay(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def write() -> None:
        def fill(fresh: Path) -> None:
            (fresh / "x").write_text("x")
            barrier.wait()

        write_folder(tmp_path / "run", fill, overwrite=False)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run", *(f"run-{number}" for number in range(2, 9))]
    assert not list(tmp_path.glob(".run*"))


def test_an_empty_folder_and_no_folder_are_free(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "new").mkdir()
    assert free_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "new" / "x").touch()
    (tmp_path / "new-2").touch()
    assert free_folder(tmp_path / "new") == tmp_path / "new-3"
