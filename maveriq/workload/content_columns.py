"""Columns that say what requests have in common: equal prompts, sessions, think times, prefix hashes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maveriq.csv_columns import MAX_LIST_CHARACTERS, Batch, check_whole, floats, whole_numbers
from maveriq.domain.requests import PREFIX_HASH_TOKENS
from maveriq.errors import InputError
from maveriq.tables import Row
from maveriq.workload.prefixes import ListedHashes

PROMPT, SESSION, THINK, HASHES, HASH_TOKENS, PARENT = (
    "prompt_id", "session_id", "think", "prefix_hashes", "prefix_hash_tokens", "parent",
)  # fmt: skip
"""What a column may mean. `PARENT` is the request, by its `SESSION`, that a request is the next turn of."""

MAX_HASHES = 50_000_000
"""Prefix hashes of a whole file; they would take 400 MB."""

_MAX_THINK_US = 10**15
_MAX_HASH_TOKENS = 10_000_000
_NOT_HASHES = re.compile(r"[\[\]\"',;|]")
_LARGEST_OWN = 1 << 61
_NOTHING = ("", "null")


class Numbering:
    """Gives each text a number from 1, in the order in which they come; an empty one is 0 (mutable)."""

    def __init__(self) -> None:
        self._numbers = dict.fromkeys(_NOTHING, 0)

    def of(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return the numbers of texts (int64)."""
        numbers, before = self._numbers, len(_NOTHING) - 1
        return np.array([numbers.setdefault(text.strip(), len(numbers) - before) for text in texts], np.int64)


@dataclass(slots=True)
class _Chats:
    """Follows requests to the first one of their session, where each names the one before (mutable)."""

    sessions: dict[str, int] = field(default_factory=dict)

    def of(self, chats: Sequence[str], parents: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return the session of each request (int64); one without a known parent begins a session."""
        found = []
        for chat, parent in zip(chats, parents, strict=True):
            session = self.sessions.get(parent.strip(), 0) or len(self.sessions) + 1
            self.sessions[chat.strip()] = session
            found.append(session)
        return np.array(found, np.int64)


class ContentColumns:
    """Collects such columns batch by batch (mutable).

    Args:
        names: the columns of the file, by their meaning.
        think_unit_us: unit of think times.
        tokens_per_hash: tokens that a prefix hash stands for, unless the file says.
    """

    def __init__(
        self, names: Mapping[str, str], *, think_unit_us: int = 1_000_000, tokens_per_hash: int = PREFIX_HASH_TOKENS
    ) -> None:
        self._names = dict(names)
        self._think_unit_us = think_unit_us
        self._tokens_per_hash = tokens_per_hash
        self._prompts, self._sessions, self._chats = Numbering(), Numbering(), _Chats()
        self._texts: dict[str, int] = {}  # hashes that are no whole numbers
        self._hashes = 0
        self._hash_tokens: int | None = None
        self._parts: dict[str, list[np.ndarray[Any, Any]]] = {}

    def add(self, batch: Batch, tokens: np.ndarray[Any, Any]) -> None:
        """Take the columns of a batch.

        Args:
            batch: the batch.
            tokens: prompt and output tokens of each request; hashes for more than these are not kept.

        Raises:
            ValueError: a cell is not what it should be; nothing is taken then.
        """
        columns = {meaning: batch.columns[name] for meaning, name in self._names.items()}
        found: dict[str, np.ndarray[Any, Any]] = {}
        if THINK in columns:
            think_us = floats(columns[THINK]) * self._think_unit_us
            if not ((think_us >= 0) & (think_us <= _MAX_THINK_US)).all():
                raise ValueError(f"{self._names[THINK]} is out of range")
            found[THINK] = np.rint(think_us).astype(np.int64)
        if HASH_TOKENS in columns:
            name = self._names[HASH_TOKENS]
            steps = whole_numbers(columns[HASH_TOKENS], name, minimum=1, maximum=_MAX_HASH_TOKENS)
            if (steps != (self._hash_tokens or steps[0])).any():
                raise ValueError(f"{name} must be the same in all rows")
            self._hash_tokens = int(steps[0])
        if HASHES in columns:
            step = self._hash_tokens or self._tokens_per_hash
            found[HASHES], found["counts"] = self._hash_lists(columns[HASHES], (-(-tokens // step) + 1).tolist())
        if PROMPT in columns:
            found[PROMPT] = self._prompts.of(columns[PROMPT])
        if PARENT in columns:
            found[SESSION] = self._chats.of(columns[SESSION], columns[PARENT])
        elif SESSION in columns:
            found[SESSION] = self._sessions.of(columns[SESSION])
        for meaning, column in found.items():
            self._parts.setdefault(meaning, []).append(column)

    def check_row(self, row: Row) -> None:
        """Check the cells of one row.

        Raises:
            InputError: a cell is not what it should be.
        """
        names = self._names
        if THINK in names:
            row.number(names[THINK], minimum=0, maximum=_MAX_THINK_US / self._think_unit_us)
        if HASHES in names and len(row.cells[names[HASHES]]) > MAX_LIST_CHARACTERS:
            raise InputError(f"{row.where}: {names[HASHES]} is longer than {MAX_LIST_CHARACTERS:,} characters")
        if HASH_TOKENS in names:
            check_whole(row, names[HASH_TOKENS], minimum=1, maximum=_MAX_HASH_TOKENS)
            tokens = int(row.number(names[HASH_TOKENS]))
            if self._hash_tokens is None:
                self._hash_tokens = tokens
            if tokens != self._hash_tokens:
                raise InputError(
                    f"{row.where}: {names[HASH_TOKENS]} must be the same in all rows: {self._hash_tokens}, not {tokens}"
                )

    def _hash_lists(
        self, cells: Sequence[str], needed: Sequence[int]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the first hashes of all cells, as many as are needed of each, and how many each has.

        Raises:
            ValueError: a list was cut before that.
        """
        hashes: list[int] = []
        counts = []
        for cell, most in zip(cells, needed, strict=True):
            texts = [] if cell in _NOTHING else _NOT_HASHES.sub(" ", cell).split(None, most)[:most]
            if len(cell) > MAX_LIST_CHARACTERS and len(texts) < most:
                raise ValueError(f"{self._names[HASHES]} is longer than {MAX_LIST_CHARACTERS:,} characters")
            counts.append(len(texts))
            hashes += map(self._hash, texts)
        self._hashes += len(hashes)
        if self._hashes > MAX_HASHES:
            raise InputError(f"more than {MAX_HASHES:,} prefix hashes; take a part of the file")
        return np.array(hashes, np.int64), np.array(counts, np.int64)

    def _hash(self, text: str) -> int:
        """Return a hash as a number: itself if it is a whole number, else one that stands for it."""
        digits = text.removeprefix("-")
        if digits.isascii() and digits.isdigit() and len(digits) < 20 and int(digits) < _LARGEST_OWN:
            return int(text)
        return -_LARGEST_OWN - self._texts.setdefault(text, len(self._texts))

    def column(self, meaning: str) -> np.ndarray[Any, Any] | None:
        """Return a whole column (int64), None if the file has none of this meaning."""
        parts = self._parts.get(meaning)
        return None if parts is None else np.concatenate(parts)

    def prefix_hashes(self) -> ListedHashes | None:
        """Return the prefix hashes of the file, None if it has none."""
        hashes, counts = self.column(HASHES), self.column("counts")
        if hashes is None or counts is None:
            return None
        return ListedHashes.counted(hashes, counts, self._hash_tokens or self._tokens_per_hash)
