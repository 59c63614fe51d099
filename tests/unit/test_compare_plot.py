"""Plots of a comparison: curves, text plots, and images."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from record_fixtures import run_record, single_server, table

from maveriq.domain.records import RunRecord
from maveriq.errors import InputError
from maveriq.report.compare import compare
from maveriq.report.compare_plot import comparison_figure, write_plot
from maveriq.report.curves import Curves, latency_curves, queue_curves
from maveriq.report.text_plot import dots_across, overlay

POINTS = dots_across(60)


def queue(load: float, requests: int = 200) -> RunRecord:
    return single_server(np.full(requests, 1.0), np.full(requests, load))


def pictures(sim: RunRecord, real: RunRecord) -> list[Curves]:
    latencies = latency_curves(sim, real, points=POINTS)
    assert latencies is not None
    return [latencies, queue_curves(sim, real, points=POINTS)]


def plot_of(curves: Curves, *, ascii_only: bool = True, rows: int = 8) -> list[str]:
    lines = overlay(curves, rows=rows, ascii_only=ascii_only).plain.split("\n")
    return [line.partition("|" if ascii_only else "│")[2] for line in lines[2 : rows + 2]]


def test_a_distribution_rises_from_0_to_1() -> None:
    latencies, _ = pictures(queue(1.5), queue(1.2))
    for shares in (latencies.sim, latencies.real):
        assert (np.diff(shares) >= 0).all()
        assert shares[-1] == 1
    assert (latencies.sim <= latencies.real).all()  # longer latencies lie to the right


def test_a_queue_is_shown_with_its_highest_peak() -> None:
    overloaded, idle = queue(1.5), queue(0.5)
    _, waiting = pictures(overloaded, idle)
    assert waiting.top == waiting.sim.max() == 67  # of 200 requests in 200 s, 133 have started
    assert waiting.real.max() <= 1
    assert waiting.x[waiting.sim.argmax()] == pytest.approx(200, abs=4)  # when the last had arrived
    assert waiting.x[-1] == pytest.approx(overloaded.ended_us / 1e6)


def test_runs_that_completed_nothing_have_no_distribution() -> None:
    nothing = run_record(table([]))
    assert latency_curves(nothing, queue(0.5), points=POINTS) is None
    assert queue_curves(nothing, nothing, points=POINTS).top == 1
    assert "Requests waiting" in overlay(queue_curves(nothing, nothing, points=POINTS), rows=4, ascii_only=False).plain


def test_every_line_fits_the_width_and_every_column_has_the_line() -> None:
    for curves, ascii_only in product(pictures(queue(1.5), queue(1.2)), (True, False)):
        text = overlay(curves, rows=8, ascii_only=ascii_only).plain
        assert max(map(len, text.split("\n")[1:])) <= 60
        assert text.isascii() == ascii_only
    columns = list(zip(*plot_of(pictures(queue(1.5), queue(1.2))[1]), strict=True))
    assert len(columns) == POINTS // 2
    assert all("*" in column for column in columns)


def test_line_and_area_differ_without_colour() -> None:
    above = plot_of(pictures(queue(1.5), queue(1.2))[1])
    below = plot_of(pictures(queue(1.2), queue(1.5))[1])
    assert sum(line.count(":") for line in above) < sum(line.count(":") for line in below)
    # The line is above the smaller area, and within the larger one.
    peak = max(range(len(above[0])), key=lambda at: sum(line[at] == "*" for line in above[:2]))
    assert "".join(line[peak] for line in above).lstrip()[0] == "*"
    assert "".join(line[peak] for line in below).lstrip()[0] == ":"


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    sim, real = queue(1.5), queue(1.2)
    for name, start in (("a.png", b"\x89PNG"), ("b.SVG", b"<?xml")):
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_plot(tmp_path / folder / name, compare(sim, real), pictures(sim, real), title="a $x_1$ against b")
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "a.png", "b.SVG", "b.SVG", "one", "two"]


def test_a_plot_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    sim, real = queue(1.5), queue(1.2)
    (tmp_path / "a.png").write_bytes(b"older")

    def stopped(_: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_plot(tmp_path / "a.png", compare(sim, real), pictures(sim, real), title="", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"older"}


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.jpg", "must end in .png or .svg"), ("a", "must end in"), ("no/a.png", "cannot be written: No such file")],
)
def test_a_plot_that_cannot_be_written(tmp_path: Path, name: str, words: str) -> None:
    run = queue(0.5)
    with pytest.raises(InputError, match=words):
        write_plot(tmp_path / name, compare(run, run), pictures(run, run), title="")
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_has_a_figure_and_tables_for_notebooks() -> None:
    sim, real = queue(1.5), queue(1.2)
    comparison = compare(sim, real)
    figure = comparison_figure(comparison, pictures(sim, real), title="a against b")
    assert len(figure.axes) == 2
    assert "Errors by model" in comparison._repr_html_()
    assert comparison.to_dict()["overall"]["ks"] == comparison.overall.ks
