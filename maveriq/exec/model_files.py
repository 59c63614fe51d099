"""The model files that engines load: the Hugging Face `config.json`, and the weights if there are any.

A model that comes without files gets a `config.json` made from its shape, and random weights.

The files are not trusted. `read_model_file` and `check_weights` are the only ways in: regular files of limited size
that lie in the model's folder. Weights are safetensors; pickle files (`pytorch_model.bin`) are never loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maveriq.domain.decoder_families import FAMILIES
from maveriq.domain.models import ModelSpec, catalogue, known_models
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.exec.messages import BatchingSpec, EngineSpec
from maveriq.files import exists, open_regular_file, read_regular_text

_DEFAULT_CONTEXT_TOKENS = 4096
_GPTJ_ROTARY_SIZE = 64
_LIKE_LLAMA = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""Families whose files have llama's keys, with the class that the file names."""
_MORE_CLASSES = {"mixtral": "MixtralForCausalLM"}
"""The classes of further families that engines run from the catalogue's keys."""
_MAX_FILE_BYTES = 64 * 1024 * 1024
_SAFETENSORS, _PICKLES = ("*.safetensors",), ("*model*.bin", "*model*.pt", "*.pth", "*.ckpt")


def hf_config_json(model: ModelSpec) -> str:
    """Return a `config.json` with the model's shape in the format of its architecture; llama's if that is unknown.

    A model of the catalogue whose shape does not say all gets the keys that the catalogue has.

    Raises:
        InputError: another model is no plain decoder, or nothing is known of how its family writes one.
    """
    plain_family = model.architecture not in FAMILIES or model.architecture in (*_LIKE_LLAMA, "falcon", "gptj")
    if (model.why_not_plain() or not plain_family) and known_models().get(model.name) == model:
        named = {"architectures": [_MORE_CLASSES[model.architecture]]} if model.architecture in _MORE_CLASSES else {}
        return json.dumps(named | catalogue()[model.name].config)
    if different := model.why_not_plain():
        raise InputError(f"model {model.name!r}: {different}, which its shape does not say: give its config.json")
    if not plain_family:
        raise InputError(f"model {model.name!r}: a config.json of family {model.architecture} cannot be made from its "
                         "shape: give its own")  # fmt: skip
    architecture_keys = {"falcon": _falcon_keys, "gptj": _gptj_keys}.get(model.architecture, _llama_keys)
    return json.dumps({"model_type": model.architecture, "vocab_size": model.vocab_size} | architecture_keys(model))


def _llama_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": [_LIKE_LLAMA.get(model.architecture, "LlamaForCausalLM")],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": _context_tokens(model),
        "tie_word_embeddings": model.decoder.tied_embeddings,
        "sliding_window": None,
    }


def _falcon_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["FalconForCausalLM"],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_kv_heads": model.kv_heads,
        "ffn_hidden_size": model.intermediate_size,
        # Falcon's first decoder has one KV head, its new decoder several.
        "multi_query": model.kv_heads == 1,
        "new_decoder_architecture": model.kv_heads > 1,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "max_position_embeddings": _context_tokens(model),
    }


def _gptj_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPTJForCausalLM"],
        "n_layer": model.layers,
        "n_embd": model.hidden_size,
        "n_head": model.attention_heads,
        "n_inner": model.intermediate_size,
        "rotary_dim": min(_GPTJ_ROTARY_SIZE, model.head_size),
        "n_positions": _context_tokens(model),
        "tie_word_embeddings": False,
    }


def _context_tokens(model: ModelSpec) -> int:
    return model.context_tokens or _DEFAULT_CONTEXT_TOKENS


class ModelFiles:
    """Finds the files of models.

    Args:
        config_path: returns the path of a model's `config.json`, None if it has no files.
    """

    def __init__(self, config_path: Callable[[ModelSpec], Path | None] = lambda _model: None) -> None:
        self._config_path = config_path

    def config_json(self, model: ModelSpec) -> str:
        """Return the configuration that a model was read from, or one made from its shape."""
        return model.config_json or hf_config_json(model)

    def weights_folder(self, model: ModelSpec) -> str:
        """Return the folder of a model's weights, "" if it has none (random weights).

        A folder with pickle files alone counts too: the engines refuse it, where random weights would be wrong.
        """
        path = self._config_path(model)
        if path is None:
            return ""
        return str(path.parent.resolve()) if has_weights(path.parent) else ""

    def engine_spec(
        self,
        model: ModelSpec,
        configuration: ParallelConfig,
        *,
        batch_size: int,
        devices: tuple[str, ...],
        deployment_id: int = 1,
        seed: int = 42,
        batching: BatchingSpec | None = None,
    ) -> EngineSpec:
        """Return what an engine loads that is measured or scored by itself.

        Args:
            model: the model.
            configuration: its layers are split as evenly as they can be if it does not say how.
            batch_size: sequences that are computed at once.
            devices: a device for each rank.
            deployment_id: tells engines apart that run at the same time.
            seed: of random weights.
            batching: of an engine that batches continuously; None for one that takes one execution at a time.
        """
        return EngineSpec(
            deployment_id=deployment_id,
            generation=1,
            model=model.name,
            config_json=self.config_json(model),
            weights_folder=self.weights_folder(model),
            tp=configuration.tp,
            pp=configuration.pp,
            layer_split=configuration.layers_per_stage(model.layers),
            weights=configuration.weights.value,
            kv=configuration.kv.value,
            batch_size=batch_size,
            devices=devices,
            seed=seed,
            batching=batching,
        )


