"""What engines that others have written have in common behind the `Engine` protocol."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from maveriq.exec.engines.base import Step
from maveriq.exec.engines.translation import as_engine_error
from maveriq.exec.messages import EngineSpec, Generate, Loaded, Sequence


class ForeignEngine(ABC):
    """One model in a package of its own: a folder for its files, and its exceptions as ours."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._most_tokens = 0  # of a sequence

    def load(self, spec: EngineSpec) -> Loaded:
        """Start the engine and serve a first token; see `Engine.load`."""
        self._folder = Path(tempfile.mkdtemp(prefix=f"maveriq-{self.name}-"))
        try:
            return self._load(spec, self._folder)
        except Exception as error:
            self.close()
            raise as_engine_error(self.name, error) from error

    def generate(self, work: Generate) -> Iterator[Step]:
        """Yield the steps of an execution; see `Engine.generate`."""
        try:
            yield from self._steps(work.sequences)
        except Exception as error:
            raise as_engine_error(self.name, error) from error

    def close(self) -> None:
        """Stop the workers and forget the model; see `Engine.close`."""
        folder, self._folder = self._folder, None
        try:
            self._shut_down()
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    @abstractmethod
    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        """Start the engine and serve a first token."""

    @abstractmethod
    def _steps(self, sequences: tuple[Sequence, ...]) -> Iterator[Step]:
        """Yield the steps of an execution."""

    @abstractmethod
    def _shut_down(self) -> None:
        """Stop what runs; there may be nothing."""
