"""The wheel check detects what it has to detect."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("check_wheel", Path(__file__).parents[2] / "scripts" / "check_wheel.py")
check_wheel = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_wheel)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "maveriq/a.py",
        "maveriq/data/b.csv",
        "maveriq/__pycache__/a.pyc",
        "traces/c.csv",
        "tests/d.py",
        "experiments/study/e.toml",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(check_wheel, "ROOT", tmp_path)
    return tmp_path


def wheel(folder: Path, names: list[str]) -> Path:
    path = folder / "maveriq-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


WHOLE = [
    "maveriq/a.py", "maveriq/data/b.csv", "maveriq/traces/c.csv", "maveriq/studies/e.toml",
    "maveriq-1.dist-info/METADATA",
]  # fmt: skip


def test_a_complete_wheel_passes(repository: Path) -> None:
    assert "1 of traces" in check_wheel.check_contents(wheel(repository, WHOLE))


@pytest.mark.parametrize("lost", ["maveriq/data/b.csv", "maveriq/traces/c.csv", "maveriq/studies/e.toml"])
def test_a_missing_file_of_the_wheel_is_named(repository: Path, lost: str) -> None:
    with pytest.raises(check_wheel.CheckError, match=lost):
        check_wheel.check_contents(wheel(repository, [name for name in WHOLE if name != lost]))


@pytest.mark.parametrize("stray", ["tests/d.py", "maveriq/tests/d.py", "traces/c.csv"])
def test_an_unexpected_file_is_named(repository: Path, stray: str) -> None:
    with pytest.raises(check_wheel.CheckError, match=stray):
        check_wheel.check_contents(wheel(repository, [*WHOLE, stray]))


def run_folder(runs: Path, statuses: list[str], counts: dict[str, int]) -> Path:
    folder = runs / "one"
    folder.mkdir(parents=True)
    (folder / "requests.csv").write_text("\n".join(["status", *statuses]))
    (folder / "run.json").write_text(json.dumps({"summary": {"overall": {"counts": counts}}}))
    (folder / "deployments.csv").touch()
    (folder / "gpus.csv").touch()
    return folder


def test_a_run_whose_files_agree_passes(tmp_path: Path) -> None:
    run_folder(tmp_path, ["completed", "refused"], {"scheduled": 2, "completed": 1, "refused": 1, "failed": 0})
    assert check_wheel.check_run(tmp_path).startswith("2 requests, 1 completed")


@pytest.mark.parametrize(
    ("statuses", "counts", "complaint"),
    [
        (["completed"], {"scheduled": 2, "completed": 1}, "do not add up"),
        (["completed"], {"scheduled": 2, "completed": 2}, r"requests\.csv has"),
        ([], {"scheduled": 0, "completed": 0}, "no request"),
    ],
)
def test_a_run_whose_files_disagree_fails(
    tmp_path: Path, statuses: list[str], counts: dict[str, int], complaint: str
) -> None:
    run_folder(tmp_path, statuses, counts)
    with pytest.raises(check_wheel.CheckError, match=complaint):
        check_wheel.check_run(tmp_path)


def test_a_run_without_a_file_fails(tmp_path: Path) -> None:
    (run_folder(tmp_path, ["completed"], {"scheduled": 1, "completed": 1}) / "gpus.csv").unlink()
    with pytest.raises(check_wheel.CheckError, match="holds deployments"):
        check_wheel.check_run(tmp_path)


def test_no_run_fails(tmp_path: Path) -> None:
    with pytest.raises(check_wheel.CheckError, match="0 run folders"):
        check_wheel.check_run(tmp_path / "runs")
