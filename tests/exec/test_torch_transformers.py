"""Models on transformers' modules: tokens of split models, quantised ones, windows, memory, folders and refusals."""

import json
import subprocess
import sys
from itertools import product

import pytest

pytest.importorskip("torch", reason="the torch engine needs maveriq[torch]")
pytest.importorskip("transformers", reason="these models run on its modules")

import torch
from torch_models import (
    BEYOND_OWN,
    EIGHT_FAMILIES,
    LAYERS,
    MORE_FAMILIES,
    PROMPTS,
    SPREAD,
    TRANSFORMERS_CONFIGS,
    expected_tokens,
    greedy,
    load_worker,
    on_ranks,
    outputs,
    prompts_of,
    run_split,
    spec_of,
    transformers_model,
)

from maveriq.domain.models import known_models
from maveriq.exec.capabilities import known_engines
from maveriq.exec.device import Device
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch import TorchEngine
from maveriq.exec.engines.torch.config import Family, read_model_config
from maveriq.exec.engines.torch.families import BEYOND_OWN_DECODER, TRANSFORMERS_FAMILIES, has_plan
from maveriq.exec.engines.torch.transformers_model import build_model
from maveriq.exec.engines.torch.weights import RandomWeights
from maveriq.exec.messages import Generate
from maveriq.exec.model_files import hf_config_json

EIGHT_SPLITS = ((4,), (3, 1), (1, 3), (2, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1, 1))
WITH_EXPERTS = "mixtral"


def tokens_of(name, *, prompts=PROMPTS, **split):
    """Return the tokens of each sequence, which all ranks must agree on."""
    ranks = run_split(spec_of(TRANSFORMERS_CONFIGS[name], **split), prompts_of(prompts))
    assert all(steps == ranks[0] for steps in ranks)
    return outputs(ranks[0])


def logits_of(worker, prompt=PROMPTS[0]):
    return worker.next_token_logits(prompts_of([prompt], output_tokens=1))


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def degrees_of(name):
    """Return the TP degrees to test a model at."""
    return (1, 2) if has_plan(family_of(TRANSFORMERS_CONFIGS[name])) else (1,)


def bound_of(name, weights):
    """Return how far scores may be from those of exact weights; gated delta nets multiply small errors."""
    has_delta_nets = "linear_conv_kernel_dim" in TRANSFORMERS_CONFIGS[name]
    return {"float16": 0.0, "int8": 0.05, "int4": 0.6}[weights] * (2.5 if has_delta_nets else 1)


def family_of(config):
    return str(config["model_type"]).removesuffix("_text")


@pytest.mark.heavy
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", EIGHT_FAMILIES)
def test_every_split_gives_the_tokens_of_the_unsplit_model(name, tp):
    for split in EIGHT_SPLITS:
        assert tokens_of(name, tp=tp, split=split) == expected_tokens(name), split


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*MORE_FAMILIES, *BEYOND_OWN])
def test_some_splits_of_more_families_give_the_tokens_of_the_unsplit_model(name):
    for tp in degrees_of(name):
        for split in ((4,), (1, 3), (1, 2, 1)):
            assert tokens_of(name, tp=tp, split=split) == expected_tokens(name), (tp, split)


@pytest.mark.heavy
@pytest.mark.parametrize("name", TRANSFORMERS_CONFIGS)
def test_every_family_runs_in_every_format_that_the_matrix_lists(name):
    config = {**TRANSFORMERS_CONFIGS[name], "initializer_range": 0.05}
    exact = logits_of(load_worker(spec_of(config)))
    listed = product(formats_of(family_of(config)), ("native", "int8"))
    for weights, kv in listed:
        worker = load_worker(spec_of(config, weights=weights, kv=kv))
        assert distance(logits_of(worker), exact) <= bound_of(name, weights), (weights, kv)


def formats_of(family):
    """Return the formats of weights that the capability matrix lists for a family on a CPU."""
    rows = [row for row in known_engines()["torch"].can if family in row.architectures and Device.CPU in row.devices]
    return [weights.value for row in rows for weights in row.weights]


@pytest.mark.heavy
@pytest.mark.parametrize("name", TRANSFORMERS_CONFIGS)
def test_the_folder_of_every_family_gives_the_tokens_of_transformers(name, tmp_path):
    check_folder(name, tmp_path, tp=max(degrees_of(name)))


