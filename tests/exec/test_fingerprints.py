"""Fingerprints of small models load in transformers, hold the kept layers' weights, and refuse damaged folders."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load, save_file

from maveriq.domain.models import load_model
from maveriq.errors import InputError
from maveriq.exec.engines.torch.collectives import SingleRank
from maveriq.exec.engines.torch.rank import RankWorker
from maveriq.exec.messages import EngineSpec, PromptSequence
from maveriq.profiling.fingerprint import read_fingerprint, write_fingerprint
from maveriq.profiling.safetensors_files import StoredTensor

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 64, "max_position_embeddings": 64, "num_hidden_layers": 6, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 6,
    "n_positions": 64,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 2,
}  # fmt: skip
FALCON = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
CASES = {
    "llama": ({}, [6]),
    "qwen3": ({}, [6]),
    "mistral": ({"sliding_window": 16}, [6]),
    "gemma2": ({"sliding_window": 16}, [3, 3]),
    "gemma3_text": ({"sliding_window": 16}, [5, 1]),
    "smollm3": ({}, [5, 1]),
    "mixtral": ({"num_local_experts": 4}, [6]),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1, 2]}, [4, 2]
    ),
    "deepseek_v3": (LATENT, [2, 4]),
    "gpt_oss": ({"sliding_window": 16, "num_local_experts": 4}, [3, 3]),
    "phi3": ({}, [6]),
    "falcon": ({**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, [6]),
    "gptj": ({**GPT, "rotary_dim": 4}, [6]),
    "gpt2": (GPT, [6]),
    "jamba": (
        {"num_experts": 4, "mamba_d_state": 4, "attn_layer_period": 5, "attn_layer_offset": 4,
         "use_mamba_kernels": False},
        [2, 3, 1],
    ),
}  # fmt: skip


def config_of(family: str, **more: object) -> transformers.PretrainedConfig:
    values = {**({} if {"n_embd", "hidden_size"} & set(CASES[family][0]) else SIZES), **CASES[family][0], **more}
    return transformers.AutoConfig.for_model(family, **values)


def saved(folder: Path, family: str, **more: object) -> torch.nn.Module:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **more)).eval()
    model.save_pretrained(folder)
    return model


def loaded(folder: Path) -> torch.nn.Module:
    """Load a folder, all of whose tensors must be in the model and the other way round."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not {name: keys for name, keys in report.items() if keys}
    return model.eval()


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load(file.read_bytes()).items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("family", CASES)
def test_kept_layers_have_the_weights_of_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", family)
    shares = CASES[family][1]
    found = write_fingerprint(tmp_path / "whole", layers=len(shares), out=tmp_path / "fingerprint")
    assert [layer.stands_for for layer in found.layers] == shares
    assert found.full_layers == 6
    stored = load_folder(tmp_path / "whole")
    assert found.full_parameters == sum(tensor.numel() for tensor in stored.values())
    assert (
        found.extra_parameters + sum(layer.stands_for * layer.parameters for layer in found.layers)
        == found.full_parameters
    )
    assert read_fingerprint(found.folder) == found

    fingerprint, weights = loaded(found.folder), whole.state_dict()
    layers = (
        fingerprint.get_decoder().layers
        if hasattr(fingerprint.get_decoder(), "layers")
        else fingerprint.get_decoder().h
    )
    prefix = next(name for name, module in fingerprint.named_modules() if module is layers)
    for name, tensor in fingerprint.state_dict().items():
        head, _, tail = name.removeprefix(f"{prefix}.").partition(".")
        source = f"{prefix}.{found.layers[int(head)].source_index}.{tail}" if name.startswith(f"{prefix}.") else name
        assert torch.equal(tensor, weights[source]), name
    assert torch.isfinite(logits(fingerprint)).all()


def test_all_layers_are_the_whole_model(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", "gemma3_text")
    found = write_fingerprint(tmp_path / "whole", layers=6, out=tmp_path / "fingerprint")
    assert torch.equal(logits(loaded(found.folder)), logits(whole))
    assert found.weight_bytes == found.full_bytes


def test_the_torch_engine_runs_it(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "llama")
    found = write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "fingerprint")
    config_json = (found.folder / "config.json").read_text("utf-8")
    spec = EngineSpec(
        deployment_id=1, generation=1, model="f", config_json=config_json, weights_folder=str(found.folder), tp=1, pp=1,
        layer_split=(2,), weights="float16", kv="native", batch_size=1, devices=("cpu",),
    )  # fmt: skip
    prompt = PromptSequence(request_id=1, prompt=(5, 6, 7, 8), output_tokens=1)
    ((tokens, _),) = RankWorker(spec, 0, SingleRank()).run((prompt,))
    assert tokens == [int(logits(loaded(found.folder))[0, -1].argmax())]


