"""Fingerprints of models: the same decoder with a few of its layers, as a Hugging Face folder that any engine loads.

A layer takes as long in the fingerprint as in the whole model, and so do embedding and output, so a fingerprint of one
or two layers is measured in place of the whole. `maveriq.estimate.fingerprints` holds the published measurements of
such fingerprints and their exponents; this module makes the models that are measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from maveriq.domain.config_fields import Config
from maveriq.domain.decoder import Decoder
from maveriq.domain.decoder_config import read_decoder
from maveriq.domain.model_config import parse_config
from maveriq.domain.models import config_path, load_model, model_name
from maveriq.errors import InputError
from maveriq.exec.model_files import has_weights, hf_config_json, read_model_file
from maveriq.files import exists, read_regular_text
from maveriq.profiling.fingerprint_files import (
    FingerprintTensor,
    copied_tensors,
    kept_files,
    random_tensors,
    stacked_axes,
)
from maveriq.profiling.layer_choice import LayerKinds, check_layer_count, layer_kinds, selections, stands_for
from maveriq.profiling.layer_names import renamed_layers
from maveriq.profiling.reduced_config import proposals
from maveriq.profiling.safetensors_files import Checkpoint, write_checkpoint
from maveriq.profiling.transformers_decoder import BuiltDecoder, build_decoder, dtype_of, text_key
from maveriq.report.run_folder import check_writable, write_folder
from maveriq.text import check_name
from maveriq.units import Bytes, gib

FINGERPRINT_FILE = "fingerprint.json"
"""What a fingerprint's folder says of itself."""

FINGERPRINT_FILES = ("config.json", FINGERPRINT_FILE)
"""What makes a folder a fingerprint."""

