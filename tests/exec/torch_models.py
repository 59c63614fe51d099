"""Tiny models of every family, what transformers makes of them, and a world of ranks in threads of one process."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from queue import SimpleQueue
from typing import Any

import torch

from maveriq.exec import messages
from maveriq.exec.engines.torch.collectives import SingleRank
from maveriq.exec.engines.torch.config import RankSlice, rank_slice
from maveriq.exec.engines.torch.rank import Worker
from maveriq.exec.engines.torch.weights import RandomSource

# Tiny models gain nothing by threads, and threads that wait take the cores from the rest.
torch.set_num_threads(1)

LAYERS = 4
VOCABULARY = 199
SPREAD = 0.3  # wide, so that tokens differ from step to step
SEED = 7

_FALCON = {
    "model_type": "falcon",
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "vocab_size": VOCABULARY,
    "initializer_range": SPREAD,
    "alibi": False,
}
_LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_LLAMA, "num_key_value_heads": 8},
    "llama-gqa": {**_LLAMA, "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True},
    "falcon-7b": {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": False},
    "falcon-40b": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "gpt-j": {
        "model_type": "gptj",
        "n_layer": LAYERS,
        "n_embd": 64,
        "n_head": 8,
        "rotary_dim": 4,
        "n_positions": 128,
        "vocab_size": VOCABULARY,
        "initializer_range": SPREAD,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    },
}
PROMPTS = tuple(tuple((7 * i * i + 3 * i + n) % VOCABULARY for i in range(n)) for n in (5, 13, 9))
OUTPUT_TOKENS = 12


def spec_of(config: Mapping[str, Any], *, tp: int = 1, split: Sequence[int] = (LAYERS,), **other: Any) -> Any:
    default = {"weights": "float16", "kv": "native", "seed": SEED, "devices": ("cpu",) * (tp * len(split))}
    return messages.EngineSpec(
        deployment_id=1,
        generation=1,
        model="tiny",
        config_json=json.dumps(config),
        tp=tp,
        pp=len(split),
        layer_split=tuple(split),
        batch_size=1,
        **default | other,
    )


def prompts_of(
    prompts: Sequence[Sequence[int]] = PROMPTS, *, output_tokens: int = OUTPUT_TOKENS, stop: Sequence[int] = ()
) -> tuple[messages.PromptSequence, ...]:
    return tuple(
        messages.PromptSequence(request_id=n, prompt=tuple(p), output_tokens=output_tokens, stop_token_ids=tuple(stop))
        for n, p in enumerate(prompts, 1)
    )


@cache
def transformers_model(name: str) -> Any:
    """Return the unsplit model of transformers, with the weights that the engine draws."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name]), dtype=torch.float32).eval()
    source = RandomSource(seed=SEED, spread=SPREAD, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(source.read(parameter_name, tuple(parameter.shape)))
    return model


def greedy(model: Any, prompt: Sequence[int], tokens: int = OUTPUT_TOKENS) -> list[int]:
    """Return what a model of transformers says, without a cache or anything else of ours or theirs in between."""
    said = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            said.append(int(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
    return said[len(prompt) :]


@cache
def expected_tokens(name: str) -> list[list[int]]:
    return [greedy(transformers_model(name), prompt) for prompt in PROMPTS]


@dataclass
class World:
    """What the ranks in threads share."""

    tp: int
    pp: int
    places: list[list[Any]] = field(init=False)
    barriers: list[threading.Barrier] = field(init=False)
    pipes: list[list[SimpleQueue[Any]]] = field(init=False)
    tokens: list[SimpleQueue[Any]] = field(init=False)
    all_there: threading.Barrier = field(init=False)
    words: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.places = [[None] * self.tp for _ in range(self.pp)]
        self.barriers = [threading.Barrier(self.tp, timeout=120) for _ in range(self.pp)]
        self.pipes = [[SimpleQueue() for _ in range(self.tp)] for _ in range(self.pp)]
        self.all_there = threading.Barrier(self.tp * self.pp, timeout=120)
        self.words = [True] * (self.tp * self.pp)
        self.tokens = [SimpleQueue() for _ in range(self.tp * self.pp)]


class ThreadLinks:
    """Links between threads: what gloo does between processes, without its start."""

    def __init__(self, world: World, part: RankSlice) -> None:
        self._world = world
        self._part = part

    def add_up(self, x: Any) -> Any:
        parts = self.gather(x)
        return sum(parts[1:], parts[0])

    def gather(self, x: Any) -> list[Any]:
        places, barrier = self._world.places[self._part.stage], self._world.barriers[self._part.stage]
        places[self._part.place] = x
        barrier.wait()
        found = list(places)
        barrier.wait()
        return found

    def pass_on(self, x: Any) -> None:
        self._world.pipes[self._part.stage + 1][self._part.place].put(x)

    def take(self, like: Any) -> Any:
        got = self._world.pipes[self._part.stage][self._part.place].get(timeout=120)
        assert got.shape == like.shape
        assert got.dtype == like.dtype
        return got

    def tell_tokens(self, tokens: Any) -> Any:
        if self._part.last and self._part.place == 0:
            for told in self._world.tokens:
                told.put(tokens)
        return self._world.tokens[self._part.stage * self._part.tp + self._part.place].get(timeout=120)

    def agree(self, *, well: bool) -> bool:
        self._world.words[self._part.stage * self._part.tp + self._part.place] = well
        self._world.all_there.wait()
        agreed = all(self._world.words)
        self._world.all_there.wait()
        return agreed


def run_split(spec: Any, prompts: Sequence[messages.PromptSequence]) -> list[list[list[int]]]:
    """Run a split model with all ranks in threads; return each rank's steps."""
    ranks = spec.tp * spec.pp
    world = World(spec.tp, spec.pp)

    def run(rank: int) -> list[list[int]]:
        links = SingleRank() if ranks == 1 else ThreadLinks(world, rank_slice(spec, rank))
        return [step for step, _ in Worker(spec, rank, links).run(tuple(prompts))]

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def outputs(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the tokens of each sequence."""
    return [[token for token in tokens if token >= 0] for tokens in zip(*steps, strict=True)]


def load_worker(spec: Any) -> Worker:
    """Load an unsplit model."""
    return Worker(spec, 0, SingleRank())