def test_other_inputs_parts_are_kept_whole(tmp_path: Path) -> None:
    text = {**SIZES, "sliding_window": 16}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 6, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(3)
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    found = write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "fingerprint")
    assert [layer.stands_for for layer in found.layers] == [5, 1]
    fingerprint, weights = loaded(found.folder).state_dict(), whole.state_dict()
    vision_names = [name for name in weights if "vision" in name]
    assert len([name for name in vision_names if ".layers.5." in name]) > 0
    assert all(torch.equal(fingerprint[name], weights[name]) for name in vision_names)


def test_tensors_with_a_part_for_each_layer_are_cut(tmp_path: Path) -> None:
    text = {
        **SIZES, "sliding_window": 16, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4,
        "laurel_rank": 4, "num_kv_shared_layers": 2, "num_hidden_layers": 10,
    }  # fmt: skip
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model("gemma3n_text", **text)
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    found = write_fingerprint(tmp_path / "whole", layers=4, out=tmp_path / "fingerprint")
    chosen = [layer.source_index for layer in found.layers]
    fingerprint, weights = loaded(found.folder).state_dict(), whole.state_dict()
    for name, axis in {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}.items():
        cut, parts = fingerprint[f"model.{name}.weight"], weights[f"model.{name}.weight"].chunk(10, dim=axis)
        assert torch.equal(cut, torch.cat([parts[layer] for layer in chosen], dim=axis))
    assert sum(layer.stands_for for layer in found.layers) == 10
    assert (
        found.extra_parameters + sum(layer.stands_for * layer.parameters for layer in found.layers)
        == found.full_parameters
    )


def test_layers_may_be_named_even_without_every_kind(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "gemma3_text")
    found = write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "fingerprint", chosen=(1, 3))
    assert [layer.source_index for layer in found.layers] == [1, 3]
    assert found.full_bytes == 4 * found.full_parameters
    with pytest.raises(InputError, match=r"layers \[3, 6\] are not some of 6 layers, in order"):
        write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "other", chosen=(3, 6))


def test_kinds_are_those_of_the_physics_estimator(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "deepseek_v3")
    found = write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "fingerprint")
    whole, fingerprint = (load_model(str(folder)).decoder for folder in (tmp_path / "whole", found.folder))
    assert fingerprint.layer_kinds == whole.layer_kinds
    assert [number for _, number in whole.kinds()] == [layer.stands_for for layer in found.layers]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "jamba"])
def test_a_model_without_weights_gets_random_ones_as_transformers_draws_them(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_of(family, dtype="float32").to_json_string(), encoding="utf-8")
    found = write_fingerprint(tmp_path / "config.json", layers=len(CASES[family][1]), out=tmp_path / "fingerprint")
    assert found.random_weights
    torch.manual_seed(3)
    drawn = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(found.folder))
    reference = drawn.state_dict()
    for name, tensor in loaded(found.folder).state_dict().items():
        if tensor.numel() >= 1000:
            spread = float(reference[name].std())
            assert float(tensor.std()) == pytest.approx(spread, rel=0.2), name
            assert abs(float(tensor.mean() - reference[name].mean())) < 0.01 + 0.2 * spread, name


def test_the_seed_fixes_random_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_of("llama").to_json_string(), encoding="utf-8")
    files = [
        write_fingerprint(tmp_path / "config.json", layers=1, out=tmp_path / f"{number}", seed=seed).folder
        for number, seed in enumerate((1, 1, 2))
    ]
    same, again, other = ((folder / "model.safetensors").read_bytes() for folder in files)
    assert same == again != other


