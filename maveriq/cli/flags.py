"""Making command-line options from a dataclass of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer


def with_options(
    shape: type[Any], only: Collection[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of a dataclass.

    The command takes the finished object as its first argument, and its own options as keywords only.
    A field's metadata says `help`, `panel`, and `shown` (the default in words, or None).

    Args:
        shape: the dataclass.
        only: names of the fields that become options, None for all; the others keep their defaults.
    """
    chosen = [one for one in fields(shape) if only is None or one.name in only]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def flat(**values: Any) -> None:
            said = {one.name: values.pop(one.name) for one in chosen}
            # Typer gives lists, and None for an option that may be repeated but was not given.
            for one in chosen:
                if isinstance(one.default, tuple):
                    said[one.name] = tuple(said[one.name] or ())
            command(shape(**said), **values)

        parameters = [*_parameters(chosen, get_type_hints(shape)), *own]
        flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions may have one
        flat.__annotations__ = {one.name: one.annotation for one in parameters}
        return flat

    return decorate


def _parameters(chosen: Iterable[Field[Any]], types: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    for one in chosen:
        repeatable = isinstance(one.default, tuple)
        kind = list[str] | None if repeatable else types[one.name]
        yield inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if repeatable else one.default,
            annotation=Annotated[kind, _typer_option(one)],
        )


def _typer_option(one: Field[Any]) -> Any:
    return typer.Option(
        f"--{one.name.replace('_', '-')}",  # named, so that flags get no --no- twin
        help=one.metadata["help"],
        rich_help_panel=one.metadata["panel"],
        show_default=one.metadata["shown"] or one.default not in (None, False, ()),
    )
