"""Which layers a fingerprint keeps, and how a configuration says so."""

import pytest

from maveriq.errors import InputError
from maveriq.profiling.layer_choice import LayerKinds, check_layer_count, selections, stands_for
from maveriq.profiling.layer_names import numbered, prefix_of, renamed_layers
from maveriq.profiling.reduced_config import proposals

PATTERNS = {
    "uniform": (0,) * 36,
    "dense first": (0,) * 3 + (1,) * 58,
    "five to one": (0, 0, 0, 0, 0, 1) * 8,
    "every second": (0, 1) * 6,
    "three kinds": (0, 1, 0, 1, 2, 1, 0, 1) * 4,
}


def kinds_of(pattern: tuple[int, ...]) -> LayerKinds:
    return LayerKinds(names=tuple(f"kind {kind}" for kind in range(max(pattern) + 1)), pattern=pattern)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_choice_has_all_kinds_and_stands_for_all_layers(name: str) -> None:
    kinds = kinds_of(PATTERNS[name])
    for layers in range(len(kinds.names), len(kinds.pattern) + 1):
        for chosen in selections(kinds, layers):
            shares = stands_for(kinds, chosen)
            assert len(chosen) == layers
            assert list(chosen) == sorted(set(chosen))
            for kind, total in enumerate(kinds.counts()):
                assert sum(s for layer, s in zip(chosen, shares, strict=True) if kinds.pattern[layer] == kind) == total


@pytest.mark.parametrize("name", PATTERNS)
def test_the_whole_is_a_choice_of_all_layers_each_for_itself(name: str) -> None:
    kinds = kinds_of(PATTERNS[name])
    chosen = next(selections(kinds, len(kinds.pattern)))
    assert chosen == tuple(range(len(kinds.pattern)))
    assert set(stands_for(kinds, chosen)) == {1}


@pytest.mark.parametrize(
    ("name", "layers", "shares"),
    [
        ("uniform", 1, [36]),
        ("uniform", 2, [18, 18]),
        ("dense first", 2, [3, 58]),
        ("five to one", 2, [40, 8]),
        ("five to one", 6, [8, 8, 8, 8, 8, 8]),
    ],
)
def test_layers_stand_for_their_share(name: str, layers: int, shares: list[int]) -> None:
    kinds = kinds_of(PATTERNS[name])
    chosen = next(selections(kinds, layers))
    assert sorted(stands_for(kinds, chosen)) == sorted(shares)


def test_too_few_layers_are_refused_with_the_kinds_and_the_least_number() -> None:
    kinds = kinds_of(PATTERNS["dense first"])
    with pytest.raises(InputError, match=r"m has 2 kinds of layers \(3 with kind 0, 58 with kind 1\).* at least 2"):
        check_layer_count(kinds, 1, "m")
    with pytest.raises(InputError, match="m has 61 layers; --layers must be at most that, not 62"):
        check_layer_count(kinds, 62, "m")


def first_proposal(config: dict, kept: tuple[int, ...], layers: int, explicit: dict | None = None) -> dict:
    return next(proposals(config, config if explicit is None else explicit, kept, layers, lambda _: None))


def test_entries_and_lists_of_layers_are_those_of_the_kept_layers() -> None:
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "a", "b"],
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_only_layers": [0, 3],
        "moe_layers_enum": "1,2,3",
        "hybrid_override_pattern": "M*M-",
        "block_types": ["m", "m", "a"],
        "window_pattern": "SL",
        "per_layer_config": {"3": {"head_dim": 8}, "1": {"head_dim": 4}},
        "eos_token_id": [1, 2, 3, 4],
        "rope_scaling": {"long_factor": [1.0, 2.0, 3.0, 4.0]},
        "num_nextn_predict_layers": 1,
    }
    assert first_proposal(config, (0, 3), 4) == config | {
        "num_hidden_layers": 2,
        "layer_types": ["a", "b"],
        "no_rope_layers": [1, 0],
        "mlp_only_layers": [0, 1],
        "moe_layers_enum": "1",
        "hybrid_override_pattern": "M-",
        "block_types": ["m", "m"],
        "window_pattern": "SL",
        "per_layer_config": {"1": {"head_dim": 8}},
        "num_nextn_predict_layers": 0,
    }


def test_a_list_that_a_rule_gives_is_written_down_where_layers_differ() -> None:
    config = {"num_hidden_layers": 4}
    implied = {"num_hidden_layers": 4, "layer_types": ["a", "a", "a", "b"], "same": ["x"] * 4}
    assert first_proposal(config, (2, 3), 4, implied) == {"num_hidden_layers": 2, "layer_types": ["a", "b"]}


def test_a_number_of_layers_at_the_start_counts_the_kept_ones() -> None:
    config = {"num_hidden_layers": 61, "first_k_dense_replace": 3}
    assert first_proposal(config, (0, 3), 61) == {"num_hidden_layers": 2, "first_k_dense_replace": 1}


def test_a_period_is_searched_that_gives_the_wanted_kinds() -> None:
    def kinds(config: dict) -> list[bool] | None:
        period, offset = config["attention_period"], config["attention_offset"]
        return [layer % period == offset for layer in range(config["n_layer"])] if period else None

    config = {"n_layer": 16, "attention_period": 8, "attention_offset": 4, "hidden_size": 8, "n_head": 4}
    found = proposals(config, config, (0, 1, 4), 16, kinds)
    fitting = next(proposal for proposal in found if kinds(proposal) == [False, False, True])
    assert {key for key in config if config[key] != fitting[key]} <= {"n_layer", "attention_period", "attention_offset"}


def test_names_of_layers_in_a_quantisation_are_renumbered() -> None:
    config = {
        "ignore": ["lm_head", "model.layers.3.mlp.gate", "model.layers.1.mlp.gate"],
        "config_groups": {"model.layers.3.mlp.up": {"bits": 8}, "model.layers.0.mlp.up": {"bits": 4}},
        "method": "awq",
        "version": None,
    }
    assert renamed_layers(config, (0, 3)) == {
        "ignore": ["lm_head", "model.layers.1.mlp.gate"],
        "config_groups": {"model.layers.1.mlp.up": {"bits": 8}, "model.layers.0.mlp.up": {"bits": 4}},
        "method": "awq",
        "version": None,
    }


def test_the_list_of_layers_is_found_under_other_modules() -> None:
    names = [
        *(f"language_model.model.layers.{layer}.mlp.experts.7.up.weight" for layer in range(3)),
        *(f"vision_tower.encoder.layers.{layer}.mlp.weight" for layer in range(3)),
        "mtp.layers.0.weight",
        "lm_head.weight",
    ]
    numbers = numbered(names)
    assert numbers["language_model.model.layers"] == {0, 1, 2}
    assert prefix_of("model.language_model.layers", numbers, 3) == "language_model.model.layers"
    assert prefix_of("transformer.h", numbered(["h.0.w", "h.1.w"]), 2) == "h"
    assert prefix_of("transformer.h", numbered(["h.0.w"]), 2) is None
