"""Weights: those of a folder, and random ones that do not depend on the split."""

import json
import os

import pytest

pytest.importorskip("torch", reason="the torch engine needs maveriq[torch]")
pytest.importorskip("transformers", reason="the folders come from transformers")

import torch
from safetensors.torch import save_file
from torch_models import CONFIGS, PROMPTS, greedy, load_worker, outputs, prompts_of, run_split, spec_of

from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.weights import RandomWeights

CPU = torch.device("cpu")
FALCON_SEQUENTIAL = {**CONFIGS["falcon-7b"], "multi_query": False, "parallel_attn": False, "bias": True}
LLAMA_31 = {
    **CONFIGS["llama-gqa"],
    "mlp_bias": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
FALCON_11B = {**CONFIGS["falcon-40b"], "num_ln_in_parallel_attn": 1}
LLAMA_LINEAR = {**CONFIGS["llama"], "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}
GPTJ_TIED = {**CONFIGS["gpt-j"], "tie_word_embeddings": True}
IN_A_FOLDER = {
    **CONFIGS,
    "falcon-sequential": FALCON_SEQUENTIAL,
    "falcon-11b": FALCON_11B,
    "gpt-j-tied": GPTJ_TIED,
    "llama-3.1": LLAMA_31,
    "llama-linear": LLAMA_LINEAR,
}


def saved(config, folder, **how):
    """Save and return a transformers model with random parameters, including biases and norms."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.save_pretrained(folder, **how)
    return model


@pytest.mark.parametrize("name", IN_A_FOLDER)
def test_a_saved_model_gives_the_tokens_of_transformers(name, tmp_path):
    model = saved(IN_A_FOLDER[name], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    for tp, split in ((1, (4,)), (2, (3, 1)), (4, (1, 1, 2))):
        spec = spec_of(config, tp=tp, split=split, weights_folder=str(tmp_path))
        for steps in run_split(spec, prompts_of()):
            assert outputs(steps) == expected


def test_a_model_in_several_files(tmp_path):
    model = saved(CONFIGS["llama"], tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    worker = load_worker(spec_of(CONFIGS["llama"], weights_folder=str(tmp_path)))
    steps = [step for step, _ in worker.run(prompts_of())]
    assert outputs(steps) == [greedy(model, prompt) for prompt in PROMPTS]


def test_a_folder_of_another_model_is_an_error(tmp_path):
    saved(CONFIGS["llama"], tmp_path)
    for config, reason in (
        (CONFIGS["gpt-j"], "no tensor transformer.wte.weight"),
        ({**CONFIGS["llama"], "vocab_size": 200}, r"shape \(199, 64\), config.json says \(200, 64\)"),
    ):
        with pytest.raises(EngineError, match=reason) as raised:
            load_worker(spec_of(config, weights_folder=str(tmp_path)))
        assert raised.value.kind is FailureKind.ERROR


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_codes_are_not_loaded_as_weights(dtype, tmp_path):
    save_file({"model.embed_tokens.weight": torch.zeros(199, 64).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(EngineError, match="reads weights that are not quantised") as raised:
        load_worker(spec_of(CONFIGS["llama"], weights_folder=str(tmp_path)))
    assert raised.value.kind is FailureKind.UNSUPPORTED


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"[" * 100_000])
@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_a_damaged_folder_is_an_error(file, content, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(EngineError, match="cannot be read"):
        load_worker(spec_of(CONFIGS["llama"], weights_folder=str(tmp_path)))


def test_an_index_cannot_point_outside_the_folder(tmp_path):
    folder = tmp_path / "model"
    saved(CONFIGS["llama"], tmp_path / "elsewhere")
    folder.mkdir()
    index = {"weight_map": {"model.embed_tokens.weight": "../elsewhere/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match="cannot be read"):
        load_worker(spec_of(CONFIGS["llama"], weights_folder=str(folder)))


def test_random_weights_depend_on_seed_and_name_only():
    def drawn(seed, name):
        return RandomWeights(seed=seed, initializer_range=0.5, device=CPU, dtype=torch.float32).read(name, (300, 200))

    assert torch.equal(drawn(1, "a.weight"), drawn(1, "a.weight"))
    assert not torch.equal(drawn(1, "a.weight"), drawn(2, "a.weight"))
    assert not torch.equal(drawn(1, "a.weight"), drawn(1, "b.weight"))
    assert drawn(1, "a.weight").std().item() == pytest.approx(0.5, rel=0.02)
    assert drawn(1, "a.weight").mean().item() == pytest.approx(0.0, abs=0.01)


def put_safetensors(folder, header, *, data=b"", size=None):
    """Write a safetensors file with a header of our own; `size` overrides the header's length."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    length = len(body) if size is None else size
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + body + data)


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("header", "more"),
    [
        ({EMBEDDING: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, {}),  # beyond the end
        ({EMBEDDING: {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, {"data": bytes(8)}),
        ({EMBEDDING: {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, {"data": bytes(12)}),  # a hole
        ({EMBEDDING: {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, {"data": bytes(8)}),
        ({EMBEDDING: {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, {"data": bytes(8)}),
        ({EMBEDDING: {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, {"data": bytes(8)}),
        (
            {
                EMBEDDING: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            {"data": bytes(12)},
        ),
        (b"{" * 1000, {}),
        (b"{}", {"size": 2**63}),
        (b"{}", {"size": 2**40}),
        (b"\x80\x04\x95", {}),  # a pickle
    ],
    ids=["beyond", "reversed", "hole", "negative", "overflow", "dtype", "overlap", "deep", "huge", "large", "pickle"],
)
def test_a_false_header_is_an_error(tmp_path, header, more):
    put_safetensors(tmp_path, header, **more)
    with pytest.raises(EngineError, match="cannot be read") as raised:
        load_worker(spec_of(CONFIGS["llama"], weights_folder=str(tmp_path)))
    assert "\n" not in str(raised.value)


def test_a_tensor_larger_than_the_model_is_not_read(tmp_path):
    elements = 1 << 40
    put_safetensors(tmp_path, {EMBEDDING: {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}})
    header = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", header + 4 * elements)  # sparse: 4 TiB
    with pytest.raises(EngineError, match=rf"shape \({elements},\), config.json says \(199, 64\)|unable to mmap"):
        load_worker(spec_of(CONFIGS["llama"], weights_folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link out of"),
        (lambda path: path.symlink_to(path.parent.parent / "secret.safetensors"), "is a link out of"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.mkdir(), "is a folder"),
    ],
    ids=["fifo", "device", "link", "loop", "folder"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_that_are_no_files_are_refused(tmp_path, make, words, name):
    folder = tmp_path / "model"
    put_safetensors(folder, b"{}")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(EngineError) as raised:
        load_worker(spec_of(CONFIGS["llama"], weights_folder=str(folder)))
    assert words in str(raised.value)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(EngineError, match=r"pickle files \(pytorch_model\.bin\).*never loaded; convert them"):
        load_worker(spec_of(CONFIGS["llama"], weights_folder=str(tmp_path)))


def test_weights_may_be_linked_within_the_cache_of_hugging_face(tmp_path):
    blob, snapshot = tmp_path / "models--me--tiny" / "blobs", tmp_path / "models--me--tiny" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    model = saved(CONFIGS["llama"], snapshot)
    blob.mkdir()
    (snapshot / "model.safetensors").rename(blob / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    worker = load_worker(spec_of(CONFIGS["llama"], weights_folder=str(snapshot)))
    assert outputs([step for step, _ in worker.run(prompts_of())]) == [greedy(model, prompt) for prompt in PROMPTS]
