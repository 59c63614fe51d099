"""Draw docs/images/live.svg and docs/images/sim.svg from a run of `maveriq sim`.

Usage: python scripts/render_readme_images.py [FOLDER]

The code of the terminal output draws the pictures. They do not depend on the machine: figures come from simulated time,
and the snapshot is taken at a fixed number of completed requests.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme

from maveriq.domain.progress import Progress
from maveriq.domain.records import RunRecord
from maveriq.report.formatting import UNICODE
from maveriq.report.live import Canvas, History, frame
from maveriq.report.metrics import summarise
from maveriq.report.results import results_view
from maveriq.report.saturation import assess_saturation
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate

_WIDTH = 118  # a wide terminal, so that the results need fewer tables
_HEIGHT = 40
_CELL = 12.2  # width of a character in rich's pictures
_SHOWN_SHARE = 0.6  # of the requests; by then all models are up
_IMAGES = Path(__file__).parent.parent / "docs" / "images"
_FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_THEME = TerminalTheme(
    (13, 17, 23),
    (201, 209, 217),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255), (188, 140, 255), (57, 197, 207),
     (177, 186, 196)],
    [(110, 118, 129), (255, 161, 152), (86, 211, 100), (227, 179, 65), (121, 192, 255), (210, 168, 255), (86, 212, 221),
     (240, 246, 252)],
)  # fmt: skip


class _Camera:
    """Follows a run and keeps one frame of its live view."""

    def __init__(self) -> None:
        self._history = History()
        self.picture: RenderableType | None = None

    def wants_update(self) -> bool:
        return True

    def update(self, progress: Progress) -> None:
        self._history.add(progress)
        if self.picture is None and progress.completed >= _SHOWN_SHARE * progress.total:
            canvas = Canvas(width=_WIDTH, height=_HEIGHT, glyphs=UNICODE)
            # The whole run takes about a second, so the remaining time rounds to 0:00.
            self.picture = frame(progress, self._history, left_s=0.0, canvas=canvas)


def main(folder: Path) -> None:
    """Simulate a run and draw both pictures."""
    camera = _Camera()
    system = build_system(Options())
    run = simulate(system, camera)
    folder.mkdir(parents=True, exist_ok=True)
    if camera.picture is not None:
        (folder / "live.svg").write_text(_svg("while it runs", camera.picture), encoding="utf-8")
    (folder / "sim.svg").write_text(_svg("maveriq sim", _results(run, system.options)), encoding="utf-8")


def _results(run: RunRecord, options: Options | None) -> RenderableType:
    saturation = assess_saturation(run, options=options)
    return results_view(summarise(run), saturation, run.deployments, width=_WIDTH)


def _svg(title: str, picture: RenderableType) -> str:
    console = Console(
        record=True, width=_WIDTH, height=_HEIGHT, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(picture)
    svg = console.export_svg(title=title, theme=_THEME, unique_id="maveriq")
    # Use the reader's fonts, so that the page needs no other server.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("font-family: Fira Code, monospace", f"font-family: {_FONTS}")
    return re.sub(r'x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"([^>]*)>((?:&#160;)+)', _indented, svg) + "\n"


def _indented(found: re.Match[str]) -> str:
    """Move text right by its leading blanks, which some viewers drop."""
    x, y, length, rest, blanks = found.groups()
    shift = blanks.count("&#160;") * _CELL
    return f'x="{float(x) + shift:g}" y="{y}" textLength="{float(length) - shift:g}"{rest}>'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=_IMAGES, help="output folder (default: docs/images)")
    main(parser.parse_args().folder)
