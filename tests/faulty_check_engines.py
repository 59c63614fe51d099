"""Engines for the tests of `maveriq engines check`: a healthy one, and one with a single fault for each check.

`Healthy` stands for a backend that reports everything; the matrix of the torch backend says what it supports. The
faults are in the engines, never in a check.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from maveriq.exec.engines.emulated import EmulatedEngine
from maveriq.exec.engines.engine import EngineError, FailureKind, Step
from maveriq.exec.gpus import GpuIdentity, GpuReading
from maveriq.exec.messages import EngineSpec, Generate, Inspected, Loaded, RankShard
from maveriq.units import BYTES_PER_GIB

FOLDER = "MAVERIQ_TEST_FOLDER"
"""Environment variable: the test's folder, for allocations of the simulated GPU driver, and PIDs to kill afterwards."""

STORED_BYTES = {"float16": 4.0, "int8": 1.0, "int4": 0.5}  # as the torch engine on a CPU


class SimulatedDriver:
    """A GPU whose memory in use is what living processes have allocated: a file `PID.gpu` for each."""

    slow = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.gpus = tuple(
            GpuIdentity(uuid=f"SIM-{index}", name="sim", memory_bytes=BYTES_PER_GIB) for index in range(4)
        )

    def read(self) -> tuple[GpuReading, ...]:
        used = sum(int(file.read_text()) for file in self._folder.glob("*.gpu") if Path(f"/proc/{file.stem}").exists())
        return tuple(GpuReading(used_bytes=used) for _ in self.gpus)

    def close(self) -> None:
        """Nothing to release."""


