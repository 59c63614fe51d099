"""The report of a sizing, from what `maveriq size --json` prints: the answer, how sure it is, and the sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from maveriq.errors import InputError
from maveriq.files import read_regular_file
from maveriq.report.formatting import NONE, figure, share
from maveriq.report.page.charts import Axis, Chart, Line, LineChart
from maveriq.report.page.page import Card, Page, Section, Verdict
from maveriq.report.view import Column, Table, number_column, row
from maveriq.sizing.size import SizeResult
from maveriq.sizing.view import size_json
from maveriq.tables import readable_error

_MAX_BYTES = 1 << 26


class FoundSize(msgspec.Struct, frozen=True, kw_only=True):
    """A size of a cluster that was simulated; figures are of the whole run, None where they do not apply."""

    gpus: int
    attainment: float
    attainment_ci95: float | None
    seeds: int
    verdict: str
    saturation: str
    deployments: list[str]
    bottlenecks: list[str]
    ttft_p95_s: float | None = None
    tpot_mean_s: float | None = None
    latency_p95_s: float | None = None
    throughput_per_s: float | None = None


class FoundKind(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for a kind of GPU; `gpus` and `usd_per_hour` (of the cluster) are None without one."""

    gpu: str
    gpus: int | None
    gpus_low: int
    gpus_high: int | None
    usd_per_hour: float | None
    gpus_if_10_percent_slower: int | None
    simulations: int
    sizes: list[FoundSize]


class FoundSizing(msgspec.Struct, frozen=True, kw_only=True):
    """What `maveriq size --json` prints."""

    attainment_target: float
    cheapest: str | None
    kinds: list[FoundKind]


