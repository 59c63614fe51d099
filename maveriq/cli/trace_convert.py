"""`maveriq trace convert`: writes a trace file in the format of another tool."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.cli.output import echo
from maveriq.errors import InputError
from maveriq.files import check_file_writable, is_folder
from maveriq.input_files import read_head
from maveriq.report.load_generator_files import LOAD_GENERATOR_FORMATS, write_load_generator_file
from maveriq.workload.sharegpt import CountTokens, read_conversations
from maveriq.workload.trace_formats import RequestTrace, TracePart, counted, remarks_on
from maveriq.workload.trace_writers import (
    WRITTEN_FORMATS,
    check_format,
    lost_in,
    resolution_of,
    writable,
    write_trace,
)
from maveriq.workload.traces import read_trace

_FORMATS = ", ".join(WRITTEN_FORMATS)
_RUN_FORMATS = ", ".join(LOAD_GENERATOR_FORMATS)
_CONVERSATIONS = re.compile(r"\s*\[.*?\"(conversations|messages)\"\s*:", re.DOTALL)


def convert(
    file: Annotated[Path, typer.Argument(metavar="IN", help="A file of requests in any known format, or a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, whole or not at all.")],
    *,
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"{_FORMATS}; of a run: {_RUN_FORMATS}.")] = "plain",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many requests, or conversations of texts.")
    ] = None,
    benchmark: Annotated[int | None, typer.Option(min=1, help="Of a GuideLLM report that holds several.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Model whose tokenizer.json counts tokens of conversations.")
    ] = None,
    chars_per_token: Annotated[
        float | None, typer.Option(help="Count conversations by this many characters a token instead.")
    ] = None,
    first_turn_only: Annotated[bool, typer.Option("--first-turn-only", help="Of each conversation.")] = False,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a trace file in another format; what the format does not hold is named."""
    if to in LOAD_GENERATOR_FORMATS:
        _convert_run(file, out, to, overwrite=overwrite, as_json=as_json)
        return
    check_format(to)
    check_file_writable(out, what="trace", overwrite=overwrite)
    if _CONVERSATIONS.match(read_head(file, what="trace")):
        counter = _counter(file, tokenizer, chars_per_token)
        arrivals, left_out = read_conversations(file, counter, first_turn_only=first_turn_only, limit=limit)
        requests, kind = writable(arrivals, has_times=False), "conversations"
        remarks = [f"{counted(left_out, 'conversation')} without an answer left out"] if left_out else []
    else:
        if tokenizer is not None or chars_per_token is not None or first_turn_only:
            raise InputError(
                f"trace {str(file)!r} holds no conversations; leave out --tokenizer, --chars-per-token and "
                "--first-turn-only"
            )
        trace = read_trace(file, TracePart(requests=limit), benchmark=benchmark)
        requests = writable(trace)
        kind = trace.format_name if isinstance(trace, RequestTrace) else "schedule"
        remarks = remarks_on(trace) if isinstance(trace, RequestTrace) else []
        requests = requests if limit is None else requests.first(limit)
    lost = lost_in(requests, to)
    write_trace(requests, to, out, overwrite=overwrite)
    times = f"times to {resolution_of(to)}" if requests.has_times else "without times: give --rate or --concurrency"
    if as_json:
        answer = {"file": str(out), "format": to, "from": kind, "requests": len(requests), "not_in_the_file": lost}
        typer.echo(json.dumps(answer, indent=2))
        return
    parts = [f"{out}: {counted(len(requests), 'request')} of {file.name} ({kind}) as {to}, {times}", *remarks]
    if lost:
        parts.append(f"not in the file: {', '.join(lost)}")
    echo("; ".join(parts))


def _convert_run(folder: Path, out: Path, to: str, *, overwrite: bool, as_json: bool) -> None:
    """Write the requests of a run as a load generator does."""
    from maveriq.report.reading import read_run  # late: few conversions need it

    if not is_folder(folder):
        raise InputError(f"--to {to} writes the requests of a run; give the folder of a run, not {str(folder)!r}")
    run = read_run(folder)
    errors = write_load_generator_file(run, to, out, overwrite=overwrite)
    if as_json:
        typer.echo(
            json.dumps({"file": str(out), "format": to, "requests": len(run.requests), "errors": errors}, indent=2)
        )
        return
    echo(f"{out}: {counted(len(run.requests), 'request')} of {folder} as {to}, {counted(errors, 'error')}")


def _counter(file: Path, tokenizer: Path | None, chars_per_token: float | None) -> CountTokens:
    """Return what counts the tokens of a text."""
    if (tokenizer is None) == (chars_per_token is None):
        raise InputError(
            f"trace {str(file)!r} holds texts; give --tokenizer with the folder of your model's tokenizer.json to "
            "count their tokens, or --chars-per-token 4 for a rough count"
        )
    if chars_per_token is not None:
        if not 0.1 <= chars_per_token <= 100:
            raise InputError(f"--chars-per-token must lie from 0.1 to 100, not {chars_per_token:g}")
        per_token = chars_per_token
        return lambda text: math.ceil(len(text) / per_token)
    from maveriq.serve.tokenizer_worker import ModelTokenizer

    encode = ModelTokenizer(tokenizer or Path()).encode
    return lambda text: len(encode(text))
