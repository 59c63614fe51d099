"""Writes docs/reference from the code: command line, Python API, files of a run, metrics, HTTP API.

Usage: python scripts/render_reference.py

`tests/docs/test_reference.py` compares the pages with what this script makes. It needs the extra `serve`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import maveriq
from maveriq.domain.progress import DeploymentStatus, GpuStatus, Progress

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
MADE = "<!-- made by scripts/render_reference.py -->"


def pages() -> dict[str, str]:
    """Return each page by the name of its file."""
    made = {"cli": _cli, "python": _python, "records": _records, "metrics": _metrics, "http": _http}
    return {f"{name}.md": "\n".join([MADE, "", *make(), ""]) for name, make in made.items()}


def main() -> None:
    """Write all pages."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def _prose(text: str) -> str:
    """Return a paragraph in lines of the repository's width, with an empty line after it."""
    return textwrap.fill(text, width=120, break_long_words=False, break_on_hyphens=False) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table with an empty line after it."""
    cells = [tuple(cell.replace("|", r"\|") for cell in row) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (tuple(header), ("---",) * len(header), *cells)]
    return [*lines, ""]


# The command line


def _cli() -> Iterator[str]:
    from maveriq.cli.app import COMMANDS, load_command

    yield "# Command line\n"
    yield _prose(
        "Every command and option, as `maveriq COMMAND --help` shows them. [Errors and exit codes](../errors.md) "
        "are on a page of their own. `MAVERIQ_DATA` names the folder of published measurements, `MAVERIQ_TOKEN` "
        "the token of a service, `MAVERIQ_TRACEBACK=1` prints tracebacks, and `NO_COLOR` turns colours off."
    )
    yield from _table(("command", "does"), ((f"[`{name}`](#maveriq-{name})", text) for name, text in COMMANDS.items()))
    shown: dict[tuple[tuple[str, ...], ...], str] = {}
    for name in COMMANDS:
        yield from _command(f"maveriq {name}", load_command(name), shown)


def _command(name: str, command: Any, shown: dict[tuple[tuple[str, ...], ...], str]) -> Iterator[str]:
    """Yield a command and its subcommands; tables of options that an earlier command had are named, not repeated."""
    yield f"## {name}\n" if name.count(" ") == 1 else f"### {name}\n"
    arguments = [parameter for parameter in command.params if not parameter.opts[0].startswith("-")]
    usage = " ".join(_argument(argument) for argument in arguments)
    call = " ".join(filter(None, (name, usage, "[OPTIONS]", "COMMAND" if _subcommands(command) else "")))
    yield f"```text\n$ {call}\n```\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    if arguments:
        yield from _table(("argument", "meaning"), ((f"`{_argument(one)}`", one.help or "") for one in arguments))
    panels: dict[str, list[tuple[str, ...]]] = {}
    for option in command.params:
        if option.opts[0].startswith("-") and not option.hidden and "completion" not in option.name:
            panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(_option_row(option))
    for panel, rows in panels.items():
        earlier = shown.setdefault(tuple(rows), name)
        if earlier != name:
            yield f"**{panel}**: those of [{earlier}](#{earlier.replace(' ', '-')}).\n"
            continue
        yield f"**{panel}**\n"
        yield from _table(("option", "default", "meaning"), rows)
    for sub, subcommand in sorted(_subcommands(command).items()):
        yield from _command(f"{name} {sub}", subcommand, shown)


def _subcommands(command: Any) -> Mapping[str, Any]:
    return getattr(command, "commands", {})


def _argument(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper())
    if name.startswith("["):
        return name
    name = f"{name.strip('[]')}{'...' if argument.nargs == -1 and '...' not in name else ''}"
    return name if argument.required else f"[{name}]"


def _option_row(option: Any) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = option.default
    if isinstance(option.show_default, str):
        default = option.show_default
    else:
        default = "" if not option.show_default or value in (None, False, ()) or callable(value) else f"`{value}`"
    return names, default, " ".join((option.help or "").split())


# The Python API


def _python() -> Iterator[str]:
    yield "# Python API\n"
    yield _prose(
        "The public names of `maveriq`, from their docstrings. [Use Python](../python.md) shows how they work together."
    )
    yield _prose(
        "Options by name (`**changes`) are those of the [command line](cli.md) with underscores: `--slo-scale` is "
        "`slo_scale`."
    )
    objects = {name: getattr(maveriq, name) for name in sorted(maveriq.__all__) if not name.startswith("_")}
    functions = {name: thing for name, thing in objects.items() if inspect.isfunction(thing)}
    classes = {name: thing for name, thing in objects.items() if inspect.isclass(thing)}
    modules = {name: thing for name, thing in objects.items() if isinstance(thing, types.ModuleType)}
    for name, function in functions.items():
        yield f"## maveriq.{name}\n"
        yield from _callable(f"maveriq.{name}", function)
    for name, shape in classes.items():
        yield f"## maveriq.{name}\n"
        yield from _docstring(inspect.getdoc(shape) or "")
        if name == "Options":
            yield "The fields are the options of [`maveriq sim`](cli.md#maveriq-sim) but those of output.\n"
            continue
        yield from _members(f"maveriq.{name}", shape)
    for name, module in modules.items():
        yield f"## maveriq.{name} (module)\n"
        yield from _docstring(inspect.getdoc(module) or "")
        public = [(member, thing) for member, thing in vars(module).items() if _is_public(member, thing, module)]
        yield from _table(("name", "what"), ((f"`{member}`", _first_line(thing)) for member, thing in sorted(public)))


def _is_public(name: str, thing: object, module: types.ModuleType) -> bool:
    exported = getattr(module, "__all__", None)
    if exported is not None:
        return name in exported
    return not name.startswith("_") and inspect.isclass(thing) and thing.__module__ == module.__name__


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def _members(name: str, shape: type[Any]) -> Iterator[str]:
    """Yield the properties of a class as a table, and its methods."""
    members = {key: value for key, value in vars(shape).items() if not key.startswith("_")}
    values = {key: value for key, value in members.items() if isinstance(value, property | cached_property)}
    if values:
        yield from _table(("property", "what"), ((f"`{key}`", _first_line(value)) for key, value in values.items()))
    for key, value in members.items():
        if inspect.isfunction(value):
            yield f"### {name}.{key}\n"
            yield from _callable(key, value)


def _callable(name: str, function: Callable[..., Any]) -> Iterator[str]:
    yield _prose(f"```py\n{_signature(name, function)}\n```")
    yield from _docstring(inspect.getdoc(function) or "")


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Return a call with its annotations, on as many lines as it needs."""
    signature = inspect.signature(function)
    whole = f"{name}{_plain(str(signature))}"
    if len(whole) <= 100 and "self" not in signature.parameters:
        return whole
    parameters = [value for value in signature.parameters.values() if value.name != "self"]
    returns = f" -> {_plain(str(signature.return_annotation))}"
    text = _plain(str(signature.replace(parameters=parameters)))
    if len(name) + len(text) <= 100:
        return f"{name}{text}"
    # Each parameter as `inspect` writes it, with the marks of those that are only positional or only named.
    parts = text[1 : text.rindex(") ->")]
    lines = re.split(r", (?=[\w*/]+(?:[:=,)]|$))", parts)
    return "\n".join([f"{name}(", *(f"    {line}," for line in lines), f"){returns}"])


