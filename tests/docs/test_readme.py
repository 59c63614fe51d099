"""The documents are correct: commands run, and links and named tests exist."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_server import command_server

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("traces/*.md"))
    if path.is_file()
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST = re.compile(r"`(tests/\S+\.py)(?:::(\w+))?`")


def text_of(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: Path, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text_of(document)) if language in languages]


def scripts(document: Path) -> list[str]:
    return blocks(document, "sh", "console")


def commands(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("maveriq ")]


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    prose = BLOCK.sub("", text_of(document))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.fixture(scope="session")
def commands_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with command_server(tmp_path_factory.mktemp("commands")) as folder:
        yield folder


@pytest.mark.heavy
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if scripts(document)], ids=str)
def test_commands_run(document: Path, tmp_path: Path, commands_folder: Path) -> None:
    """Run all `sh` blocks of a document in a folder with the tables and docs of the clone.

    scripts/first_ten_minutes.py runs those of the README as processes of their own.
    """
    for folder in ("docs", "traces"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = os.pathsep.join([str(commands_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    script = "\n".join(["set -e", *scripts(document)])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if document.name == "README.md":
        written = {f"/{path.name}{'/' * path.is_dir()}" for path in tmp_path.iterdir()} - {"/docs/", "/traces/"}
        assert written <= set((ROOT / ".gitignore").read_text(encoding="utf-8").split()), "git sees these files"


@pytest.mark.heavy
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "python")], ids=str)
def test_python_runs(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every `python` block separately, in a folder with the examples of the docs."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    for block in blocks(document, "python"):
        exec(compile(block, str(document), "exec"), {})  # noqa: S102


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_blocks_that_are_not_run_contain_no_maveriq_command(document: Path) -> None:
    """Commands of maveriq are in blocks that are run, unless they need more than a clone."""
    for language, body in BLOCK.findall(text_of(document)):
        assert language, "say the language of a block, `text` if it has none"
        if language not in ("sh", "console"):
            assert not commands(body)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_resolve(document: Path) -> None:
    for target in LINK.findall(text_of(document)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        to = (ROOT / document).parent / file if file else ROOT / document
        assert to.exists(), f"{document} links to {target}"
        if anchor:
            assert anchor in anchors(to.resolve().relative_to(ROOT)), f"{document} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_tests_that_are_named_exist(document: Path) -> None:
    for file, function in TEST.findall(text_of(document)):
        assert (ROOT / file).is_file(), f"{document} names {file}"
        if function:
            assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{document} names {function}"


def test_every_section_of_the_spec_that_code_refers_to_is_there() -> None:
    sections = set(re.findall(r"^## (\d+)\. ", text_of(Path("docs/spec.md")), re.MULTILINE))
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "maveriq").rglob("*.py")]
    referred = {number for text in code for number in re.findall(r"SPEC (\d+)", text)}
    assert referred
    assert referred <= sections
