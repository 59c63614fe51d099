"""The navigation of the site has every page. `make docs` checks the rest: links, anchors, what pages load."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    times = Counter(re.findall(r"^ +- .+: (\S+)$", navigation, re.MULTILINE))
    assert {page: times[page] for page in PAGES if times[page] != 1} == {}, "see `nav` in mkdocs.yml"


def test_decisions_are_numbered_as_their_files() -> None:
    decisions = [page for page in PAGES if page.startswith("decisions/")]
    numbers = [int(Path(page).name[:4]) for page in decisions]
    assert len(set(numbers)) == len(numbers), "two decisions have one number"
    for page, number in zip(decisions, numbers, strict=True):
        assert (ROOT / "docs" / page).read_text(encoding="utf-8").startswith(f"# {number}. "), page
