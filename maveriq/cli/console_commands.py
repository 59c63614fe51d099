"""The commands of `maveriq console`: their syntax, their help texts, and Tab completion."""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from maveriq.errors import InputError

T = TypeVar("T")

USAGE = {
    "register": "register MODEL [PROFILE]",
    "models": "models",
    "endpoints": "endpoints",
    "health": "health",
    "help": "help",
    "quit": "quit",
    "deploy": "ID deploy MODEL LEN INTENT [SLO] [FP16] [PLACEMENT] [BATCH] [ACCURACY] [WAIT]",
    "inference": "ID inference TEXT",
    "prior_inference": "ID prior_inference TEXT",
    "cancel_profile": "ID cancel_profile",
    "status": "ID status",
    "remove": "ID remove",
}
"""The syntax of each command. ID is the ID of a registered model."""

HELP = {
    "register": "register a model by name or by its path in the server's models folder; prints its ID; PROFILE: "
    "measure it, yes or no",
    "models": "list the registered models, their IDs and profiles",
    "endpoints": "list the endpoints and the GPUs of their deployments",
    "health": "show the health of the server",
    "help": "show this help",
    "quit": "leave the console (or Ctrl-D)",
    "deploy": "create an endpoint; LEN: typical output tokens, SLO: 500ms or 2s, ACCURACY: in percent, WAIT: for the "
    "profile, yes or no",
    "inference": "complete a text",
    "prior_inference": "complete a text, at the head of the queue",
    "cancel_profile": "stop measuring the model",
    "status": "show the endpoints of the model",
    "remove": "remove the endpoints of the model",
}
"""What each command does."""

_GENERAL_COMMANDS = ("register", "models", "endpoints", "health", "help", "quit")
_MODEL_COMMANDS = ("deploy", "inference", "prior_inference", "cancel_profile", "status", "remove")
_ALIASES = {"exit": "quit"}

_DEFAULT = "-"  # stands for an optional argument that keeps its default
_YES, _NO = ("yes", "true", "fp16", "1"), ("no", "false", "0")
_HELP_WIDTH, _HELP_COLUMN = 80, 25


@dataclass(frozen=True, slots=True)
class Register:
    """`register MODEL [PROFILE]`; `profile` None leaves it to the server."""

    model: str
    profile: bool | None = None


