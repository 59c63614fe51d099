"""The answer of a sizing: the verdict first, then the sizes that were simulated, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from maveriq.report.formatting import NONE, figure, share
from maveriq.report.results import WIDE
from maveriq.report.view import BLANK, Column, Part, Table, Text, View, fit_width, number_column, row
from maveriq.sizing.search import Point
from maveriq.sizing.size import SLOWER, KindSize, SizeResult
from maveriq.sweeps.tables import ALL
from maveriq.sweeps.worker import CellResult

_LONGER = f"{100 * (SLOWER - 1):.0f} %"


def size_view(result: SizeResult, *, width: int = WIDE) -> View:
    """Return the answer for each kind of GPU, the cheapest of them, and the evidence.

    Args:
        result: of the sizing.
        width: in characters; wider tables are split.
    """
    parts: list[Part] = []
    for kind in result.kinds:
        parts += [Text(_verdict(kind, result), "bold green" if kind.sizes.answer else "bold red"), BLANK]
        parts += [*fit_width(_curve(kind), width), BLANK]
        parts += [Text(line) for line in _reasons(kind)]
        parts.append(BLANK)
    if len(result.kinds) > 1 and result.best is not None and result.fewest is not None:
        parts.append(Text(f"Cheapest: {_cluster(result.best)}. Fewest GPUs: {_cluster(result.fewest)}.", "bold"))
    return View(parts)


def _cluster(kind: KindSize) -> str:
    return f"{kind.sizes.answer} x {kind.kind}, ${kind.cluster_usd_per_hour:,.2f} an hour"


def _verdict(kind: KindSize, result: SizeResult) -> str:
    sizes, target = kind.sizes, share(result.request.attainment)
    points = {point.gpus: point for point in sizes.points}
    if sizes.answer is None:
        most = sizes.points[-1]
        return (
            f"No cluster of up to {most.gpus} x {kind.kind} meets the SLOs for {target} of the requests: "
            f"{most.gpus} meet them for {share(most.mean)}."
        )
    met = share(points[sizes.answer].mean)
    text = (
        f"{sizes.answer} x {kind.kind} (${kind.cluster_usd_per_hour:,.2f} an hour) meet the SLOs for {met} of the "
        f"requests; {target} are asked for."
    )
    if sizes.answer - 1 in points:
        text += f" {sizes.answer - 1} meet them for {share(points[sizes.answer - 1].mean)}."
    if (sizes.low, sizes.high) == (sizes.answer, sizes.answer):
        return f"{text} The seeds leave no doubt (95 %)."
    high = "more than were tried" if sizes.high is None else str(sizes.high)
    return f"{text} Chance leaves {sizes.low} to {high} possible (95 %)."


def _curve(kind: KindSize) -> Table:
    rows = [
        row(
            str(point.gpus),
            f"{point.gpus * kind.usd_per_hour:,.2f}",
            _spread(point),
            str(len(point.attainments)),
            *_figures(kind.found[point.gpus]),
            Text(point.verdict.value, "green" if point.verdict.is_met else "red"),
        )
        for point in kind.sizes.points
    ]
    headers = (
        "\nGPUs",
        "$ an\nhour",
        "SLOs met,\n% of requests",
        "\nseeds",
        "TTFT\np95 s",
        "TPOT\nmean ms",
        "requests\nper s",
    )
    return Table(f"Sizes of {kind.kind} that were simulated", [*map(number_column, headers), Column("\nverdict")], rows)


def _spread(point: Point) -> str:
    half = 100 * point.half_width
    return f"{100 * point.mean:.2f}" + ("" if math.isinf(half) or half == 0 else f" ± {half:.2f}")


def _figures(result: CellResult) -> Iterator[str]:
    whole = result.rows[ALL]
    for name, factor in (("ttft_p95_s", 1.0), ("tpot_mean_s", 1e3), ("throughput_per_s", 1.0)):
        value = whole.get(name)
        yield NONE if value is None else figure(factor * value)


def _reasons(kind: KindSize) -> Iterator[str]:
    """Yield the deployments of the answer, what holds the next smaller size back, and what would change the answer."""
    sizes, points = kind.sizes, {point.gpus: point for point in kind.sizes.points}
    shown = sizes.points[-1].gpus if sizes.answer is None else sizes.answer
    yield f"With {shown}:"
    for deployment in kind.found[shown].deployments:
        yield f"  {deployment}"
    smaller = shown if sizes.answer is None else shown - 1
    if smaller in kind.found:
        result = kind.found[smaller]
        refused = [text for text in result.deployments if " on " not in text]
        yield f"What holds {smaller} back: {_held_back(result, refused)}"
    if sizes.answer is None:
        return
    if sizes.answer + 1 in points:
        gain = 100 * (points[sizes.answer + 1].mean - points[sizes.answer].mean)
        yield f"One more GPU: {gain:+.2f} points of attainment, ${kind.usd_per_hour:,.2f} an hour."
    if kind.why_not_slower:
        yield f"What a 10 % error of the estimates would change is unknown: {kind.why_not_slower}."
    elif kind.when_slower is None:
        yield f"If all steps take {_LONGER} longer than estimated, no cluster within --max-gpus is enough."
    elif kind.when_slower == sizes.answer:
        yield f"If all steps take {_LONGER} longer than estimated, the answer is the same."
    else:
        yield f"If all steps take {_LONGER} longer than estimated, {kind.when_slower} GPUs are needed."


def _held_back(result: CellResult, refused: list[str]) -> str:
    """Return why a size misses the target: models that found no place, else the model that misses its SLOs most."""
    if refused:
        return f"not every model is deployed ({'; '.join(refused)})."
    met = {model: _met(row) for model, row in result.rows.items() if model != ALL}
    missed = {model: part for model, part in met.items() if part is not None}
    if not missed:
        return " ".join([f"the run is {result.saturation}.", *result.bottlenecks])
    worst = min(missed, key=lambda model: missed[model])
    ttft_s, tpot_s = result.rows[worst].get("ttft_p95_s"), result.rows[worst].get("tpot_p95_s")
    times = ""
    if ttft_s is not None and tpot_s is not None:
        times = f", with p95 of TTFT {ttft_s:.2f} s and of TPOT {1e3 * tpot_s:.1f} ms"
    line = f"{worst} meets the SLOs for {share(missed[worst])} of its requests{times}."
    return " ".join([line, f"The run is {result.saturation}.", *result.bottlenecks])


def _met(row: Mapping[str, float | None]) -> float | None:
    goodput = row.get("goodput")
    return row.get("slo_attainment") if goodput is None else goodput


def size_json(result: SizeResult) -> dict[str, Any]:
    """Return the answers in plain values."""
    best, fewest = result.best, result.fewest
    return {
        "attainment_target": result.request.attainment,
        "cheapest": None if best is None else best.kind,
        "fewest": None if fewest is None else fewest.kind,
        "kinds": [_kind_json(kind) for kind in result.kinds],
    }


def _kind_json(kind: KindSize) -> dict[str, Any]:
    sizes = kind.sizes
    return {
        "gpu": kind.kind,
        "gpus": sizes.answer,
        "gpus_low": sizes.low,
        "gpus_high": sizes.high,
        "usd_per_hour": kind.cluster_usd_per_hour,
        "gpus_if_10_percent_slower": kind.when_slower,
        "simulations": sizes.simulations,
        "sizes": [
            {
                "gpus": point.gpus,
                "attainment": point.mean,
                "attainment_ci95": None if math.isinf(point.half_width) else point.half_width,
                "seeds": len(point.attainments),
                "verdict": point.verdict.value,
                "saturation": kind.found[point.gpus].saturation,
                "deployments": kind.found[point.gpus].deployments,
                "bottlenecks": kind.found[point.gpus].bottlenecks,
                **kind.found[point.gpus].rows[ALL],
            }
            for point in sizes.points
        ],
    }
