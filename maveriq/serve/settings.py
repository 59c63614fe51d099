"""Settings of a service: limits, timeouts, the token, and the models folder."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from maveriq.errors import InputError
from maveriq.exec.batching_spec import EngineChoice

MAX_HEAD_BYTES = 32 * 1024
"""Size of URL and headers of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits of a service and who may use it.

    Args:
        token: every request must carry it; None serves everyone who can reach the loopback address.
        models_folder: the only folder from which models are read; None allows known models only.
        max_in_flight: accepted requests that have not ended; more get 429.
        max_body_bytes: size of an HTTP body; a longer one gets 413.
        body_timeout_s: time within which a body must arrive; a slower one gets 408.
        max_prompt_tokens: tokens of one prompt.
        max_output_tokens: tokens of one output.
        max_endpoints: endpoints at a time.
        max_models: registered models at a time.
        grace_period_s: time for running requests to finish at shutdown.
        kept_requests: number of ended requests whose status is kept.
        engine: how the engines of endpoints batch.

    Raises:
        InputError: a limit is not positive, or the token is empty.
    """

    token: str | None = field(default=None, repr=False)
    models_folder: Path | None = None
    max_in_flight: int = 256
    max_body_bytes: int = 1024 * 1024
    body_timeout_s: float = 30.0
    max_prompt_tokens: int = 32_768
    max_output_tokens: int = 4_096
    max_endpoints: int = 256
    max_models: int = 1_024
    grace_period_s: float = 30.0
    kept_requests: int = 100_000
    engine: EngineChoice = field(default_factory=EngineChoice)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, (int, float)) and not 0 < value < float("inf"):
                raise InputError(f"{setting.name} must be positive, not {value}")
        if self.token is not None and not self.token.strip():
            raise InputError("the token is empty; it needs at least one character")
