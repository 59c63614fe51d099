"""Replays scenarios that were recorded from vLLM's own scheduler classes, call by call (docs/engine-models.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from maveriq.domain.engine_defaults import vllm_rules
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.requests import EngineRequest
from maveriq.engine.sequence import Sequence
from maveriq.engine.vllm import SchedulerLimits, VllmScheduler
from maveriq.errors import InputError

_DEFAULT_ITERATIONS = 1000


def replay_scenario(scenario: Mapping[str, Any], version: str) -> list[dict[str, Any]]:
    """Return what vLLM's scheduler does with a scenario, a record for each call of `schedule`.

    Args:
        scenario: its `config` holds `block_size, num_blocks, max_num_seqs, max_num_batched_tokens, max_model_len`, and
            may hold `policy, prefix_caching, long_prefill_token_threshold, chunked, mode` ("sync" or "async"), `pp` and
            `reserve_full_isl`. Its `requests` hold `id, prompt` (token IDs), `max_tokens`, and may hold `priority` and
            `at`: the iteration of the engine's loop before which the request is there, and `output`: the token IDs that
            it generates. `aborts` holds IDs by iteration; `max_iters` ends the loop, which is that of vLLM 0.15.1 for
            all versions.
        version: of vLLM.

    Returns:
        For each call its number `step`; the `batch` in order, as `[id, tokens, tokens computed before]`; the IDs that
        were `preempted`, sorted; `running` and `waiting` in order, and the number of `free` blocks, after it; what the
        batch emits once it is computed, as `[id, tokens, finish reason or None]`; and the number of blocks that are
        free then, `free_after`.

    Raises:
        InputError: a key is missing, or the version is not modelled.
    """
    try:
        return _Replay(scenario, version).run()
    except KeyError as error:
        raise InputError(f"scenario: {error.args[0]!r} is missing") from None


class _Replay:
    """One replay (mutable)."""

    def __init__(self, scenario: Mapping[str, Any], version: str) -> None:
        config = scenario["config"]
        limits = SchedulerLimits(
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            max_model_len=config["max_model_len"],
            long_prefill_token_threshold=config.get("long_prefill_token_threshold", 0),
            enable_chunked_prefill=config.get("chunked", True),
            scheduler_reserve_full_isl=config.get("reserve_full_isl", True),
            by_priority=config.get("policy", "fcfs") == "priority",
            async_scheduling=config.get("mode", "sync") == "async",
            pipeline_parallel_size=config.get("pp", 1),
        )
        rules = vllm_rules(version)
        self._pool = KVBlockPool(
            config["num_blocks"] - 1,  # one is the null block
            config["block_size"],
            prefix_caching=config.get("prefix_caching", True),
            reuse_unhashed_first=rules.reuse_unhashed_first,
        )
        self._scheduler = VllmScheduler(limits, rules, self._pool, counts_together=False)
        self._arrivals = deque(sorted(scenario["requests"], key=_iteration_of))
        self._aborts = scenario.get("aborts", {})
        self._iterations = scenario.get("max_iters", _DEFAULT_ITERATIONS)
        self._records: list[dict[str, Any]] = []
        self._updated = 0  # the first record whose batch has not been computed

    def run(self) -> list[dict[str, Any]]:
        scheduler = self._scheduler
        for iteration in range(self._iterations):
            self._take_messages(iteration)
            if scheduler.has_requests:
                step = scheduler.schedule()
                self._record([[_id(entry.sequence), entry.tokens, entry.past] for entry in step.scheduled])
                if not step.is_empty and len(scheduler.in_flight) < scheduler.limits.steps_in_flight:
                    continue
            if scheduler.in_flight:
                self._update()
            elif not self._arrivals:
                break
        return self._records

    def _take_messages(self, iteration: int) -> None:
        while self._arrivals and _iteration_of(self._arrivals[0]) <= iteration:
            self._scheduler.submit(_request(self._arrivals.popleft()))
        for request_id in self._aborts.get(str(iteration), ()):
            self._scheduler.abort(request_id)

    def _record(self, batch: list[list[Any]]) -> None:
        scheduler = self._scheduler
        self._records.append(
            {
                "step": len(self._records),
                "batch": batch,
                "preempted": sorted(_id(sequence) for sequence in scheduler.in_flight[-1].preempted),
                "running": [_id(sequence) for sequence in scheduler.running],
                "waiting": [_id(sequence) for sequence in scheduler.waiting.in_order()],
                "free": self._pool.free_blocks,
                "emit": [],
                "free_after": self._pool.free_blocks,
            }
        )

    def _update(self) -> None:
        record = self._records[self._updated]
        record["emit"] = [[token.request_id, 1, token.finish_reason] for token in self._scheduler.update()]
        record["free_after"] = self._pool.free_blocks
        self._updated += 1


def _request(recorded: Mapping[str, Any]) -> EngineRequest:
    request_id, prompt, max_tokens = recorded["id"], recorded["prompt"], recorded["max_tokens"]
    # Without a model, the recorder generated these.
    first_output = 900_000 + 1000 * sum(map(ord, request_id))
    return EngineRequest(
        request_id=request_id,
        prompt_tokens=len(prompt),
        output_tokens=max_tokens,
        priority=recorded.get("priority", 0),
        token_ids=[*prompt, *recorded.get("output", range(first_output, first_output + max_tokens))],
    )


def _iteration_of(recorded: Mapping[str, Any]) -> int:
    return int(recorded.get("at", 0))


def _id(sequence: Sequence) -> str:
    return str(sequence.request.request_id)