def check_folder(name, folder, *, tp):
    """Save a model of transformers in several files, and compare its tokens with those of two stages that read them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**TRANSFORMERS_CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    saved = json.loads((folder / "config.json").read_text())
    ranks = run_split(spec_of(saved, tp=tp, split=(3, 1), weights_folder=str(folder)), prompts_of())
    assert outputs(ranks[0]) == [greedy(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("name", "tp", "split"),
    [("qwen3", 2, (3, 1)), ("mixtral", 2, (1, 3)), ("mistral-window", 1, (1, 2, 1)), ("nemotron_h", 1, (3, 1))],
)
def test_split_models_give_the_tokens_of_unsplit_ones(name, tp, split):
    assert tokens_of(name, tp=tp, split=split) == expected_tokens(name)


@pytest.mark.parametrize("name", ["qwen3", "mistral-window"])
def test_a_batch_gives_the_tokens_of_each_prompt_alone_in_any_order(name):
    worker = load_worker(spec_of(TRANSFORMERS_CONFIGS[name]))
    prompts = prompts_of()
    for chosen in ([0], [1], [1, 0], [2, 0, 1]):
        steps = [step for step, _ in worker.run(tuple(prompts[n] for n in chosen))]
        assert outputs(steps) == [expected_tokens(name)[n] for n in chosen]


def test_sequences_may_end_at_different_steps():
    short, long = prompts_of(PROMPTS[:1], output_tokens=2)[0], prompts_of(PROMPTS[1:2], output_tokens=8)[0]
    worker = load_worker(spec_of(TRANSFORMERS_CONFIGS["qwen3"]))
    expected = expected_tokens("qwen3")
    steps = [step for step, _ in worker.run((short, long))]
    assert outputs(steps) == [expected[0][:2], expected[1][:8]]
    assert all(step[0] == -1 for step in steps[2:])


def test_windows_move_through_a_long_sequence(monkeypatch):
    """More tokens than a layer with a window has room for, which is a multiple of 64."""
    monkeypatch.setattr("maveriq.exec.engines.torch.transformers_cache._SLACK_TOKENS", 4)
    name, tokens = "mistral-window", 70
    worker = load_worker(spec_of(TRANSFORMERS_CONFIGS[name]))
    steps = [step for step, _ in worker.run(prompts_of(PROMPTS[:1], output_tokens=tokens))]
    assert outputs(steps) == [greedy(transformers_model(name), PROMPTS[0], tokens)]


def test_recurrent_states_are_those_of_the_execution_alone():
    """States of an earlier batch, of another size and with other padding, do not reach the next one."""
    name = "qwen3_next"
    worker = load_worker(spec_of(TRANSFORMERS_CONFIGS[name]))
    expected = expected_tokens(name)
    for chosen in ([0, 1, 2], [2, 0]):
        steps = [step for step, _ in worker.run(tuple(prompts_of()[n] for n in chosen))]
        assert outputs(steps) == [expected[n] for n in chosen]
    held = worker.stage.kv_cache_bytes
    worker.stage.release()
    assert worker.stage.kv_cache_bytes == 0 < held
    assert outputs([step for step, _ in worker.run(prompts_of())]) == expected


def test_a_layer_with_a_window_keeps_little_more_than_the_window():
    windowed, full = (load_worker(spec_of(TRANSFORMERS_CONFIGS[name])) for name in ("mistral-window", "mistral"))
    for worker in (windowed, full):
        list(worker.run(prompts_of([PROMPTS[0] * 40], output_tokens=1)))
    assert windowed.stage.kv_cache_bytes < full.stage.kv_cache_bytes / 1.5


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.03), ("int4", 0.4)])
@pytest.mark.parametrize("name", ["qwen3", WITH_EXPERTS])
def test_quantized_scores_are_close(name, weights, bound):
    config = {**TRANSFORMERS_CONFIGS[name], "initializer_range": 0.05}
    exact, near = (load_worker(spec_of(config, weights=kind)) for kind in ("float16", weights))
    assert 0 < distance(logits_of(near), logits_of(exact)) < bound


@pytest.mark.parametrize("weights", [pytest.param("int8", marks=pytest.mark.heavy), "int4"])
@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.heavy), WITH_EXPERTS])
def test_a_quantized_model_can_be_split_into_stages(name, weights):
    assert tokens_of(name, split=(1, 3), weights=weights) == tokens_of(name, weights=weights)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("phi", "int8"),
        *(pytest.param(*case, marks=pytest.mark.heavy) for case in product(TRANSFORMERS_CONFIGS, ("int8", "int4"))),
    ],
)
def test_the_scores_of_a_split_quantized_model_are_close_on_every_rank(name, weights):
    """Shards of rows have their own scales, so scores differ from those of one rank, though not by more than these."""
    config = {**TRANSFORMERS_CONFIGS[name], "initializer_range": 0.05}
    exact = logits_of(load_worker(spec_of(config)))
    tp = max(degrees_of(name))
    scores = on_ranks(spec_of(config, tp=tp, split=(3, 1), weights=weights), logits_of)
    assert scores[:tp] == [None] * tp  # the first stage
    assert all(0 < distance(found, exact) < bound_of(name, weights) for found in scores[tp:])


@pytest.mark.parametrize("name", ["qwen3", "mistral-window"])
def test_scores_with_an_8_bit_kv_cache_are_close(name, monkeypatch):
    from maveriq.exec.engines.torch import decoding

    seen, chosen = [], decoding.greedy_tokens

    def spied(logits, stage, collectives):
        seen.append(logits)
        return chosen(logits, stage, collectives)

    monkeypatch.setattr("maveriq.exec.engines.torch.decoding.greedy_tokens", spied)
    for kv in ("native", "int8"):
        list(load_worker(spec_of(TRANSFORMERS_CONFIGS[name], kv=kv)).run(prompts_of(PROMPTS[:1], output_tokens=2)))
    exact, near = seen[2:4], seen[6:8]  # each worker warms up with two steps
    assert torch.equal(exact[0], near[0])  # prefill uses unquantized keys and values
    assert 0 < distance(near[1], exact[1]) < 0.05


def test_memory_is_less_with_fewer_bits_and_on_more_ranks():
    config = {**TRANSFORMERS_CONFIGS[WITH_EXPERTS], "hidden_size": 256, "vocab_size": 200}
    exact, int8, int4 = (load_worker(spec_of(config, weights=kind)).stage for kind in ("float16", "int8", "int4"))
    outside = 2 * 200 * 256 * 4
    assert (int8.weights_bytes - outside) / (exact.weights_bytes - outside) < 0.28
    assert (int4.weights_bytes - outside) / (exact.weights_bytes - outside) < 0.17
    assert load_worker(spec_of(config, kv="int8")).stage.kv_cache_bytes < exact.kv_cache_bytes / 3


def test_the_scores_of_the_next_token_are_those_of_transformers():
    with torch.inference_mode():
        expected = transformers_model("phi")(torch.tensor([PROMPTS[1]])).logits[0, -1]
    worker = load_worker(spec_of(TRANSFORMERS_CONFIGS["phi"]))
    batch = worker.next_token_logits(prompts_of(PROMPTS, output_tokens=1))
    assert torch.allclose(batch[1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", WITH_EXPERTS])
def test_a_saved_model_gives_the_tokens_of_transformers(name, tmp_path):
    check_folder(name, tmp_path, tp=2)


@pytest.mark.parametrize("prefixes", [("language_model.model.", "language_model."), ("model.language_model.", "")])
def test_the_decoder_of_a_multimodal_folder_is_read_alone(prefixes, tmp_path):
    from safetensors.torch import save_file

    text = TRANSFORMERS_CONFIGS["gemma3"]
    base, other = prefixes
    saved = {
        base + name.removeprefix("model.") if name.startswith("model.") else other + name: parameter.contiguous()
        for name, parameter in transformers_model("gemma3").state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    save_file({**saved, "vision_tower.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": True}
    worker = load_worker(spec_of(config, weights_folder=str(tmp_path)))
    assert outputs([step for step, _ in worker.run(prompts_of())]) == expected_tokens("gemma3")


def test_a_folder_without_a_tensor_is_an_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"model.embed_tokens.weight": torch.zeros(199, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(EngineError, match=r"no tensor model\.layers\.0") as raised:
        load_worker(spec_of(TRANSFORMERS_CONFIGS["qwen3"], weights_folder=str(tmp_path)))
    assert raised.value.kind is FailureKind.ERROR


def test_an_expert_larger_than_the_model_is_not_read(tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    header = {name: {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}
    body = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    with path.open("ab") as file:
        file.truncate(8 + len(body) + (1 << 42))  # sparse: 4 TiB
    with pytest.raises(EngineError, match=r"than config\.json says|no tensor|unable to mmap"):
        load_worker(spec_of(TRANSFORMERS_CONFIGS["mixtral"], weights_folder=str(tmp_path)))


@pytest.mark.parametrize(
    "hostile",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil--repo.Model"}},
        {"_attn_implementation": "kernels-community/evil"},
        {"attn_implementation": "kernels-community/evil", "output_attentions": True, "return_dict": False},
        {"_commit_hash": "x", "_name_or_path": "/etc/passwd", "use_cache": False},
    ],
    ids=["remote code", "kernel", "outputs", "paths"],
)
def test_keys_that_name_code_or_change_outputs_are_not_read(hostile):
    worker = load_worker(spec_of({**TRANSFORMERS_CONFIGS["qwen3"], **hostile}))
    assert outputs([step for step, _ in worker.run(prompts_of())]) == expected_tokens("qwen3")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "deepseek_v3"}, "'deepseek_v3' is not one of llama, falcon, gptj, "),
        ({"model_type": "mamba"}, "is not one of"),
        (
            {"model_type": "qwen3", "text_config": {**TRANSFORMERS_CONFIGS["qwen3"], "model_type": "qwen3_vl_text"}},
            "'qwen3_vl_text', which this engine does not run within qwen3",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_what_does_not_run_is_refused_before_anything_starts(changed, reason):
    engine = TorchEngine()
    with pytest.raises(EngineError, match=reason) as raised:
        engine.load(spec_of({**TRANSFORMERS_CONFIGS["qwen3"], **changed}))
    assert raised.value.kind is FailureKind.UNSUPPORTED
    assert engine.pids == ()
    assert "\n" not in str(raised.value)


def test_what_transformers_refuses_is_one_line():
    with pytest.raises(EngineError, match="transformers cannot build this qwen3") as raised:
        load_worker(spec_of({**TRANSFORMERS_CONFIGS["qwen3"], "hidden_act": "none such"}))
    assert raised.value.kind is FailureKind.UNSUPPORTED
    assert "\n" not in str(raised.value)


def test_random_weights_do_not_depend_on_the_split():
    drawn = RandomWeights(seed=7, initializer_range=SPREAD, device=torch.device("cpu"), dtype=torch.float32)
    parameters = dict(transformers_model("qwen3").named_parameters())
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(parameters[name], drawn.read(name, tuple(parameters[name].shape)))


def test_sizes_are_read_without_torch_and_transformers():
    config = json.dumps(TRANSFORMERS_CONFIGS["mixtral"])
    read = read_model_config(config)
    assert (read.layers, read.hidden, read.heads, read.kv_heads, read.vocabulary) == (LAYERS, 64, 8, 4, 199)
    script = (
        "import sys; from maveriq.exec.engines.torch.config import read_model_config; read_model_config(sys.argv[1]);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, config], check=True)


@pytest.mark.parametrize(
    "name",
    ["qwen3-8b", "gemma-3-4b", *(pytest.param(name, marks=pytest.mark.heavy) for name in sorted(known_models()))],
)
def test_transformers_builds_a_model_with_as_many_parameters_as_estimates_count(name):
    """The whole model, of any size: on the meta device it takes no memory."""
    model = known_models()[name]
    if model.architecture not in TRANSFORMERS_FAMILIES:
        pytest.skip(f"{model.architecture} runs on maveriq's own decoder, or not at all")
    built = build_model(read_model_config(hf_config_json(model)), torch.float16, eager_experts=False)
    counted = model.decoder.parameters() - model.decoder.other_inputs_parameters
    embedding, head = built.get_input_embeddings().weight, built.get_output_embeddings().weight
    twice = head.numel() if built.config.get_text_config().tie_word_embeddings and head is not embedding else 0
    assert sum(parameter.numel() for parameter in built.parameters()) - twice == counted


@pytest.mark.heavy
def test_two_stages_of_two_shards_over_processes():
    engine = TorchEngine()
    try:
        loaded = engine.load(spec_of(TRANSFORMERS_CONFIGS["qwen3"], tp=2, split=(1, 3)))
        assert [shard.layers for shard in loaded.shards] == [1, 1, 3, 3]
        steps = list(engine.generate(Generate(execution_id=1, sequences=prompts_of())))
        assert outputs(steps) == expected_tokens("qwen3")
        with pytest.raises(EngineError, match="300 tokens is longer than the model's 256 positions"):
            list(engine.generate(Generate(execution_id=2, sequences=prompts_of([(1, 2)], output_tokens=298))))
        steps = list(engine.generate(Generate(execution_id=3, sequences=prompts_of())))
        assert outputs(steps) == expected_tokens("qwen3")
    finally:
        engine.close()


def test_every_family_is_tested_and_in_the_matrix():
    assert {family_of(config) for config in TRANSFORMERS_CONFIGS.values()} == {*TRANSFORMERS_FAMILIES, *Family}
    assert set(BEYOND_OWN_DECODER) == set(Family)
    for row in known_engines()["torch"].can:
        unplanned = [family for family in row.architectures if not TRANSFORMERS_FAMILIES.get(family, True)]
        assert unplanned == (list(row.architectures) if row.max_tp == 1 else [])
    for device in Device:
        rows = [row for row in known_engines()["torch"].can if device in row.devices]
        families = [family for row in rows for family in row.architectures]
        assert sorted(families) == sorted([*TRANSFORMERS_FAMILIES, *Family])
