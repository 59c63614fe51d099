"""The torch engine refuses unsupported models before anything starts. These tests need no torch."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.domain.models import known_models
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch import TorchEngine
from maveriq.exec.engines.torch.config import (
    Family,
    NotCoveredError,
    TransformersConfig,
    read_decoder_config,
    read_model_config,
)
from maveriq.exec.messages import EngineSpec
from maveriq.exec.model_files import hf_config_json

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
FALCON_7B, FALCON_40B = (json.loads(hf_config_json(known_models()[name])) for name in ("falcon-7b", "falcon-40b"))


def spec_of(config=LLAMA, *, tp=1, split=(4,), devices=None, weights="float16", kv="native"):
    return EngineSpec(
        deployment_id=1,
        generation=1,
        model="refused",
        config_json=config if isinstance(config, str) else json.dumps(config),
        tp=tp,
        pp=len(split),
        layer_split=split,
        weights=weights,
        kv=kv,
        batch_size=1,
        devices=devices or ("cpu",) * (tp * len(split)),
    )


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(FALCON_7B, tp=2, split=(32,)), "TP 2 does not divide the 71 attention heads.*TP 1"),
        (spec_of(tp=16), "TP 16 does not divide the 8 attention heads.*TP 8"),
        (spec_of({**LLAMA, "intermediate_size": 100}, tp=8), "feed-forward width.*TP 4"),
        (
            spec_of({**LLAMA, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3}, tp=2),
            "TP 2 neither divides the 3 KV heads",
        ),
        (spec_of(split=(2, 1)), r"2\+1 must add up to 4 layers"),
        (spec_of(split=(2, 2), devices=("cpu",)), "needs 2 devices, got 1"),
        (spec_of(split=(2, 2), devices=("cpu", "cuda:0")), "more than one kind"),
        (spec_of(devices=("tpu",)), "neither cpu nor cuda"),
        (spec_of(devices=("cuda:x",)), "neither cpu nor cuda"),
        (spec_of(weights="int4_gptq"), "ask for int4"),
        (spec_of(weights="int3"), "int3"),
        (spec_of(kv="fp8"), "fp8"),
        (spec_of("{"), "not valid JSON"),
        (spec_of("[]"), "must hold a JSON object"),
        (spec_of({"model_type": "mamba"}), "'mamba' is not one of llama, falcon, gptj"),
        (spec_of({}), "None is not one of"),
        (spec_of({**LLAMA, "hidden_size": None}), "hidden_size"),
        (spec_of({**LLAMA, "num_hidden_layers": "4"}), "num_hidden_layers"),
        (spec_of({**LLAMA, "vocab_size": True}), "vocab_size"),
        (spec_of({**LLAMA, "num_attention_heads": 7, "num_key_value_heads": 7}), "7 attention heads do not divide"),
        (spec_of({**LLAMA, "num_key_value_heads": 3}), "num_key_value_heads 3 must divide"),
        (spec_of({**FALCON_7B, "num_attention_heads": 70}, split=(32,)), "do not divide the hidden size"),
        (spec_of({"model_type": "gptj", "n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 9}), "rotary size 64"),
        (spec_of({**LLAMA, "head_dim": 0}), "head_dim"),
        (spec_of({**LLAMA, "rope_scaling": {"rope_type": "linear"}}), "factor"),
        (spec_of({**LLAMA, "rope_scaling": "linear"}), "rope"),
        (spec_of({**LLAMA, "num_local_experts": 8}), "experts .num_local_experts. in a family without"),
        (spec_of({**LLAMA, "sliding_window": 16}), "sliding window"),
        (spec_of({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}), "quantization_config"),
        (spec_of({**LLAMA, "rms_norm_eps": "small"}), "rms_norm_eps"),
        (spec_of({**FALCON_40B, "alibi": True}, split=(60,)), "alibi"),
        (spec_of({**LLAMA, "rms_norm_eps": 10**400}), "rms_norm_eps"),
        (spec_of({**LLAMA, "rope_theta": 1e400}), "rope_theta"),
        (spec_of({**LLAMA, "vocab_size": 2**62}), "vocab_size must be at most"),
        (spec_of({**LLAMA, "vocab_size": 10**8, "hidden_size": 8 * 10**6 * 2}), "hidden_size must be at most"),
        (
            spec_of({**LLAMA, "hidden_size": 10**7, "num_attention_heads": 64, "head_dim": 10**7}),
            "no machine holds",
        ),
        (spec_of({**LLAMA, "vocab_size": 1}, tp=2), "without any of 1 tokens"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(spec, reason):
    engine = TorchEngine()
    with pytest.raises(EngineError, match=reason) as raised:
        engine.load(spec)
    assert raised.value.kind is FailureKind.UNSUPPORTED
    assert engine.pids == ()


@pytest.mark.parametrize(
    "changed",
    [{"hidden_act": "relu"}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"partial_rotary_factor": 0.5}],
)
def test_what_the_own_decoder_does_not_cover_is_left_to_transformers(changed):
    config = json.dumps({**LLAMA, **changed})
    with pytest.raises(NotCoveredError):
        read_decoder_config(config)
    assert isinstance(read_model_config(config), TransformersConfig)


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b", "gptj-6b", "llama-2-7b", "llama-2-13b", "llama-2-70b"])
def test_every_built_in_model_can_be_loaded(name):
    shape = known_models()[name]
    read = read_decoder_config(hf_config_json(shape))
    assert (read.layers, read.hidden, read.heads, read.kv_heads, read.intermediate, read.vocabulary) == (
        shape.layers,
        shape.hidden_size,
        shape.attention_heads,
        shape.kv_heads,
        shape.intermediate_size,
        shape.vocab_size,
    )
    assert read.gated == (shape.feed_forward_matrices == 3)
    assert read.parallel_attention == (shape.all_reduces_per_layer == 1)


ODD = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 7, 64, 2**40, 10**400, 0.0, 0.5, 1e400, -1e400, "", "x", "gelu", [], [1], {}]
)
KEYS = st.sampled_from(
    [
        *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "vocab_size", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "torch_dtype"),
        *("rope_parameters", "initializer_range", "num_kv_heads", "multi_query", "new_decoder_architecture"),
        *("parallel_attn", "ffn_hidden_size", "n_embd", "n_head", "n_layer", "n_inner", "rotary_dim", "activation"),
    ]
)
POSITIONS = st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), ODD | st.just("linear"))


@given(
    st.sampled_from([model for model in known_models().values() if model.architecture in tuple(Family)]),
    st.dictionaries(KEYS, ODD | POSITIONS, max_size=4),
)
def test_any_config_json_is_read_or_refused(model, changed):
    try:
        arch = read_decoder_config(json.dumps(json.loads(hf_config_json(model)) | changed))
    except EngineError:
        return
    assert min(arch.layers, arch.hidden, arch.heads, arch.kv_heads, arch.head_size, arch.rotary.size) >= 1


@pytest.mark.parametrize("text", ["", "nul", "[" * 20_000, "1", '"x"', '{"model_type": ["llama"]}'])
def test_any_text_is_refused_cleanly(text):
    with pytest.raises(EngineError):
        read_decoder_config(text)


def test_without_torch_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr("maveriq.exec.engines.torch.engine.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'maveriq\[torch\]'") as raised:
        TorchEngine().load(spec_of())
    assert raised.value.kind is FailureKind.UNSUPPORTED


def test_the_engine_module_imports_no_torch():
    script = "import sys, maveriq.exec.engines.torch; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