def _plain(signature: str) -> str:
    """Remove the quotes of annotations, but not those of defaults."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)


def _docstring(text: str) -> Iterator[str]:
    """Yield a docstring in Google's style as Markdown."""
    for block in re.split(r"\n(?=(?:Args|Raises|Returns):\n)|(?<=\S)\n\n(?=\S)", text):
        section = re.match(r"(Args|Raises|Returns):\n", block)
        if section is None:
            yield re.sub(r"^::\n\n((?:    .*\n?|\n)+)", _code, block, flags=re.MULTILINE).strip() + "\n"
            continue
        entries = inspect.cleandoc(block[section.end() :])
        if section[1] == "Returns":
            yield f"**Returns** {entries[0].lower()}{' '.join(entries[1:].split())}\n"
            continue
        yield f"**{_SECTIONS[section[1]]}**\n"
        for entry in re.split(r"\n(?=\S)", entries):
            name, _, meaning = entry.partition(": ")
            yield f"- `{name}`: {' '.join(meaning.split())}"
        yield ""


_SECTIONS = {"Args": "Arguments", "Raises": "Raises"}


def _code(found: re.Match[str]) -> str:
    text = inspect.cleandoc(found[1])
    return f"```{'text' if '├' in text else 'py'}\n{text}\n```\n"


