"""What is said about one engine beside its messages: what to start, how long to be patient with it, why it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from maveriq.exec.messages import EngineSpec
from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What engine to start: its specification, and the memory it needs on each of its GPUs, in rank order."""

    spec: EngineSpec
    needed: Mapping[int, Bytes]
    load_s: float  # of the run, as estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionSettings:
    """How long to be patient with engines; all in real seconds.

    `start_s` is for launch, handshake and load together. An engine that serves and is not heard for `hang_s`, or does
    not get on with an execution for that and `stretch` times its estimated service, hangs. A stopped one is
    asked by word, after `stop_s` by SIGTERM, after as long again by SIGKILL. The n-th failure in a row is mended after
    `backoff_s` * 2^(n-1), at most `longest_backoff_s`; the `most_failures`-th is the last.
    """

    start_s: float = 900.0
    ping_s: float = 1.0
    hang_s: float = 30.0
    stretch: float = 3.0
    stop_s: float = 5.0
    backoff_s: float = 1.0
    longest_backoff_s: float = 60.0
    most_failures: int = 5
    memory_back_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a life ended. `failed` is False for one that was told to stop, `final` True for one that no repeat mends."""

    reason: str
    failed: bool = True
    final: bool = False
