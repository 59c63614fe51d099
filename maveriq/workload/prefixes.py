"""What requests of a workload have in common: hashes of their prefixes, from a file or of generated conversations.

A prefix hash stands for the first tokens of a request, in steps of a fixed number: equal hashes, equal tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from maveriq.domain.requests import PREFIX_HASH_TOKENS

_HASHES_OF_A_CONVERSATION = 1 << 32


@runtime_checkable
class PrefixHashes(Protocol):
    """The prefix hashes of each request, by row."""

    @property
    def tokens_per_hash(self) -> int:
        """The i-th hash of a request stands for its first `(i + 1) * tokens_per_hash` tokens."""

    def __len__(self) -> int:
        """Return the number of requests."""

    def of(self, row: int) -> Sequence[int]:
        """Return the hashes of one request; none where nothing is known of it."""

    def rows(self, index: np.ndarray[Any, Any]) -> PrefixHashes:
        """Return those of some of the requests, in the order of `index`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ListedHashes:
    """Hashes that a file lists.

    Args:
        hashes: of all requests, one request after the other (int64).
        ends: where those of each request end in `hashes` (int64).
        starts: where they begin (int64).
        tokens_per_hash: see `PrefixHashes`.
    """

    hashes: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    tokens_per_hash: int = PREFIX_HASH_TOKENS

    @classmethod
    def counted(
        cls, hashes: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], tokens_per_hash: int = PREFIX_HASH_TOKENS
    ) -> ListedHashes:
        """Return hashes of which each request has so many."""
        ends = np.cumsum(counts)
        return cls(hashes=hashes, starts=ends - counts, ends=ends, tokens_per_hash=tokens_per_hash)

    def __len__(self) -> int:
        return len(self.ends)

    def of(self, row: int) -> Sequence[int]:
        """Return the hashes of one request."""
        hashes: list[int] = self.hashes[self.starts[row] : self.ends[row]].tolist()
        return hashes

    def rows(self, index: np.ndarray[Any, Any]) -> ListedHashes:
        """Return those of some of the requests."""
        return ListedHashes(
            hashes=self.hashes,
            starts=self.starts[index],
            ends=self.ends[index],
            tokens_per_hash=self.tokens_per_hash,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConversationHashes:
    """Hashes of generated requests: a shared prefix, then the text of their conversation, which grows with each turn.

    They are computed when they are asked for, so that long conversations take no memory.

    Args:
        prefix: number of the shared prefix of each request, from 1; 0 for none (int64).
        conversation: number of the conversation of each request, from 1; 0 where nobody else has its text (int64).
        known_tokens: tokens of each request that others may have (int64).
        prefix_tokens: length of the shared prefix; 0 for none.
    """

    prefix: np.ndarray[Any, Any]
    conversation: np.ndarray[Any, Any]
    known_tokens: np.ndarray[Any, Any]
    prefix_tokens: int

    @property
    def tokens_per_hash(self) -> int:
        """The length of the shared prefix, so that exactly it is shared."""
        return self.prefix_tokens or PREFIX_HASH_TOKENS

    def __len__(self) -> int:
        return len(self.conversation)

    def of(self, row: int) -> Sequence[int]:
        """Return the hashes of one request."""
        shared = [int(self.prefix[row])] if self.prefix_tokens else []
        conversation = int(self.conversation[row])
        if not conversation:
            return shared
        hashes = -(-int(self.known_tokens[row]) // self.tokens_per_hash)
        first = conversation * _HASHES_OF_A_CONVERSATION
        own = range(first + len(shared), first + hashes)
        return [*shared, *own] if shared else own

    def rows(self, index: np.ndarray[Any, Any]) -> ConversationHashes:
        """Return those of some of the requests."""
        return ConversationHashes(
            prefix=self.prefix[index],
            conversation=self.conversation[index],
            known_tokens=self.known_tokens[index],
            prefix_tokens=self.prefix_tokens,
        )
