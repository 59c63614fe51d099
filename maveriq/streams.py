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
