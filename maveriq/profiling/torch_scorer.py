"""Scores tokens with maveriq's torch engine, whose weight formats are those that serve.

One rank of the engine runs in this process: scores need logits, which an engine's processes do not send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import MaveriqError
from maveriq.exec.messages import PromptSequence
from maveriq.exec.model_files import ModelFiles


class TorchScorer:
    """A model in one format, loaded on one device. It is a `maveriq.profiling.accuracy.Scorer`.

    Args:
        model: the model.
        files: its configuration and weights.
        weights: the format of its weights.
        kv: that of the KV cache.

    Raises:
        MaveriqError: torch is not installed, or the engine cannot load the model.
    """

    def __init__(self, model: ModelSpec, files: ModelFiles, *, weights: WeightType, kv: KvType) -> None:
        try:
            import torch
        except ImportError:
            raise MaveriqError("scores are computed with torch: pip install 'maveriq[torch]'") from None
        from maveriq.exec.engines.engine import EngineError
        from maveriq.exec.engines.torch.collectives import SingleRank
        from maveriq.exec.engines.torch.rank import RankWorker

        spec = files.engine_spec(
            model,
            ParallelConfig(tp=1, pp=1, weights=weights, kv=kv),
            batch_size=1,
            devices=("cuda:0" if torch.cuda.is_available() else "cpu",),
        )
        self._engine_error = EngineError
        try:
            self._worker: Any = RankWorker(spec, 0, SingleRank())
        except EngineError as error:
            raise MaveriqError(f"{model.name} in {weights}: {error}") from None

    def log_probabilities(self, prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log probabilities of tokens after prompts.

        Raises:
            MaveriqError: memory is short, or the engine fails.
        """
        sequences = tuple(
            PromptSequence(request_id=number, prompt=tuple(prompt), output_tokens=1)
            for number, prompt in enumerate(prompts)
        )
        try:
            logits = self._worker.next_token_logits(sequences)
        except self._engine_error as error:
            raise MaveriqError(f"scores of {len(prompts)} prompts: {error}; try a smaller --batch-size") from None
        logs = logits.float().log_softmax(dim=-1)
        return [[float(row[token]) for token in tokens] for row, tokens in zip(logs, wanted, strict=True)]
