"""Masks obey their laws, and a pruned folder differs from its source by zeros only."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maveriq.errors import InputError
from maveriq.profiling.safetensors_files import Checkpoint, NewTensor, write_checkpoint
from maveriq.study.grid import SMALL_MODEL
from maveriq.study.masks import largest, largest_of_groups, mask_of, pruning_method
from maveriq.study.pruned_model import input_norms_of, write_pruned

WEIGHT = st.floats(-4, 4, width=32)
MATRIX = st.tuples(st.integers(1, 5), st.sampled_from([8, 16])).flatmap(
    lambda shape: arrays(np.float32, shape, elements=WEIGHT)
)


@given(MATRIX, st.integers(1, 99))
def test_exactly_the_given_share_goes_and_the_largest_stay(weights: np.ndarray, percent: int) -> None:
    mask = largest(np.abs(weights), percent)
    assert (~mask).sum() == weights.size * percent // 100
    if mask.any() and not mask.all():
        assert np.abs(weights[mask]).min() >= np.abs(weights[~mask]).max()


@given(MATRIX, st.sampled_from([(2, 4), (4, 8), (1, 4), (7, 8)]))
def test_each_group_keeps_its_n_largest(weights: np.ndarray, pattern: tuple[int, int]) -> None:
    kept, group = pattern
    mask = largest_of_groups(np.abs(weights), kept, group)
    groups, sizes = mask.reshape(-1, group), np.abs(weights).reshape(-1, group)
    assert (groups.sum(axis=1) == kept).all()
    for stays, size in zip(groups, sizes, strict=True):
        assert size[stays].min() >= size[~stays].max()


@given(MATRIX, st.integers(1, 99))
def test_wanda_with_equal_norms_is_magnitude_within_each_row(weights: np.ndarray, percent: int) -> None:
    mask = mask_of(weights, pruning_method(f"wanda-{percent}"), np.ones(weights.shape[1]))
    for row, stays in zip(weights, mask, strict=True):
        assert (stays == largest(np.abs(row), percent)).all()


@given(MATRIX)
def test_wanda_keeps_what_its_inputs_make_large(weights: np.ndarray) -> None:
    norms = np.zeros(weights.shape[1])
    norms[::2] = 1.0
    nonzero = np.where(weights == 0, np.float32(1), weights)
    mask = mask_of(nonzero, pruning_method("wanda-2:4"), norms)
    assert (mask == (norms > 0)).all()


@given(MATRIX, st.floats(0.1, 10))
def test_a_mask_does_not_depend_on_the_scale_of_powers_of_two(weights: np.ndarray, scale: float) -> None:
    power = np.float32(2.0 ** round(np.log2(scale)))
    for text in ("magnitude-50", "magnitude-2:4"):
        method = pruning_method(text)
        assert (mask_of(weights, method) == mask_of(weights * power, method)).all()


@pytest.mark.parametrize("text", ["magnitude-50", "wanda-30", "magnitude-2:4", "wanda-4:8"])
def test_a_method_is_written_as_it_is_read(text: str) -> None:
    assert str(pruning_method(text)) == text


@pytest.mark.parametrize(
    "text", ["", "magnitude", "magnitude-0", "magnitude-100", "magnitude-4:4", "wanda-0:4", "x-50"]
)
def test_what_is_no_method_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="pruning"):
        pruning_method(text)


def test_a_row_that_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="6 inputs cannot be pruned in groups of 4"):
        largest_of_groups(np.ones((2, 6)), 2, 4)


def bf16(values: np.ndarray) -> bytes:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


WEIGHTS = np.random.default_rng(1).normal(size=(4, 16)).astype("<f4")


def model_folder(folder: Path, dtype: str) -> Path:
    folder.mkdir()
    data = {"F32": WEIGHTS.tobytes(), "F16": WEIGHTS.astype("<f2").tobytes(), "BF16": bf16(WEIGHTS)}[dtype]
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    tensors = [NewTensor(name=name, dtype=dtype, shape=WEIGHTS.shape, chunks=lambda: iter([data])) for name in names]
    norm = NewTensor(name="model.layers.0.norm.weight", dtype="F32", shape=(4,), chunks=lambda: iter([b"\0" * 16]))
    write_checkpoint(folder, [*tensors, norm])
    (folder / "config.json").write_text("{}")
    return folder


def values(folder: Path, name: str) -> np.ndarray:
    tensor = Checkpoint(folder).tensor(name)
    stored = np.frombuffer(b"".join(tensor.chunks()), {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype])
    return stored.reshape(tensor.shape)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_pruned_folder_has_zeros_in_the_matrices_of_layers_and_nothing_else_changed(
    dtype: str, tmp_path: Path
) -> None:
    source, out = model_folder(tmp_path / "source", dtype), tmp_path / "out"
    pruned = write_pruned(source, pruning_method("magnitude-2:4"), out)
    assert (pruned.matrices, pruned.weights, pruned.sparsity) == (2, 128, 0.5)
    assert (out / "config.json").read_text() == "{}"
    for name in Checkpoint(source).names:
        before, after = values(source, name), values(out, name)
        if "up_proj" in name:
            mask = mask_of(WEIGHTS, pruning_method("magnitude-2:4"))
            assert (after[mask] == before[mask]).all()
            assert not after[~mask].any()
        else:
            assert (after == before).all()


def test_wanda_without_norms_names_the_matrix_and_leaves_nothing(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source", "F32")
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: pruning wanda-50 needs the norm"):
        write_pruned(source, pruning_method("wanda-50"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_every_matrix_that_wanda_prunes_has_the_norms_of_its_inputs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from maveriq.profiling.fingerprint import write_fingerprint

    config = dict(SMALL_MODEL) | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, out = tmp_path / "source", tmp_path / "out"
    write_fingerprint(tmp_path / "config.json", layers=2, out=source)
    norms = input_norms_of(source, tokens=16)
    pruned = write_pruned(source, pruning_method("wanda-2:4"), out, input_norms=norms)
    assert (pruned.matrices, pruned.sparsity) == (14, 0.5)
    assert all(norm.min() > 0 for norm in norms.values())
