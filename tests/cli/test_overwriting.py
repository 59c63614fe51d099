"""No command overwrites what exists unless it is asked to."""

from pathlib import Path

import pytest
from command_results import Maveriq, everything_in, put
from testbed_fixtures import RUN, put_testbed

from maveriq.errors import InputError
from maveriq.files import written_whole

RUN_TABLES = ("requests.csv", "deployments.csv", "gpus.csv", "run.json")
RUN_FOLDER = {f"a/{name}": "mine" for name in RUN_TABLES}
RECORDED_FOLDER = {f"{RUN}/{name}": "mine" for name in RUN_TABLES}
PROFILE = {
    f"a/{name}": "mine" for name in ("profile.toml", "hardware.toml", "load_fit.toml", "measured.csv", "models.toml")
}
TRACE = {"t.csv": "arrival_s,endpoint,prompt_tokens,output_tokens\n300,1,10,20\n"}


@pytest.fixture(autouse=True)
def _testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_testbed(tmp_path / "data" / "testbed")
    monkeypatch.setenv("MAVERIQ_DATA", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("command", "files", "named"),
    [
        ("sim --trace t.csv --quiet --out a", RUN_FOLDER, "/a'"),
        ("run --backend emulated --trace t.csv --quiet --out a", RUN_FOLDER, "/a'"),
        (f"testbed import {RUN} --out .", RECORDED_FOLDER, ""),
        (f"testbed replay {RUN} --out .", RECORDED_FOLDER, ""),
        ("profile gptj-6b --configuration 1x1 --out a", PROFILE, "/a'"),
        ("trace export --out s.csv", {"s.csv": "mine"}, "schedule 's.csv'"),
        (f"compare {RUN} {RUN} --plot a.png", {"a.png": "mine"}, "plot 'a.png'"),
        (f"compare {RUN} {RUN} --plot a.svg", {"a.svg": "mine"}, "plot 'a.svg'"),
        ("fit t.csv --out a", {"a/calibrated.toml": "mine"}, "fitted file 'a/calibrated.toml'"),
        ("fit t.csv --out a", {"a/calibrated-without-gptj-6b.toml": "mine"}, "fitted file"),
        ("fit t.csv --out a", {"a/exponents.csv": "mine"}, "fitted file"),
    ],
)
def test_what_exists_is_refused(
    maveriq: Maveriq, tmp_path: Path, command: str, files: dict[str, str], named: str
) -> None:
    put(tmp_path, files | TRACE)
    before = everything_in(tmp_path)
    ended = maveriq(command)
    assert ended.code == 2
    assert "exists already; name another, or replace it with --overwrite" in ended.only_line
    assert named in ended.only_line
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "files"),
    [
        ("sim --trace t.csv --quiet --out a", RUN_FOLDER),
        (f"testbed import {RUN} --out .", RECORDED_FOLDER),
        (f"testbed replay {RUN} --out .", RECORDED_FOLDER),
        ("trace export --scale 0.05 --out s.csv", {"s.csv": "mine"}),
        (f"compare {RUN} {RUN} --plot a.png", {"a.png": "mine"}),
    ],
)
def test_what_exists_is_replaced_when_asked(
    maveriq: Maveriq, tmp_path: Path, command: str, files: dict[str, str]
) -> None:
    put(tmp_path, files | TRACE)
    assert maveriq(f"{command} --overwrite").code == 0
    after = everything_in(tmp_path)
    assert all(after[name] != content.encode() for name, content in files.items())


def write(path: Path, text: str, *, meanwhile: str | None = None) -> None:
    with written_whole(path, what="table", overwrite=False) as partial:
        partial.write_text(text)
        if meanwhile is not None:
            path.write_text(meanwhile)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_another_process_makes_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, hard_links: bool
) -> None:
    if not hard_links:

        def unsupported(self: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", unsupported)
    path = tmp_path / "a.csv"
    write(path, "first")
    assert path.read_text() == "first"
    path.unlink()
    with pytest.raises(InputError, match=r"table .* exists already"):
        write(path, "second", meanwhile="of another process")
    assert path.read_text() == "of another process"
    assert [left.name for left in tmp_path.iterdir() if left.name.startswith(".")] == []


def test_a_link_to_nowhere_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="exists already"), written_whole(tmp_path / "link", what="x", overwrite=False):
        pass
    assert (tmp_path / "link").is_symlink()
