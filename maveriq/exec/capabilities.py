"""Whether an engine can run a model as configured: asked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.deployment import Configuration, LayerSplit
from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError
from maveriq.exec.matrix import Arrangement, Device, engine_facts, reason_against
from maveriq.exec.nearest import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why an engine cannot run a model so, and the nearest that it can, None where there is nothing near."""

    engine: str
    model: str
    asked: Arrangement
    reason: str
    nearest: Arrangement | None

    def __str__(self) -> str:
        near = "it has nothing near" if self.nearest is None else f"nearest that it can: {self.nearest}"
        return f"{self.engine} cannot run {self.model} as {self.asked}: {self.reason}; {near}"


def why_not(
    engine: str, model: ModelSpec, configuration: Configuration, layer_split: LayerSplit, device: Device
) -> Refusal | None:
    """Return why an engine cannot run a model so, or None where it can.

    Args:
        engine: its name, a key of `known_engines`.
        model: its shape.
        configuration: how it is cut and stored.
        layer_split: layers of each pipeline stage; they must add up to the model's.
        device: what the engine is to compute on.

    Raises:
        UnknownNameError: no such engine.
        InputError: the split does not belong to the model or the configuration.
    """
    facts, asked = engine_facts(engine), Arrangement(configuration=configuration, layer_split=layer_split)
    if sum(layer_split) != model.layers:
        raise InputError(f"layer split {layer_split} of {model.name} must add up to {model.layers} layers")
    reason = reason_against(facts, model, asked, device)
    if reason is None:
        return None
    near = nearest(model, asked, lambda one: reason_against(facts, model, one, device) is None)
    return Refusal(engine=engine, model=model.name, asked=asked, reason=reason, nearest=near)