def read_sizing(path: Path) -> FoundSizing:
    """Read what `maveriq size --json` printed.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    data = read_regular_file(path, what="sizing", max_bytes=_MAX_BYTES)
    try:
        found = msgspec.json.decode(data, type=FoundSizing)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        reason = readable_error(str(error))
        raise InputError(f"sizing {str(path)!r} is not what maveriq size --json prints: {reason}") from None
    if not all(kind.sizes for kind in found.kinds) or not found.kinds:
        raise InputError(f"sizing {str(path)!r} has no simulated size; run maveriq size --json again")
    return found


def sizing_page(sizing: FoundSizing, *, name: str) -> Page:
    """Return the report of a sizing; `name` is what it is called."""
    return Page(
        title=f"maveriq report: {name}",
        subtitle=f"sizing · {share(sizing.attainment_target)} of the requests must meet the SLOs",
        kind="sizing",
        verdicts=[_verdict(kind, sizing) for kind in _cheapest_first(sizing)],
        cards=[card for kind in _cheapest_first(sizing) for card in _cards(kind)],
        sections=[
            Section(section_id="sizes", title="Sizes", charts=list(_charts(sizing))),
            *(
                Section(
                    section_id=f"kind-{number}",
                    title=f"Sizes of {kind.gpu}",
                    tables=[_sizes_table(kind), *_deployments_tables(kind)],
                )
                for number, kind in enumerate(sizing.kinds, start=1)
            ),
        ],
    )


def page_of(result: SizeResult) -> Page:
    """Return the report of a sizing that was just made; it is that of its JSON."""
    return sizing_page(msgspec.convert(size_json(result), FoundSizing), name=Path(result.request.options.models).stem)


def _cheapest_first(sizing: FoundSizing) -> Sequence[FoundKind]:
    return sorted(sizing.kinds, key=lambda kind: kind.gpu != sizing.cheapest)


def _verdict(kind: FoundKind, sizing: FoundSizing) -> Verdict:
    target, sizes = share(sizing.attainment_target), {size.gpus: size for size in kind.sizes}
    if kind.gpus is None or kind.gpus not in sizes:
        most = max(kind.sizes, key=lambda size: size.gpus)
        return Verdict(
            headline=f"No cluster of up to {most.gpus} x {kind.gpu} meets the SLOs",
            sentences=[f"{most.gpus} meet them for {share(most.attainment)} of the requests; {target} are asked for."],
            tone="poor",
        )
    cost = "" if kind.usd_per_hour is None else f", ${kind.usd_per_hour:,.2f} an hour"
    is_cheapest = len(sizing.kinds) > 1 and kind.gpu == sizing.cheapest
    return Verdict(
        headline=f"{kind.gpus} x {kind.gpu}{cost}{' (the cheapest)' if is_cheapest else ''}",
        sentences=list(_sentences(kind, sizes, target)),
        tone="good",
    )


def _sentences(kind: FoundKind, sizes: dict[int, FoundSize], target: str) -> Iterator[str]:
    """Yield how well the answer meets the SLOs, how sure it is, what holds back the next smaller size, and what if."""
    answer = kind.gpus or 0
    yield f"They meet the SLOs for {share(sizes[answer].attainment)} of the requests; {target} are asked for."
    if (kind.gpus_low, kind.gpus_high) == (answer, answer):
        yield "The seeds leave no doubt (95 %)."
    else:
        high = "more than were tried" if kind.gpus_high is None else str(kind.gpus_high)
        yield f"Chance leaves {kind.gpus_low} to {high} possible (95 %)."
    if (smaller := sizes.get(answer - 1)) is not None:
        held_back = " ".join([f"The run is {smaller.saturation}.", *smaller.bottlenecks])
        yield f"{answer - 1} meet them for {share(smaller.attainment)}. {held_back}"
    if (larger := sizes.get(answer + 1)) is not None:
        gain = 100 * (larger.attainment - sizes[answer].attainment)
        yield f"One more GPU changes the attainment by {gain:+.2f} points."
    slower = kind.gpus_if_10_percent_slower
    if slower is not None:
        needed = "the answer is the same" if slower == answer else f"{slower} GPUs are needed"
        yield f"If all steps take 10 % longer than estimated, {needed}."


def _cards(kind: FoundKind) -> Iterator[Card]:
    value = NONE if kind.gpus is None else f"{kind.gpus}"
    cost = "no size is enough" if kind.usd_per_hour is None else f"${kind.usd_per_hour:,.2f} an hour by list price"
    yield Card(label=f"{kind.gpu} needed", value=value, detail=f"{cost}; {kind.simulations:,} simulations")
    size = next((size for size in kind.sizes if size.gpus == kind.gpus), None)
    if size is not None:
        yield Card(label=f"SLOs met by {kind.gpu}", value=share(size.attainment), detail=_spread(size))


def _spread(size: FoundSize) -> str:
    if not size.attainment_ci95:
        return f"over {size.seeds} seeds"
    return f"± {100 * size.attainment_ci95:.2f} points (95 %, over {size.seeds} seeds)"


def _charts(sizing: FoundSizing) -> Iterator[Chart]:
    """Yield the attainment and the p95 of TTFT over the number of GPUs, a line for each kind."""
    lines = []
    for style, kind in enumerate(sizing.kinds, start=1):
        sizes = sorted(kind.sizes, key=lambda size: size.gpus)
        mean = np.array([100 * size.attainment for size in sizes])
        half = np.array([100 * (size.attainment_ci95 or 0.0) for size in sizes])
        lines.append(
            Line(
                name=kind.gpu,
                x=np.array([size.gpus for size in sizes]),
                y=mean,
                low=np.maximum(mean - half, 0),
                high=np.minimum(mean + half, 100),
                style=style,
                has_markers=True,
            )
        )
    rows = [
        row(kind.gpu, str(size.gpus), f"{100 * size.attainment:.2f}", _spread(size))
        for kind in sizing.kinds
        for size in sorted(kind.sizes, key=lambda size: size.gpus)
    ]
    columns = [Column("GPU"), number_column("GPUs"), number_column("SLOs met, %"), Column("interval")]
    yield LineChart(
        chart_id="attainment",
        title="Requests that meet the SLOs",
        summary="Share of all requests over the number of GPUs, with 95 % intervals over seeds. The dashed level is "
        f"the target, {share(sizing.attainment_target)}.",
        table=Table("Requests that meet the SLOs", columns, rows),
        x=Axis(label="GPUs"),
        y=Axis(label="SLOs met, % of requests", low=0, high=100),
        lines=lines,
        target=100 * sizing.attainment_target,
    )
    yield from _ttft_chart(sizing)


def _ttft_chart(sizing: FoundSizing) -> Iterator[LineChart]:
    lines, rows = [], []
    for style, kind in enumerate(sizing.kinds, start=1):
        sizes = sorted((size for size in kind.sizes if size.ttft_p95_s is not None), key=lambda size: size.gpus)
        if sizes:
            x, y = (np.array(column, float) for column in zip(*((s.gpus, s.ttft_p95_s) for s in sizes), strict=True))
            lines.append(Line(name=kind.gpu, x=x, y=y, style=style, has_markers=True))
            rows += [row(kind.gpu, str(size.gpus), figure(size.ttft_p95_s)) for size in sizes]
    if lines:
        yield LineChart(
            chart_id="ttft",
            title="Time to first token (TTFT), p95",
            summary="p95 of TTFT over the number of GPUs, of the first seed.",
            table=Table("p95 of TTFT", [Column("GPU"), number_column("GPUs"), number_column("TTFT p95, s")], rows),
            x=Axis(label="GPUs"),
            y=Axis(label="TTFT p95, s", low=0),
            lines=lines,
        )


def _sizes_table(kind: FoundKind) -> Table:
    headers = ("GPUs", "SLOs met, %", "± 95 %, points", "seeds", "TTFT p95 s", "TPOT mean ms", "requests per s")
    rows = [
        row(
            str(size.gpus),
            f"{100 * size.attainment:.2f}",
            NONE if size.attainment_ci95 is None else f"{100 * size.attainment_ci95:.2f}",
            str(size.seeds),
            figure(size.ttft_p95_s),
            figure(None if size.tpot_mean_s is None else 1e3 * size.tpot_mean_s),
            figure(size.throughput_per_s),
            size.verdict,
            size.saturation,
        )
        for size in sorted(kind.sizes, key=lambda size: size.gpus)
    ]
    columns = [*map(number_column, headers), Column("verdict"), Column("load")]
    return Table(f"Sizes of {kind.gpu} that were simulated", columns, rows)


def _deployments_tables(kind: FoundKind) -> Iterator[Table]:
    shown = next((size for size in kind.sizes if size.gpus == kind.gpus), None)
    if shown is not None and shown.deployments:
        rows = [row(text) for text in shown.deployments]
        yield Table(f"Deployments on {shown.gpus} x {kind.gpu}", [Column("deployment", wrap="words")], rows)
