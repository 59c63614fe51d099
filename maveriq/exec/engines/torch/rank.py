"""The process of one rank: `python -m maveriq.exec.engines.torch.rank FD`, where FD is its end of a socket pair.

A rank loads its shard, connects to the other ranks, then runs executions until the engine closes the socket. A thread
of its own reads the socket, so that the process exits at once even while it computes or waits for another rank.
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
from importlib import metadata
from pathlib import Path

import torch

from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.failures import as_engine_error, is_out_of_memory
from maveriq.exec.engines.torch.collectives import Collectives, DistributedRanks, SingleRank
from maveriq.exec.engines.torch.config import DecoderConfig, ModelConfig, read_model_config, shard_of
from maveriq.exec.engines.torch.decoding import Stage, generate_tokens, next_token_logits
from maveriq.exec.engines.torch.messages import (
    TO_RANK,
    LoadRank,
    RankFailed,
    RankLoaded,
    RunExecution,
    Stepped,
    ToRank,
    receive,
    send,
)
from maveriq.exec.engines.torch.model import OwnStage
from maveriq.exec.engines.torch.weights import RandomWeights, SafetensorsWeights, WeightSource
from maveriq.exec.messages import EngineSpec, PromptSequence, RankShard

_WARM_UP_TOKENS = 8


class KvCacheAllocationError(EngineError):
    """A rank has no memory for the KV cache of an execution.

    All ranks reject the execution together, before any of them starts it, so that they can run the next one.
    """


class RankWorker:
    """One rank of a model, loaded and warmed up.

    Args:
        spec: the model and its parallel configuration.
        rank: this rank's number.
        collectives: connects it to the other ranks.
        config: of the model, None to read it from the spec.

    Raises:
        EngineError: weights cannot be read, or do not fit.
    """

    def __init__(
        self, spec: EngineSpec, rank: int, collectives: Collectives, *, config: ModelConfig | None = None
    ) -> None:
        config = config or read_model_config(spec.config_json)
        device = torch.device(spec.devices[rank])
        dtype = _activation_dtype(config, device)
        self._collectives = collectives
        self.reports_steps = rank == (spec.pp - 1) * spec.tp
        with torch.inference_mode(), memory_errors():
            if device.type == "cuda":
                _check_device(device)
                torch.cuda.set_device(device)  # else NCCL and the allocator would also use the first device
            self._like = torch.empty(0, device=device, dtype=dtype)
            source = _weight_source(spec, config, device, dtype)
            self.stage = _load_stage(config, spec, rank, source, collectives, like=self._like)
        _free_unused_memory(device)
        warm_up = PromptSequence(request_id=0, prompt=(0,) * _WARM_UP_TOKENS, output_tokens=2)
        for _ in self.run((warm_up,) * spec.batch_size):
            pass

    def describe_shard(self) -> RankShard:
        """Return what this rank holds."""
        return RankShard(
            layers=self.stage.layers,
            weights_bytes=self.stage.weights_bytes,
            dtype=str(self._like.dtype).removeprefix("torch."),
            pid=os.getpid(),
        )

    def run(self, prompts: tuple[PromptSequence, ...]) -> Iterator[tuple[list[int], bool]]:
        """Yield each step's tokens, and whether it is the last.

        Raises:
            KvCacheAllocationError: a rank has no memory for the KV cache.
            EngineError: memory for something else is short.
        """
        self._reserve_kv_cache(prompts)
        try:
            with memory_errors():
                yield from generate_tokens(self.stage, self._collectives, prompts, like=self._like)
        except EngineError:
            self._release_kv_cache()
            raise

    def next_token_logits(self, prompts: tuple[PromptSequence, ...]) -> torch.Tensor | None:
        """Return the logits of the token after each prompt, [batch, vocabulary]; None on ranks before the last stage.

        All ranks must make this call.

        Raises:
            KvCacheAllocationError: a rank has no memory for the KV cache.
            EngineError: memory for something else is short.
        """
        self._reserve_kv_cache(prompts)
        with memory_errors():
            return next_token_logits(self.stage, self._collectives, prompts, like=self._like)

    def _reserve_kv_cache(self, prompts: tuple[PromptSequence, ...]) -> None:
        error = self._try_reserve(prompts)
        if error is not None:
            # The cache only grows, to the largest batch and the longest sequence so far. This batch may need less.
            self._release_kv_cache()
            error = self._try_reserve(prompts)
        if not self._collectives.all_ok(ok=error is None):
            # Free what was allocated for this execution: the next one may need the memory elsewhere.
            self._release_kv_cache()
            if error is None:
                raise KvCacheAllocationError(FailureKind.ERROR, "another rank is out of memory")
            raise KvCacheAllocationError(error.kind, str(error), device=error.device)

    def _try_reserve(self, prompts: tuple[PromptSequence, ...]) -> EngineError | None:
        try:
            with memory_errors():
                self.stage.reserve(prompts)
        except EngineError as error:
            return error
        return None

    def _release_kv_cache(self) -> None:
        self.stage.release()
        _free_unused_memory(self._like.device)


def connect_ranks(spec: EngineSpec, rank: int, rendezvous_file: Path) -> Collectives:
    """Connect a rank to the others; returns once all have connected."""
    if len(spec.devices) == 1:
        return SingleRank()
    return DistributedRanks(shard_of(spec, rank), rank, rendezvous_file=rendezvous_file, devices=spec.devices)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's out-of-memory errors into `EngineError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise as_engine_error("torch", error) from None
        raise


def _free_unused_memory(device: torch.device) -> None:
    """Return the memory that torch's allocator caches on a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_device(device: torch.device) -> None:
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= seen:
        raise EngineError(
            FailureKind.UNSUPPORTED, f"no {device} on this machine: torch {torch.__version__} sees {seen} GPUs"
        )


