"""The engine as its host sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

from maveriq.exec.engines.base import EngineError, FailureKind, Step
from maveriq.exec.engines.torch.architecture import read_architecture, refuse
from maveriq.exec.engines.torch.plan import check
from maveriq.exec.engines.torch.ranks import RankLostError, Ranks
from maveriq.exec.engines.torch.wire import RankFailed, RankLoaded, Stepped
from maveriq.exec.messages import EngineSpec, Generate, Loaded

BACKEND = "torch"


class TorchEngine:
    """Runs a model in one process per shard (the `Engine` protocol).

    Where a rank is lost `RankLostError` is raised instead of an `EngineError`: nothing can be run any more.
    """

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._vocabulary = 0
        self._done = True  # of the execution: whether its last step was heard

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, stage by stage."""
        return () if self._ranks is None else self._ranks.pids

    def load(self, spec: EngineSpec) -> Loaded:
        """Start the ranks and wait until each has loaded and warmed up its part.

        Raises:
            EngineError: the model or the split is not supported, does not fit, or a rank failed.
        """
        arch = read_architecture(spec.config_json)
        check(spec, arch)
        if find_spec("torch") is None:
            refuse("torch is not installed here: pip install 'maveriq[torch]'")
        self._vocabulary = arch.vocabulary
        try:
            self._ranks = Ranks(spec)
            loaded = _all_loaded(self._ranks)
        except (RankLostError, OSError) as error:
            self.close()
            raise EngineError(FailureKind.ERROR, f"its ranks could not start: {error}") from None
        except EngineError:
            self.close()
            raise
        return Loaded(
            backend=BACKEND,
            version=metadata.version("torch"),
            weights_bytes=sum(rank.weights_bytes for rank in loaded),
            kv_cache_bytes=sum(rank.kv_cache_bytes for rank in loaded),
        )

    def generate(self, work: Generate) -> Iterator[Step]:
        """Yield each step as the last stage reports it.

        Raises:
            EngineError: a token is not in the vocabulary, or there is not memory enough.
            RankLostError: a rank is gone, or they failed in the midst of working together.
        """
        if self._ranks is None:
            raise RankLostError("the engine is not loaded")
        beyond = max(max(sequence.prompt) for sequence in work.sequences)
        if beyond >= self._vocabulary:
            message = f"token {beyond} is not in the vocabulary of {self._vocabulary}"
            raise EngineError(FailureKind.ERROR, message)
        ranks = self._ranks
        with suppress(EngineError):
            # Where nobody listened to the end of the execution before: the ranks know no other end.
            while not self._done:
                self._next_step(ranks)
        ranks.run(work)
        self._done = False
        while not self._done:
            yield self._next_step(ranks)

    def close(self) -> None:
        """Kill the ranks and wait until they are gone."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()

    def _next_step(self, ranks: Ranks) -> Step:
        """Wait for a step and note whether it is the execution's last; after a failure there is none either way."""
        self._done = True
        while True:
            rank, message = ranks.hear()
            if isinstance(message, RankFailed):
                raise _refused(ranks, message) if message.serves else RankLostError(f"rank {rank}: {message.message}")
            if isinstance(message, Stepped):
                self._done = message.last
                return message.tokens


def _all_loaded(ranks: Ranks) -> list[RankLoaded]:
    loaded: dict[int, RankLoaded] = {}
    while len(loaded) < len(ranks.pids):
        rank, message = ranks.hear()
        if isinstance(message, RankFailed):
            raise _cause([message, *ranks.failures()])
        if isinstance(message, RankLoaded):
            loaded[rank] = message
    return list(loaded.values())


def _refused(ranks: Ranks, first: RankFailed) -> EngineError:
    """Return why an execution cannot be, when all ranks have said so."""
    failures = [first]
    while len(failures) < len(ranks.pids):
        _, message = ranks.hear()
        if isinstance(message, RankFailed):
            failures.append(message)
    return _cause(failures)


def _cause(failures: list[RankFailed]) -> EngineError:
    """Return the failure that tells why: a plain error may be only that another rank is missed."""
    cause = next((failure for failure in failures if failure.kind != FailureKind.ERROR), failures[0])
    return EngineError(FailureKind(cause.kind), cause.message)
