"""The glossary has the code's words, and the code has no private synonyms."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| ([^|]+) \| [^|]+ \| `([\w/]+\.py)`: ([^|]+) \|$", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE
)
# No identifier contains these words: the glossary has a standard term for each.
FORBIDDEN = frozenset(
    {
        *("abandon", "arrangement", "belief", "believed", "calm", "chronicle", "crowd", "drama", "fleet", "hurry"),
        *("incarnation", "ledger", "neighbour", "neighbours", "nobody", "overseer", "patience", "putdown", "said"),
        *("slowness", "somebody", "stretch", "stretched", "told", "underway", "whoever", "worlds"),
    }
)
FOLDERS = ("maveriq", "tests", "benchmarks", "experiments", "scripts")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def words_of(path: Path) -> dict[str, set[str]]:
    """Return the words of the identifiers of a module, each with the identifiers that it is part of."""
    found: dict[str, set[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type == tokenize.NAME:
            for word in WORD.findall(token.string):
                found.setdefault(word.lower(), set()).add(token.string)
    return found


@pytest.mark.parametrize(("term", "file", "names"), ROWS, ids=[row[0] for row in ROWS])
def test_a_term_is_in_the_code(term: str, file: str, names: str) -> None:
    text = (ROOT / "maveriq" / file).read_text("utf-8")
    for name in re.findall(r"`(\w+)`", names):
        assert re.search(rf"^(class |def )?{name}\b", text, re.MULTILINE), f"{file} has no {name}"


def test_pre_commit_runs_make_lint() -> None:
    assert re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text("utf-8")) == ["make lint"]


def test_there_are_terms() -> None:
    assert len(ROWS) > 20


def test_no_identifier_has_a_forbidden_word() -> None:
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for word, identifiers in words_of(path).items():
            if word in FORBIDDEN:
                found.append(f"{path.relative_to(ROOT)}: {', '.join(sorted(identifiers))}")
    assert not found, "\n".join(found)