_MODELOPT_FILE = "hf_quant_config.json"
_MAX_CONFIG_BYTES = 4 << 20
_MARGIN_BYTES = 64 << 20
_MAX_SELECTIONS, _MAX_TRIES = 16, 500
_LEFT_OUT = ("auto_map", "_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLayer:
    """A layer of a fingerprint.

    Args:
        source_index: its number in the whole model.
        kind: what kind of layer it is, in words; equal for layers of one kind.
        stands_for: how many layers of the whole model it stands for, itself included.
        parameters: its parameters.
        weight_bytes: their bytes.
    """

    source_index: int
    kind: str
    stands_for: int
    parameters: int
    weight_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """A model with a few layers that was written.

    What is measured of it extends to the whole model: a quantity that adds up over layers is `extra`, plus each kept
    layer's as often as it `stands_for`.

    Args:
        folder: where it is.
        model: the name of the whole model.
        architecture: its class in `transformers`.
        layers: its layers, in order.
        full_layers: the layers of the whole model.
        extra_parameters: parameters beside the layers: embedding, output, norms, other inputs' parts.
        extra_bytes: their bytes.
        full_parameters: parameters of the whole model.
        full_bytes: their bytes, with weights of the same types.
        disk_bytes: bytes of the fingerprint's files.
        random_weights: whether its weights are random, not the whole model's.
        seed: the seed of random weights.
        write_s: seconds that writing the weights' files took, their flush to the disk included.
        notes: what of the whole model the fingerprint lacks, beside layers.
    """

    folder: Path
    model: str
    architecture: str
    layers: tuple[KeptLayer, ...]
    full_layers: int
    extra_parameters: int
    extra_bytes: Bytes
    full_parameters: int
    full_bytes: Bytes
    disk_bytes: Bytes
    random_weights: bool
    seed: int
    write_s: float
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All its parameters."""
        return self.extra_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> Bytes:
        """The bytes of its parameters: what an engine that converts nothing holds on its GPUs."""
        return self.extra_bytes + sum(layer.weight_bytes for layer in self.layers)

    @property
    def read_s(self) -> float:
        """Seconds to read its weights at the rate at which they were written."""
        return self.write_s

    @property
    def full_read_s(self) -> float:
        """Seconds to read the whole model's weights at that rate."""
        return self.write_s * self.full_bytes / max(1, self.weight_bytes)


def write_fingerprint(
    model: Path | str,
    *,
    layers: int,
    out: Path,
    seed: int = 1,
    overwrite: bool = False,
    chosen: Sequence[int] | None = None,
) -> Fingerprint:
    """Write the model of so many layers that stands for a whole one.

    Weights are those of the whole model where its folder has safetensors files; only the tensors of the fingerprint
    are read. Else they are random, distributed as `transformers` initialises the model.

    Args:
        model: a name of `maveriq models`, or the path of a `config.json` or of its folder.
        layers: how many layers to keep: at least one of each kind.
        out: the folder to write. It is written whole or not at all.
        seed: the seed of random weights.
        overwrite: replace a fingerprint that is there.
        chosen: which layers to keep, `layers` of them; None for those that stand best for all.

    Raises:
        InputError: the model cannot be read or reduced, the number of layers does not do, or `out` cannot be written.
        MaveriqError: torch or transformers is not installed, or the disk is too small.
    """
    check_writable(out, files=FINGERPRINT_FILES, overwrite=overwrite)
    source = _read_source(model)
    if source.folder is not None and out.resolve() == source.folder.resolve():
        raise InputError(f"output folder {str(out)!r} is the model's own; name another")
    reduced = reduce_layers(source.config, layers, where=source.where, modelopt=source.modelopt, chosen=chosen)
    quantised = bool(source.modelopt or source.config.get("quantization_config"))
    stacked = stacked_axes(reduced.built, reduced.full, source.where)
    if source.has_weights and source.folder is not None:
        tensors = copied_tensors(
            Checkpoint(source.folder),
            reduced.built,
            reduced.chosen,
            len(reduced.kinds.pattern),
            stacked=stacked,
            quantised=quantised,
        )
    else:
        tensors = random_tensors(build_decoder(reduced.config, source.where, with_weights=True), seed=seed)
    texts = _texts(source, reduced, random_weights=not source.has_weights)
    extra_files = kept_files(source.folder) if source.folder is not None else {}
    _check_disk(out, sum(entry.tensor.size for entry in tensors) + sum(map(len, extra_files.values())))
    described = _described(source, reduced, tensors, stacked, seed=seed, quantised=quantised)
    result = described

    def fill(fresh: Path) -> None:
        nonlocal result
        written = write_checkpoint(fresh, [entry.tensor for entry in tensors])
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        for name, content in extra_files.items():
            (fresh / name).write_bytes(content)
        beside = [*(text.encode() for text in texts.values()), *extra_files.values()]
        result = replace(described, disk_bytes=written.size + sum(map(len, beside)), write_s=round(written.seconds, 3))
        (fresh / FINGERPRINT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(_stored(result)), indent=2))

    folder = write_folder(out, fill, files=FINGERPRINT_FILES, overwrite=overwrite)
    return replace(result, folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A model as it was given; `folder` is None where it comes without files."""

    name: str
    where: str
    config: dict[str, Any]
    modelopt: dict[str, Any] | None = None
    folder: Path | None = None
    has_weights: bool = False


def _read_source(model: Path | str) -> _Source:
    """Read a model's configuration, of any decoder.

    Raises:
        InputError: it cannot be read.
    """
    named = str(model)
    path = Path(named)
    if not exists(path) and path.suffix != ".json":
        spec = load_model(named)  # a known name, or the error that says what would be one
        where = f"model {spec.name!r}"
        return _Source(name=spec.name, where=where, config=parse_config(hf_config_json(spec), where))
    path = config_path(path)
    folder = path.parent
    where = f"model configuration {str(path)!r}"
    config = parse_config(read_regular_text(path, what="model configuration", max_bytes=_MAX_CONFIG_BYTES), where)
    beside = read_model_file(folder, _MODELOPT_FILE, what="quantisation")
    modelopt = parse_config(beside, f"quantisation {_MODELOPT_FILE!r}") if beside is not None else None
    name = model_name(config, path)
    check_name(name, "model", remedy="set _name_or_path in its config.json")
    return _Source(
        name=name,
        where=where,
        config=config,
        modelopt=modelopt,
        folder=folder,
        has_weights=has_weights(folder),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducedModel:
    """A configuration with the chosen layers alone.

    Args:
        config: the configuration.
        chosen: the layers, by their numbers in the whole model.
        kinds: the kinds of the whole model's layers.
        built: the model with the chosen layers, as `transformers` builds it.
        full: the whole model, likewise.
    """

    config: dict[str, Any]
    chosen: tuple[int, ...]
    kinds: LayerKinds
    built: BuiltDecoder
    full: BuiltDecoder


def reduce_layers(
    config: Config, layers: int, *, where: str, modelopt: Config | None = None, chosen: Sequence[int] | None = None
) -> ReducedModel:
    """Reduce a decoder's configuration to so many layers that stand for all.

    Args:
        config: the parsed `config.json`.
        layers: how many layers to keep.
        where: the file's name, for messages.
        modelopt: the parsed `hf_quant_config.json` beside it, None where there is none.
        chosen: the layers to keep, in order, perhaps not of every kind; None for those that stand best for all.

    Raises:
        InputError: the configuration cannot be used, `layers` is fewer than its kinds of layers or more than its
            layers, or no configuration of the family has such layers alone.
        MaveriqError: torch or transformers is not installed.
    """
    full = build_decoder(config, where)
    kinds = layer_kinds(full.layers, _decoder(config, where, modelopt, len(full.layers)))
    if chosen is None:
        check_layer_count(kinds, layers, where)
    elif list(chosen) != sorted(set(chosen)) or not chosen or not 0 <= chosen[0] <= chosen[-1] < len(kinds.pattern):
        raise InputError(f"{where}: layers {list(chosen)} are not some of {len(kinds.pattern)} layers, in order")
    search = _Search(config, full, where, modelopt)
    for selection in [tuple(chosen)] if chosen is not None else islice(selections(kinds, layers), _MAX_SELECTIONS):
        found = search.reduced_to(selection)
        if found is not None:
            return ReducedModel(config=found[0], chosen=selection, kinds=kinds, built=found[1], full=full)
        if search.tries_left <= 0:
            break
    raise InputError(
        f"{where}: no configuration of this family was found that has {layers} layers with every kind; "
        f"try another number of --layers ({', '.join(kinds.names)})"
    )


def _decoder(config: Config, where: str, modelopt: Config | None, layers: int) -> Decoder | None:
    """Return maveriq's description of a decoder; None where it has none, or counts other layers than transformers."""
    try:
        decoder = read_decoder(config, where, modelopt).decoder
    except InputError:
        return None
    return decoder if decoder.layers == layers else None


class _Search:
    """Searches the configuration that has chosen layers alone."""

    def __init__(self, config: Config, full: BuiltDecoder, where: str, modelopt: Config | None) -> None:
        self._config = config
        self._full = full
        self._where = where
        self._modelopt = modelopt
        self._decoder = _decoder(config, where, modelopt, len(full.layers))
        self._key = text_key(config)
        self.tries_left = _MAX_TRIES

    def reduced_to(self, chosen: Sequence[int]) -> tuple[dict[str, Any], BuiltDecoder] | None:
        """Return the configuration and what is built from it; None if there is none, or the tries are used up."""
        wanted = [self._full.layers[layer] for layer in chosen]
        described = (
            [self._decoder.layer_kinds[self._decoder.layer_pattern[layer]] for layer in chosen]
            if self._decoder
            else None
        )
        built_of: dict[str, tuple[BuiltDecoder, object] | None] = {}

        def build(part: Config) -> tuple[BuiltDecoder, object] | None:
            text = json.dumps(part, sort_keys=True)
            if text not in built_of:
                built_of[text] = self._built(self._whole(part, chosen), chosen)
            return built_of[text]

        def kinds_of(part: Config) -> object:
            found = build(part)
            return None if found is None else (found[0].layers, found[1])

        part = self._config[self._key] if self._key else self._config
        for proposal in proposals(part, self._full.explicit, chosen, len(self._full.layers), kinds_of):
            found = build(proposal)
            if found is not None and list(found[0].layers) == wanted and found[1] == described:
                return self._whole(proposal, chosen), found[0]
            if self.tries_left <= 0:
                return None
        return None

    def _built(self, config: Config, chosen: Sequence[int]) -> tuple[BuiltDecoder, object] | None:
        """Return what is built from a configuration, and maveriq's kinds of its layers; None if it is none."""
        self.tries_left -= 1
        try:
            built = build_decoder(config, self._where)
        except InputError:
            return None
        decoder = None
        if self._decoder is not None:
            modelopt = renamed_layers(self._modelopt, chosen) if self._modelopt else None
            decoder = _decoder(config, self._where, modelopt, len(chosen))
        return built, [decoder.layer_kinds[kind] for kind in decoder.layer_pattern] if decoder else None

    def _whole(self, part: Config, chosen: Sequence[int]) -> dict[str, Any]:
        """Return the configuration with its decoder's part replaced."""
        whole = {**self._config, self._key: dict(part)} if self._key else dict(part)
        whole = {key: value for key, value in whole.items() if key not in _LEFT_OUT}
        if whole.get("quantization_config"):
            whole["quantization_config"] = renamed_layers(whole["quantization_config"], chosen)
        if not self._key:
            # The decoder of a multimodal family alone has a name of its own.
            whole["model_type"] = self._full.explicit["model_type"]
        whole.setdefault("architectures", [self._full.class_name])
        return whole


def _texts(source: _Source, reduced: ReducedModel, *, random_weights: bool) -> dict[str, str]:
    """Return the configuration files by name. Random weights are not quantised."""
    config = dict(reduced.config)
    if random_weights:
        config.pop("quantization_config", None)
        if not ({"dtype", "torch_dtype"} & set(config)):
            config["dtype"] = dtype_of(config, source.where)
    texts = {"config.json": json.dumps(config, indent=2) + "\n"}
    if source.modelopt and not random_weights:
        texts[_MODELOPT_FILE] = json.dumps(renamed_layers(source.modelopt, reduced.chosen), indent=2) + "\n"
    return texts


def _check_disk(out: Path, needed: Bytes) -> None:
    """Check that there is room for the files.

    Raises:
        InputError: there is not.
    """
    ancestor = next(parent for parent in out.expanduser().resolve().parents if parent.exists())
    free = shutil.disk_usage(ancestor).free
    if needed + _MARGIN_BYTES > free:
        raise InputError(
            f"output folder {str(out)!r} needs {gib(needed):.2f} GiB, but {gib(free):.2f} GiB are free there; "
            "name a folder on another disk, or keep fewer --layers"
        )


def _described(
    source: _Source,
    reduced: ReducedModel,
    tensors: Sequence[FingerprintTensor],
    stacked: Collection[str],
    *,
    seed: int,
    quantised: bool,
) -> Fingerprint:
    """Return the fingerprint before it is written. Tensors that hold a part for each layer count with the layers."""
    number = len(reduced.chosen)
    sizes: dict[int | None, int] = dict.fromkeys((None, *range(number)), 0)
    for entry in tensors:
        sizes[entry.layer] += entry.tensor.size
    parts_bytes = sum(entry.tensor.size for entry in tensors if entry.tensor.name in stacked) // number
    parts = sum(parameter.count for parameter in reduced.built.parameters if parameter.name in stacked) // number
    extra_bytes = sizes[None] - number * parts_bytes
    shares = stands_for(reduced.kinds, reduced.chosen)
    layers = tuple(
        KeptLayer(
            source_index=layer,
            kind=reduced.kinds.names[reduced.kinds.pattern[layer]],
            stands_for=share,
            parameters=reduced.built.parameters_of(place) + parts,
            weight_bytes=sizes[place] + parts_bytes,
        )
        for place, (layer, share) in enumerate(zip(reduced.chosen, shares, strict=True))
    )
    notes = () if source.has_weights or not quantised else ("random weights are not quantised as the checkpoint's are",)
    return Fingerprint(
        folder=Path(),
        model=source.name,
        architecture=reduced.built.class_name,
        layers=layers,
        full_layers=len(reduced.kinds.pattern),
        extra_parameters=reduced.built.parameters_of(None) - number * parts,
        extra_bytes=extra_bytes,
        full_parameters=sum(parameter.count for parameter in reduced.full.parameters),
        full_bytes=_full_bytes(reduced, extra_bytes, layers),
        disk_bytes=0,
        random_weights=not source.has_weights,
        seed=seed,
        write_s=0.0,
        notes=notes,
    )


def _full_bytes(reduced: ReducedModel, extra_bytes: Bytes, layers: Sequence[KeptLayer]) -> Bytes:
    """Return the bytes of the whole model's weights; in proportion to parameters where a kind of layer was not kept."""
    if all(reduced.kinds.counts(reduced.chosen)):
        return extra_bytes + sum(layer.stands_for * layer.weight_bytes for layer in layers)
    kept_bytes = extra_bytes + sum(layer.weight_bytes for layer in layers)
    full, kept = (sum(parameter.count for parameter in built.parameters) for built in (reduced.full, reduced.built))
    return kept_bytes * full // kept


def _stored(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return what `fingerprint.json` says: all but where it is."""
    values: dict[str, Any] = msgspec.to_builtins(fingerprint, enc_hook=str)
    del values["folder"]
    return values


def read_fingerprint(folder: Path) -> Fingerprint:
    """Return the fingerprint that a folder holds.

    Raises:
        InputError: it holds none.
    """
    text = read_regular_text(folder / FINGERPRINT_FILE, what="fingerprint", max_bytes=_MAX_CONFIG_BYTES)
    try:
        values = {**msgspec.json.decode(text), "folder": str(folder)}
        return msgspec.convert(values, Fingerprint, dec_hook=lambda kind, value: kind(value))
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise InputError(f"fingerprint {str(folder / FINGERPRINT_FILE)!r} cannot be read: {error}") from None
