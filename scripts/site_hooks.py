"""What MkDocs does differently for the site of docs/: mkdocs.yml names this module under `hooks`.

- Pages from outside docs/ (the trace formats, the changelog) and notebooks are pages of the site.
- Links that lead out of docs/ go to those pages; to other files they become text, or links into the repository where
  mkdocs.yml has a `repo_url`.
- Anchors are those that GitHub makes, so that a link works in both places.
- A page that would load anything from another host fails.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("traces/README.md", "experiments/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
"""Pages of the site that are not in docs/, by their paths in the repository, which are also their paths in the site."""

PICTURES = (".png", ".svg")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make anchors as GitHub does."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def slug(title: str, separator: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", separator)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and a page for each notebook."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        notebook = json.loads(file.content_string)
        files.append(File.generated(config, f"{file.src_uri}.md", content=notebook_markdown(notebook)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to pages of the site."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if source in OUTSIDE else f"docs/{source}")

    def rewritten(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        in_repository = posixpath.normpath(posixpath.join(folder, path))
        uri = _uri(in_repository, files, config)
        if uri:
            to = posixpath.relpath(uri, posixpath.dirname(source) or ".")
            return f"{mark}[{text}]({to}{'#' + anchor if anchor else ''})"
        if not (ROOT / in_repository).exists():
            return found[0]  # MkDocs warns of it
        return f"[{text}]({config.repo_url}/blob/main/{in_repository})" if config.repo_url else text

    parts = re.split(f"({_FENCE.pattern})", markdown, flags=_FENCE.flags)
    return "".join(part if number % 2 else _LINK.sub(rewritten, part) for number, part in enumerate(parts))


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:  # noqa: ARG001  (MkDocs passes it)
    """Refuse a page that would load something from another host.

    Raises:
        PluginError: a script, style, picture or frame of another host.
    """
    found = re.search(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:)?//[^"]*"', output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def _uri(in_repository: str, files: Files, config: MkDocsConfig) -> str | None:
    """Return where the site has a file of the repository, None if nowhere; pictures are added."""
    uri = in_repository.removeprefix("docs/")
    if uri.endswith(".ipynb"):
        uri += ".md"
    if files.get_file_from_path(uri):
        return uri
    if in_repository.endswith(PICTURES) and (ROOT / in_repository).is_file():
        files.append(File.generated(config, in_repository, abs_src_path=str(ROOT / in_repository)))
        return in_repository
    return None


def notebook_markdown(notebook: dict[str, Any]) -> str:
    """Return a notebook as a page: texts, code, and what the cells show."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    return [f"```python\n{source}\n```", *(shown for output in cell["outputs"] if (shown := _output(output)))]


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        # Not a data URL in Markdown: Python-Markdown would read through all of it.
        png = "".join(data["image/png"]).replace("\n", "")
        base64.b64decode(png, validate=True)
        return f'<img alt="{"".join(data.get("text/plain", "figure"))}" src="data:image/png;base64,{png}">'
    if "text/html" in data:
        html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
        html = html.replace('<table border="1" class="dataframe">', "<table>")  # else the theme leaves it as it is
        return f"<div>{html}</div>".replace("\n\n", "\n")
    text = "".join(data.get("text/plain", output.get("text", "")))
    return f"```text\n{text.rstrip()}\n```" if text else ""
