"""Checks that every external engine passes, each with its stand-in package."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from engine_specs import spec

from maveriq.exec import messages
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.external import ExternalEngine


def class_with(*names: str) -> Any:
    """Return what stands for a class that takes these keyword arguments and no others."""

    def stand_in(**_: Any) -> None: ...

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    vars(stand_in)["__signature__"] = inspect.Signature(parameters)
    return stand_in


def batch_of(*requested: tuple[int, int], stops: tuple[int, ...] = ()) -> messages.Generate:
    """Return a batch: for each sequence, the only prompt token and the number of output tokens."""
    return messages.Generate(
        execution_id=1,
        sequences=tuple(
            messages.PromptSequence(request_id=number, prompt=(start,), output_tokens=maximum, stop_token_ids=stops)
            for number, (start, maximum) in enumerate(requested)
        ),
    )


def check_that_close_may_come_twice_and_at_any_time(engine: ExternalEngine) -> None:
    engine.close()
    engine.load(spec())
    steps = engine.generate(batch_of((10, 99), (50, 99)))
    assert next(steps) == (11, 51)
    engine.close()
    engine.close()
    steps.close()  # type: ignore[attr-defined]


def check_that_a_sequence_without_room_fails_alone(engine: ExternalEngine) -> None:
    engine.load(spec())
    with pytest.raises(EngineError, match=r"of 257 tokens is too long \(limit 256\)") as failed:
        list(engine.generate(batch_of((1, 2), (1, 256))))
    assert failed.value.kind is FailureKind.ERROR
    assert list(engine.generate(batch_of((1, 2)))) == [(2,), (3,)]
    engine.close()


def check_that_the_folder_goes_even_if_the_engine_will_not(engine: ExternalEngine, folder: Path) -> None:
    shut_down = engine._shut_down

    def break_down() -> None:
        shut_down()
        raise RuntimeError("a worker hangs")

    engine._shut_down = break_down  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a worker hangs"):
        engine.close()
    assert not folder.exists()