def test_only_the_needed_shards_are_read(tmp_path: Path) -> None:
    """Shards of other layers may even be missing: a part of a large model's files is enough."""
    model = saved(tmp_path / "whole", "llama")
    (tmp_path / "whole/model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"layer-{layer}.safetensors", {})[name] = tensor.clone()
    for file, tensors in shards.items():
        if file in ("layer-0.safetensors", "layer-rest.safetensors"):
            save_file(tensors, tmp_path / "whole" / file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (tmp_path / "whole/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = write_fingerprint(tmp_path / "whole", layers=1, out=tmp_path / "fingerprint")
    assert torch.isfinite(logits(loaded(found.folder))).all()
    with pytest.raises(InputError, match=r"layer-1.safetensors' do not exist.*get the missing file"):
        write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_huge_sparse_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "whole", "llama")
    path = tmp_path / "whole/model.safetensors"
    tensors = load(path.read_bytes())
    header, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: ".layers.0." in item[0] or ".layers." not in item[0]):
        if ".layers.0." in name or ".layers." not in name:
            end = max(end, 1 << 40)  # what is needed lies behind a terabyte of other layers
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            file.seek(8 + len(text) + entry["data_offsets"][0])
            file.write(tensors[name].numpy().tobytes())
    assert path.stat().st_blocks * 512 < 1 << 30 < path.stat().st_size
    read: list[int] = []
    chunks = StoredTensor.chunks
    monkeypatch.setattr(StoredTensor, "chunks", lambda self: (read.append(len(c)) or c for c in chunks(self)))
    found = write_fingerprint(tmp_path / "whole", layers=1, out=tmp_path / "fingerprint")
    assert sum(read) == found.weight_bytes
    assert torch.isfinite(logits(loaded(found.folder))).all()


def test_tokenizer_and_generation_settings_are_kept_and_code_is_not(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "modeling_own.py", "notes.txt"):
        (tmp_path / "whole" / name).write_text("{}", encoding="utf-8")
    found = write_fingerprint(tmp_path / "whole", layers=1, out=tmp_path / "fingerprint")
    assert {path.name for path in found.folder.iterdir()} == {
        "config.json", "fingerprint.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert found.disk_bytes == sum(p.stat().st_size for p in found.folder.iterdir() if p.name != "fingerprint.json")


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), encoding="utf-8")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 8)


def index_with(folder: Path, file: str) -> None:
    weight_map = dict.fromkeys(load((folder / "model.safetensors").read_bytes()), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def link_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def without(folder: Path, name: str) -> None:
    tensors = load((folder / "model.safetensors").read_bytes())
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def with_header(folder: Path, **changes: object) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= changes
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DAMAGED = {
    "a truncated file": (truncate, "are truncated"),
    "a path in the index": (lambda f: index_with(f, "../model.safetensors"), "no name of a safetensors file"),
    "a file that is missing": (lambda f: index_with(f, "other.safetensors"), "do not exist.*get the missing file"),
    "an empty index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}", encoding="utf-8"), "no weight_map"
    ),
    "a link out of the folder": (link_out, "is a link out of"),
    "a tensor that is missing": (lambda f: without(f, "model.norm.weight"), "lack model.norm.weight"),
    "a layer's tensor that is missing": (
        lambda f: without(f, "model.layers.0.mlp.up_proj.weight"), "lack model.layers.0.mlp.up_proj.weight"
    ),
    "a size that is no number": (lambda f: with_header(f, shape=["x"]), "do not fit"),
    "a shape that is larger than its bytes": (lambda f: with_header(f, shape=[1 << 40]), "do not fit"),
    "a negative place": (lambda f: with_header(f, data_offsets=[-128, 0]), "do not fit"),
    "an unknown type": (lambda f: with_header(f, dtype="F7"), "do not fit"),
    "another shape": (lambda f: with_header(f, shape=[2, 16]), r"has shape \[2, 16\], but config.json says \[32\]"),
    "absurd layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "absurd experts": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1000, num_experts=1000), "more than any model has"
    ),
    "an absurd width": (lambda f: edit_json(f / "config.json", hidden_size=10**18), "hidden_size"),
    "an unknown family": (lambda f: edit_json(f / "config.json", model_type="nothing"), "knows no model_type"),
    "no decoder": (lambda f: edit_json(f / "config.json", model_type="bert", is_decoder=False), "bert|BERT|Bert"),
    "pickle files alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle files"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_refused_in_one_line_and_nothing_is_left(damage: str, tmp_path: Path) -> None:
    saved(tmp_path / "whole", "llama")
    spoil, message = DAMAGED[damage]
    spoil(tmp_path / "whole")
    with pytest.raises(InputError, match=message) as caught:
        write_fingerprint(tmp_path / "whole", layers=1, out=tmp_path / "fingerprint")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"whole", "elsewhere.safetensors"}


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "whole", "llama")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs 0.00 GiB, but 0.00 GiB are free there"):
        write_fingerprint(tmp_path / "whole", layers=1, out=tmp_path / "fingerprint")
    assert not (tmp_path / "fingerprint").exists()


def test_only_a_fingerprint_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "llama")
    write_fingerprint(tmp_path / "whole", layers=1, out=tmp_path / "fingerprint")
    with pytest.raises(InputError, match="exists already"):
        write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "fingerprint")
    assert (
        len(write_fingerprint(tmp_path / "whole", layers=2, out=tmp_path / "fingerprint", overwrite=True).layers) == 2
    )
    with pytest.raises(InputError):
        write_fingerprint(tmp_path / "whole", layers=1, out=tmp_path / "whole", overwrite=True)
    assert (tmp_path / "whole/model.safetensors").exists()