def has_weights(folder: Path) -> bool:
    """Return whether a model's folder has files of weights, safetensors or pickles."""
    return _has_any(folder, _SAFETENSORS + _PICKLES)


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def check_inside(path: Path, folder: Path, *, what: str) -> None:
    """Check that a file lies in its model's folder after all links.

    In the cache of Hugging Face `snapshots/REVISION` holds links into `blobs` beside `snapshots`.

    Raises:
        InputError: it lies elsewhere, or its links form a loop.
    """
    try:
        own, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error}") from None
    inside = target.is_relative_to(own)
    if own.parent.name == "snapshots":
        inside = inside or target.is_relative_to(own.parent.parent / "blobs")
    if not inside:
        raise InputError(f"{what} {str(path)!r} is a link out of {str(folder)!r}; put the file itself there")


def read_model_file(folder: Path, name: str, *, what: str) -> str | None:
    """Return the text of a file in a model's folder, None if there is none.

    Raises:
        InputError: it is not a regular file in the folder, is larger than 64 MiB, or is not UTF-8.
    """
    path = folder / name
    if not exists(path) and not path.is_symlink():
        return None
    check_inside(path, folder, what=what)
    return read_regular_text(path, what=what, max_bytes=_MAX_FILE_BYTES)


def check_weights(folder: Path) -> None:
    """Check that a folder's weights are safetensors, each a regular file in the folder.

    Raises:
        InputError: there are none, or one is a link out of the folder, a FIFO or a device.
    """
    if not _has_any(folder, _SAFETENSORS):
        pickles = ", ".join(sorted(path.name for path in _matching(folder, _PICKLES)))
        raise InputError(
            f"weights in {str(folder)!r} are pickle files ({pickles[:100]}), which can run any code and are never "
            "loaded; convert them to safetensors"
            if pickles
            else f"weights in {str(folder)!r} cannot be read: the folder has no safetensors file"
        )
    for path in _matching(folder, _SAFETENSORS):
        check_inside(path, folder, what="weights")
        open_regular_file(path, what="weights").close()


def matrix_types(folder: Path) -> dict[str, str]:
    """Return the types of the matrices in a folder's safetensors files ("F16", "BF16", ...), each with the first name.

    Only the headers are read: the length of a JSON object in eight bytes, then the object
    (https://github.com/huggingface/safetensors#format).

    Raises:
        InputError: a file is not a regular file in the folder, or has no valid header.
    """
    types: dict[str, str] = {}
    for path in sorted(_matching(folder, _SAFETENSORS)):
        check_inside(path, folder, what="weights")
        for name, tensor in safetensors_header(path)[0].items():
            if name != "__metadata__" and len(tensor["shape"]) > 1:
                types.setdefault(tensor["dtype"], name)
    return types


def safetensors_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header of a safetensors file, where its data starts, and the bytes of the file.

    The header has an object with `dtype` and `shape` for each tensor, and perhaps `__metadata__`.

    Raises:
        InputError: the file has no valid header.
    """
    with open_regular_file(path, what="weights") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(_MAX_FILE_BYTES, file_bytes) else b""
    try:
        header = json.loads(text)
        if all(name == "__metadata__" or _is_described(tensor) for name, tensor in header.items()):
            return dict(header), 8 + length, file_bytes
    except (ValueError, AttributeError, RecursionError):
        pass
    raise InputError(f"weights {str(path)!r} cannot be read: not a safetensors file; give another file")


def _is_described(tensor: Any) -> bool:
    return isinstance(tensor, dict) and isinstance(tensor.get("dtype"), str) and isinstance(tensor.get("shape"), list)


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern))
