"""Quantized weights and KV cache: close scores, and less memory."""

import gc

import pytest

pytest.importorskip("torch", reason="the torch engine needs maveriq[torch]")
pytest.importorskip("transformers", reason="tests/exec/torch_models.py draws models with it")

import torch
from torch_models import (
    CONFIGS,
    OUTPUT_TOKENS,
    TRANSFORMERS_CONFIGS,
    load_worker,
    outputs,
    prompts_of,
    run_split,
    spec_of,
)

from maveriq.exec.engines.torch.decoding import greedy_tokens
from maveriq.exec.engines.torch.linear import DenseLinear, Int4Linear, Int8Linear, make_linear
from maveriq.exec.engines.torch.rank import RankWorker

WIDE = {
    **CONFIGS["llama"],
    "hidden_size": 256,
    "intermediate_size": 512,
}  # offsets and scales of groups take little memory
PROMPT = (5, 17, 101, 3, 77, 150, 42)


def scores_of(worker):
    """Return the scores of the token after PROMPT."""
    return worker.next_token_logits(prompts_of([PROMPT], output_tokens=1))


def scores_after_decoding(worker, monkeypatch):
    """Return the scores of every step; all runs generate the tokens of the first run."""
    seen = []

    def spied(logits, stage, collectives):
        seen.append(logits)
        return greedy_tokens(logits, stage, collectives)

    monkeypatch.setattr("maveriq.exec.engines.torch.decoding.greedy_tokens", spied)
    list(worker.run(prompts_of([PROMPT], output_tokens=4)))
    return torch.cat(seen)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.03), ("int4", 0.4)])
@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_scores_are_close(name, weights, bound):
    config = {**CONFIGS[name], "initializer_range": 0.05}  # with more, errors grow from layer to layer
    exact = scores_of(load_worker(spec_of(config)))
    assert distance(scores_of(load_worker(spec_of(config, seed=1))), exact) > 1
    away = distance(scores_of(load_worker(spec_of(config, weights=weights))), exact)
    assert 0 < away < bound


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("tp", "split"), [(2, (3, 1)), (1, (1, 1, 2))])
def test_a_quantized_model_can_be_split(weights, tp, split):
    config = CONFIGS["falcon-40b"]
    ranks = run_split(spec_of(config, weights=weights, tp=tp, split=split), prompts_of())
    assert all(steps == ranks[0] for steps in ranks)
    if tp == 1:  # shards of rows have their own scales
        worker = load_worker(spec_of(config, weights=weights))
        assert outputs(ranks[0]) == outputs([step for step, _ in worker.run(prompts_of())])


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_with_an_8_bit_kv_cache_are_close(name, monkeypatch):
    exact, near = (
        scores_after_decoding(load_worker(spec_of(CONFIGS[name], kv=kv)), monkeypatch) for kv in ("native", "int8")
    )
    assert torch.equal(exact[0], near[0])  # prefill uses unquantized keys and values
    assert 0 < distance(near[1:2], exact[1:2]) < 0.05


def live_bytes():
    """Return the memory of all live tensors."""
    gc.collect()
    # By type, because `isinstance` on torch's lazy objects warns.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.heavy
def test_memory_is_as_reported_and_smaller_than_unquantized():
    measured = {}
    for weights in ("float16", "int8", "int4"):
        before = live_bytes()
        worker = load_worker(spec_of(WIDE, weights=weights))
        reported = worker.stage.weights_bytes + worker.stage.kv_cache_bytes
        assert live_bytes() - before == pytest.approx(reported, rel=0.01)
        embedding_and_output = 2 * worker.stage.embedding.nbytes
        measured[weights] = worker.stage.weights_bytes - embedding_and_output
        del worker
    assert measured["int8"] / measured["float16"] < 0.27
    assert measured["int4"] / measured["float16"] < 0.15


def test_an_8_bit_kv_cache_is_really_smaller():
    config = {**CONFIGS["llama"], "hidden_size": 512}
    native, small = (load_worker(spec_of(config, kv=kv)).stage.kv_cache_bytes for kv in ("native", "int8"))
    assert small / native == pytest.approx((1 + 4 / 64) / 4)


class Unheard:
    """Collectives without other ranks."""

    def all_reduce(self, x):
        return x

    def all_gather(self, x):
        return [x] * 4

    def send(self, x):
        pass

    def recv(self, like):
        return like.zero_()

    def broadcast_tokens(self, tokens):
        return tokens.zero_()

    def all_ok(self, *, ok):
        return ok


@pytest.mark.parametrize("rank", [2, pytest.param(6, marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gpt-j", "float16"),
        ("falcon-40b", "float16"),
        ("llama-gqa", "float16"),
        ("llama", "int4"),
        ("qwen3", "float16"),
        ("qwen3", "int4"),
        ("mixtral", "float16"),
        ("mixtral", "int8"),
    ],
)
def test_a_shard_does_not_keep_whole_matrices_in_memory(name, weights, rank):
    before = live_bytes()
    config = {**CONFIGS, **TRANSFORMERS_CONFIGS}[name]
    worker = RankWorker(spec_of(config, tp=4, split=(3, 1), weights=weights), rank, Unheard())
    reported = worker.stage.weights_bytes + worker.stage.kv_cache_bytes
    assert live_bytes() - before == pytest.approx(reported, rel=0.02)


@pytest.mark.parametrize("inputs", [2, 6, 24, 96, 128, 384])
def test_layers_of_any_even_width(inputs):
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(40, inputs, generator=generator)
    bias = torch.randn(40, generator=generator)
    x = torch.randn(3, 2, inputs, generator=generator)
    expected = DenseLinear(weight, bias)(x)
    for layer, bound in ((Int8Linear(weight, bias), 0.02), (Int4Linear(weight, bias), 0.2)):
        assert layer(x).shape == expected.shape
        assert distance(layer(x), expected) < bound


def test_odd_rows_stay_in_8_bits_and_zeroes_stay_zeroes():
    assert isinstance(make_linear("int4", torch.ones(3, 5)), Int8Linear)
    for layer in (Int8Linear(torch.zeros(3, 8)), Int4Linear(torch.zeros(3, 8))):
        assert not layer(torch.ones(1, 8)).any()


@pytest.mark.parametrize("kv", ["native", "int8"])
@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_in_16_bits_as_on_a_gpu(name, weights, kv, monkeypatch):
    """All steps run in 16 bits without overflow."""
    monkeypatch.setattr("maveriq.exec.engines.torch.rank._activation_dtype", lambda arch, device: torch.float16)
    config = {**CONFIGS[name], "initializer_range": 0.05}
    worker = load_worker(spec_of(config, weights=weights, kv=kv))
    assert scores_of(worker).dtype is torch.float16
    assert scores_of(worker).isfinite().all()
    assert len(outputs([step for step, _ in worker.run(prompts_of())])[2]) == OUTPUT_TOKENS
