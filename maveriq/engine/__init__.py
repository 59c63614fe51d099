"""Models of batching engines as they are today, without a clock (docs/engine-models.md)."""

from maveriq.engine.interface import Engine, EngineCounters, QuietRun
from maveriq.engine.replay import replay_scenario
from maveriq.engine.requests import EngineRequest
from maveriq.engine.steps import Emitted, Step

__all__ = ["Emitted", "Engine", "EngineCounters", "EngineRequest", "QuietRun", "Step", "replay_scenario"]
