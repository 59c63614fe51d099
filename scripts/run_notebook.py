"""Runs notebooks of docs/examples and writes what their cells show into them.

Usage: python scripts/run_notebook.py docs/examples/NAME.ipynb ...

It needs no Jupyter. The last expression of a cell is shown as a notebook shows it: a picture of a figure, HTML of a
table, else text.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_DOTS_PER_INCH = 80


def main() -> None:
    """Run each notebook that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        run_cells(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run_cells(notebook: dict[str, Any], names: dict[str, object] | None = None) -> None:
    """Run the cells of a notebook in order, in one namespace, and replace their outputs."""
    names = {} if names is None else names
    count = 0
    with mpl.rc_context({"backend": "agg"}):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                shown = _run("".join(cell["source"]), names)
                cell["execution_count"] = count
                cell["outputs"] = [] if shown is None else [_output(shown, count)]


def _run(source: str, names: dict[str, object]) -> object:
    """Run a cell and return its last expression, None if it ends with a statement or a semicolon."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "cell", "exec"), names)  # noqa: S102  (the project's own notebooks)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), "cell", "exec"), names)  # noqa: S102
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
    return None if source.rstrip().endswith(";") else value


def _output(shown: object, count: int) -> dict[str, Any]:
    data: dict[str, object] = {}
    if isinstance(shown, Figure):
        png = io.BytesIO()
        shown.savefig(png, dpi=_DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
        data["image/png"] = base64.b64encode(png.getvalue()).decode()
        data["text/plain"] = ["figure"]
    else:
        html = getattr(shown, "_repr_html_", lambda: None)()
        if html:
            data["text/html"] = html.splitlines(keepends=True)
        data["text/plain"] = repr(shown).splitlines(keepends=True)
    return {"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"}


if __name__ == "__main__":
    main()
