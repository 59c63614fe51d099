"""Values of new parameters as bytes, chunk by chunk: seed and name fix them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from maveriq.profiling.transformers_decoder import Constant, Distribution, Normal, Uniform
from maveriq.streams import generator

_CHUNK_VALUES = 4 << 20
_HIGH_HALF = 16


def random_chunks(
    name: str, dtype: str, shape: Sequence[int], distribution: Distribution, *, seed: int
) -> Iterator[bytes]:
    """Yield the bytes of a tensor, at most 4 Mi values at a time.

    Args:
        name: the tensor's name, which gives it a stream of its own.
        dtype: its type, as safetensors files name it; what is no float of 16 or 32 bits is zero.
        shape: its sizes.
        distribution: how its values are distributed.
        seed: the seed of all tensors.
    """
    stream = generator(seed, f"weights/{name}")
    left = math.prod(shape)
    while left:
        count = min(left, _CHUNK_VALUES)
        left -= count
        yield _encoded(_values(stream, distribution, count), dtype)


def _values(stream: Any, distribution: Distribution, count: int) -> Any:
    import numpy as np

    match distribution:
        case Normal(mean=mean, std=std):
            values = stream.standard_normal(count, dtype=np.float32)
            values *= np.float32(std)
            values += np.float32(mean)
            return values
        case Uniform(low=low, high=high):
            return stream.random(count, dtype=np.float32) * np.float32(high - low) + np.float32(low)
        case Constant(value=value):
            return np.full(count, value, dtype=np.float32)


def _encoded(values: Any, dtype: str) -> bytes:
    """Return values of float32 as the bytes of another type, little-endian."""
    import numpy as np

    match dtype:
        case "F32":
            encoded = values.astype("<f4")
        case "F16":
            encoded = values.astype("<f2")
        case "BF16":
            # The upper half of a float32, rounded to the nearest, ties to even.
            bits = values.view(np.uint32)
            bits += np.uint32(0x7FFF) + ((bits >> _HIGH_HALF) & np.uint32(1))
            encoded = (bits >> _HIGH_HALF).astype("<u2")
        case _:
            encoded = np.zeros(values.size * _ITEM_BYTES[dtype], dtype=np.uint8)
    found: bytes = encoded.tobytes()
    return found


_ITEM_BYTES = {"F64": 8, "I64": 8, "I32": 4, "BOOL": 1, "U8": 1}
