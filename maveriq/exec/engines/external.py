"""What the engines of other projects (vLLM, TensorRT-LLM) have in common behind the `Engine` protocol.

`read_spec` parses an `EngineSpec` and rejects what the engine does not support. Each engine's module translates the
result into a `Translation`: the arguments of its constructor. `ExternalEngine` is their base class.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from maveriq.domain.model_config import parse_config
from maveriq.domain.models import KvType, ModelSpec, WeightType, model_from_hf_config
from maveriq.domain.parallel import ParallelConfig, check_layer_split
from maveriq.errors import InputError
from maveriq.exec.device import Device
from maveriq.exec.engines.engine import EngineError, FailureKind, Step
from maveriq.exec.engines.failures import as_engine_error
from maveriq.exec.engines.worker_log import WorkerLog
from maveriq.exec.messages import EngineSpec, Generate, Loaded, PromptSequence
from maveriq.exec.model_files import check_weights
from maveriq.units import Bytes

MAX_SEQUENCE_TOKENS = 4096
"""KV cache capacity for one sequence (prompt and output); less if the model's context is shorter."""

_STEP_TOKENS = 8192
_DEFAULT_CONTEXT_TOKENS = 2048  # for configurations without a context length, such as falcon's


def max_sequence_tokens(model: ModelSpec) -> int:
    """Return the KV cache capacity for one sequence of a model, in tokens."""
    return min(model.context_tokens or _DEFAULT_CONTEXT_TOKENS, MAX_SEQUENCE_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """How to start an external engine.

    Args:
        arguments: keyword arguments of the engine's constructor.
        files: contents of the files to write into the model's folder, by name; empty if the spec has weights.
        environment: variables to set before the engine's package is imported.
    """

    arguments: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequirements:
    """A parsed `EngineSpec`: the model, its parallel configuration and the kind of device."""

    spec: EngineSpec
    hf_config: Mapping[str, Any]
    model: ModelSpec
    configuration: ParallelConfig
    device: Device

    @property
    def sequence_tokens(self) -> int:
        """KV cache capacity for one sequence, in tokens."""
        return max_sequence_tokens(self.model)

    @property
    def step_tokens(self) -> int:
        """Tokens that a step may compute, so that a prompt takes as many steps on every engine and kind of GPU.

        The default of vLLM depends on how it is started, that of TensorRT-LLM is this.
        """
        return max(_STEP_TOKENS, self.sequence_tokens, self.spec.batch_size)

    def kv_blocks(self, block_tokens: int) -> int:
        """Return the KV blocks for a batch of the longest sequences, with a spare block for each.

        Engines reserve the slots of a sequence's next tokens while its last ones are computed.

        Args:
            block_tokens: tokens of a block.
        """
        return self.spec.batch_size * (-(-self.sequence_tokens // block_tokens) + 1)

    @property
    def checkpoint_quantisation(self) -> str | None:
        """The quantisation method in the model's own configuration, None if its weights are not quantised."""
        quantization = self.hf_config.get("quantization_config")
        if not quantization:
            return None
        return str(quantization.get("quant_method")) if isinstance(quantization, dict) else "something unknown"

    @property
    def stated_type(self) -> str:
        """The type of values that the model's own configuration states, such as bfloat16; "" if it states none."""
        return str(self.hf_config.get("torch_dtype") or self.hf_config.get("dtype") or "")  # the older name, the newer

    def random_weights_config(self, quantisation: Mapping[str, Any] | None, *, torch_dtype: str = "") -> str:
        """Return the `config.json` for random weights.

        Args:
            quantisation: its `quantization_config`; None if weights are not quantised.
            torch_dtype: the type of the layers; "" keeps that of the model's own configuration.
        """
        config = {key: value for key, value in self.hf_config.items() if key != "quantization_config"}
        if torch_dtype:
            config.pop("dtype", None)  # the newer name
            config["torch_dtype"] = torch_dtype
        return json.dumps(config if quantisation is None else config | {"quantization_config": quantisation}, indent=2)

    def kv_bytes_per_token(self, *, element_bytes: int, per_head_bytes: int = 0) -> Bytes:
        """Return the KV cache size of one token on a GPU of the stage with the most layers.

        Args:
            element_bytes: size of one element.
            per_head_bytes: size of what is stored with each head's vector, such as its scale.
        """
        model, tp = self.model, self.configuration.tp
        heads = max(1, model.kv_heads // tp)
        return 2 * max(self.spec.layer_split) * heads * (model.head_size * element_bytes + per_head_bytes)


def read_spec(engine: str, spec: EngineSpec) -> EngineRequirements:
    """Parse a spec and check that it is consistent.

    Whether the engine supports it is checked before the process starts (`maveriq.exec.capabilities.check_spec`).

    Raises:
        EngineError: it cannot be read, or it is inconsistent.
    """
    try:
        where = f"configuration of {spec.model}"
        model = model_from_hf_config(spec.config_json, name=spec.model, where=where)
        hf_config = parse_config(spec.config_json, where)
        configuration = ParallelConfig(
            tp=spec.tp,
            pp=spec.pp,
            weights=WeightType(spec.weights),
            kv=KvType(spec.kv),
            layer_split=spec.layer_split,
            batch_size=spec.batch_size,
        )
        device = Device.named(spec.devices[0] if spec.devices else "")
        check_layer_split(spec.layer_split, spec.pp, model.layers)
    except (InputError, ValueError) as error:
        raise EngineError(FailureKind.UNSUPPORTED, f"{engine}: {error}") from None
    expected_devices = tuple(f"cuda:{rank}" for rank in range(configuration.gpus))
    if device is Device.CUDA and spec.devices != expected_devices:
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"{engine} uses the {configuration.gpus} GPUs that it sees, one per rank in order, not "
            f"{', '.join(spec.devices)}",
        )
    return EngineRequirements(spec=spec, hf_config=hf_config, model=model, configuration=configuration, device=device)


def check_lengths(engine: str, sequences: tuple[PromptSequence, ...], max_tokens: int) -> None:
    """Check that every sequence fits; the engines would silently truncate a longer one.

    Raises:
        EngineError: a sequence is too long.
    """
    longest = max(len(sequence.prompt) + sequence.output_tokens for sequence in sequences)
    if longest > max_tokens:
        raise EngineError(
            FailureKind.ERROR, f"{engine}: a sequence of {longest} tokens is too long (limit {max_tokens})"
        )


def unknown_names(names: Iterable[str], accepted_by: type) -> set[str]:
    """Return the keyword arguments that a class does not have."""
    parameters = inspect.signature(accepted_by).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return set()  # it takes any
    return set(names) - parameters.keys()


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Write a translation's files into the model's folder."""
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


class ExternalEngine(ABC):
    """Base class of external engines: gives the model a temporary folder and converts exceptions to `EngineError`."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._max_tokens = 0  # per sequence

    def load(self, spec: EngineSpec) -> Loaded:
        """Start the engine and warm it up; see `Engine.load`."""
        if spec.weights_folder:
            try:
                check_weights(Path(spec.weights_folder))
            except InputError as error:
                raise EngineError(FailureKind.UNSUPPORTED, f"{self.name}: {error}") from None
        self._folder = Path(tempfile.mkdtemp(prefix=f"maveriq-{self.name}-"))
        log = WorkerLog()
        try:
            return self._load(spec, self._folder)
        except Exception as error:
            self.close()
            raise as_engine_error(self.name, error, printed=log.exceptions()) from error

    def generate(self, batch: Generate) -> Iterator[Step]:
        """Yield the steps of an execution; see `Engine.generate`."""
        try:
            yield from self._steps(batch.sequences)
        except Exception as error:
            raise as_engine_error(self.name, error) from error

    def close(self) -> None:
        """Stop the workers and remove the folder; see `Engine.close`."""
        folder, self._folder = self._folder, None
        try:
            self._shut_down()
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    @abstractmethod
    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        """Start the engine and warm it up."""

    @abstractmethod
    def _steps(self, sequences: tuple[PromptSequence, ...]) -> Iterator[Step]:
        """Yield the steps of an execution."""

    @abstractmethod
    def _shut_down(self) -> None:
        """Stop the engine if it runs."""