def _activation_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of activations and unquantised weights: 16 bits on a GPU, 32 on a CPU, where 16 are slower."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if config.bfloat16 else torch.float16


def _load_stage(
    config: ModelConfig,
    spec: EngineSpec,
    rank: int,
    source: WeightSource,
    collectives: Collectives,
    *,
    like: torch.Tensor,
) -> Stage:
    """Load a rank's stage: of maveriq's own decoder, or of transformers' modules, which only then are imported."""
    shard = shard_of(spec, rank)
    if isinstance(config, DecoderConfig):
        return OwnStage(config, shard, spec, source, collectives, like=like)
    try:
        from maveriq.exec.engines.torch.transformers_stage import TransformersStage
    except ImportError as error:
        version = metadata.version("transformers")
        raise EngineError(
            FailureKind.UNSUPPORTED, f"transformers {version} is not one that maveriq knows (5.20 or newer): {error}"
        ) from None
    return TransformersStage(config, shard, spec, source, collectives, like=like)


def _weight_source(spec: EngineSpec, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> WeightSource:
    if spec.weights_folder:
        return SafetensorsWeights(Path(spec.weights_folder), device=device, dtype=dtype)
    return RandomWeights(seed=spec.seed, initializer_range=config.initializer_range, device=device, dtype=dtype)


def main() -> None:
    """Serve the engine at the other end of the socket, named by the only argument, until it closes the socket."""
    # Ctrl-C reaches the whole process group; the executor handles it and stops its engines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    try:
        _serve(channel, inbox)
    except EngineError as error:
        send(channel, _failure(error))
    except BrokenPipeError:
        return
    except Exception as error:  # report anything to the engine
        send(channel, RankFailed(kind=FailureKind.ERROR, message=f"{type(error).__name__}: {error}"))
        raise


def _listen(channel: socket.socket, inbox: queue.SimpleQueue[ToRank]) -> None:
    while (body := receive(channel)) is not None:
        inbox.put(TO_RANK.decode(body))
    # Not sys.exit: the computing thread may be waiting for ranks that have exited.
    os._exit(0)


def _serve(channel: socket.socket, inbox: queue.SimpleQueue[ToRank]) -> None:
    load = inbox.get()
    if not isinstance(load, LoadRank):
        raise TypeError(f"the first message must be a LoadRank, not {load!r}")
    worker = RankWorker(load.spec, load.rank, connect_ranks(load.spec, load.rank, Path(load.rendezvous_file)))
    stage = worker.stage
    send(channel, RankLoaded(shard=worker.describe_shard(), kv_cache_bytes=stage.kv_cache_bytes))
    while True:
        message = inbox.get()
        if not isinstance(message, RunExecution):
            raise TypeError(f"a loaded rank takes only RunExecution, not {message!r}")
        try:
            for tokens, last in worker.run(message.batch.sequences):
                if worker.reports_steps:
                    send(channel, Stepped(tokens=tokens, last=last))
        except EngineError as error:
            # In the middle of an execution the other ranks wait for this one and cannot be resumed.
            if len(load.spec.devices) > 1 and not isinstance(error, KvCacheAllocationError):
                raise
            send(channel, _failure(error, serves=True))


def _failure(error: EngineError, *, serves: bool = False) -> RankFailed:
    return RankFailed(kind=error.kind, message=str(error), device=error.device, serves=serves)


if __name__ == "__main__":
    main()
