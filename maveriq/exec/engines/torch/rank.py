"""What a rank does: load its part, then run what it is told.

The process of one rank: `python -m maveriq.exec.engines.torch.rank FD`, where FD is its end of a socket.

It lives as long as the other end is open. A thread of its own waits on the socket, so that the process ends at once
with its engine even while it computes or waits for another rank.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.collectives import Collectives, DistributedRanks, SingleRank
from maveriq.exec.engines.torch.config import DecoderConfig, rank_slice, read_decoder_config
from maveriq.exec.engines.torch.messages import (
    TO_RANK,
    FromRank,
    LoadRank,
    RankFailed,
    RankLoaded,
    Run,
    Stepped,
    ToRank,
    receive,
    send,
)
from maveriq.exec.engines.torch.model import Stage, decode
from maveriq.exec.engines.torch.weights import FolderSource, RandomSource, Source
from maveriq.exec.messages import EngineSpec, PromptSequence

_WARM_UP_TOKENS = 8
_NO_ROOM = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


class NoRoomError(EngineError):
    """Some rank has no room for an execution. All of them refuse it together, so that they can take the next one."""


class Worker:
    """One rank of a model, loaded and warm.

    Args:
        spec: the model and how it is split.
        rank: which part this is.
        links: to the other ranks.

    Raises:
        EngineError: weights cannot be had, or do not fit.
    """

    def __init__(self, spec: EngineSpec, rank: int, links: Collectives) -> None:
        arch = read_decoder_config(spec.config_json)
        device = torch.device(spec.devices[rank])
        dtype = _type_of_numbers(arch, device)
        self._links = links
        self.reports = rank == (spec.pp - 1) * spec.tp
        with torch.inference_mode(), memory_errors():
            if device.type == "cuda":
                _check_there(device)
                torch.cuda.set_device(device)  # else nccl and the allocator would open the first one too
            self._like = torch.empty(0, device=device, dtype=dtype)
            self.stage = Stage(arch, rank_slice(spec, rank), spec, _source(spec, arch, device, dtype), links)
        _give_back_unused(device)
        warm_up = PromptSequence(request_id=0, prompt=(0,) * _WARM_UP_TOKENS, output_tokens=2)
        for _ in self.run((warm_up,) * spec.batch_size):
            pass

    def run(self, prompts: tuple[PromptSequence, ...]) -> Iterator[tuple[list[int], bool]]:
        """Yield each step's tokens, and whether it is the last.

        Raises:
            NoRoomError: there is no room for the KV cache.
            EngineError: there is not memory enough for something else.
        """
        self._make_room(prompts)
        try:
            with memory_errors():
                yield from decode(self.stage, self._links, prompts, like=self._like)
        except EngineError:
            self._give_room_back()
            raise

    def _make_room(self, prompts: tuple[PromptSequence, ...]) -> None:
        short = self._missed_room(prompts)
        if short is not None:
            # Room is kept, and made for the largest batch and the longest sequence that were; this one may want less.
            self._give_room_back()
            short = self._missed_room(prompts)
        if not self._links.agree(well=short is None):
            # What others got of it would be missed by the next execution.
            self._give_room_back()
            if short is None:
                raise NoRoomError(FailureKind.ERROR, "another rank has no room")
            raise NoRoomError(short.kind, str(short))

    def _missed_room(self, prompts: tuple[PromptSequence, ...]) -> EngineError | None:
        try:
            with memory_errors():
                self.stage.make_room(len(prompts), max(len(each.prompt) + each.output_tokens for each in prompts))
        except EngineError as error:
            return error
        return None

    def _give_room_back(self) -> None:
        self.stage.give_room_back()
        _give_back_unused(self._like.device)


def links_of(spec: EngineSpec, rank: int, meeting_point: Path) -> Collectives:
    """Return a rank's links to the others, once all are there."""
    if len(spec.devices) == 1:
        return SingleRank()
    return DistributedRanks(rank_slice(spec, rank), rank, meeting_point=meeting_point, devices=spec.devices)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn what torch raises for want of memory into an `EngineError`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineError(FailureKind.OUT_OF_MEMORY, _first_line(error)) from None
    except RuntimeError as error:
        # Memory of a CPU, of a GPU's context, of nccl and of cuBLAS is missed in words only.
        if any(words in str(error) for words in _NO_ROOM):
            raise EngineError(FailureKind.OUT_OF_MEMORY, _first_line(error)) from None
        raise


def _give_back_unused(device: torch.device) -> None:
    """Let other processes have what torch keeps of a GPU for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_there(device: torch.device) -> None:
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= seen:
        raise EngineError(
            FailureKind.UNSUPPORTED, f"there is no {device} here: torch {torch.__version__} sees {seen} GPUs"
        )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _type_of_numbers(arch: DecoderConfig, device: torch.device) -> torch.dtype:
    """Return the type of what is not quantised: 16 bits on a GPU, 32 on a CPU, where 16 are slower."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if arch.bfloat16 else torch.float16


def _source(spec: EngineSpec, arch: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Source:
    if spec.weights_folder:
        return FolderSource(Path(spec.weights_folder), device=device, dtype=dtype)
    return RandomSource(seed=spec.seed, spread=arch.spread, device=device, dtype=dtype)


def main(argument: str) -> None:
    """Serve the engine at the other end of a socket until it goes away."""
    # Ctrl-C is for the executor, which stops its engines in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=int(argument))
    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    try:
        _serve(channel, inbox)
    except EngineError as error:
        _fail(channel, error.kind, str(error))
    except BrokenPipeError:
        return
    except Exception as error:  # whatever it is, the engine must hear of it
        _fail(channel, FailureKind.ERROR, f"{type(error).__name__}: {error}")
        raise


def _listen(channel: socket.socket, inbox: queue.SimpleQueue[ToRank]) -> None:
    while (body := receive(channel)) is not None:
        inbox.put(TO_RANK.decode(body))
    # Not sys.exit: the thread that computes may be waiting for ranks that are gone.
    os._exit(0)


def _serve(channel: socket.socket, inbox: queue.SimpleQueue[ToRank]) -> None:

    load = inbox.get()
    if not isinstance(load, LoadRank):
        raise TypeError(f"the first message must be a LoadRank, not {load!r}")
    worker = Worker(load.spec, load.rank, links_of(load.spec, load.rank, Path(load.meeting_point)))
    stage = worker.stage
    send(channel, RankLoaded(weights_bytes=stage.weights_bytes, kv_cache_bytes=stage.kv_cache_bytes))
    while True:
        order = inbox.get()
        if not isinstance(order, Run):
            raise TypeError(f"a loaded rank can only run, not {order!r}")
        try:
            for tokens, last in worker.run(order.work.sequences):
                if worker.reports:
                    send(channel, Stepped(tokens=tokens, last=last))
        except EngineError as error:
            # In the midst of an execution other ranks are left waiting.
            if len(load.spec.devices) > 1 and not isinstance(error, NoRoomError):
                raise
            send(channel, RankFailed(kind=error.kind, message=str(error), serves=True))


def _fail(channel: socket.socket, kind: str, message: str) -> None:
    failure: FromRank = RankFailed(kind=kind, message=message)
    send(channel, failure)


if __name__ == "__main__":
    main(sys.argv[1])
