"""A scheduler with one rule broken on purpose fails a corner case: no rule is there that nothing would miss."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corner_cases import CORNER_CASES, expanded, notation, recorded

from maveriq.engine import replay_scenario

Replay = Callable[[dict[str, Any], str], list[dict[str, Any]]]

MUTANTS = {
    "the first one is preempted": ("vllm", "return self.running[-1]", "return self.running[0]"),
    "priority: the least important is spared": ("vllm", "return max(self.running, key", "return min(self.running, key"),
    "preempted requests queue up": ("vllm", "self.waiting.put_back(victim)", "self.waiting.add(victim)"),
    "who preempts itself lets others go on": (
        "vllm",
        "                    if victim is sequence:\n                        return",
        "                    if victim is sequence:\n                        tokens = 0\n                        break",
    ),
    "generated tokens are lost": ("vllm", "victim.preempt()", "victim.preempt(); victim.length = victim.prompt_tokens"),
    "the last token in flight is scheduled again": (
        "vllm",
        "sequence.computed + 2 - pending >= sequence.limit",
        "False",
    ),
    "chunks of any length": ("vllm", "0 < threshold < tokens", "False"),
    "prompts are split although they may not be": ("vllm", "if not limits.enable_chunked_prefill", "if False"),
    "the budget holds no prompt that it cannot hold whole": (
        "vllm",
        "            tokens = budget\n",
        "            return None\n",
    ),
    "seats are not limited": ("vllm", " or len(self.running) >= limits.max_num_seqs", ""),
    "requests go beyond max_model_len": (
        "sequence",
        "self.limit = min(prompt + max_tokens, max_model_len)",
        "self.limit = prompt + max_tokens",
    ),
    "blocks are asked for the first chunk only": (
        "vllm",
        "if self._reserves else cached + tokens",
        "if False else cached + tokens",
    ),
    "blocks are asked for whole prompts by all versions": (
        "vllm",
        "self._reserves = rules.reserve_full_prompt and",
        "self._reserves =",
    ),
    "a middle chunk emits": ("vllm", "emits = computed >= sequence.length + sequence.pending", "emits = True"),
    "asynchronous: no token is awaited": ("vllm", "pending = sequence.pending = sequence.pending + 1", "pass"),
    "blocks are found after their step only": (
        "vllm",
        "self._register(sequence, min(sequence.computed + tokens, sequence.length))",
        "self._register(sequence, min(sequence.computed, sequence.length))",
    ),
    "a whole prompt may come from the cache": ("kv_blocks", "[: (sequence.length - 1) // self.block_size]", ""),
    "cached blocks that are free cost nothing": (
        "kv_blocks",
        " + self.unused(found) <= self.free_blocks",
        " <= self.free_blocks",
    ),
    "the first block is freed first": ("kv_blocks", "in reversed(shared)", "in shared"),
    "the tail of the queue is reused first": (
        "kv_blocks",
        "next(iter(queue.items()))",
        "next(reversed(queue.items()))",
    ),
    "generated tokens are not cached": ("requests", "return len(request.token_ids)", "return request.prompt_tokens"),
    "requests that end keep their blocks": ("vllm", "        self.pool.release(sequence)\n        seq", "        seq"),
    "the null block is used": ("replay", 'config["num_blocks"] - 1', 'config["num_blocks"]'),
    "the end of the last request calls for no step": ("vllm", "or self._has_news", ""),
    "a victim's tokens are lost to the step": ("vllm", "self._budget += scheduled.pop", "scheduled.pop"),
}

# Only the recorded random scenarios miss these.
RARE_MUTANTS = {
    "requests are admitted beside a preemption": ("vllm", "if self.waiting and not step.preempted", "if self.waiting"),
    "the pass does not step back": ("vllm", "return int(victim in scheduled)", "return 0"),
}


def mutant(name: str, old: str, new: str) -> types.ModuleType:
    """Return a module of maveriq.engine with one text replaced."""
    original = importlib.import_module(f"maveriq.engine.{name}")
    assert original.__file__ is not None
    source = Path(original.__file__).read_text("utf-8")
    assert source.count(old) == 1, f"{source.count(old)} times in {name}: {old}"
    module = types.ModuleType(original.__name__)
    module.__dict__.update(__name__=original.__name__)
    exec(compile(source.replace(old, new), original.__file__, "exec"), module.__dict__)  # noqa: S102
    return module


def wrong_cases(replayed: Replay) -> list[str]:
    wrong = []
    for version in ("0.15.1", "0.23.0"):
        for name, case in CORNER_CASES.items():
            calls = case.calls_of_0_23 if version == "0.23.0" and case.calls_of_0_23 else case.calls
            try:
                if notation(replayed(case.scenario(), version)) != expanded(calls):
                    wrong.append(name)
            except Exception as error:
                wrong.append(f"{name}: {error!r}")
    return wrong


def test_the_rules_as_they_are_pass() -> None:
    assert not wrong_cases(replay_scenario)


@pytest.mark.parametrize("broken", MUTANTS)
def test_a_broken_rule_fails_a_corner_case(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_cases(broken_replay(*MUTANTS[broken], monkeypatch))


@pytest.mark.data
@pytest.mark.heavy
@pytest.mark.parametrize("broken", RARE_MUTANTS)
def test_a_broken_rule_fails_a_recorded_scenario(
    broken: str, monkeypatch: pytest.MonkeyPatch, measured_data: Path
) -> None:
    replayed = broken_replay(*RARE_MUTANTS[broken], monkeypatch)
    scenarios = recorded(measured_data, "vllm_random.json.gz").values()
    assert any(replayed(scenario, "0.15.1") != scenario["steps"]["0.15.1"] for scenario in scenarios)


def broken_replay(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """Return `replay_scenario` with one text of a module replaced."""
    module = mutant(name, old, new)
    if name == "replay":
        return module.replay_scenario
    for user in ("replay", "vllm", "kv_blocks"):
        used = importlib.import_module(f"maveriq.engine.{user}")
        for attribute, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and hasattr(used, attribute):
                monkeypatch.setattr(used, attribute, value)
    return replay_scenario
