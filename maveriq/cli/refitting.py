"""The work behind `maveriq fit DATA`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape

from maveriq.calibration.cross_validation import CrossFit, cross_fit, errors_of, least_trusted
from maveriq.calibration.fitting import Kinds, exponents_csv, fit_exponents, start_calibration, start_for
from maveriq.calibration.online import cross_fit_served, errors_without
from maveriq.calibration.samples import read_samples
from maveriq.cli.fitting import print_json, show_groups
from maveriq.errors import InputError
from maveriq.estimate.calibration_file import OnlineCalibration, online_csv, to_toml
from maveriq.files import exists, is_folder
from maveriq.report.reading import read_run
from maveriq.testbed.engines import RecordedEngine, engines_of, read_engines

_DISTRUSTED = 12  # rows shown


@dataclass(frozen=True, slots=True, kw_only=True)
class FitQuestion:
    """What a user asks of `maveriq fit DATA`; fields as its options."""

    data: Path
    prompt_tokens: int | None
    runs: Path | None
    gpus_per_socket: int
    out: Path | None
    as_json: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """The live system: its figures, those without each run, and errors in percent, of runs left out where possible."""

    served: OnlineCalibration
    without: Mapping[str, OnlineCalibration]
    errors: Sequence[float]
    runs_left_out: bool


def show_fit(question: FitQuestion) -> None:
    """Fit the calibrated estimator to tables, and print how far it is from models left out.

    Raises:
        InputError: a table or a run is missing or wrong, or files cannot be written there.
    """
    if question.out is not None and not is_folder(question.out):
        raise InputError(f"--out {str(question.out)!r} is no folder; make it first")
    recorded = _recorded(question.runs) if question.runs else []
    samples = read_samples(question.data, prompt_tokens=question.prompt_tokens)
    told = _teller()
    fitted = cross_fit(samples, start_for(samples, start_calibration()), on_fit=told)
    live = None
    if recorded:
        told("the live system")
        live = _live(fitted, recorded, question.gpus_per_socket)
    if question.out is not None:
        told("the exponents of the paper's formula")
        _write(fitted, live, fit_exponents(samples, fitted.constants), question.out, question.data)
    if question.as_json:
        print_json(_plain(fitted, live))
    else:
        _show(fitted, live, recorded)


def _teller() -> Callable[[str], None]:
    console = Console(stderr=True)
    return lambda what: console.print(f"fitting: {escape(what)}")


def _recorded(folder: Path) -> list[RecordedEngine]:
    """Read recordings of the testbed, or a run folder, or a folder of them."""
    if exists(folder / "completed.csv.gz"):
        return read_engines(folder)
    runs = [path.parent for path in sorted([folder / "run.json", *folder.glob("*/run.json")]) if exists(path)]
    found = [one for path in runs for one in engines_of(path.resolve().name, read_run(path))]
    if not found:
        raise InputError(
            f"--runs {str(folder)!r} holds no run folder with a deployment that served requests one by one; name a "
            "folder of run folders, or the recordings of a testbed"
        )
    return found


def _live(fitted: CrossFit, recorded: Sequence[RecordedEngine], gpus_per_socket: int) -> _Live:
    calibration = fitted.calibration
    served, without = cross_fit_served(fitted.layer_time_ratio, calibration, recorded, gpus_per_socket)
    left_out = errors_without(fitted.layer_time_ratio, calibration, recorded, without)
    same_runs = dict.fromkeys((one.run for one in recorded), served)
    errors = left_out or errors_without(fitted.layer_time_ratio, calibration, recorded, same_runs)
    return _Live(served=served, without=without, errors=errors, runs_left_out=bool(left_out))


def _write(fitted: CrossFit, live: _Live | None, exponents: Kinds, out: Path, data: Path) -> None:
    comment = f"Fitted by `maveriq fit` to {data.name}"
    whole = fitted.calibration if live is None else msgspec.structs.replace(fitted.calibration, served=live.served)
    files = {"calibrated.toml": to_toml(whole, f"{comment}.")} | {
        f"calibrated-without-{model}.toml": to_toml(calibration, f"{comment}; full models of {model} left out.")
        for model, calibration in fitted.without.items()
    }
    if live and live.without:
        files["calibrated-served.csv"] = online_csv(live.without)
    if exponents:
        files["exponents.csv"] = exponents_csv(exponents)
    for name, text in files.items():
        try:
            (out / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {str(out)!r}: {name} cannot be written: {error.strerror or error}") from None


def _plain(fitted: CrossFit, live: _Live | None) -> dict[str, object]:
    rows = least_trusted(fitted.answered, _DISTRUSTED)
    answer: dict[str, object] = {
        "groups": [asdict(group) for group in errors_of(fitted)],
        "least_trusted": [{"row": row, "measured_s": seen, "predicted_s": said} for row, seen, said in rows],
    }
    if live:
        off = {"deployments": len(live.errors), "median": float(np.median(live.errors)), "worst": max(live.errors)}
        answer["live"] = {**off, "runs_left_out": live.runs_left_out}
    return answer


def _show(fitted: CrossFit, live: _Live | None, recorded: Sequence[RecordedEngine]) -> None:
    screen = Console()
    screen.print("every model predicted by a fit to the others:")
    show_groups(screen, errors_of(fitted))
    screen.print("rows that the fit trusts least:")
    for row, seen, said in least_trusted(fitted.answered, _DISTRUSTED):
        screen.print(f"  {escape(row)}: measured {seen:.3f} s, predicted {said:.3f} s", soft_wrap=True)
    if live:
        runs = len({one.run for one in recorded})
        how = "each by figures without its run" if live.runs_left_out else "by figures fitted to them"
        screen.print(
            f"median service times of {len(live.errors)} deployments in {runs} recorded runs, {how}: off by "
            f"{np.median(live.errors):.1f} % in the median, {max(live.errors):.1f} % at worst",
            soft_wrap=True,
            highlight=False,
        )
