"""Published configurations are read right: parameters as published, KV bytes by hand, and as transformers builds them.

The configurations are in the folder that MAVERIQ_DATA names (`models`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from maveriq.domain.decoder import Decoder
from maveriq.domain.models import load_model
from maveriq.errors import InputError

pytestmark = pytest.mark.skipif("MAVERIQ_DATA" not in os.environ, reason="MAVERIQ_DATA names the configurations")

FOLDER = Path(os.environ.get("MAVERIQ_DATA", ".")) / "models"

# Billions of parameters as the model's card or its name says, with as many digits as it gives. Layers that predict
# further tokens are not in it, or are noted.
PUBLISHED: Mapping[str, str] = {
    "MiniMaxAI--MiniMax-M2.5": "230",
    "Qwen--Qwen3-0.6B": "0.6",
    "Qwen--Qwen3-235B-A22B": "235",
    "Qwen--Qwen3-30B-A3B": "30.5",
    "Qwen--Qwen3-30B-A3B-FP8": "30.5",
    "Qwen--Qwen3-32B": "32.8",
    "Qwen--Qwen3-32B-FP8": "32.8",
    "Qwen--Qwen3-32B-FP8-Static-PerTensor": "32.8",
    "Qwen--Qwen3-8B": "8.2",
    "Qwen--Qwen3-VL-235B-A22B-Instruct": "236",
    "Qwen--Qwen3-VL-2B-Instruct": "2.13",
    "Qwen--Qwen3-VL-32B-Instruct": "33.4",
    "Qwen--Qwen3-VL-32B-Thinking": "33.4",
    "Qwen--Qwen3-VL-8B-Instruct": "8.77",
    "Qwen--Qwen3.5-122B-A10B": "122",
    "Qwen--Qwen3.5-397B-A17B": "397",
    "XiaomiMiMo--MiMo-7B-Base": "7.62",  # 7.83 with a layer of 0.21 that predicts a further token
    "codellama-34b-instruct-hf": "33.7",
    "deepseek-ai--DeepSeek-R1": "671",
    "deepseek-ai--DeepSeek-V3": "671",
    "deepseek-v2-lite": "15.7",
    "google--gemma-4-26B-A4B": "25.8",  # 25.2 without the vision tower
    "llama-2-7b-hf": "6.74",
    "llama-4-scout-17b-16e-instruct-fp8-dynamic": "109",
    "meta-llama--Llama-4-Maverick-17B-128E-Instruct": "400",
    "meta-llama--Meta-Llama-3.1-70B": "70.6",
    "meta-llama--Meta-Llama-3.1-8B": "8.03",
    "mistralai--Mixtral-8x7B-v0.1": "46.7",
    "moonshotai--Kimi-K2.5": "1027",  # the card says 1T; counted by transformers
    "nvidia--DeepSeek-V3.1-NVFP4": "671",
    "nvidia--DeepSeek-V3.2-NVFP4": "671",
    "nvidia--GLM-5-NVFP4": "744",
    "nvidia--GLM-5.1-NVFP4": "744",
    "nvidia--GLM-5.2-NVFP4": "744",
    "nvidia--Gemma-4-26B-A4B-NVFP4": "25.8",
    "nvidia--Kimi-K2.5-NVFP4": "1027",
    "nvidia--Kimi-K2.6-NVFP4": "1027",
    "nvidia--Kimi-K2.7-Code-NVFP4": "1027",
    "nvidia--Llama-3.1-70B-Instruct-FP8": "70.6",
    "nvidia--MiniMax-M2.5-NVFP4": "230",
    "nvidia--MiniMax-M2.7-NVFP4": "230",
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": "31.6",
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8": "120",
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": "120",
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": "550",
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8": "550",
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4": "550",
    "nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4": "31.6",
    "nvidia--Qwen3.5-122B-A10B-NVFP4": "122",
    "nvidia--Qwen3.5-397B-A17B-NVFP4": "397",
    "nvidia--Qwen3.6-27B-NVFP4": "27.4",
    "nvidia--Qwen3.6-35B-A3B-NVFP4": "35",
    "openai--gpt-oss-120b": "116.8",
    "qwen2.5-7b-instruct": "7.62",
    "qwen3-14b": "14.8",
    "stepfun-ai--Step-3.7-Flash-FP8": "196",  # the decoder's, as of Step 3.5 Flash; the file has no vision tower
    "zai-org--GLM-5": "744",
    "zai-org--GLM-5-FP8": "744",
    "zai-org--GLM-5.1-FP8": "744",
    "zai-org--GLM-5.2": "744",
    "zai-org--GLM-5.2-FP8": "744",
}
REFUSED = {
    "MiniMaxAI--MiniMax-M3": "sparse attention (sparse_attention_config)",
    "nvidia--MiniMax-M3-NVFP4": "sparse attention (sparse_attention_config)",
    "deepseek-ai--DeepSeek-V4-Pro": "compressed attention (compress_ratios)",
    "nvidia--DeepSeek-V4-Flash-NVFP4": "compressed attention (compress_ratios)",
    "nvidia--DeepSeek-V4-Pro-NVFP4": "compressed attention (compress_ratios)",
    "sgl-project--DeepSeek-V4-Flash-FP8": "compressed attention (compress_ratios)",
    "sgl-project--DeepSeek-V4-Pro-FP8": "compressed attention (compress_ratios)",
}

# By hand, in 16 bits: 2 x layers x KV heads x head size x 2 bytes; latent: layers x (512 + 64) x 2 bytes, and 132 bytes
# of an indexer in the layers that have one.
KV_BYTES = {
    "MiniMaxAI--MiniMax-M2.5": 2 * 62 * 8 * 128 * 2,
    "Qwen--Qwen3-0.6B": 2 * 28 * 8 * 128 * 2,
    "Qwen--Qwen3-VL-8B-Instruct": 2 * 36 * 8 * 128 * 2,
    "Qwen--Qwen3.5-122B-A10B": 2 * 12 * 2 * 256 * 2,
    "nvidia--Qwen3.6-27B-NVFP4": 2 * 16 * 4 * 256 * 2,
    "XiaomiMiMo--MiMo-7B-Base": 2 * 36 * 8 * 128 * 2,
    "codellama-34b-instruct-hf": 2 * 48 * 8 * 128 * 2,
    "deepseek-ai--DeepSeek-R1": 61 * 576 * 2,
    "deepseek-v2-lite": 27 * 576 * 2,
    "moonshotai--Kimi-K2.5": 61 * 576 * 2,
    "nvidia--DeepSeek-V3.2-NVFP4": 61 * (576 * 2 + 132),
    "zai-org--GLM-5": 78 * (576 * 2 + 132),
    "zai-org--GLM-5.2": 78 * 576 * 2 + 21 * 132,
    "google--gemma-4-26B-A4B": 25 * 2 * 8 * 256 * 2 + 5 * 2 * 2 * 512 * 2,
    "llama-4-scout-17b-16e-instruct-fp8-dynamic": 2 * 48 * 8 * 128 * 2,
    "openai--gpt-oss-120b": 2 * 36 * 8 * 64 * 2,
    "stepfun-ai--Step-3.7-Flash-FP8": 2 * 45 * 8 * 128 * 2,
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": 2 * 6 * 2 * 128 * 2,
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": 2 * 12 * 2 * 128 * 2,
}


def decoder_of(name: str) -> Decoder:
    return load_model(str(FOLDER / name)).decoder


def test_every_configuration_is_in_one_of_the_tables() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/config.json")} == {*PUBLISHED, *REFUSED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    published = float(PUBLISHED[name]) * 1e9
    last_digit = 10.0 ** -len(PUBLISHED[name].partition(".")[2]) * 1e9
    assert abs(decoder_of(name).parameters() - published) <= max(0.01 * published, last_digit / 2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_modelled_is_named(name: str) -> None:
    with pytest.raises(InputError) as refused:
        load_model(str(FOLDER / name))
    assert f"{REFUSED[name]} is not modelled" in str(refused.value)


@pytest.mark.parametrize("name", KV_BYTES)
def test_bytes_of_a_token_in_the_kv_cache(name: str) -> None:
    assert decoder_of(name).kv_bytes_per_token() == KV_BYTES[name]


def test_layers_with_a_window() -> None:
    windows = {
        "openai--gpt-oss-120b": (18, 128),
        "google--gemma-4-26B-A4B": (25, 1024),
        "llama-4-scout-17b-16e-instruct-fp8-dynamic": (36, 8192),
        "stepfun-ai--Step-3.7-Flash-FP8": (33, 512),
    }
    for name, (layers, window) in windows.items():
        decoder = decoder_of(name)
        with_window = [
            kind.attention.window
            for index in decoder.layer_pattern
            if (kind := decoder.layer_kinds[index]).attention and kind.attention.window
        ]
        assert (len(with_window), set(with_window)) == (layers, {window}), name


# transformers has no such family, or reads another layout of its keys.
_NOT_BY_TRANSFORMERS = ("MiMo-7B", "Step-3.7", "V4")


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in PUBLISHED if not any(part in name for part in _NOT_BY_TRANSFORMERS)])
def test_transformers_builds_a_model_of_as_many_parameters(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))
    config = transformers.AutoConfig.from_pretrained(str(FOLDER / name), trust_remote_code=False, local_files_only=True)
    multimodal = "vision_config" in text or "text_config" in text
    kind = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    decoder = decoder_of(name)
    if "vision_config" not in text and multimodal:
        built -= sum(parameter.numel() for key, parameter in model.named_parameters() if "language_model" not in key)
    buffers = sum(buffer.numel() for key, buffer in model.named_buffers() if "correction" in key)
    assert decoder.parameters() == pytest.approx(built + buffers, rel=1e-6)
