"""Writes a page as one HTML file that needs nothing else and that may load nothing.

A Content-Security-Policy allows exactly the scripts in the file, by their hashes, and no connection of any kind. Names
of models, paths and notes are hostile input: the template escapes all text, and the data are JSON without any character
that could end their element.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from maveriq import __version__
from maveriq.errors import MaveriqError
from maveriq.files import as_path, written_whole
from maveriq.report.page.page import Page, cell_spans, table_sections

_ASSETS = Path(__file__).parent / "assets"
_BUNDLES = ("bokeh.min.js", "bokeh-api.min.js")
_ESCAPES: Mapping[str, str] = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_INSTALL = "reports and the dashboard need Bokeh and Jinja2; pip install 'maveriq[report]'"


@dataclass(frozen=True, slots=True)
class _Script:
    text: str

    @property
    def source(self) -> str:
        """The hash by which the policy of the page allows it."""
        digest = hashlib.sha256(self.text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveShell:
    """A page without data, which asks its server for them.

    Args:
        html: the page.
        policy: its Content-Security-Policy, for a header.
    """

    html: str
    policy: str


def to_html(page: Page) -> str:
    """Return a page as HTML.

    Raises:
        MaveriqError: Bokeh or Jinja2 is not installed.
    """
    check_installed()
    scripts = _scripts()
    data = {chart.chart_id: chart.to_json() for chart in page.charts}
    return _rendered(page, scripts, policy=_policy(scripts), data=as_script_data(data), live_data="")


def to_live_shell(page: Page, *, data_path: str) -> LiveShell:
    """Return the HTML of a page that shows what its server tells it, see `live_update`.

    Args:
        page: its title and subtitle; it has no sections yet.
        data_path: where the script asks for updates: a path from the page's own.

    Raises:
        MaveriqError: Bokeh or Jinja2 is not installed.
    """
    check_installed()
    scripts = _scripts()
    policy = f"{_policy(scripts)}; connect-src 'self'"
    html = _rendered(page, scripts, policy=policy, data="{}", live_data=data_path)
    return LiveShell(html=html, policy=f"{policy}; frame-ancestors 'none'")


def live_update(page: Page) -> dict[str, Any]:
    """Return what the script of a live page needs to show a page.

    `main` and `links` are HTML. `structure` changes with the charts and the models: while it stays, the script changes
    only the figures.

    Raises:
        MaveriqError: Jinja2 is not installed.
    """
    parts: Any = _environment().get_template("parts.html.jinja").module
    structure = [[section.section_id, [chart.chart_id for chart in section.charts]] for section in page.sections]
    return {
        "structure": json.dumps([structure, list(page.models), bool(page.notes)], ensure_ascii=False),
        "subtitle": page.subtitle,
        "main": str(parts.main(page)),
        "links": str(parts.links(page)),
        "charts": {chart.chart_id: chart.to_json() for chart in page.charts},
    }


def _rendered(page: Page, scripts: list[_Script], *, policy: str, data: str, live_data: str) -> str:
    template = _environment().get_template("page.html.jinja")
    text: str = template.render(
        page=page,
        policy=policy,
        style=_read("page.css"),
        scripts=[script.text for script in scripts],
        data=data,
        live_data=live_data,
        version=__version__,
        library=f"BokehJS {metadata.version('bokeh')}",
    )
    return text


@lru_cache(maxsize=1)
def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise MaveriqError(_INSTALL) from None
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(sections_of=table_sections, spans_of=cell_spans)
    return environment


def _scripts() -> list[_Script]:
    return [*map(_Script, _library()), _Script(_read("page.js"))]


def check_installed() -> None:
    """Check, before long work, that a page can be made.

    Raises:
        MaveriqError: Bokeh or Jinja2 is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("bokeh", "jinja2")):
        raise MaveriqError(_INSTALL)


def write_page(page: Page, path: str | Path, *, overwrite: bool) -> Path:
    """Write a page as an HTML file, whole or not at all, and return where it is.

    Raises:
        InputError: the file is there already and may not be replaced, or cannot be written.
        MaveriqError: Bokeh or Jinja2 is not installed; the disk is full.
    """
    file = as_path(path, "path")
    text = to_html(page)
    with written_whole(file, what="report", overwrite=overwrite) as partial:
        # A path of the user's may hold bytes that are no UTF-8; the report stays readable without them.
        partial.write_bytes(text.encode("utf-8", errors="replace"))
    return file


def as_script_data(values: Mapping[str, Any]) -> str:
    """Return values as JSON that may stand in a `script` element: nothing in it can end the element."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(character): escape for character, escape in _ESCAPES.items()})


def _policy(scripts: list[_Script]) -> str:
    allowed = " ".join(script.source for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _library() -> list[str]:
    """Return the scripts of Bokeh's own package, which has them with their licence."""
    found = importlib.util.find_spec("bokeh")
    if found is None or found.origin is None:
        raise MaveriqError(_INSTALL)
    folder = Path(found.origin).parent / "server" / "static" / "js"
    try:
        return [(folder / name).read_text(encoding="utf-8") for name in _BUNDLES]
    except OSError as error:
        raise MaveriqError(f"the installed Bokeh lacks its scripts ({error}); {_INSTALL}") from None


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
