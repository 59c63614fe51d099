"""The greedy decoding loop that every rank runs over its own stage, and the scores of the next token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from maveriq.exec.engines.torch.collectives import Collectives
from maveriq.exec.engines.torch.config import Shard
from maveriq.exec.messages import PromptSequence as Prompt

ENDED = -1
"""In a step: the sequence ended before."""


class Stage(Protocol):
    """A rank's shard of a model, loaded.

    Attributes:
        shard: which part of the model it is.
        vocabulary: how many tokens the model knows.
        hidden: the size of a hidden state.
        layers: how many transformer layers it holds.
        weights_bytes: memory of the weights; tied matrices count once.
        kv_cache_bytes: memory that the KV cache has reserved now.
    """

    shard: Shard
    vocabulary: int
    hidden: int

    @property
    def layers(self) -> int: ...  # noqa: D102

    @property
    def weights_bytes(self) -> int: ...  # noqa: D102

    @property
    def kv_cache_bytes(self) -> int: ...  # noqa: D102

    def reserve(self, prompts: Sequence[Prompt]) -> None:
        """Reserve KV cache for an execution of these prompts."""

    def release(self) -> None:
        """Free the KV cache."""

    def prefill(self, prompts: Sequence[Sequence[int]], received: torch.Tensor | None) -> torch.Tensor:
        """Run whole prompts through its layers, as a new execution.

        Args:
            prompts: the tokens of each sequence.
            received: what the stage before returned, None on the first.

        Returns:
            Hidden states [batch, longest prompt, hidden]; on the last stage this rank's logits of the next tokens,
            [batch, this rank's tokens].
        """

    def decode(self, tokens: torch.Tensor, lengths: Sequence[int], received: torch.Tensor | None) -> torch.Tensor:
        """Run one token of each sequence, [batch], after `lengths` tokens each; return as `prefill`, for one."""


def generate_tokens(
    stage: Stage, collectives: Collectives, prompts: Sequence[Prompt], *, like: torch.Tensor
) -> Iterator[tuple[list[int], bool]]:
    """Prefill, then decode until all sequences have ended; yield each step's tokens and whether it is the last step.

    The KV cache must be reserved for the prompts.

    Args:
        stage: this rank's shard.
        collectives: connects it to the other ranks.
        prompts: the sequences of the execution.
        like: gives device and dtype of hidden states.
    """
    lengths = [len(prompt.prompt) for prompt in prompts]
    next_tokens = _next_tokens(stage, collectives, _prefill(stage, collectives, [p.prompt for p in prompts], like=like))
    remaining = [prompt.output_tokens for prompt in prompts]
    while True:
        step = [token if count else ENDED for token, count in zip(next_tokens.tolist(), remaining, strict=True)]
        remaining = [_remaining(*sequence) for sequence in zip(prompts, step, remaining, strict=True)]
        last = not any(remaining)
        yield step, last
        if last:
            return
        with torch.inference_mode():
            x = stage.decode(next_tokens, lengths, _received(stage, collectives, len(prompts), 1, like=like))
        next_tokens = _next_tokens(stage, collectives, x)
        # An ended sequence stays in the batch and stays as long as it is, so that it never outgrows the cache.
        lengths = [length + 1 if count > 1 else length for length, count in zip(lengths, remaining, strict=True)]


def next_token_logits(
    stage: Stage, collectives: Collectives, prompts: Sequence[Prompt], *, like: torch.Tensor
) -> torch.Tensor | None:
    """Return the logits of the token after each prompt, [batch, vocabulary]; None on stages before the last.

    The KV cache must be reserved for the prompts. All ranks must make this call.
    """
    x = _prefill(stage, collectives, [prompt.prompt for prompt in prompts], like=like)
    if not stage.shard.is_last_stage:
        collectives.send(x)
        return None
    if stage.shard.tp == 1:
        return x
    widest = -(-stage.vocabulary // stage.shard.tp)
    parts = collectives.all_gather(torch.nn.functional.pad(x, (0, widest - x.shape[1])))
    return torch.cat(
        [part[:, : len(stage.shard.partition_of(rank, stage.vocabulary))] for rank, part in enumerate(parts)], 1
    )


def _prefill(
    stage: Stage, collectives: Collectives, prompts: Sequence[Sequence[int]], *, like: torch.Tensor
) -> torch.Tensor:
    with torch.inference_mode():
        longest = max(map(len, prompts))
        return stage.prefill(prompts, _received(stage, collectives, len(prompts), longest, like=like))


def _received(
    stage: Stage, collectives: Collectives, batch: int, tokens: int, *, like: torch.Tensor
) -> torch.Tensor | None:
    """Wait for the hidden states of the stage before; None on the first."""
    if stage.shard.is_first_stage:
        return None
    return collectives.recv(like.new_empty(batch, tokens, stage.hidden))


def _next_tokens(stage: Stage, collectives: Collectives, x: torch.Tensor) -> torch.Tensor:
    """Return the next tokens [batch] on every rank, given what this stage returned."""
    with torch.inference_mode():
        if stage.shard.is_last_stage:
            return collectives.broadcast_tokens(greedy_tokens(x, stage, collectives))
        collectives.send(x)
        return collectives.broadcast_tokens(torch.empty(len(x), dtype=torch.long, device=x.device))


def greedy_tokens(logits: torch.Tensor, stage: Stage, collectives: Collectives) -> torch.Tensor:
    """Return the token with the largest logit for each sequence, [batch]; the lowest one of equals."""
    best, token = logits.max(dim=-1)
    if stage.shard.tp == 1:
        return token
    token += stage.shard.partition(stage.vocabulary).start  # from this rank's index to the token id
    bests = torch.stack(collectives.all_gather(best))
    tokens = torch.stack(collectives.all_gather(token))
    return tokens.gather(0, bests.argmax(dim=0, keepdim=True)).squeeze(0)


def _remaining(prompt: Prompt, token: int, count: int) -> int:
    """Return how many tokens a sequence still generates after this one."""
    return 0 if token in prompt.stop_token_ids else max(count - 1, 0)