@dataclass(frozen=True, slots=True)
class Show:
    """`models`, `endpoints`, `health`, `help` or `quit`."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployModel:
    """`ID deploy ...`; the fields after `assumed_ms` are those of `POST /endpoints`.

    `assumed_ms`: the SLO was given without a unit.
    """

    model_id: int
    assumed_ms: bool = False
    model: str
    output_tokens: int
    intent: str
    slo_ms: float | None = None
    float16_only: bool = False
    placement: str | None = None
    batch_size: int = 1
    min_accuracy: float = 0.0
    wait_for_profile: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Infer:
    """`ID inference TEXT` or `ID prior_inference TEXT`."""

    model_id: int
    text: str
    priority: bool


@dataclass(frozen=True, slots=True)
class ShowModel:
    """`ID status`."""

    model_id: int


@dataclass(frozen=True, slots=True)
class CancelProfile:
    """`ID cancel_profile`."""

    model_id: int


@dataclass(frozen=True, slots=True)
class RemoveModel:
    """`ID remove`."""

    model_id: int


Command: TypeAlias = Register | Show | DeployModel | Infer | ShowModel | CancelProfile | RemoveModel


def parse(line: str) -> Command | None:
    """Return the command in a line, or None for an empty line or a comment.

    Raises:
        InputError: the line is not a command; the message shows the correct syntax.
    """
    if any("\ud800" <= character <= "\udfff" for character in line):  # bytes that are not UTF-8
        raise InputError("the line is not UTF-8 text; type it again, or save its file as UTF-8")
    arguments = line.split()
    if not arguments or arguments[0].startswith("#"):
        return None
    if arguments[0].isdecimal():
        return _parse_model_command(line, arguments)
    name, rest = _ALIASES.get(arguments[0], arguments[0]), arguments[1:]
    if name in _MODEL_COMMANDS:
        raise InputError(f"{name} needs a model ID in front: {USAGE[name]}; models lists the IDs")
    if name not in _GENERAL_COMMANDS:
        raise _unknown_command(name, (*_GENERAL_COMMANDS, *_MODEL_COMMANDS))
    if name == "register":
        if not 1 <= len(rest) <= 2:
            raise InputError(f"register takes one model: {USAGE['register']}")
        if rest[1:] in ([], [_DEFAULT]):
            return Register(rest[0])
        return Register(rest[0], _convert(rest[1].lower(), _boolean, "PROFILE", "yes or no", command=name))
    _check_no_arguments(name, rest)
    return Show(name)


def _parse_model_command(line: str, arguments: Sequence[str]) -> Command:
    model_id = int(arguments[0]) if len(arguments[0]) < 16 else 0
    if len(arguments) < 2:
        raise InputError(f"a command is missing after model ID {model_id}: one of {', '.join(_MODEL_COMMANDS)}")
    name, rest = arguments[1], arguments[2:]
    match name:
        case "deploy":
            return _parse_deploy(model_id, rest)
        case "inference" | "prior_inference":
            if not rest:
                raise InputError(f"{name} needs a text: {USAGE[name]}")
            text = line.split(maxsplit=2)[2].rstrip("\r\n")
            return Infer(model_id=model_id, text=text, priority=name == "prior_inference")
        case "cancel_profile":
            _check_no_arguments(name, rest)
            return CancelProfile(model_id)
        case "status":
            _check_no_arguments(name, rest)
            return ShowModel(model_id)
        case "remove":
            _check_no_arguments(name, rest)
            return RemoveModel(model_id)
    raise _unknown_command(name, _MODEL_COMMANDS)


def _parse_deploy(model_id: int, arguments: Sequence[str]) -> DeployModel:
    from maveriq.domain.deployments import Objective

    if not 3 <= len(arguments) <= 9:
        raise InputError(f"deploy takes three to nine arguments, not {len(arguments)}: {USAGE['deploy']}")
    model, length, intent, *optional = arguments
    slo, fp16, placement, batch, accuracy, wait = (*optional, *[_DEFAULT] * (6 - len(optional)))
    return DeployModel(
        model_id=model_id,
        assumed_ms=slo not in (_DEFAULT, "0") and not slo.endswith("s"),
        model=model,
        output_tokens=_convert(length, int, "LEN", "a whole number of tokens"),
        intent=Objective.named(intent).value,
        slo_ms=None if slo in (_DEFAULT, "0") else _convert(slo, _milliseconds, "SLO", "a time like 500ms or 2s"),
        float16_only=fp16 != _DEFAULT and _convert(fp16.lower(), _boolean, "FP16", "yes or no"),
        placement=None if placement == _DEFAULT else placement,
        batch_size=1 if batch == _DEFAULT else _convert(batch, int, "BATCH", "a whole number of requests"),
        min_accuracy=(
            0.0 if accuracy == _DEFAULT else _convert(accuracy.rstrip("%"), _finite, "ACCURACY", "a percentage")
        ),
        wait_for_profile=wait == _DEFAULT or _convert(wait.lower(), _boolean, "WAIT", "yes or no"),
    )


def _convert(text: str, convert: Callable[[str], T], argument: str, expected: str, *, command: str = "deploy") -> T:
    try:
        return convert(text)
    except ValueError:
        raise InputError(f"{argument} must be {expected}, not {text!r}: {USAGE[command]}") from None


def _milliseconds(text: str) -> float:
    for unit, factor in (("ms", 1.0), ("s", 1e3)):
        if text.endswith(unit):
            return _finite(text.removesuffix(unit)) * factor
    return _finite(text)  # without a unit: milliseconds, as everywhere in the API; the console says so


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _boolean(text: str) -> bool:
    if text not in (*_YES, *_NO):
        raise ValueError(text)
    return text in _YES


def _check_no_arguments(name: str, arguments: Sequence[str]) -> None:
    if arguments:
        raise InputError(f"{name} takes no more arguments, not {' '.join(arguments)!r}")


def _unknown_command(name: str, known: Sequence[str]) -> InputError:
    matches = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {USAGE[matches[0]]!r}?" if matches else f" (known: {', '.join(known)})"
    return InputError(f"unknown command {name!r}{hint}")


def help_text() -> str:
    """Return the syntax and the help text of every command, within 80 columns."""
    lines: list[str] = []
    for name, usage in USAGE.items():
        first, *rest = textwrap.wrap(HELP[name], _HELP_WIDTH - _HELP_COLUMN)
        if len(usage) < _HELP_COLUMN:
            lines.append(f"{usage:{_HELP_COLUMN}}{first}")
        else:
            lines += [usage, " " * _HELP_COLUMN + first]
        lines += [" " * _HELP_COLUMN + line for line in rest]
    return "\n".join(lines)


def completions(
    before: str, *, models: Iterable[str], model_ids: Iterable[int], placements: Iterable[str]
) -> list[str]:
    """Return the Tab completions of the last argument of a partly typed line.

    Args:
        before: the line up to the cursor.
        models: names of models that can be registered or deployed.
        model_ids: IDs of registered models.
        placements: names of placement policies.
    """
    from maveriq.domain.deployments import Objective

    arguments = before.split()
    if before.endswith(" ") or not arguments:
        position, prefix = len(arguments), ""
    else:
        position, prefix = len(arguments) - 1, arguments[-1]
    candidates: Iterable[str] = ()
    if position == 0:
        candidates = (*_GENERAL_COMMANDS, *map(str, model_ids))
    elif arguments[0] == "register":
        candidates = {1: models, 2: ("yes", "no")}.get(position, ())
    elif arguments[0].isdecimal() and position == 1:
        candidates = _MODEL_COMMANDS
    elif arguments[0].isdecimal() and arguments[1] == "deploy":
        intents = [objective.value for objective in Objective]
        candidates = {2: models, 4: intents, 6: ("yes", "no"), 7: placements, 10: ("yes", "no")}.get(position, ())
    return sorted({candidate for candidate in candidates if candidate.startswith(prefix)})
