"""The console's language: a line becomes a command, or an error that says how the line should be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from maveriq.domain.deployments import Objective
from maveriq.errors import InputError

T = TypeVar("T")

_NOTHING = "-"
_YES, _NO = ("yes", "true", "fp16", "1"), ("no", "false", "0")

USAGE = {
    "register": "register MODEL",
    "models": "models",
    "endpoints": "endpoints",
    "health": "health",
    "help": "help",
    "quit": "quit",
    "deploy": "ID deploy MODEL LEN INTENT [SLO] [FP16] [PLACEMENT] [BATCH] [ACCURACY]",
    "inference": "ID inference TEXT",
    "prior_inference": "ID prior_inference TEXT",
    "status": "ID status",
    "remove": "ID remove",
}
"""How each command is written."""

TOLD = {
    "register": "make a model known: its name, or its place in the server's models folder; gives its ID",
    "models": "list the models and their IDs",
    "endpoints": "list the endpoints and the GPUs of their deployments",
    "health": "say whether all is well",
    "help": "show this",
    "quit": "leave (or Ctrl-D)",
    "deploy": "have a model served; LEN is the usual output in tokens, SLO as 500ms or 2s, ACCURACY in percent",
    "inference": "let the model continue a text",
    "prior_inference": "the same, at the head of the queue",
    "status": "show the endpoints of a model",
    "remove": "remove the endpoints of a model",
}
"""What each command does."""

_PLAIN = ("register", "models", "endpoints", "health", "help", "quit")
_OF_A_MODEL = ("deploy", "inference", "prior_inference", "status", "remove")


@dataclass(frozen=True, slots=True)
class Register:
    """`register MODEL`."""

    model: str


@dataclass(frozen=True, slots=True)
class Show:
    """`models`, `endpoints`, `health`, `help` or `quit`."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployModel:
    """`ID deploy ...`; fields as the server takes them."""

    model_id: int
    model: str
    output_tokens: int
    intent: str
    slo_ms: float | None = None
    float16_only: bool = False
    placement: str | None = None
    batch_size: int = 1
    min_accuracy: float = 0.0


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
class RemoveModel:
    """`ID remove`."""

    model_id: int


Command: TypeAlias = Register | Show | DeployModel | Infer | ShowModel | RemoveModel


def parse(line: str) -> Command | None:
    """Return the command of a line; None for an empty one or a comment.

    Raises:
        InputError: it is none, with how it should be.
    """
    if any("\ud800" <= character <= "\udfff" for character in line):  # bytes that no character was made of
        raise InputError("the line is no text in UTF-8; type it anew, or save its file as UTF-8")
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    if words[0].isdecimal():
        return _of_a_model(line, words)
    name, rest = {"exit": "quit"}.get(words[0], words[0]), words[1:]
    if name in _OF_A_MODEL:
        raise InputError(f"{name} needs the ID of a model first: {USAGE[name]}; models lists the IDs")
    if name not in _PLAIN:
        raise _unknown(name, (*_PLAIN, *_OF_A_MODEL))
    if name == "register":
        if len(rest) != 1:
            raise InputError(f"register takes one model: {USAGE['register']}")
        return Register(rest[0])
    if rest:
        raise InputError(f"{name} takes nothing more, not {' '.join(rest)!r}")
    return Show(name)


def _of_a_model(line: str, words: Sequence[str]) -> Command:
    model_id = int(words[0]) if len(words[0]) < 16 else 0
    if len(words) < 2:
        raise InputError(f"what about model {model_id}? Say {_or(_OF_A_MODEL)}")
    name, rest = words[1], words[2:]
    match name:
        case "deploy":
            return _deploy(model_id, rest)
        case "inference" | "prior_inference":
            if not rest:
                raise InputError(f"{name} needs a text: {USAGE[name]}")
            text = line.split(maxsplit=2)[2].rstrip("\r\n")
            return Infer(model_id=model_id, text=text, priority=name == "prior_inference")
        case "status" | "remove":
            if rest:
                raise InputError(f"{name} takes nothing more, not {' '.join(rest)!r}")
            return ShowModel(model_id) if name == "status" else RemoveModel(model_id)
    raise _unknown(name, _OF_A_MODEL)


def _deploy(model_id: int, words: Sequence[str]) -> DeployModel:
    usage = USAGE["deploy"]
    if not 3 <= len(words) <= 8:
        raise InputError(f"deploy takes three to eight words after it, not {len(words)}: {usage}")
    model, length, intent, *rest = words
    slo, fp16, placement, batch, accuracy = (*rest, *[_NOTHING] * (5 - len(rest)))
    return DeployModel(
        model_id=model_id,
        model=model,
        output_tokens=_read(length, int, "LEN", "a whole number of tokens"),
        intent=Objective.named(intent).value,
        slo_ms=None if slo in (_NOTHING, "0") else _read(slo, _milliseconds, "SLO", "a time as 500ms or 2s"),
        float16_only=fp16 != _NOTHING and _read(fp16.lower(), _yes_or_no, "FP16", "yes or no"),
        placement=None if placement == _NOTHING else placement,
        batch_size=1 if batch == _NOTHING else _read(batch, int, "BATCH", "a whole number of requests"),
        min_accuracy=0.0 if accuracy == _NOTHING else _read(accuracy.rstrip("%"), _finite, "ACCURACY", "a percentage"),
    )


def _read(word: str, as_what: Callable[[str], T], name: str, told: str) -> T:
    try:
        return as_what(word)
    except ValueError:
        raise InputError(f"{name} must be {told}, not {word!r}: {USAGE['deploy']}") from None


def _milliseconds(word: str) -> float:
    for unit, factor in (("ms", 1.0), ("s", 1e3)):
        if word.endswith(unit):
            return _finite(word.removesuffix(unit)) * factor
    return _finite(word)  # milliseconds, as everywhere in this API


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


def _yes_or_no(word: str) -> bool:
    if word not in (*_YES, *_NO):
        raise ValueError(word)
    return word in _YES


def completions(before: str, *, models: Iterable[str], ids: Iterable[int], placements: Iterable[str]) -> list[str]:
    """Return what the last word of a line that is being typed may become.

    Args:
        before: the line up to the cursor.
        models: names that can be registered or deployed.
        ids: of registered models.
        placements: names of placements.
    """
    words = before.split()
    at, word = (len(words), "") if before.endswith(" ") or not words else (len(words) - 1, words[-1])
    intents = [one.value for one in Objective]
    if at == 0:
        fitting: Iterable[str] = (*_PLAIN, *map(str, ids))
    elif words[0] == "register":
        fitting = models if at == 1 else ()
    elif not words[0].isdecimal():
        fitting = ()
    elif at == 1:
        fitting = _OF_A_MODEL
    elif words[1] == "deploy":
        fitting = {2: models, 4: intents, 6: ("yes", "no"), 7: placements}.get(at, ())
    else:
        fitting = ()
    return sorted({one for one in fitting if one.startswith(word)})


def _unknown(name: str, known: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {USAGE[near[0]]!r}?" if near else f" (known: {', '.join(known)})"
    return InputError(f"unknown command {name!r}{guess}")


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
