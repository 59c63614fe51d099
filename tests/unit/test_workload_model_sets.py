"""Model sets: names, files, overrides of the intent, and validation."""

import json

import pytest

from maveriq.domain.deployments import Intent, Objective
from maveriq.errors import InputError, UnknownNameError
from maveriq.workload.model_sets import load_model_set

ENTRY = '[[models]]\nmodel = "llama-2-7b"\nload_at = {load_at}\n'


def model_set(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_model_set(str(path))


def test_entries_keep_their_order_and_bins():
    large = load_model_set("large")
    assert [(entry.model.name, entry.load_at) for entry in large.entries] == [
        ("llama-2-70b", 0),
        ("falcon-40b", 5),
        ("llama-2-7b", 10),
        ("falcon-40b", 15),
    ]


def test_an_entry_overrides_only_its_given_parts_of_the_intent(tmp_path):
    entries = model_set(
        tmp_path,
        'name = "mine"\n'
        + ENTRY.format(load_at=0)
        + 'objective = "min_latency"\nmin_accuracy = 95\n'
        + ENTRY.format(load_at=0)
        + "float16_only = false\n",
    ).entries
    of_run = Intent(objective=Objective.MIN_COST, min_accuracy=90.0, float16_only=True)
    assert entries[0].intent(of_run) == Intent(objective=Objective.MIN_LATENCY, min_accuracy=95, float16_only=True)
    assert entries[1].intent(of_run) == Intent(objective=Objective.MIN_COST, min_accuracy=90.0)


def test_a_models_config_is_relative_to_the_file(tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "intermediate_size": 128,
    }
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    [entry] = model_set(tmp_path, 'name = "mine"\n[[models]]\nmodel = "tiny/config.json"\nload_at = 0\n').entries
    assert (entry.model.name, entry.model.layers) == ("tiny", 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name = "mine"\n', "missing key `models`"),
        ('name = "mine"\nmodels = []\n', "models must be a list of length at least 1"),
        ('name = "mine"\ncolour = 1\n' + ENTRY.format(load_at=0), "unknown key `colour`"),
        ('name = "mine"\n' + ENTRY.format(load_at=0) + "slo = 1\n", "unknown key `slo`"),
        ('name = "mine"\n' + ENTRY.format(load_at=-1), "models[0].load_at must be a whole number of at least 0"),
        ('name = "mine"\n' + ENTRY.format(load_at=1.5), "models[0].load_at must be a whole number, not a fraction"),
        ('name = "mine"\n' + ENTRY.format(load_at=5) + ENTRY.format(load_at=4), "list the models by load_at"),
        (
            'name = "mine"\n' + ENTRY.format(load_at=0) + "min_accuracy = 101\n",
            "models[0].min_accuracy must be a number of at most 100",
        ),
        ('name = "mine"\n' + ENTRY.format(load_at=0) + "min_accuracy = nan\n", "accuracy"),
        ('name = "mine"\n' + ENTRY.format(load_at=0) + 'objective = "min-lat"\n', "did you mean 'min-latency'"),
        ('name = "mine"\n[[models]]\nmodel = "llama-2-7"\nload_at = 0\n', "did you mean 'llama-2-7b'"),
        ('name = "mine"\n[[models]]\nmodel = "llama-2-7"\nload_at = 0\n', "mine.toml"),
        ("name = \n", "is not valid TOML"),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, says):
    with pytest.raises(InputError) as refused:
        [entry.intent(Intent(objective=Objective.MIN_COST)) for entry in model_set(tmp_path, text).entries]
    assert says in str(refused.value)


@pytest.mark.parametrize("name", ["larg", "cluster-8xA6000", ""])
def test_unknown_names(name):
    with pytest.raises(UnknownNameError, match="known: large, regular, twentyone"):
        load_model_set(name)