class Healthy(EmulatedEngine):
    """Does what the checks ask for."""

    def inspect(self, spec: EngineSpec) -> Inspected:
        return Inspected(version="2.13.0")

    def load(self, spec: EngineSpec) -> Loaded:
        if spec.model == "too large":
            self.refuse()
        self.spec = spec
        loaded = super().load(spec)
        self.allocate(os.getpid())
        return msgspec.structs.replace(loaded, shards=tuple(self.shards(spec)))

    def refuse(self) -> None:
        raise EngineError(FailureKind.OUT_OF_MEMORY, "simulated: needs 1.50 GiB, 0.75 GiB free", device="cpu")

    def allocate(self, pid: int) -> None:
        (Path(os.environ[FOLDER]) / f"{pid}.gpu").write_text(str(BYTES_PER_GIB // 4))

    def shards(self, spec: EngineSpec) -> Iterator[RankShard]:
        config = json.loads(spec.config_json)
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        heads = config["num_attention_heads"] + config["num_key_value_heads"]
        layer = hidden * (2 * heads * config["head_dim"] + 3 * config["intermediate_size"])
        for stage, layers in enumerate(spec.layer_split):
            tables = ((stage == 0) + (stage == spec.pp - 1)) * vocabulary * hidden * 4
            weights = layers * layer * self.stored_bytes(spec.weights)
            for _ in range(spec.tp):
                yield RankShard(layers=layers, weights_bytes=int((weights + tables) / spec.tp), dtype="float32")

    def stored_bytes(self, weights: str) -> float:
        return STORED_BYTES[weights]


class WrongVersion(Healthy):
    def inspect(self, spec: EngineSpec) -> Inspected:
        return Inspected(version="1.0")


class UnknownArgument(Healthy):
    def inspect(self, spec: EngineSpec) -> Inspected:
        return Inspected(version="2.13.0", unknown_arguments=("swap_space",) if spec.pp > 1 else ())


class CannotLoadInt8(Healthy):
    def load(self, spec: EngineSpec) -> Loaded:
        if spec.weights == "int8":
            raise EngineError(FailureKind.ERROR, "no kernel for int8")
        return super().load(spec)


class CannotShareGpu(Healthy):
    def load(self, spec: EngineSpec) -> Loaded:
        if spec.model == "second engine":
            raise EngineError(FailureKind.ERROR, "the GPU is in exclusive mode")
        return super().load(spec)


class CrossTalk(Healthy):
    """The second engine on a GPU computes something else."""

    def generate(self, batch: Generate) -> Iterator[Step]:
        return super().generate(other_prompt(batch) if self.spec.model == "second engine" else batch)


class LoadsTooMuch(Healthy):
    """Takes any model, whatever it would need."""

    def refuse(self) -> None:
        self.is_too_large = True

    def shards(self, spec: EngineSpec) -> Iterator[RankShard]:
        return iter(()) if hasattr(self, "is_too_large") else super().shards(spec)


class RefusesWithoutKind(Healthy):
    def refuse(self) -> None:
        raise EngineError(FailureKind.ERROR, "needs 1.50 GiB, 0.75 GiB free")


class RefusesWithoutSizes(Healthy):
    def refuse(self) -> None:
        raise EngineError(FailureKind.OUT_OF_MEMORY, "out of memory")


class EndsEarly(Healthy):
    """In batches of several sequences."""

    def generate(self, batch: Generate) -> Iterator[Step]:
        steps = super().generate(batch)
        return itertools.islice(steps, 5) if len(batch.sequences) > 1 else steps


class OutOfVocabulary(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        for tokens in super().generate(batch):
            yield [10**6, *tokens[1:]] if len(tokens) > 1 else tokens


class NotDeterministic(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        return super().generate(other_prompt(batch) if len(batch.sequences) > 1 and batch.execution_id % 2 else batch)


class FailsInBatches(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        if len(batch.sequences) > 1:
            raise EngineError(FailureKind.ERROR, "a kernel failed")
        return super().generate(batch)


class DependsOnSplit(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        return super().generate(other_prompt(batch) if self.spec.pp > 1 else batch)


class EvenSplit(Healthy):
    """Ignores the layer split, as an engine does that has lost the argument."""

    def shards(self, spec: EngineSpec) -> Iterator[RankShard]:
        for shard, planned in zip(super().shards(spec), super().shards(spec), strict=True):
            layers = sum(spec.layer_split) // spec.pp
            yield msgspec.structs.replace(shard, layers=layers, weights_bytes=planned.weights_bytes)


class Int8IsNotInt8(Healthy):
    """Takes int8 for weights that it leaves as they are, as vLLM 0.32 did with `int8_per_channel_weight_only`."""

    def stored_bytes(self, weights: str) -> float:
        return STORED_BYTES["float16"]


class IgnoresStopTokens(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        free = (msgspec.structs.replace(sequence, stop_token_ids=()) for sequence in batch.sequences)
        return super().generate(msgspec.structs.replace(batch, sequences=tuple(free)))


class SwallowsStopTokens(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        stops = batch.sequences[0].stop_token_ids
        return (tokens for tokens in super().generate(batch) if not set(tokens) & set(stops))


class CutsLongSequences(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        steps = super().generate(batch)
        return itertools.islice(steps, 4) if len(batch.sequences[0].prompt) > 400 else steps


class HangsWhenAborted(Healthy):
    def generate(self, batch: Generate) -> Iterator[Step]:
        try:
            yield from super().generate(batch)
        except GeneratorExit:
            time.sleep(600)
            raise


class LosesWorkers(Healthy):
    """Its ranks are nobody's children, so that nobody hears of their end."""

    def load(self, spec: EngineSpec) -> Loaded:
        loaded = super().load(msgspec.structs.replace(spec, tp=1, pp=1))
        for _ in range(spec.tp * spec.pp - 1):
            subprocess.run(["sh", "-c", "sleep 600 &"], check=True, stdin=subprocess.DEVNULL)
        return msgspec.structs.replace(loaded, shards=tuple(self.shards(spec)))


class LeavesProcess(Healthy):
    """Has a process that hides from whoever kills the engine: no environment, another session, no parent."""

    def load(self, spec: EngineSpec) -> Loaded:
        if spec.pp > 1:
            hide = ["sh", "-c", 'sleep 600 & echo $! > "$0"', str(Path(os.environ[FOLDER]) / "hidden.pid")]
            subprocess.run(hide, check=True, stdin=subprocess.DEVNULL, start_new_session=True, env={})
        return super().load(spec)


class LeaksGpuMemory(Healthy):
    """The driver keeps an allocation of a process that never ends."""

    def allocate(self, pid: int) -> None:
        super().allocate(1)


class LeaksSharedMemory(Healthy):
    """It maps a file in shared memory when its processes and their files are known already."""

    def generate(self, batch: Generate) -> Iterator[Step]:
        if not hasattr(self, "shared"):
            descriptor, _ = tempfile.mkstemp(prefix="maveriq-test-", dir="/dev/shm")
            os.ftruncate(descriptor, mmap.PAGESIZE)
            self.shared = mmap.mmap(descriptor, mmap.PAGESIZE)
        return super().generate(batch)


def other_prompt(batch: Generate) -> Generate:
    longer = (msgspec.structs.replace(sequence, prompt=(*sequence.prompt, 1)) for sequence in batch.sequences)
    return msgspec.structs.replace(batch, sequences=tuple(longer))
