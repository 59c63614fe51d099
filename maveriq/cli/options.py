"""Command-line options made from dataclasses of options, and the options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from maveriq.scenario.options import option

JsonFlag: TypeAlias = Annotated[bool, typer.Option("--json", help="Print only JSON.")]

OverwriteFlag: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]

_OUTPUT = "Output"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Where the results of a run go and how they are shown; options of `maveriq sim` and `maveriq run`."""

    slo_ttft_ms: float | None = option(None, "Time to first token within which a request counts as goodput.", _OUTPUT)
    slo_tpot_ms: float | None = option(None, "Time per output token within which a request counts as goodput.", _OUTPUT)
    out: Path | None = option(None, "Folder for the records.", _OUTPUT, shown="runs/NAME")
    overwrite: bool = option(False, "Replace a run that is in the folder.", _OUTPUT)  # noqa: FBT003
    as_json: bool = option(False, "Print only JSON.", _OUTPUT, flags=("--json",))  # noqa: FBT003
    quiet: bool = option(False, "No live view and no tables.", _OUTPUT, flags=("--quiet", "-q"))  # noqa: FBT003


Table: TypeAlias = type[Any] | tuple[type[Any], Collection[str]]
"""A dataclass whose fields `maveriq.scenario.options.option` made; or such a class and the fields to use."""


def with_options(*tables: Table) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of some dataclasses.

    The command receives an object of each dataclass as a positional argument, in this order, and its own options
    as keywords. Fields that are not used keep their defaults.
    """
    chosen = [_fields(table) for table in tables]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(tables) :]

        @functools.wraps(command)
        def with_flat_options(**values: Any) -> None:
            objects = [shape(**{field.name: _value(field, values.pop(field.name)) for field in used})
                       for shape, used in chosen]  # fmt: skip
            command(*objects, **values)

        parameters = [*(p for shape, used in chosen for p in _parameters(shape, used)), *own]
        with_flat_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_flat_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_flat_options

    return decorate


def _fields(table: Table) -> tuple[type[Any], list[Field[Any]]]:
    shape, names = table if isinstance(table, tuple) else (table, None)
    return shape, [field for field in fields(shape) if names is None or field.name in names]


def _value(field: Field[Any], value: Any) -> Any:
    """Return the value of a field; Typer gives a list, or None, for an option that may be repeated."""
    return tuple(value or ()) if isinstance(field.default, tuple) else value


def _parameters(shape: type[Any], used: list[Field[Any]]) -> Iterator[inspect.Parameter]:
    types = get_type_hints(shape)
    for field in used:
        repeatable = isinstance(field.default, tuple)
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if repeatable else field.default,
            annotation=Annotated[list[str] | None if repeatable else types[field.name], _typer_option(field)],
        )


def _typer_option(field: Field[Any]) -> Any:
    return typer.Option(
        *(field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",)),  # explicit: no --no- twin for flags
        help=field.metadata["help"],
        rich_help_panel=field.metadata["panel"],
        show_default=field.metadata["shown"] or field.default not in (None, False, ()),
        autocompletion=_completer(field.metadata["choices"]) if field.metadata["choices"] else None,
    )


def _completer(choices: Collection[str]) -> Callable[[str], list[str]]:
    """Return what Typer calls to complete a value; it reads the annotations of a function."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def complete_model(incomplete: str) -> list[str]:
    """Return the names of known models that begin so, for shells."""
    from maveriq.domain.models import known_models

    return [name for name in sorted(known_models()) if name.startswith(incomplete)]


def complete_gpu(incomplete: str) -> list[str]:
    """Return the names of known kinds of GPU that begin so, for shells."""
    from maveriq.domain.gpu_kinds import gpu_sheets

    return [name for name in gpu_sheets() if name.casefold().startswith(incomplete.casefold())]
