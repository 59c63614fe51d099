"""Writes a model's folder with pruned weights, for engines that know nothing of pruning.

Pruned are the matrices of the decoder's layers, as in the papers: not embeddings, output projection, norms or biases.
Zeros take as much room as other weights and dense kernels multiply them, so the model gets neither smaller nor faster.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.errors import InputError, MaveriqError
from maveriq.files import exists
from maveriq.profiling.layer_names import split_name
from maveriq.profiling.safetensors_files import Checkpoint, NewTensor, StoredTensor, write_checkpoint
from maveriq.streams import generator
from maveriq.study.masks import WANDA, Matrix, PruningMethod, mask_of

_FLOATS: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was pruned: matrices, weights in them, and how many are zero now."""

    matrices: int
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.weights


def write_pruned(
    source: Path, method: PruningMethod, out: Path, *, input_norms: Mapping[str, Matrix] | None = None
) -> Pruned:
    """Write a model's folder with pruned weights.

    Args:
        source: a folder with `config.json` and safetensors files of floating-point weights.
        method: how to prune.
        out: the folder to write, which must not exist.
        input_norms: for `wanda`, the norm of each input by the name of the matrix (`input_norms_of`).

    Raises:
        InputError: no such weights, already quantised ones, or a matrix that cannot be pruned so.
    """
    checkpoint = Checkpoint(source)
    tensors = [checkpoint.tensor(name) for name in checkpoint.names]
    chosen = [tensor for tensor in tensors if _is_pruned(tensor)]
    if not chosen:
        raise InputError(f"weights in {str(source)!r} have no matrices in numbered layers, so nothing can be pruned")
    counts = {"weights": 0, "zeros": 0}

    def pruned_chunks(tensor: StoredTensor) -> Iterator[bytes]:
        norms = None if input_norms is None else input_norms.get(tensor.name)
        data = _with_zeros(tensor, method, norms)
        counts["weights"] += data.size
        counts["zeros"] += data.size - int(np.count_nonzero(data))
        yield data.tobytes()

    if exists(out):
        raise InputError(f"output folder {str(out)!r} exists already; name another")
    out.mkdir(parents=True)
    try:
        write_checkpoint(
            out,
            [
                NewTensor(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    chunks=partial(pruned_chunks, tensor) if tensor in chosen else tensor.chunks,
                )
                for tensor in tensors
            ],
        )
        for file in source.iterdir():
            if file.suffix == ".json" and "safetensors" not in file.name and file.is_file():
                shutil.copyfile(file, out / file.name)
    except BaseException:  # nothing half-written stays
        shutil.rmtree(out)
        raise
    return Pruned(matrices=len(chosen), **counts)


def _is_pruned(tensor: StoredTensor) -> bool:
    if len(tensor.shape) != 2 or split_name(tensor.name) is None or not tensor.name.endswith(".weight"):
        return False
    if tensor.dtype not in _FLOATS:
        raise InputError(f"{tensor.name} has type {tensor.dtype}; only weights of 16 or 32 bits can be pruned")
    return True


def _with_zeros(tensor: StoredTensor, method: PruningMethod, norms: Matrix | None) -> Matrix:
    """Return a tensor's values as they are stored, zero where they are pruned."""
    stored = np.frombuffer(b"".join(tensor.chunks()), dtype=_FLOATS[tensor.dtype]).reshape(tensor.shape)
    values = stored
    if tensor.dtype == "BF16":  # the upper half of a 32-bit number; all bits zero is zero
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    try:
        mask = mask_of(values, method, norms)
    except InputError as error:
        raise InputError(f"{tensor.name}: {error}") from None
    return np.asarray(np.where(mask, stored, stored.dtype.type(0)), dtype=stored.dtype)


def input_norms_of(folder: Path, *, tokens: int = 512, seed: int = 42) -> dict[str, Matrix]:
    """Return the norm of each input of every matrix of a model, over random tokens, by the matrix's name.

    Published masks saw text; for time, which random weights and tokens do not change, any input will do.

    Args:
        folder: of the model.
        tokens: how many tokens to run.
        seed: of the tokens.

    Raises:
        MaveriqError: torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise MaveriqError(
            "wanda needs the inputs of a model's matrices: pip install 'maveriq[torch]' transformers"
        ) from None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    squares: dict[str, Matrix] = {}

    def watch(name: str, _: object, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        squares[name] = squares.get(name, 0.0) + (values**2).sum(dim=0).numpy()

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(watch, f"{name}.weight"))
    prompt = generator(seed, "tokens for wanda").integers(0, model.config.get_text_config().vocab_size, (1, tokens))
    with torch.no_grad():
        model(torch.from_numpy(prompt))
    return {name: np.sqrt(found) for name, found in squares.items()}


def needs_norms(method: PruningMethod) -> bool:
    """Return whether a method needs `input_norms_of` a model."""
    return method.score == WANDA
