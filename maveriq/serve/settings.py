"""What a service allows: its limits, its secret, its folders."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from maveriq.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits of a service, and who may use it.

    Args:
        token: what every request must carry; None serves everybody who can reach a loopback address.
        models_folder: models may be read from here, and from nowhere else; None for known models alone.
        max_in_flight: accepted requests that have not ended; more are told to come back (429).
        max_body_bytes: a longer body is not read (413).
        body_timeout_s: a body must be there in this time (408).
        max_prompt_tokens: of one request.
        max_output_tokens: of one request.
        max_endpoints: at a time.
        max_models: registered at a time.
        grace_period_s: on the way down, what runs gets so long to end.
        kept_requests: so many ended requests keep their status.

    Raises:
        InputError: a limit that is not positive, or an empty token.
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

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (int, float)) and not 0 < value < float("inf"):
                raise InputError(f"{one.name} must be positive, not {value}")
        if self.token is not None and not self.token.strip():
            raise InputError("the token is empty; put at least one character into it")
