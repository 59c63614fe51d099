"""Named random streams of one seed.

Each consumer draws from its own stream, so that asking one more question of one of them
(another prompt length, say) never shifts the numbers that another one sees.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the stream `name` of `seed`; the same pair always gives the same numbers.

    The name enters by its CRC-32, not by `hash`, which differs between processes.
    """
    import numpy as np

    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))


def pick(seed: int, name: str, index: int, choices: int) -> int:
    """Return draw number `index` of the stream `name`: a whole number from 0 to `choices` - 1.

    Unlike a generator it keeps no state: the same index gives the same number, whatever else
    was drawn before. The mixing is that of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    mask = (1 << 64) - 1
    state = (zlib.crc32(name.encode()) << 32 ^ seed) + index * 0x9E3779B97F4A7C15 & mask
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return (state ^ state >> 31) % choices
