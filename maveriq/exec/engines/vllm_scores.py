"""A process that loads a model into vLLM, scores sequences of tokens, and ends.

It runs in vLLM's own interpreter: `module_command(python, "maveriq.exec.engines.vllm_scores")` with the paths of two
files, a `ScoreJob` to read and its `Scores` to write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from maveriq.exec.engines.engine import EngineError
from maveriq.exec.engines.vllm import VllmEngine
from maveriq.exec.messages import EngineSpec


class ScoreJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to load, and sequences whose last token is scored."""

    spec: EngineSpec
    sequences: tuple[tuple[int, ...], ...]


class Scores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The log probability of the last token of each sequence, or in one line why there is none."""

    log_probabilities: tuple[float, ...] = ()
    error: str = ""


def main() -> None:
    """Score the job in the file that the first argument names."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ScoreJob)
    engine = VllmEngine()
    try:
        engine.load(job.spec)
        scores = Scores(log_probabilities=tuple(engine.log_probabilities(job.sequences)))
    except EngineError as error:
        scores = Scores(error=str(error))
    finally:
        engine.close()
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(scores))


if __name__ == "__main__":
    main()
