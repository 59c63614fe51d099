"""What a rank does: load its part, then run what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from maveriq.exec.engines.base import EngineError, FailureKind
from maveriq.exec.engines.torch.architecture import Architecture, read_architecture
from maveriq.exec.engines.torch.decode import decode
from maveriq.exec.engines.torch.links import Alone, Distributed, Links
from maveriq.exec.engines.torch.plan import part_of
from maveriq.exec.engines.torch.sources import FolderSource, RandomSource, Source
from maveriq.exec.engines.torch.stage import Stage
from maveriq.exec.messages import EngineSpec, Sequence

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

    def __init__(self, spec: EngineSpec, rank: int, links: Links) -> None:
        arch = read_architecture(spec.config_json)
        device = torch.device(spec.devices[rank])
        dtype = _type_of_numbers(arch, device)
        self._links = links
        self.reports = rank == (spec.pp - 1) * spec.tp
        with torch.inference_mode(), memory_errors():
            if device.type == "cuda":
                _check_there(device)
                torch.cuda.set_device(device)  # else nccl and the allocator would open the first one too
            self._like = torch.empty(0, device=device, dtype=dtype)
            self.stage = Stage(arch, part_of(spec, rank), spec, _source(spec, arch, device, dtype), links)
        _give_back_unused(device)
        warm_up = Sequence(request_id=0, prompt=(0,) * _WARM_UP_TOKENS, output_tokens=2)
        for _ in self.run((warm_up,) * spec.batch_size):
            pass

    def run(self, prompts: tuple[Sequence, ...]) -> Iterator[tuple[list[int], bool]]:
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

    def _make_room(self, prompts: tuple[Sequence, ...]) -> None:
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

    def _missed_room(self, prompts: tuple[Sequence, ...]) -> EngineError | None:
        try:
            with memory_errors():
                self.stage.make_room(len(prompts), max(len(each.prompt) + each.output_tokens for each in prompts))
        except EngineError as error:
            return error
        return None

    def _give_room_back(self) -> None:
        self.stage.give_room_back()
        _give_back_unused(self._like.device)


def links_of(spec: EngineSpec, rank: int, meeting_point: Path) -> Links:
    """Return a rank's links to the others, once all are there."""
    if len(spec.devices) == 1:
        return Alone()
    return Distributed(part_of(spec, rank), rank, meeting_point=meeting_point, devices=spec.devices)


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


def _type_of_numbers(arch: Architecture, device: torch.device) -> torch.dtype:
    """Return the type of what is not quantised: 16 bits on a GPU, 32 on a CPU, where 16 are slower."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if arch.bfloat16 else torch.float16


def _source(spec: EngineSpec, arch: Architecture, device: torch.device, dtype: torch.dtype) -> Source:
    if spec.weights_folder:
        return FolderSource(Path(spec.weights_folder), device=device, dtype=dtype)
    return RandomSource(seed=spec.seed, spread=arch.spread, device=device, dtype=dtype)