# Files of a run


def _records() -> Iterator[str]:
    from maveriq.domain.records import COLUMN_MEANINGS

    yield "# Files of a run\n"
    yield _prose(
        "The columns of the CSV files in a run folder, in order. Times are seconds since the start of the run. A "
        "value that does not apply is an empty cell. Lists in a cell are separated by spaces. The "
        "[specification](../spec.md#10-records) says more, also about `run.json`, recordings and runs on engines."
    )
    rows_of = {
        "requests.csv": "A row for each request, in the order of arrival.",
        "deployments.csv": "A row for each deployment, and for each endpoint that was rejected.",
        "gpus.csv": "A row for each GPU and sample.",
        "engines.csv": "A row for each interval and engine that batches continuously.",
        "itl.csv": "A row for each endpoint and inter-token latency, of engines that batch continuously.",
    }
    for file, columns in COLUMN_MEANINGS.items():
        yield f"## {file}\n"
        yield rows_of[file] + "\n"
        yield from _table(("column", "meaning"), ((f"`{name}`", meaning) for name, meaning in columns.items()))


# Metrics


def _metrics() -> Iterator[str]:
    from maveriq.report.compare import QUANTITIES
    from maveriq.report.metrics import METRIC_MEANINGS, Figures
    from maveriq.runs import METRIC_COLUMNS

    figures = ", ".join(f"`{field.name}`" for field in dataclasses.fields(Figures))
    yield "# Metrics\n"
    yield "## Of a run\n"
    yield _prose(
        "`summary` of `run.json`, and what `--json` prints, have them for the run (`overall`) and for each model "
        "(`models`). "
        f"Times, costs and GPU-hours are those of completed requests, each as {figures}. Shares of all requests "
        "count those that did not complete as missed. The last column names the columns of the DataFrame "
        "`Run.metrics` and of tables of sweeps. The row of the whole run also has `gpus_busy_mean`, `gpus_busy_peak`, "
        "`memory_mean_gib` and `memory_peak_gib`: GPUs busy at once and memory held by all GPUs, over time."
    )
    rows = ((f"`{name}`", meaning, _columns_of(name, METRIC_COLUMNS)) for name, meaning in METRIC_MEANINGS.items())
    yield from _table(("metric", "meaning", "columns"), rows)
    yield "## Of a comparison\n"
    yield _prose(
        "`maveriq compare` computes an error of each, and `--tolerance NAME=LIMIT` bounds it ([in "
        "CI](../how-to/ci.md)): in percent of the reference, or in percentage points (`pt`). `ks` and `request` "
        "are bounds too ([comparing runs](../comparing.md))."
    )
    yield from _table(("name", "of", "error in"), ((f"`{one.name}`", one.label, one.unit) for one in QUANTITIES))
    yield "## Of the service\n"
    yield _prose(
        "`GET /metrics` of [`maveriq serve`](../serving.md), in Prometheus' text format. Durations are on the "
        "cluster's clock and start at arrival. `process_*` describe the server process."
    )
    yield from _table(("metric", "type", "labels", "meaning"), _service_metrics())


def _columns_of(metric: str, columns: Mapping[str, str]) -> str:
    return ", ".join(f"`{column}`" for column, source in columns.items() if source == metric)


def _service_metrics() -> Iterator[tuple[str, str, str, str]]:
    """Yield the metrics of a service that has one deployment and has served one request."""
    from maveriq.domain.requests import RequestStatus
    from maveriq.exec.live_cluster import Outcome
    from maveriq.serve.metrics import Metrics
    from maveriq.serve.profile_jobs import ProfileJobs

    metrics = Metrics()
    metrics.add_cluster(_progress, lambda: 0)
    metrics.add_connections(lambda: 0)
    metrics.add_profiles(ProfileJobs(cast("Any", None), None))
    metrics.add_model("m")
    metrics.http_errors.labels("code")
    outcome = Outcome(
        request_id=1, status=RequestStatus.COMPLETED, reason="", tokens=(1, 2),
        arrival_us=0, start_us=1, first_token_us=2, finish_us=3,
    )  # fmt: skip
    metrics.count_ended("m", outcome, prompt_tokens=1, slo_us=1)
    for family in metrics.registry.collect():
        if family.name.startswith("maveriq_"):
            labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
            name = family.name + ("_total" if family.type == "counter" else "")
            yield f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation


