"""Model files: configurations and weights that a run uses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures import MODEL

from maveriq.domain.models import known_models, model_from_hf_config
from maveriq.errors import InputError
from maveriq.exec.model_files import ModelFiles, hf_config_json
from maveriq.workload.model_sets import load_model_set

SET = """
name = "mine"
[[models]]
model = "tiny/config.json"
load_at = 0
[[models]]
model = "llama-2-7b"
load_at = 0
[[models]]
model = "{third}"
load_at = 0
"""


def put_model(folder: Path, **more: object) -> Path:
    folder.mkdir()
    config = json.loads(hf_config_json(MODEL)) | {"rope_theta": 5e5} | more
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_folder_provides_config_and_weights(tmp_path: Path) -> None:
    put_model(tmp_path / "tiny")
    put_model(tmp_path / "other", num_hidden_layers=4)
    (tmp_path / "set.toml").write_text(SET.format(third="./other"))
    (tmp_path / "tiny" / "model.safetensors").touch()
    models = load_model_set(str(tmp_path / "set.toml"))
    files = ModelFiles(models.configs().get)
    own, known, other = (entry.model for entry in models.entries)
    assert json.loads(files.config_json(own))["rope_theta"] == 5e5
    assert files.weights_folder(own) == str(tmp_path / "tiny")
    assert (files.config_json(known), files.weights_folder(known)) == (hf_config_json(known), "")
    assert (json.loads(files.config_json(other))["num_hidden_layers"], files.weights_folder(other)) == (4, "")
    (tmp_path / "tiny" / "config.json").unlink()
    assert json.loads(files.config_json(own))["rope_theta"] == 5e5, "the model is what was read, whatever became of it"


def test_models_with_equal_names_in_two_folders_are_refused(tmp_path: Path) -> None:
    for folder in ("tiny", "twin"):
        put_model(tmp_path / folder, _name_or_path="somebody/tiny")
    (tmp_path / "set.toml").write_text(SET.format(third="twin/config.json"))
    with pytest.raises(InputError, match="_name_or_path"):
        load_model_set(str(tmp_path / "set.toml")).configs()


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-20b", "deepseek-v2-lite", "gemma-2-9b"])
def test_models_of_the_catalogue_have_a_configuration_that_reads_back(name: str) -> None:
    model = known_models()[name]
    read = model_from_hf_config(hf_config_json(model), name=name, where="its own")
    assert (read.decoder, read.quantization) == (model.decoder, model.quantization)


def test_a_model_that_only_looks_like_one_of_the_catalogue_has_none() -> None:
    model = replace(known_models()["gpt-oss-20b"], name="gpt-oss-120b")
    with pytest.raises(InputError, match="which its shape does not say"):
        hf_config_json(model)
