"""The paged KV cache: a pool of blocks with reference counts, and a prefix cache over blocks that no request uses.

The rules are those of vLLM V1 (`vllm/v1/core/block_pool.py`, `single_type_kv_cache_manager.py`; SCHEDULERS 1.3, 1.4):
free blocks form a queue, allocation takes them from its head and forgets what they held, and a sequence that ends
appends its blocks to the tail, its last block first.

Only blocks whose content another sequence may have are objects here. All others are counted: runs of them in the
queue are one entry, and where no shareable block is free the whole queue is one number. Which sequence gets which of
the blocks at the head does not matter, only how many are taken.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from itertools import count

from maveriq.engine.requests import BlockKey, block_keys
from maveriq.engine.sequence import Sequence


class KVBlockPool:
    """The KV blocks of one engine (mutable).

    Args:
        blocks: blocks that sequences may hold.
        block_size: tokens of a block.
        prefix_caching: whether blocks are found again by their content.
        reuse_unhashed_first: whether freed blocks that are not full go to the head of the queue, not to its tail.
    """

    __slots__ = (
        "_by_key", "_ids", "_key", "_queue", "_tail_run", "_users", "block_size", "blocks", "free_blocks",
        "prefix_caching", "reuse_unhashed_first", "shared_free_blocks",
    )  # fmt: skip

    def __init__(
        self, blocks: int, block_size: int, *, prefix_caching: bool, reuse_unhashed_first: bool = False
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.reuse_unhashed_first = reuse_unhashed_first
        self.free_blocks = blocks
        self.shared_free_blocks = 0
        # Free blocks from head to tail while shareable ones are among them: an identifier of one of these, with 1, or
        # a negative number of a run of others, with their count.
        self._queue: OrderedDict[int, int] = OrderedDict()
        self._tail_run = 0  # the run at the tail; 0 if a shareable block is there
        self._ids = count(1)
        self._users: dict[int, int] = {}
        self._key: dict[int, BlockKey] = {}
        # Several blocks may hold the same; the one that was registered first is found.
        self._by_key: dict[BlockKey, dict[int, None]] = {}

    @property
    def tokens(self) -> int:
        """Tokens that it holds."""
        return self.blocks * self.block_size

    @property
    def used_tokens(self) -> int:
        """Tokens of the blocks that sequences hold, full or not."""
        return (self.blocks - self.free_blocks) * self.block_size

    def keys_of(self, sequence: Sequence) -> list[BlockKey]:
        """Return the keys of a sequence's shareable blocks, computed on the first call."""
        keys = sequence.keys
        if keys is None:
            shareable = self.prefix_caching and sequence.request.is_shareable
            keys = sequence.keys = block_keys(sequence.request, self.block_size) if shareable else []
        return keys

    def find(self, sequence: Sequence) -> list[int]:
        """Return the blocks that hold the beginning of a sequence.

        These are whole blocks, and at least one token is left to compute (`KVCacheManager.get_computed_blocks`).
        """
        by_key = self._by_key
        if not by_key:
            return []
        found: list[int] = []
        for key in self.keys_of(sequence)[: (sequence.length - 1) // self.block_size]:
            same = by_key.get(key)
            if same is None:
                break
            found.append(next(iter(same)))
        return found

    def unused(self, found: Items[int]) -> int:
        """Return how many of some blocks are free; a free one that is shared is free no longer."""
        users = self._users
        return sum(1 for block in found if not users[block])

    def can_hold(self, tokens: int, found: Items[int] = ()) -> bool:
        """Return whether a sequence without blocks, which shares `found`, can get those for its first `tokens`."""
        if not found:
            return -(-tokens // self.block_size) <= self.free_blocks
        return max(0, -(-tokens // self.block_size) - len(found)) + self.unused(found) <= self.free_blocks

    def allocate(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence the blocks for its first `tokens` tokens; nothing changes if there are too few.

        Args:
            sequence: the sequence.
            tokens: computed tokens after the step.

        Returns:
            Whether there were enough.
        """
        new = -(-tokens // self.block_size) - sequence.blocks
        if new > self.free_blocks:
            return False
        if new > 0:
            self.take(new)
            sequence.blocks += new
        return True

    def register(self, sequence: Sequence, tokens: int) -> None:
        """Make the full blocks within a sequence's first `tokens` tokens findable.

        `tokens` is limited to those that are known; blocks become findable when a step is scheduled, before it runs.
        """
        if not self.prefix_caching:
            return
        sequence.registered = tokens
        keys = sequence.keys if sequence.keys is not None else self.keys_of(sequence)
        if not keys:
            return
        shared = sequence.shared_blocks
        for index in range(len(shared), min(tokens // self.block_size, len(keys))):
            block = next(self._ids)
            key = keys[index]
            self._users[block] = 1
            self._key[block] = key
            self._by_key.setdefault(key, {})[block] = None
            shared.append(block)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence, its last one first; their content can be found until they are reused."""
        shared = sequence.shared_blocks
        others = sequence.blocks - len(shared)
        if others and self.reuse_unhashed_first:
            unhashed = min(others, sequence.blocks - sequence.registered // self.block_size)
            self._put_first(unhashed)
            others -= unhashed
        if others:
            self._append_run(others)
        if shared:
            users = self._users
            for block in reversed(shared):
                users[block] -= 1
                if not users[block]:
                    self._append_shared(block)
            sequence.shared_blocks = []
        sequence.blocks = 0

    def register_own(self, sequence: Sequence) -> None:
        """Register also the blocks that only the sequence itself can find, before it is preempted."""
        if not self.prefix_caching:
            return
        keys = self.keys_of(sequence)
        mark, blocks = next(self._ids), sequence.limit // self.block_size
        keys.extend((None, mark, index) for index in range(len(keys), blocks))  # no other key has three parts
        self.register(sequence, sequence.registered)

    def share(self, sequence: Sequence, found: Items[int]) -> None:
        """Give a sequence without blocks those of `find`."""
        users = self._users
        for block in found:
            if not users[block]:
                del self._queue[block]
                self.free_blocks -= 1
                self.shared_free_blocks -= 1
            users[block] += 1
        sequence.shared_blocks.extend(found)
        sequence.blocks += len(found)

    def take(self, number: int) -> None:
        """Take blocks from the head of the queue; what they held is forgotten."""
        self.free_blocks -= number
        if not self.shared_free_blocks:
            return
        queue = self._queue
        while number:
            entry, size = next(iter(queue.items()))
            if entry < 0 and size > number:
                queue[entry] = size - number
                return
            del queue[entry]
            number -= size
            if entry > 0:
                self._forget(entry)
                if not self.shared_free_blocks:
                    return
            elif entry == self._tail_run:
                self._tail_run = 0

    def _forget(self, block: int) -> None:
        self.shared_free_blocks -= 1
        del self._users[block]
        key = self._key.pop(block)
        same = self._by_key[key]
        del same[block]
        if not same:
            del self._by_key[key]

    def _append_run(self, number: int) -> None:
        self.free_blocks += number
        if not self.shared_free_blocks:
            return
        run = self._tail_run
        if run:
            self._queue[run] += number
        else:
            run = self._tail_run = -next(self._ids)
            self._queue[run] = number

    def _put_first(self, number: int) -> None:
        self.free_blocks += number
        if number and self.shared_free_blocks:
            run = -next(self._ids)
            self._queue[run] = number
            self._queue.move_to_end(run, last=False)

    def _append_shared(self, block: int) -> None:
        if not self.shared_free_blocks:
            self._queue.clear()
            if self.free_blocks:
                self._queue[-next(self._ids)] = self.free_blocks
        self._queue[block] = 1
        self._tail_run = 0
        self.free_blocks += 1
        self.shared_free_blocks += 1

    def users(self) -> dict[int, int]:
        """Return how many sequences hold each shareable block."""
        return dict(self._users)
