"""Where weights come from: drawn at random by name, or read from a folder of safetensors files.

Both give whole tensors one at a time, by the names that transformers gives them, so that a rank never holds more than
its part of the model and one tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from maveriq.exec.engines.base import EngineError, FailureKind

Shape = tuple[int, ...]
T = TypeVar("T")
_ONLY_FILE = "model.safetensors"
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types of weights that are what they say; codes of 8 bits mean nothing without the scales beside them."""


class Source(Protocol):
    """Gives tensors by name."""

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Return a whole tensor of this shape, on the source's device and of its type.

        Raises:
            EngineError: there is none, or its shape is another.
        """


class RandomSource:
    """Weights of a normal distribution; however the model is split, the same seed and name give the same tensor."""

    def __init__(self, *, seed: int, spread: float, device: torch.device, dtype: torch.dtype) -> None:
        self._seed = seed
        self._spread = spread
        self._device = device
        self._dtype = dtype

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Draw a matrix; vectors are those of a fresh model: 1 for the weights of norms, 0 for biases."""
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, value, device=self._device, dtype=self._dtype)
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(shape, device=self._device, dtype=self._dtype)
        return drawn.normal_(0.0, self._spread, generator=generator)


class FolderSource:
    """The safetensors files of a model's folder, as `save_pretrained` writes them.

    Raises:
        EngineError: the folder holds none.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._files = _files_of_tensors(folder)

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """Read one tensor."""
        file = self._files.get(name)
        if file is None:
            raise EngineError(FailureKind.ERROR, f"{self._folder}: no tensor {name}; is it this model's folder?")
        tensor = _opened(self._folder, file, lambda opened: opened.get_tensor(name))
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise EngineError(FailureKind.ERROR, f"{self._folder}: {name} has shape {found}, config.json says {shape}")
        if tensor.dtype not in _PLAIN:
            what = (
                f"{self._folder}: {name} is stored as {tensor.dtype}; this engine reads weights that are not quantised"
            )
            raise EngineError(FailureKind.UNSUPPORTED, what)
        return tensor.to(device=self._device, dtype=self._dtype)


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Return the file of each tensor. Only files of this folder: an index must not lead elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _opened(folder, _ONLY_FILE, lambda opened: dict.fromkeys(opened.keys(), _ONLY_FILE))
    try:
        return {name: Path(file).name for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(FailureKind.ERROR, f"{index} cannot be read: {error!r}") from None


def _opened(folder: Path, file: str, use: Callable[[Any], T]) -> T:
    """Return what `use` makes of an open file of tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / file, framework="pt", device="cpu") as opened:
            return use(opened)
    except (OSError, SafetensorError) as error:
        raise EngineError(FailureKind.ERROR, f"weights {folder / file} cannot be read: {error}") from None
