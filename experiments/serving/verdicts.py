"""The bars that are asked of the simulator, and what it reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

_NEAR_SATURATION = 12.0  # requests a second of the deployment that was recorded up to there
_MANY_IN_FLIGHT = 128
_OPEN = ("TTFT p50", "TPOT mean", "E2E mean")


@dataclass(frozen=True, slots=True)
class Bar:
    """What is asked of a figure: an error of at most, or a share of at least, so many percent."""

    name: str
    found: float
    most: float | None
    rows: int
    is_share: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether it is met; None where nothing is asked."""
        if self.most is None:
            return None
        return self.found >= self.most if self.is_share else self.found <= self.most

    def line(self) -> str:
        """Return a row of a table."""
        asked = "" if self.most is None else f"{self.most:g}"
        met = {None: "", True: "met", False: "missed"}[self.is_met]
        return f"| {self.name} | {self.rows} | {self.found:.1f} | {asked} | {met} |"


def bars_of(tables: Mapping[str, pd.DataFrame]) -> Iterator[Bar]:
    """Yield the bars of the parts that were simulated."""
    for name, make in (
        ("open-loop", _open_loop), ("left-out", _left_out), ("load-sweep", _load_sweep), ("closed-loop", _closed_loop),
    ):  # fmt: skip
        if name in tables:
            yield from make(tables[name])


def _median(name: str, errors: pd.Series, most: float | None) -> Bar:
    return Bar(name, float(np.median(np.abs(errors))) if len(errors) else float("nan"), most, len(errors))


def _worst(name: str, errors: pd.Series, most: float | None) -> Bar:
    return Bar(name, float(np.max(np.abs(errors))) if len(errors) else float("nan"), most, len(errors))


def _served(table: pd.DataFrame) -> pd.DataFrame:
    """Return runs of H100 through a server, the kind that constants were fitted to."""
    return table[~table["run"].str.contains("llmservingsim")]


def _rate(table: pd.DataFrame) -> pd.Series:
    return pd.to_numeric(table["rate"], errors="coerce").fillna(0.0)


def _open_loop(table: pd.DataFrame) -> Iterator[Bar]:
    judged = _served(table)
    judged = judged[judged["split"] == "validate"]
    near = _rate(judged) >= _NEAR_SATURATION
    below = judged[~near]
    for figure in _OPEN:
        yield _median(f"validate, below saturation: {figure}, median", below[f"{figure} %"], 2)
        yield _worst(f"validate, below saturation: {figure}, worst", below[f"{figure} %"], 5)
    yield _worst("validate, below saturation: E2E p99, worst", below["E2E p99 %"], 6)
    yield _worst("validate, below saturation: TTFT p99, worst", below["TTFT p99 %"], 15)
    yield _worst("validate, without the first 100 requests: E2E p99, worst", below["E2E p99 later %"], None)
    yield _worst("validate, without the first 100 requests: TTFT p99, worst", below["TTFT p99 later %"], None)
    yield _median("validate, below saturation: E2E p99, median", below["E2E p99 %"], None)
    yield _median("validate, below saturation: TTFT p99, median", below["TTFT p99 %"], None)
    for figure in _OPEN:
        yield _worst(f"validate, 12 requests/s: {figure}", judged[near][f"{figure} %"], 6)
    other = table[table["run"].str.contains("llmservingsim")]
    for figure in _OPEN:
        yield _worst(f"RTX PRO 6000, vLLM 0.19, overloaded: {figure}", other[f"{figure} %"], None)


def _left_out(table: pd.DataFrame) -> Iterator[Bar]:
    judged = _served(table)
    for split in ("validate", "fit"):
        chosen = judged[judged["split"] == split]
        asked = split == "validate"
        for figure, most in (("TTFT p50", 5), ("TPOT mean", 3), ("E2E mean", 3)):
            yield _median(f"model left out, {split}: {figure}, median", chosen[f"{figure} %"], most if asked else None)
            yield _worst(f"model left out, {split}: {figure}, worst", chosen[f"{figure} %"], 8 if asked else None)


def _load_sweep(table: pd.DataFrame) -> Iterator[Bar]:
    judged = table[(table["split"] == "validate") & table["open loop"]]
    many = judged["in flight"] > _MANY_IN_FLIGHT
    for figure, most in (("ITL", 3.5), ("TTFT", 6), ("E2E", 6)):
        yield _median(f"load sweep, validate: {figure}, median", judged[f"{figure} %"], most)
        yield _median(f"load sweep, more than 128 in flight: {figure}, median", judged[many][f"{figure} %"], 10)
    opened = table[table["open loop"]]
    right = 100 * float((opened["stable"] == opened["simulated stable"]).mean())
    yield Bar("load sweep: verdict right", right, 95, len(opened), is_share=True)
    closed = table[~table["open loop"]]
    for figure in ("ITL", "TTFT", "E2E"):
        yield _median(f"load sweep, closed loops: {figure}, median", closed[f"{figure} %"], None)


def _closed_loop(table: pd.DataFrame) -> Iterator[Bar]:
    table = table[~table["impossible"]]
    for engine, family in sorted(set(zip(table["engine"], table["family"], strict=True))):
        for split in ("validate", "fit"):
            chosen = table[(table["engine"] == engine) & (table["family"] == family) & (table["split"] == split)]
            if chosen.empty:
                continue
            judged = split == "validate" and engine == "vllm" and family in ("dense", "MLA")
            what = f"closed loop, {split}, {engine}, {family}"
            yield _median(f"{what}: TPOT", chosen["TPOT %"], 7 if judged else None)
            yield _median(f"{what}: TTFT", chosen["TTFT %"], 15 if judged else None)
            scaled = chosen["TPOT calibrated %"].dropna()
            if len(scaled):
                yield _median(f"{what}: TPOT by three points", scaled, None if engine == "vllm" else 10)
