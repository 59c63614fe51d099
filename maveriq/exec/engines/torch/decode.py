"""Greedy decoding, the same loop on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from maveriq.exec.engines.torch.attention import Positions, decode_positions, prefill_positions
from maveriq.exec.engines.torch.links import Links
from maveriq.exec.engines.torch.stage import Stage
from maveriq.exec.messages import Sequence as Prompt

ENDED = -1
"""Stands for the token of a sequence that had ended before."""


def decode(
    stage: Stage, links: Links, prompts: Sequence[Prompt], *, like: torch.Tensor
) -> Iterator[tuple[list[int], bool]]:
    """Yield a token for each sequence, step by step until all have ended, and whether this step is the last.

    There must be room for all of it in the KV cache.

    Args:
        stage: this rank's part.
        links: to the others.
        prompts: what to go on from.
        like: gives device and type of hidden states.
    """
    lengths = [len(prompt.prompt) for prompt in prompts]
    longest = max(lengths)
    filled = [[*prompt.prompt, *[0] * (longest - len(prompt.prompt))] for prompt in prompts]
    tokens = torch.tensor(filled, device=like.device)
    positions = prefill_positions(stage.arch.rotary, len(prompts), longest, like=like)
    told = _step(stage, links, tokens, positions, [length - 1 for length in lengths], like=like)
    left = [prompt.output_tokens for prompt in prompts]
    places = lengths
    while True:
        step = [token if count else ENDED for token, count in zip(told.tolist(), left, strict=True)]
        left = [_left(prompt, token, count) for prompt, token, count in zip(prompts, step, left, strict=True)]
        last = not any(left)
        yield step, last
        if last:
            return
        positions = decode_positions(stage.arch.rotary, places, like=like)
        told = _step(stage, links, told[:, None], positions, [0] * len(prompts), like=like)
        # A sequence that has ended goes on, unheard, in its last place, so that it never outgrows its room.
        places = [place + 1 if count > 1 else place for place, count in zip(places, left, strict=True)]


def _left(prompt: Prompt, token: int, count: int) -> int:
    """Return how many tokens a sequence still wants after this one."""
    return 0 if token in prompt.stop_token_ids else max(count - 1, 0)


def _step(
    stage: Stage, links: Links, tokens: torch.Tensor, positions: Positions, ends: list[int], *, like: torch.Tensor
) -> torch.Tensor:
    """Run tokens [batch, tokens] through all stages and return the next ones, [batch]."""
    with torch.inference_mode():
        if stage.embedding is not None:
            x = torch.nn.functional.embedding(tokens, stage.embedding)
        else:
            x = links.take(like.new_empty(*tokens.shape, stage.arch.hidden))
        x = stage.run(x, positions)
        batch = len(ends)
        if stage.part.last:
            told = stage.likeliest(x[torch.arange(batch, device=x.device), torch.tensor(ends, device=x.device)])
        else:
            links.pass_on(x)
            told = torch.empty(batch, dtype=torch.long, device=x.device)
        return links.tell_tokens(told)
