"""The models of the measured tables: their structure, and how each table's rows store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from maveriq.domain.gpu_kinds import NumberFormat
from maveriq.domain.models import ModelSpec, load_model
from maveriq.domain.weight_formats import FP8_PER_CHANNEL
from maveriq.estimate.intervals import Family, family_of
from maveriq.estimate.step_time import Formats


@dataclass(frozen=True, slots=True)
class Stored:
    """A model, and how it is stored and computed."""

    model: ModelSpec
    formats: Formats

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.model.decoder)


# Published names, by their beginning, and maveriq's; `models/...` is a folder of configurations. Models that differ in
# nothing that takes time stand for each other: Llama 3 and 3.1, Qwen 2 and 2.5, Llama 1 and 2.
_MODELS: Mapping[str, str] = {
    "BAAI/Aquila-7B": "llama-2-7b",
    "EleutherAI/gpt-j-6b": "gptj-6b",
    "MiniMaxAI/MiniMax-M2.5": "models/MiniMaxAI--MiniMax-M2.5",
    "Qwen/Qwen1.5-7B": "llama-2-7b",
    "Qwen/Qwen2-72B": "qwen2.5-72b",
    "Qwen/Qwen2-7B": "qwen2.5-7b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-235B-A22B": "qwen3-235b-a22b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-Coder-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-Coder-480B-A35B": "qwen3-coder-480b-a35b",
    "Qwen/Qwen3.5-397B-A17B": "models/Qwen--Qwen3.5-397B-A17B",
    "bigscience/bloom-7b1": "bloom-7b1",
    "bloom-176b": "bloom-176b",
    "deepseek-ai/DeepSeek-R1": "models/deepseek-ai--DeepSeek-R1",
    "deepseek-ai/DeepSeek-V3": "models/deepseek-ai--DeepSeek-V3",
    "facebook/opt-6.7b": "opt-6.7b",
    "google/gemma-3-12b": "gemma-3-12b",
    "google/gemma-3-27b": "gemma-3-27b",
    "huggyllama/llama-7b": "llama-2-7b",
    "llama2-70b": "llama-2-70b",
    "meta-llama/Llama-2-70b": "llama-2-70b",
    "meta-llama/Llama-2-7b": "llama-2-7b",
    "meta-llama/Llama-3.1-405B": "llama-3.1-405b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.3-70B": "llama-3.3-70b",
    "meta-llama/Llama-4-Maverick": "models/meta-llama--Llama-4-Maverick-17B-128E-Instruct",
    "meta-llama/Llama-4-Scout": "models/llama-4-scout-17b-16e-instruct-fp8-dynamic",
    "meta-llama/Meta-Llama-3-70B": "llama-3.1-70b",
    "meta-llama/Meta-Llama-3-8B": "llama-3.1-8b",
    "mistralai/Mistral-7B": "mistral-7b",
    "mistralai/Mixtral-8x7B": "mixtral-8x7b",
    "moonshotai/Kimi-K2.5": "models/moonshotai--Kimi-K2.5",
    "nvidia/DeepSeek-V3.1-NVFP4": "models/nvidia--DeepSeek-V3.1-NVFP4",
    "nvidia/Llama-3.1-8B": "llama-3.1-8b",
    "nvidia/Qwen3-32B-NVFP4": "qwen3-32b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "zhipuai/GLM-5": "models/zai-org--GLM-5",
}
_QUANTISED: Mapping[tuple[str, str], str] = {
    ("deepseek-ai/DeepSeek-R1", "nvfp4"): "models/nvidia--DeepSeek-V3.1-NVFP4",
    ("deepseek-ai/DeepSeek-V3", "nvfp4"): "models/nvidia--DeepSeek-V3.1-NVFP4",
    ("MiniMaxAI/MiniMax-M2.5", "nvfp4"): "models/nvidia--MiniMax-M2.5-NVFP4",
    ("meta-llama/Llama-3.1-70B", "fp8"): "models/nvidia--Llama-3.1-70B-Instruct-FP8",
}
_EIGHT_BITS = 8
_DIFFERENT: Mapping[str, tuple[int, int]] = {
    "Qwen/Qwen1.5-7B": (151936, 32768),
    "BAAI/Aquila-7B": (100008, 2048),
    "huggyllama/llama-7b": (32000, 2048),
}
"""Vocabulary and positions of models, where they are not those of the one that stands for them."""
_PUBLISHED_IN_BLOCKS = ("Qwen/",)  # whose 8-bit checkpoints have a scale for each block
_EXPERTS_ALONE = ("meta-llama/Llama-4",)  # whose 8-bit checkpoints leave attention in 16 bits


def stored_model(name: str, number_format: str, data: Path) -> Stored | None:
    """Return a model as a row stores it; None where neither maveriq nor the folder of configurations has it.

    Args:
        name: the published name.
        number_format: `bfloat16`, `fp8`, `fp8_block`, `mxfp4`, `nvfp4` or `int4`.
        data: the folder of measured data, with `models` in it.
    """
    known = max((key for key in _MODELS if name.startswith(key)), key=len, default=None)
    if known is None:
        return None
    in_blocks = number_format == "fp8" and name.startswith(_PUBLISHED_IN_BLOCKS) and name.endswith("-FP8")
    return _stored(known, "fp8_block" if in_blocks else number_format, data)


@cache
def _stored(known: str, number_format: str, data: Path) -> Stored:
    path = _QUANTISED.get((known, number_format), _MODELS[known])
    model = load_model(str(data / path) if "/" in path else path)
    if known in _DIFFERENT:
        vocabulary, positions = _DIFFERENT[known]
        model = replace(model, vocab_size=vocabulary, context_tokens=positions)
    if number_format == "bfloat16":
        return Stored(model, Formats(weights=NumberFormat.BFLOAT16))
    if known.startswith(_EXPERTS_ALONE):
        return Stored(_with_8_bit_experts(model), Formats(weights=None))
    if model.quantization:
        kv = NumberFormat.FP8 if model.decoder.kv_bits == _EIGHT_BITS else NumberFormat.BFLOAT16
        return Stored(model, Formats(weights=None, kv=kv))
    return Stored(model, Formats(weights=NumberFormat(number_format)))


def _with_8_bit_experts(model: ModelSpec) -> ModelSpec:
    decoder = model.decoder
    kinds = tuple(
        replace(
            kind,
            formats=tuple(
                (matrix.name, FP8_PER_CHANNEL)
                for matrix in kind.weight_matrices(decoder.hidden_size)
                if "experts" in matrix.name
            ),
        )
        for kind in decoder.layer_kinds
    )
    return replace(model, decoder=replace(decoder, layer_kinds=kinds))