def _progress() -> Progress:
    """Return the state of a cluster of one GPU and one continuous engine."""
    deployment = DeploymentStatus(
        deployment_id=1, endpoint_id=1, model="m", configuration="", layer_split=(1,), gpu_ids=(0,), status="up",
        waiting=0, completed=0, running=0, kv_use=0.0,
    )  # fmt: skip
    return Progress(
        now_us=0, last_arrival_us=0, total=0, arrived=0, waiting=0, running=0, completed=0, refused=0, failed=0,
        recent_p50_s=None, recent_p95_s=None, recent_slo_attainment=None, deployments=(deployment,),
        gpus=(GpuStatus(gpu_id=0, used_bytes=0, capacity_bytes=1, load=0.0, down=False),),
    )  # fmt: skip


# The HTTP API


def _http() -> Iterator[str]:
    from fastapi import FastAPI

    from maveriq.serve.routes import endpoint_routes, model_routes, openai_routes, operator_routes

    service = cast("Any", None)  # only handlers use it
    app = FastAPI(title="maveriq")
    app.include_router(openai_routes(service))
    app.include_router(model_routes(service))
    app.include_router(endpoint_routes(service), prefix="/endpoints")
    app.include_router(operator_routes(service))
    schema = app.openapi()
    yield "# HTTP API\n"
    yield _prose(
        "The routes of `maveriq serve` and the fields of their bodies. `GET /openapi.json` of a server has the schema."
    )
    yield "[Serving](../serving.md) explains them: errors, limits, what is stored, what a token protects.\n"
    operations = [
        (method.upper(), path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    rows = (
        (f"`{method} {path}`", _summary(operation), _body_link(operation)) for method, path, operation in operations
    )
    yield from _table(("route", "does", "body"), rows)
    for name, shape in sorted(schema["components"]["schemas"].items()):
        if shape.get("properties") and not name.endswith("ValidationError"):
            yield f"## {name}\n"
            if shape.get("description"):
                yield inspect.cleandoc(shape["description"]) + "\n"
            yield from _fields(shape)


def _summary(operation: Mapping[str, Any]) -> str:
    return " ".join(operation.get("description", operation["summary"]).split())


def _body_link(operation: Mapping[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    return f"[{name}](#{name.lower()})" if name else ""


_NEUTRAL = "Not supported: only values that change nothing."


def _fields(shape: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of a body's fields; those that take one value alone are listed below it."""
    required = set(shape.get("required", ()))
    fields = shape["properties"]
    neutral = [name for name, field in fields.items() if field.get("description") == _NEUTRAL]
    rows = []
    for name, field in fields.items():
        if name not in neutral:
            default = "" if field.get("default") is None else f"`{json.dumps(field['default'])}`"
            default = "required" if name in required else default
            rows.append((f"`{name}`", _type_of(field), default, " ".join(field.get("description", "").split())))
    if required == set(fields):  # of an answer
        yield from _table(("field", "type", "meaning"), ((name, kind, meaning) for name, kind, _, meaning in rows))
    else:
        yield from _table(("field", "type", "default", "meaning"), rows)
    if neutral:
        yield "Not supported, and accepted with a value that changes nothing:"
        yield ", ".join(f"`{name}` {_type_of(fields[name])}".rstrip() for name in neutral) + ".\n"


def _type_of(field: Mapping[str, Any]) -> str:
    """Return the type of a field in a word or two."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type_of(one) for one in field["anyOf"] if one.get("type") != "null"))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field or "const" in field:
        values = [value for value in field.get("enum", [field.get("const")]) if value is not None]
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if field.get("type") == "array":
        return f"list of {_type_of(field.get('items', {}))}"
    return str(field.get("type", "any"))


if __name__ == "__main__":
    main()
