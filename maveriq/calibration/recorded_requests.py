"""Reads recorded requests for a fit: tables of a load generator, and run folders of maveriq."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.calibration.deployment import Deployment
from maveriq.calibration.serving_fit import RecordedRequests
from maveriq.csv_columns import Batch, csv_batches, floats, whole_numbers
from maveriq.domain.records import NOT_YET
from maveriq.domain.requests import Request, RequestStatus
from maveriq.errors import InputError
from maveriq.report.reading import read_run
from maveriq.tables import Row
from maveriq.units import MICROS_PER_SECOND

_WHAT = "table of recorded requests"
_NAMES: Mapping[str, Sequence[str]] = {
    "arrival_s": ("send_s", "arrival_s"),
    "prompt_tokens": ("prompt_tokens", "input_tokens"),
    "output_tokens": ("output_tokens",),
    "ttft_s": ("ttft_s",),
    "e2e_s": ("e2e_s", "latency_s"),
}
"""What a table must have, and the names that its columns may have, the preferred one first."""

_PROMPT = "prompt_id"
_MAX_S, _MAX_TOKENS = 1e9, 10**8
_WARM_UP_SHARE, _MOST_WARM_UP = 10, 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestColumns:
    """Recorded requests in the order of their arrival, a column each; times in seconds, latencies from the arrival."""

    arrival_s: Any
    prompt_tokens: Any
    output_tokens: Any
    ttft_s: Any
    e2e_s: Any
    prompt_id: Any


def read_recorded(path: Path) -> RequestColumns:
    """Read a CSV file with the columns arrival_s, prompt_tokens, output_tokens, ttft_s and e2e_s, or a run folder.

    A table may name them send_s, input_tokens and latency_s, too, and may have a prompt_id (equal for equal prompts);
    further columns are not read. Of a run folder the requests that were completed count.

    Raises:
        InputError: a file is missing or wrong, or nothing was completed.
    """
    return _of_run(path) if path.is_dir() else _of_table(path)


def recorded_requests(
    path: Path, deployment: Deployment, *, max_in_flight: int | None = None, warm_up: int | None = None
) -> RecordedRequests:
    """Return what `read_recorded` reads, for a fit.

    Args:
        path: as for `read_recorded`.
        deployment: that served them.
        max_in_flight: of the client that sent them.
        warm_up: so many first requests do not count; None for a tenth of them, at most 100.
    """
    columns = read_recorded(path)
    number = len(columns.arrival_s)
    return RecordedRequests(
        name=path.name,
        group=deployment.model.name,
        deployment=deployment,
        requests=_requests(columns),
        ttft_s=columns.ttft_s,
        e2e_s=columns.e2e_s,
        max_in_flight=max_in_flight,
        warm_up=min(number // _WARM_UP_SHARE, _MOST_WARM_UP) if warm_up is None else warm_up,
    )


def _requests(columns: RequestColumns) -> list[Request]:
    arrival_us = np.rint((columns.arrival_s - columns.arrival_s[0]) * MICROS_PER_SECOND).astype(np.int64)
    rows = zip(
        arrival_us.tolist(), columns.prompt_tokens.tolist(), columns.output_tokens.tolist(),
        columns.prompt_id.tolist(), strict=True,
    )  # fmt: skip
    return [
        Request(
            request_id=number, endpoint_id=1, arrival_us=arrival, prompt_tokens=prompt, output_tokens=output,
            prompt_id=prompt_id,
        )
        for number, (arrival, prompt, output, prompt_id) in enumerate(rows, start=1)
    ]  # fmt: skip


def _of_run(folder: Path) -> RequestColumns:
    table = read_run(folder).requests
    done = (table.status == RequestStatus.COMPLETED) & (table.first_token_us != NOT_YET)
    if not done.any():
        raise InputError(f"run {str(folder)!r} completed no request; there is nothing to fit to")
    if len(np.unique(table.endpoint_id)) > 1:
        raise InputError(f"run {str(folder)!r} has requests of several models; a fit is to those of one deployment")
    arrival_us = table.arrival_us[done]
    return RequestColumns(
        arrival_s=arrival_us / MICROS_PER_SECOND,
        prompt_tokens=table.prompt_tokens[done],
        output_tokens=table.output_tokens[done],
        ttft_s=(table.first_token_us[done] - arrival_us) / MICROS_PER_SECOND,
        e2e_s=(table.finish_us[done] - arrival_us) / MICROS_PER_SECOND,
        prompt_id=np.zeros(int(done.sum()), dtype=np.int64),
    )


def _of_table(path: Path) -> RequestColumns:
    named: dict[str, str] = {}

    def choose(header: list[str]) -> list[str]:
        for column, names in _NAMES.items():
            found = next((name for name in names if name in header), None)
            if found is None:
                raise InputError(f"{_WHAT} {str(path)!r} has no column {' or '.join(names)}; add it")
            named[column] = found
        return [*named.values(), *([_PROMPT] if _PROMPT in header else [])]

    parts = [
        batch.converted(lambda batch: _columns(batch, named), lambda row: _check(row, named))
        for batch in csv_batches(path, choose, what=_WHAT)
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    numbers = {"": 0}
    texts = columns.pop(_PROMPT, np.full(len(columns["arrival_s"]), "", dtype=object))
    columns[_PROMPT] = np.asarray([numbers.setdefault(text.strip(), len(numbers)) for text in texts.tolist()])
    order = np.argsort(columns["arrival_s"], kind="stable")
    return RequestColumns(**{name: values[order] for name, values in columns.items()})


def _columns(batch: Batch, named: Mapping[str, str]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for column, name in named.items():
        cells = batch.columns[name]
        if column.endswith("_tokens"):
            columns[column] = whole_numbers(cells, name, minimum=1, maximum=_MAX_TOKENS)
        else:
            columns[column] = floats(cells)
            least = 0.0 if column == "arrival_s" else 1e-6
            if not ((columns[column] >= least) & (columns[column] <= _MAX_S)).all():
                raise ValueError(f"{name} must lie between {least:g} and {_MAX_S:g}")
    if (columns["e2e_s"] < columns["ttft_s"]).any():
        raise ValueError(f"{named['e2e_s']} is less than {named['ttft_s']}")
    if _PROMPT in batch.columns:
        columns[_PROMPT] = np.asarray(batch.columns[_PROMPT], dtype=object)
    return columns


def _check(row: Row, named: Mapping[str, str]) -> None:
    for column, name in named.items():
        least = 1 if column.endswith("_tokens") else 0.0 if column == "arrival_s" else 1e-6
        row.number(name, minimum=least)
    if row.number(named["e2e_s"]) < row.number(named["ttft_s"]):
        raise InputError(f"{row.where}: {named['e2e_s']} is less than {named['ttft_s']}; both count from the arrival")
