"""The files of a fingerprint: its tensors, copied from the whole model's files or random, and the tokenizer's files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maveriq.errors import InputError
from maveriq.exec.model_files import check_inside
from maveriq.files import read_regular_file
from maveriq.profiling.layer_names import numbered, prefix_of, split_name
from maveriq.profiling.random_values import random_chunks
from maveriq.profiling.safetensors_files import Checkpoint, NewTensor
from maveriq.profiling.transformers_decoder import BuiltDecoder

_KEPT_FILES = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken|"
    r"preprocessor_config|processor_config|video_preprocessor_config)\.json|merges\.txt|vocab\.txt|"
    r"[\w.-]{1,60}\.(tiktoken|jinja)|(tokenizer|spiece|sentencepiece\.bpe|tokenizer\.model)\.model(\.v\d+)?"
)
_MAX_FILE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FingerprintTensor:
    """A tensor of a fingerprint.

    Args:
        tensor: what to write.
        layer: the fingerprint's layer that it belongs to; None for what stands beside the layers.
    """

    tensor: NewTensor
    layer: int | None


def random_tensors(built: BuiltDecoder, *, seed: int) -> list[FingerprintTensor]:
    """Return the tensors of a new model: `built` with its layers alone."""
    return [
        FingerprintTensor(
            tensor=NewTensor(
                name=parameter.name,
                dtype=parameter.dtype,
                shape=parameter.shape,
                chunks=partial(
                    random_chunks, parameter.name, parameter.dtype, parameter.shape, parameter.distribution, seed=seed
                ),
            ),
            layer=parameter.layer,
        )
        for parameter in built.parameters
    ]


def stacked_axes(built: BuiltDecoder, full: BuiltDecoder, where: str) -> dict[str, int]:
    """Return the tensors beside the layers that hold a part for each layer, with the axis along which the parts lie.

    Args:
        built: the model with the chosen layers alone.
        full: the whole model.
        where: the configuration's name, for messages.

    Raises:
        InputError: a tensor depends on the number of layers in another way.
    """
    layers, full_layers = len(built.layers), len(full.layers)
    shapes = {parameter.name: parameter.shape for parameter in full.parameters if parameter.layer is None}
    found = {}
    for parameter in built.parameters:
        shape = shapes.get(parameter.name, parameter.shape)
        if parameter.layer is not None or shape == parameter.shape:
            continue
        axes = [axis for axis, size in enumerate(parameter.shape) if size != shape[axis]]
        if len(axes) > 1 or any(parameter.shape[axis] * full_layers != shape[axis] * layers for axis in axes):
            raise InputError(
                f"{where}: {parameter.name} has shape {list(shape)}, and {list(parameter.shape)} with {layers} layers; "
                "how it depends on layers is not known"
            )
        found[parameter.name] = axes[0]
    return found


def copied_tensors(
    checkpoint: Checkpoint,
    built: BuiltDecoder,
    chosen: Sequence[int],
    full_layers: int,
    *,
    stacked: Mapping[str, int],
    quantised: bool,
) -> list[FingerprintTensor]:
    """Return the tensors of the chosen layers, renumbered, and those beside the layers.

    Args:
        checkpoint: the whole model's files.
        built: the model with the chosen layers alone.
        chosen: the layers, by their numbers in the whole model.
        full_layers: how many layers the whole model has.
        stacked: tensors that hold a part for each layer, with the axis of the parts.
        quantised: whether matrices are stored in a form of their own, so that other tensors stand for them.

    Raises:
        InputError: a tensor is missing, or has another shape than the configuration says.
    """
    numbers = numbered(checkpoint.names)
    prefixes = [prefix_of(path, numbers, full_layers) for path in built.layer_paths]
    if None in prefixes:
        path = built.layer_paths[prefixes.index(None)]
        raise InputError(
            f"weights in {str(checkpoint.folder)!r} lack layers: no names such as {path}.0 to "
            f"{path}.{full_layers - 1}; are they this model's?"
        )
    expected_parts = {parameter.name.split(".")[0] for parameter in built.parameters}
    expected_parts |= {part for name in built.module_parameters for part in name.split(".")}
    found = []
    for name in checkpoint.names:
        split = split_name(name)
        if split and split[0] in prefixes:
            if split[1] not in chosen:
                continue
            layer = chosen.index(split[1])
            found.append(_copied(checkpoint, name, f"{split[0]}.{layer}.{split[2]}", layer))
        elif name in stacked:
            found.append(_cut(checkpoint, name, stacked[name], chosen, full_layers))
        elif name.split(".")[0] in expected_parts:
            found.append(_copied(checkpoint, name, name, None))
    _check_complete(checkpoint, built, found, quantised=quantised)
    return found


def _copied(checkpoint: Checkpoint, name: str, new_name: str, layer: int | None) -> FingerprintTensor:
    stored = checkpoint.tensor(name)
    tensor = NewTensor(name=new_name, dtype=stored.dtype, shape=stored.shape, chunks=stored.chunks)
    return FingerprintTensor(tensor=tensor, layer=layer)


def _cut(checkpoint: Checkpoint, name: str, axis: int, chosen: Sequence[int], full_layers: int) -> FingerprintTensor:
    """Return a tensor with the parts of the chosen layers."""
    stored = checkpoint.tensor(name)
    if axis >= len(stored.shape) or stored.shape[axis] % full_layers or 0 in stored.shape:
        raise InputError(f"weights in {str(checkpoint.folder)!r}: {name} has no part for each of {full_layers} layers")
    shape = list(stored.shape)
    shape[axis] = shape[axis] // full_layers * len(chosen)
    chunks = partial(stored.slice_chunks, axis, full_layers, tuple(chosen))
    return FingerprintTensor(
        tensor=NewTensor(name=name, dtype=stored.dtype, shape=tuple(shape), chunks=chunks), layer=None
    )


def _check_complete(
    checkpoint: Checkpoint, built: BuiltDecoder, found: Sequence[FingerprintTensor], *, quantised: bool
) -> None:
    """Check that the files have what the configuration describes.

    Raises:
        InputError: they do not.
    """
    where = f"weights in {str(checkpoint.folder)!r}"
    shapes = {entry.tensor.name: entry.tensor.shape for entry in found}
    for parameter in built.parameters:
        shape = shapes.get(parameter.name, parameter.shape)
        if not quantised and shape != parameter.shape:
            raise InputError(
                f"{where}: {parameter.name} has shape {list(shape)}, but config.json says {list(parameter.shape)}"
            )
    if quantised:
        return
    present = {_essence(name) for name in shapes}
    tied = {_essence(name) for name in built.module_parameters} - {_essence(p.name) for p in built.parameters}
    lacking = [
        [name for name in names if _essence(name) not in present | tied]
        for names in ([parameter.name for parameter in built.parameters], built.module_parameters)
    ]
    if all(lacking):
        raise InputError(f"{where} lack {lacking[0][0]}, which config.json asks for; get the missing files")


def _essence(name: str) -> str:
    """Return a tensor's name without the modules around: those differ between files and models."""
    split = split_name(name)
    return f"{split[1]}.{split[2]}" if split else ".".join(name.split(".")[-2:])


def kept_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a model's folder that say how text becomes tokens and how it is generated, by name.

    Raises:
        InputError: one is no regular file in the folder, or larger than 128 MiB.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if _KEPT_FILES.fullmatch(path.name):
            check_inside(path, folder, what="model file")
            found[path.name] = read_regular_file(path, what="model file", max_bytes=_MAX_FILE_BYTES)
    return found
