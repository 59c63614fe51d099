"""The catalogue: counts as published, memory by hand."""

import pytest

from maveriq.domain.models import catalogue, known_models, load_model
from maveriq.domain.weight_formats import FORMATS

KIB = 1024
KV_BYTES_A_TOKEN = {
    # 2 (key and value) x layers x KV heads x head size x 2 bytes
    "llama-2-7b": 2 * 32 * 32 * 128 * 2,
    "llama-2-70b": 2 * 80 * 8 * 128 * 2,
    "llama-3.1-8b": 2 * 32 * 8 * 128 * 2,
    "llama-3.1-405b": 2 * 126 * 8 * 128 * 2,
    "llama-3.2-1b": 2 * 16 * 8 * 64 * 2,
    "qwen2.5-7b": 2 * 28 * 4 * 128 * 2,
    "qwen3-32b": 2 * 64 * 8 * 128 * 2,
    "qwen3-235b-a22b": 2 * 94 * 4 * 128 * 2,
    "mistral-nemo-12b": 2 * 40 * 8 * 128 * 2,
    "mixtral-8x7b": 2 * 32 * 8 * 128 * 2,
    "falcon-7b": 2 * 32 * 1 * 64 * 2,
    "falcon-40b": 2 * 60 * 8 * 64 * 2,
    "gptj-6b": 2 * 28 * 16 * 256 * 2,
    "opt-13b": 2 * 40 * 40 * 128 * 2,
    "bloom-176b": 2 * 70 * 112 * 128 * 2,
    "gpt-oss-120b": 2 * 36 * 8 * 64 * 2,
    "gemma-3-27b": 2 * 62 * 16 * 128 * 2,
    "phi-3-medium": 2 * 40 * 10 * 128 * 2,
    # layers x (latent vector + rotary key) x 2 bytes
    "deepseek-v3": 61 * (512 + 64) * 2,
    "deepseek-v2-lite": 27 * (512 + 64) * 2,
}
WINDOWED_LAYERS = {"gpt-oss-20b": (12, 128), "gemma-2-9b": (21, 4096), "gemma-3-27b": (52, 1024)}
ACTIVE = {
    "mixtral-8x7b": 12.9e9, "mixtral-8x22b": 39e9, "qwen3-30b-a3b": 3.3e9, "qwen3-235b-a22b": 22e9,
    "deepseek-v3": 37e9, "deepseek-v2": 21e9, "qwen3-coder-480b-a35b": 35e9,
}  # fmt: skip
"""Parameters that a token passes, rounded, as the models' cards have them."""


@pytest.mark.parametrize("name", catalogue())
def test_parameters_are_the_published_ones(name: str) -> None:
    assert known_models()[name].decoder.parameters() == pytest.approx(catalogue()[name].parameters, rel=0.01)


def test_most_counts_are_the_published_ones_to_the_last() -> None:
    exact = [name for name, entry in catalogue().items() if load_model(name).decoder.parameters() == entry.parameters]
    assert len(exact) >= 50
    assert all(entry.source.startswith("https://huggingface.co/") for entry in catalogue().values())


@pytest.mark.parametrize("name", KV_BYTES_A_TOKEN)
def test_bytes_of_a_token(name: str) -> None:
    assert load_model(name).decoder.kv_bytes_per_token() == KV_BYTES_A_TOKEN[name]
    assert load_model(name).decoder.kv_bytes_per_token(1) == KV_BYTES_A_TOKEN[name] // 2


@pytest.mark.parametrize("name", WINDOWED_LAYERS)
def test_layers_with_a_window(name: str) -> None:
    layers, window = WINDOWED_LAYERS[name]
    decoder = load_model(name).decoder
    [(found, size)] = decoder.kv_cache().windowed
    assert found == window
    assert size * decoder.layers == decoder.kv_bytes_per_token() * layers


@pytest.mark.parametrize("name", ACTIVE)
def test_parameters_that_a_token_passes(name: str) -> None:
    assert load_model(name).decoder.active_parameters() == pytest.approx(ACTIVE[name], rel=0.03)


def test_weights_of_a_stage_add_up() -> None:
    for name in ("deepseek-v3", "gpt-oss-120b", "gemma-3-27b", "llama-3.1-8b"):
        decoder = load_model(name).decoder
        for stored in (None, *FORMATS.values()):
            cut = decoder.layers // 3
            stages = decoder.layers_bytes(stored, 0, cut) + decoder.layers_bytes(stored, cut)
            assert stages == decoder.layers_bytes(stored)
        assert decoder.layers_parameters(0, 5) + decoder.layers_parameters(5) == decoder.layers_parameters()
