"""Tiny models of every family, their transformers equivalents, and ranks in threads of one process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from maveriq.exec import messages
from maveriq.exec.engines.torch.collectives import SingleRank
from maveriq.exec.engines.torch.config import Shard, shard_of
from maveriq.exec.engines.torch.rank import RankWorker
from maveriq.exec.engines.torch.weights import RandomWeights

# Tiny models do not gain from threads, and waiting threads take cores from other processes.
torch.set_num_threads(1)

T = TypeVar("T")
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
    "llama-head-dim": {**_LLAMA, "num_key_value_heads": 2, "head_dim": 16},
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
_DECODER = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE = {**_DECODER, "head_dim": 16}
_TIED = {**_WIDE, "tie_word_embeddings": True}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_SHARED_EXPERTS = {
    **_WIDE,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_RECURRENT = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
}
_GPT2 = {"n_layer": LAYERS, "n_embd": 64, "n_head": 8, "n_positions": 256, "vocab_size": VOCABULARY}
_WINDOW = {"sliding_window": 6}  # shorter than the prompts
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
EIGHT_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gemma": {**_TIED, "model_type": "gemma"},
    "mistral": {**_DECODER, "model_type": "mistral", "sliding_window": None},
    "mistral-window": {**_DECODER, "model_type": "mistral", **_WINDOW},
    "mixtral": {**_DECODER, "model_type": "mixtral", **_LOCAL_EXPERTS, "sliding_window": None},
    "phi": {**_DECODER, "model_type": "phi"},
    "qwen3": {**_WIDE, "model_type": "qwen3"},
}
"""Those of the eight families of decision 20 that run on transformers' modules; `CONFIGS` has the others."""
MORE_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "arcee": {**_DECODER, "model_type": "arcee"},
    "bloom": {"model_type": "bloom", "n_layer": LAYERS, "hidden_size": 64, "n_head": 8, "vocab_size": VOCABULARY},
    "codegen": {**_GPT2, "model_type": "codegen", "rotary_dim": 4, "tie_word_embeddings": False},
    "cohere": {**_TIED, "model_type": "cohere", "logit_scale": 0.5},
    "cohere2": {**_TIED, "model_type": "cohere2", "logit_scale": 0.5, **_MIXED},
    "dots1": {**_SHARED_EXPERTS, "model_type": "dots1"},
    "ernie4_5": {**_DECODER, "model_type": "ernie4_5"},
    "exaone4": {**_DECODER, "model_type": "exaone4", **_MIXED},
    "gemma2": {**_TIED, "model_type": "gemma2", **_WINDOW},
    "gemma3": {**_TIED, "model_type": "gemma3_text", **_MIXED},
    "glm": {**_WIDE, "model_type": "glm"},
    "glm4": {**_WIDE, "model_type": "glm4"},
    "glm4_moe": {**_SHARED_EXPERTS, "model_type": "glm4_moe"},
    "gpt2": {**_GPT2, "model_type": "gpt2"},
    "gpt_bigcode": {**_GPT2, "model_type": "gpt_bigcode", "multi_query": True},
    "gpt_neox": {**_DECODER, "model_type": "gpt_neox"},
    "granite": {**_DECODER, "model_type": "granite", "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "granitemoe": {**_DECODER, "model_type": "granitemoe", **_LOCAL_EXPERTS},
    "minimax_m2": {**_WIDE, "model_type": "minimax_m2", **_LOCAL_EXPERTS},
    "nemotron": {**_DECODER, "model_type": "nemotron"},
    "nemotron_h": {
        **_WIDE,
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-*-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "chunk_size": 8,
        **_EXPERTS,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo": {**_DECODER, "model_type": "olmo"},
    "olmo2": {**_DECODER, "model_type": "olmo2"},
    "olmo3": {**_DECODER, "model_type": "olmo3", **_MIXED},
    "olmoe": {**_DECODER, "model_type": "olmoe", **_EXPERTS},
    "opt": {
        "model_type": "opt",
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_attention_heads": 8,
        "ffn_dim": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
    },
    "phi3": {**_DECODER, "model_type": "phi3"},
    "qwen2": {**_DECODER, "model_type": "qwen2"},
    "qwen2-window": {
        **_DECODER, "model_type": "qwen2", **_WINDOW, "use_sliding_window": True, "max_window_layers": 2,
    },
    "qwen2_moe": {**_DECODER, "model_type": "qwen2_moe", **_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_5": {**_WIDE, "model_type": "qwen3_5_text", **_RECURRENT},
    "qwen3_5_moe": {
        **_WIDE, "model_type": "qwen3_5_moe_text", **_EXPERTS, "shared_expert_intermediate_size": 64, **_RECURRENT,
    },
    "qwen3_next": {
        **_WIDE, "model_type": "qwen3_next", **_EXPERTS, "shared_expert_intermediate_size": 64, **_RECURRENT,
    },
    "qwen3_moe": {**_WIDE, "model_type": "qwen3_moe", **_EXPERTS, "mlp_only_layers": [0]},
    "seed_oss": {**_WIDE, "model_type": "seed_oss"},
    "smollm3": {**_DECODER, "model_type": "smollm3"},
    "stablelm": {**_DECODER, "model_type": "stablelm", "use_parallel_residual": True},
    "starcoder2": {**_DECODER, "model_type": "starcoder2", **_WINDOW},
}  # fmt: skip
BEYOND_OWN: Mapping[str, Mapping[str, Any]] = {
    "falcon-alibi": {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "gpt-j-relu": {**CONFIGS["gpt-j"], "activation_function": "relu"},
    "llama-partial": {**_DECODER, "hidden_act": "relu", "partial_rotary_factor": 0.5},
    "llama-yarn": {
        **_DECODER,
        "rope_scaling": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
"""Models of the families of maveriq's own decoder that it does not cover."""
TRANSFORMERS_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    name: {**config, "initializer_range": SPREAD}
    for name, config in {**EIGHT_FAMILIES, **MORE_FAMILIES, **BEYOND_OWN}.items()
}
"""Models that run on transformers' modules."""
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

    config = AutoConfig.for_model(**{**CONFIGS, **TRANSFORMERS_CONFIGS}[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    source = RandomWeights(seed=SEED, initializer_range=SPREAD, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(source.read(parameter_name, tuple(parameter.shape)))
    return model


def greedy(model: Any, prompt: Sequence[int], tokens: int = OUTPUT_TOKENS) -> list[int]:
    """Return the greedy tokens of a transformers model, without a KV cache."""
    sequence = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            sequence.append(int(model(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


@cache
def expected_tokens(name: str) -> list[list[int]]:
    return [greedy(transformers_model(name), prompt) for prompt in PROMPTS]


@dataclass
class ThreadGroupState:
    """State shared by ranks in threads."""

    tp: int
    pp: int
    gathered: list[list[Any]] = field(init=False)
    barriers: list[threading.Barrier] = field(init=False)
    pipes: list[list[SimpleQueue[Any]]] = field(init=False)
    tokens: list[SimpleQueue[Any]] = field(init=False)
    all_ranks: threading.Barrier = field(init=False)
    flags: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.gathered = [[None] * self.tp for _ in range(self.pp)]
        self.barriers = [threading.Barrier(self.tp, timeout=120) for _ in range(self.pp)]
        self.pipes = [[SimpleQueue() for _ in range(self.tp)] for _ in range(self.pp)]
        self.all_ranks = threading.Barrier(self.tp * self.pp, timeout=120)
        self.flags = [True] * (self.tp * self.pp)
        self.tokens = [SimpleQueue() for _ in range(self.tp * self.pp)]


class ThreadCollectives:
    """`Collectives` between threads, like gloo between processes but without startup time."""

    def __init__(self, state: ThreadGroupState, shard: Shard) -> None:
        self._state = state
        self._shard = shard

    def all_reduce(self, x: Any) -> Any:
        parts = self.all_gather(x)
        return sum(parts[1:], parts[0])

    def all_gather(self, x: Any) -> list[Any]:
        gathered, barrier = (
            self._state.gathered[self._shard.stage],
            self._state.barriers[self._shard.stage],
        )
        gathered[self._shard.tp_rank] = x
        barrier.wait()
        found = list(gathered)
        barrier.wait()
        return found

    def send(self, x: Any) -> None:
        self._state.pipes[self._shard.stage + 1][self._shard.tp_rank].put(x)

    def recv(self, like: Any) -> Any:
        got = self._state.pipes[self._shard.stage][self._shard.tp_rank].get(timeout=120)
        assert got.shape == like.shape
        assert got.dtype == like.dtype
        return got

    def broadcast_tokens(self, tokens: Any) -> Any:
        if self._shard.is_last_stage and self._shard.tp_rank == 0:
            for queue in self._state.tokens:
                queue.put(tokens)
        return self._state.tokens[self._shard.stage * self._shard.tp + self._shard.tp_rank].get(timeout=120)

    def all_ok(self, *, ok: bool) -> bool:
        self._state.flags[self._shard.stage * self._shard.tp + self._shard.tp_rank] = ok
        self._state.all_ranks.wait()
        agreed = all(self._state.flags)
        self._state.all_ranks.wait()
        return agreed


def on_ranks(spec: Any, use: Callable[[RankWorker], T]) -> list[T]:
    """Load a split model with all ranks in threads; return what `use` returns for each rank."""
    ranks = spec.tp * spec.pp
    state = ThreadGroupState(spec.tp, spec.pp)

    def run(rank: int) -> T:
        collectives = SingleRank() if ranks == 1 else ThreadCollectives(state, shard_of(spec, rank))
        return use(RankWorker(spec, rank, collectives))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def run_split(spec: Any, prompts: Sequence[messages.PromptSequence]) -> list[list[list[int]]]:
    """Run a split model with all ranks in threads; return each rank's steps."""
    return on_ranks(spec, lambda worker: [step for step, _ in worker.run(tuple(prompts))])


def outputs(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the tokens of each sequence."""
    return [[token for token in tokens if token >= 0] for tokens in zip(*steps, strict=True)]


def load_worker(spec: Any) -> RankWorker:
    """Load an unsplit model."""
    return RankWorker(spec, 0, SingleRank())
