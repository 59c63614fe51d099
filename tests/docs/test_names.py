"""Every module, file and dotted name that the documents mention exists."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if path.is_file()
)
QUOTED = re.compile(r"`([^`\n]+)`")
SOURCE = re.compile(r"(?<![\w:/])[\w./-]+\.py\b")
FOLDER = re.compile(r"(?<![\w/.])maveriq/[\w/.-]+(?![\w/.*-])")
DOTTED = re.compile(r"(?<![/\w.-])maveriq(?:\.\w+)+")
RELATIVE_TO = (ROOT, ROOT / "maveriq", ROOT / "maveriq" / "policy" / "alpaserve", ROOT / "docs")
OF_THE_READER = re.compile(r"FILE|NAME|mine|my")


def text_of(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@functools.cache
def top_level_names(path: Path) -> set[str]:
    """The names that a module defines or imports."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


@functools.cache
def public_names() -> str:
    return (ROOT / "maveriq" / "__init__.py").read_text(encoding="utf-8")


def exists(dotted: str) -> bool:
    """Whether `maveriq.a.b.Name` is a package, a module, or a name that a module defines."""
    folder, (_, *parts) = ROOT / "maveriq", dotted.split(".")
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    if not parts:
        return True
    module = folder / f"{parts[0]}.py"
    if module.is_file():
        return len(parts) == 1 or parts[1] in top_level_names(module)
    if folder == ROOT / "maveriq":  # the public API imports its names when they are used
        return f'"{parts[0]}"' in public_names()
    return parts[0] in top_level_names(folder / "__init__.py")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_that_are_named_exist(document: Path) -> None:
    for quoted in QUOTED.findall(text_of(document)):
        for name in (*SOURCE.findall(quoted), *FOLDER.findall(quoted)):
            if not OF_THE_READER.search(name):
                assert any((base / name).exists() for base in (*RELATIVE_TO, ROOT / document.parent)), (
                    f"{document} names {name}"
                )


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_names_of_the_package_exist(document: Path) -> None:
    for dotted in DOTTED.findall(text_of(document)):
        assert exists(dotted), f"{document} names {dotted}"


STEP = re.compile(r"^\d+\. (.+(?:\n   .+)*)", re.MULTILINE)
NAME = re.compile(r"[A-Za-z_]\w+")


@pytest.mark.parametrize("step", STEP.findall(text_of(Path("docs/reading-guide.md"))), ids=lambda step: step[:40])
def test_a_step_of_the_reading_guide_names_what_its_files_have(step: str) -> None:
    quoted = QUOTED.findall(step)
    files = [ROOT / name for name in quoted if SOURCE.fullmatch(name)]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for name in filter(NAME.fullmatch, quoted):
        assert not files or re.search(rf"\b{name}\b", text), f"the files of this step have no {name}"


def test_the_reading_guide_lists_every_layer() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = " ".join(project["tool"]["importlinter"]["contracts"][0]["layers"])
    packages = text_of(Path("docs/reading-guide.md")).partition("## Packages")[2].partition("- ")[0]
    for name in re.findall(r"maveriq\.(\w+)", layers):
        assert re.search(rf"\b{name}\b", packages), f"the list of packages has no {name}"
