"""Corner cases of vLLM's scheduler, as its classes of 0.15.1 and 0.23.0 were observed to handle them.

A sequence is written so: `A8@0` A computes 8 tokens, with 0 computed before; `!B` B is preempted; `>A,B.` A and B
emit a token, B its last; `-` nothing; `;` the next call. `A1@4..7 >A each` stands for four calls. Empty calls at the
end are left out.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULTS = {
    "block_size": 4, "num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 8, "max_model_len": 64,
}  # fmt: skip


@dataclass(frozen=True)
class CornerCase:
    """`requests` holds (name, prompt tokens or how many, max_tokens, at, priority); the last two may be left out."""

    requests: tuple[tuple[Any, ...], ...]
    calls: str
    config: dict[str, Any] = field(default_factory=dict)
    aborts: dict[str, list[str]] = field(default_factory=dict)
    calls_of_0_23: str | None = None

    def scenario(self) -> dict[str, Any]:
        requests = []
        for name, prompt, max_tokens, *others in self.requests:
            at, priority = [*others, *(0, 0)[len(others) :]]
            tokens = distinct(name, prompt) if isinstance(prompt, int) else prompt
            requests.append({"id": name, "prompt": tokens, "max_tokens": max_tokens, "at": at, "priority": priority})
        config = DEFAULTS | self.config
        return {"config": config, "requests": requests, "aborts": self.aborts, "max_iters": 60}


def distinct(name: str, tokens: int) -> list[int]:
    return [1000 * ord(name) + index for index in range(tokens)]


def outputs(name: str, tokens: int) -> list[int]:
    """Return the first tokens that a request generates in a replay."""
    return [900_000 + 1000 * ord(name) + index for index in range(tokens)]


def notation(calls: list[dict[str, Any]]) -> str:
    """Return calls as they are written here."""
    texts = []
    for call in calls:
        parts = [f"{name}{tokens}@{past}" for name, tokens, past in call["batch"]]
        if call["preempted"]:
            parts.append("!" + ",".join(call["preempted"]))
        if call["emit"]:
            parts.append(">" + ",".join(f"{name}{'.' if reason else ''}" for name, _, reason in call["emit"]))
        texts.append(" ".join(parts) or "-")
    while texts and texts[-1] == "-":
        texts.pop()
    return "; ".join(texts)


def expanded(calls: str) -> str:
    """Return a sequence without abbreviations."""
    texts = []
    for call in calls.split("; "):
        ranges = re.findall(r"@(\d+)\.\.(\d+)", call)
        times = int(ranges[0][1]) - int(ranges[0][0]) + 1 if ranges else 1
        texts += [
            re.sub(r"@(\d+)(\.\.\d+)?", lambda m, step=step: f"@{int(m[1]) + step}", call).removesuffix(" each")
            for step in range(times)
        ]
    return "; ".join(texts)


def recorded(folder: Path, file: str) -> dict[str, Any]:
    """Return recorded scenarios by name."""
    with gzip.open(folder / "schedulers" / file, "rt", encoding="utf-8") as text:
        return json.load(text)


WIDE = {"max_num_batched_tokens": 32}
ASYNC = {"mode": "async"}

CORNER_CASES = {
    "a chunk, then chunk and prompt": CornerCase(
        (("A", 10, 3), ("B", 3, 2)), "A8@0; A2@8 B3@0 >A,B; A1@10 B1@3 >A,B.; A1@11 >A."
    ),
    "max_model_len ends a request": CornerCase((("A", 5, 20),), "A5@0 >A; A1@5 >A; A1@6 >A.", {"max_model_len": 8}),
    "a whole prompt is cached": CornerCase(
        (("A", distinct("A", 8), 1), ("B", distinct("A", 8), 1, 2)),
        "A8@0 >A.; -; B4@4 >B.",
        {"max_num_batched_tokens": 16},
    ),
    "a hit in the same step": CornerCase(
        (("A", distinct("A", 9), 1), ("B", distinct("A", 9), 1)), "A9@0 B1@8 >A.,B.", WIDE
    ),
    "generated tokens are cached": CornerCase(
        (("A", 6, 7), ("B", [*distinct("A", 6), *outputs("A", 6), 7], 1, 9)),
        "A6@0 >A; A1@6..10 >A each; A1@11 >A.; -; B1@12 >B.",
        WIDE,
    ),
    "the head of the queue blocks": CornerCase(
        (("A", 16, 8), ("B", 20, 1), ("C", 2, 1)),
        "A16@0 >A; A1@16..21 >A each; A1@22 >A.; B20@0 C2@0 >B.,C.",
        WIDE | {"num_blocks": 8},
    ),
    "the last one is preempted": CornerCase(
        (("A", 7, 6), ("B", 7, 6)),
        "A7@0 B7@0 >A,B; A1@7 B1@7 >A,B; A1@8 !B >A; A1@9..10 >A each; A1@11 >A.; B5@4 >B; B1@9..10 >B each; B1@11 >B.",
        WIDE | {"num_blocks": 5},
    ),
    "nobody is admitted beside a preemption": CornerCase(
        (("A", 7, 4), ("B", 7, 4), ("C", 1, 1, 2)),
        "A7@0 B7@0 >A,B; A1@7 B1@7 >A,B; A1@8 !B >A; A1@9 >A.; B5@4 C1@0 >B,C.; B1@9 >B.",
        WIDE | {"num_blocks": 5},
    ),
    "the threshold of long prompts": CornerCase(
        (("A", 10, 2), ("B", 3, 2)),
        "A4@0 B3@0 >B; A4@4 B1@3 >B.; A2@8 >A; A1@10 >A.",
        {"max_num_batched_tokens": 16, "long_prefill_token_threshold": 4},
    ),
    "without chunks the head blocks": CornerCase(
        (("A", 6, 2), ("B", 7, 1), ("C", 1, 1)),
        "A6@0 >A; A1@6 B7@0 >A.,B.; C1@0 >C.",
        {"max_model_len": 8, "chunked": False},
    ),
    "a running request is aborted": CornerCase(
        (("A", 4, 9), ("B", 4, 3)), "A4@0 B4@0 >A,B; A1@4 B1@4 >A,B; B1@5 >B.", aborts={"2": ["A"]}
    ),
    "blocks for the whole prompt": CornerCase(
        (("A", 8, 4), ("B", 20, 1)),
        "A8@0 B4@0 >A; A1@8 !B >A; A1@9 >A; A1@10 >A.; B12@4; B4@16 >B.",
        {"num_blocks": 7, "max_num_batched_tokens": 12},
        calls_of_0_23="A8@0 >A; A1@8..9 >A each; A1@10 >A.; B12@0; B8@12 >B.",
    ),
    "asynchronous: the last token is not scheduled again": CornerCase(
        (("A", 4, 3), ("B", 2, 2)), "A4@0 B2@0 >A,B; A1@4 B1@2 >A,B.; A1@5 >A.", ASYNC
    ),
    "asynchronous: a preemption": CornerCase(
        (("A", 7, 5), ("B", 7, 5)),
        "A7@0 B7@0 >A,B; A1@7 B1@7 >A,B; A1@8 !B >A; A1@9 >A; A1@10 >A.; -; B5@4 >B; B1@9 >B; B1@10 >B.",
        WIDE | ASYNC | {"num_blocks": 5},
    ),
    "two stages: two batches": CornerCase(
        (("A", 12, 2), ("B", 4, 3)),
        "A8@0; A4@8 B4@0 >A,B; -; A1@12 B1@4 >A.,B; -; B1@5 >B.",
        {"pp": 2},
    ),
    "the least recently freed block goes first": CornerCase(
        (
            ("A", distinct("A", 8), 1),
            ("B", distinct("B", 8), 1, 1),
            ("C", distinct("C", 8), 1, 2),
            ("D", distinct("A", 9), 1, 3),
            ("E", distinct("B", 9), 1, 4),
        ),
        "A8@0 >A.; B8@0 >B.; C8@0 >C.; D5@4 >D.; E9@0 >E.",
        WIDE | {"num_blocks": 6},
    ),
    "priority: a request preempts itself": CornerCase(
        (("A", 6, 6, 0, 5), ("B", 7, 4, 1, 0)),
        "A6@0 >A; A1@6 B7@0 >A,B; A1@7 B1@7 >A,B; !A; B1@8 >B; B1@9 >B.; A5@4 >A; A1@9 >A; A1@10 >A.",
        WIDE | {"num_blocks": 5, "policy": "priority"},
    ),
    "priority: a victim leaves the batch": CornerCase(
        (("A", 5, 4, 0, 5), ("B", 8, 3, 1, 0)),
        "A5@0 >A; A1@5 B8@0 >A,B; B1@8 !A >B; B1@9 >B.; A3@4 >A; A1@7 >A.",
        WIDE | {"num_blocks": 5, "policy": "priority"},
    ),
    # By the rule, not observed: the seventh token of A is the one that C's leaving returns to the budget.
    "priority: a victim's tokens go to those behind it": CornerCase(
        (("A", 50, 7, 7, 0), ("B", 4, 11, 5, 0), ("C", 30, 12, 1, 2)),
        "C8@0; C8@8; C8@16; C6@24 >C; C1@30 B4@0 >C,B; C1@31 B1@4 >C,B; C1@32 B1@5 A6@0 >C,B; "
        "C1@33 B1@6 A6@6 >C,B; C1@34 B1@7 A6@12 >C,B; C1@35 B1@8 A6@18 >C,B; C1@36 B1@9 A6@24 >C,B; "
        "C1@37 B1@10 A6@30 >C,B; C1@38 B1@11 A6@36 >C,B; B1@12 A7@42 !C >B; B1@13 A1@49 C6@0 >B.,A; "
        "A1@50 C7@6 >A; A1@51 C7@13 >A; A1@52 C7@20 >A; A1@53 C7@27 >A; A1@54 C6@34 >A,C; A1@55 !C >A.; "
        "C8@0; C8@8; C8@16; C8@24; C8@32; C1@40 >C.",
        {"num_blocks": 25, "policy": "priority", "prefix_caching": False},
        calls_of_0_23="C8@0; C8@8; C8@16; C6@24 >C; C1@30 B4@0 >C,B; C1@31 B1@4 >C,B; C1@32 B1@5 A6@0 >C,B; "
        "C1@33 B1@6 A6@6 >C,B; C1@34 B1@7 A6@12 >C,B; C1@35 B1@8 A6@18 >C,B; C1@36 B1@9 A6@24 >C,B; "
        "C1@37 B1@10 A6@30 >C,B; C1@38 B1@11 A6@36 >C,B; B1@12 A7@42 !C >B; B1@13 A1@49 >B.,A; A1@50 C7@0 >A; "
        "A1@51 C7@7 >A; A1@52 C7@14 >A; A1@53 C7@21 >A; A1@54 C7@28 >A; A1@55 C5@35 >A.,C; C1@40 >C.",
    ),
    "two stages: one request": CornerCase((("A", 4, 3),), "A4@0 >A; -; A1@4 >A; -; A1@5 >A.", {"pp": 2}),
    "two stages: chunks follow each other": CornerCase(
        (("A", 20, 2),), "A8@0; A8@8; A4@16 >A; -; A1@20 >A.", {"pp": 2}
    ),
    "asynchronous: an abort in flight": CornerCase((("A", 4, 9),), "A4@0 >A; A1@4", ASYNC, {"2": ["A"]}),
    "a hit takes a free block": CornerCase(
        (("A", distinct("A", 8), 1), ("B", 9, 3, 1), ("C", distinct("A", 9), 1, 2)),
        "A8@0 >A.; B9@0 >B; B1@9 >B; B1@10 >B.; C1@8 >C.",
        WIDE | {"num_blocks": 6},
    ),
    "asynchronous: a seat is free one step later": CornerCase(
        (("A", 4, 2), ("B", 4, 1)), "A4@0 >A; A1@4 >A.; -; B4@0 >B.", ASYNC | {"max_num_seqs": 1}
    ),
    "synchronous: a seat is free in the next step": CornerCase(
        (("A", 4, 2), ("B", 4, 1)), "A4@0 >A; A1@4 >A.; B4@0 >B.", {"max_num_seqs": 1}
    ),
    "two victims keep their order": CornerCase(
        (("A", 15, 4), ("B", 3, 6), ("C", 3, 6)),
        "A15@0 B3@0 C3@0 >A,B,C; A1@15 B1@3 C1@3 >A,B,C; A1@16 !B,C >A; A1@17 >A.; B5@0 C5@0 >B,C; "
        "B1@5..6 C1@5..6 >B,C each; B1@7 C1@7 >B.,C.",
        WIDE | {"num_blocks": 7, "prefix_caching": False},
    ),
}
