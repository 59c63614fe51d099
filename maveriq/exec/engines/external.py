"""What the translators to foreign engines share: what comes out, and what they read off a specification.

What engines that others have written have in common behind the `Engine` protocol.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from maveriq.domain.models import KvType, ModelSpec, WeightType, model_from_hf_config
from maveriq.domain.parallel import ParallelConfig, check_layer_split
from maveriq.errors import InputError
from maveriq.exec.capabilities import Device, why_not
from maveriq.exec.engines.engine import EngineError, FailureKind, Step
from maveriq.exec.messages import EngineSpec, Generate, Loaded, PromptSequence
from maveriq.units import Bytes

MAX_SEQUENCE_TOKENS = 4096
"""Room for one sequence, prompt and output, in a KV cache; less where the model ends before that."""

_SHORT_MODEL_TOKENS = 2048  # where a configuration does not say; falcon's does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """What starts a foreign engine.

    Args:
        arguments: keywords of the engine's constructor.
        files: content of the files to write into the model's folder, by name; none where weights are given.
        environment: variables that must be set before the engine's package is imported.
    """

    arguments: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequirements:
    """A specification, read: the model, how to cut and store it, and on what."""

    spec: EngineSpec
    hf_config: Mapping[str, Any]
    model: ModelSpec
    configuration: ParallelConfig
    device: Device

    @property
    def sequence_tokens(self) -> int:
        """Room for one sequence, in tokens."""
        known = [self.hf_config.get(key) for key in ("max_position_embeddings", "n_positions")]
        of_model = next((maximum for maximum in known if isinstance(maximum, int) and maximum > 0), _SHORT_MODEL_TOKENS)
        return min(of_model, MAX_SEQUENCE_TOKENS)

    @property
    def quantised_ahead(self) -> str | None:
        """How the model's own configuration says that its weights are quantised, None where it does not."""
        quantization = self.hf_config.get("quantization_config")
        if not quantization:
            return None
        return str(quantization.get("quant_method")) if isinstance(quantization, dict) else "something unknown"

    def own_config(self, quantisation: Mapping[str, Any] | None) -> str:
        """Return the `config.json` for random weights that are stored as given."""
        config = {key: value for key, value in self.hf_config.items() if key != "quantization_config"}
        return json.dumps(config if quantisation is None else config | {"quantization_config": quantisation}, indent=2)

    def kv_bytes_per_token(self, *, element_bytes: int, per_head_bytes: int = 0) -> Bytes:
        """Return what a token takes in the KV cache on a GPU of the stage with the most layers.

        Args:
            element_bytes: of a number.
            per_head_bytes: of what is kept beside each vector, such as its scale.
        """
        model, tp = self.model, self.configuration.tp
        heads = max(1, model.kv_heads // tp)
        head_size = self.hf_config.get("head_dim") or model.hidden_size // model.attention_heads
        return 2 * max(self.spec.layer_split) * heads * (head_size * element_bytes + per_head_bytes)


def read_spec(engine: str, spec: EngineSpec) -> EngineRequirements:
    """Read a specification, and make sure that the engine can do what it asks.

    Raises:
        EngineError: the engine cannot, or the specification contradicts itself.
    """
    try:
        hf_config = json.loads(spec.config_json)
        model = model_from_hf_config(hf_config, name=spec.model, where=f"configuration of {spec.model}")
        configuration = ParallelConfig(
            tp=spec.tp,
            pp=spec.pp,
            weights=WeightType(spec.weights),
            kv=KvType(spec.kv),
            layer_split=spec.layer_split,
            batch_size=spec.batch_size,
        )
        _check_head_size(hf_config)
        device = Device.named(spec.devices[0] if spec.devices else "")
        check_layer_split(spec.layer_split, spec.pp)
        refusal = why_not(engine, model, configuration, device)
    except (InputError, ValueError, AttributeError, RecursionError) as error:
        raise EngineError(FailureKind.UNSUPPORTED, f"{engine}: {error}") from None
    if refusal is not None:
        raise EngineError(FailureKind.UNSUPPORTED, str(refusal))
    each_its_own = tuple(f"cuda:{rank}" for rank in range(configuration.gpus))
    if device is Device.CUDA and spec.devices != each_its_own:
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"{engine} takes the {configuration.gpus} GPUs that it sees, one for each rank in their order, not "
            f"{', '.join(spec.devices)}",
        )
    return EngineRequirements(spec=spec, hf_config=hf_config, model=model, configuration=configuration, device=device)


def _check_head_size(hf_config: Mapping[str, Any]) -> None:
    size = hf_config.get("head_dim")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise InputError(f"head_dim must be a positive whole number, not {size!r}")


def check_lengths(engine: str, sequences: tuple[PromptSequence, ...], max_tokens: int) -> None:
    """Make sure that every sequence has room; engines themselves would end it early without a word.

    Raises:
        EngineError: one has not.
    """
    longest = max(len(one.prompt) + one.output_tokens for one in sequences)
    if longest > max_tokens:
        raise EngineError(
            FailureKind.ERROR, f"{engine}: a sequence of {longest} tokens, where there is room for {max_tokens}"
        )


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Write a translation's files into the model's folder."""
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


_NO_ROOM = ("out of memory", "no available memory", "free memory on device", "not enough memory", "less than requested")


def as_engine_error(engine: str, error: BaseException) -> EngineError:
    """Return an engine's exception as an `EngineError`; out of memory is recognised by its message alone."""
    if isinstance(error, EngineError):
        return error
    message = " ".join(str(error).split()) or "no message"
    no_room = isinstance(error, MemoryError) or any(words in message.lower() for words in _NO_ROOM)
    kind = FailureKind.OUT_OF_MEMORY if no_room else FailureKind.ERROR
    return EngineError(kind, f"{engine}: {type(error).__name__}: {message[:500]}")


class ExternalEngine(ABC):
    """One model in a package of its own: a folder for its files, and its exceptions as ours."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._max_tokens = 0  # of a sequence

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
    def _steps(self, sequences: tuple[PromptSequence, ...]) -> Iterator[Step]:
        """Yield the steps of an execution."""

    @abstractmethod
    def _shut_down(self) -> None:
        """Stop what runs; there may be nothing."""
