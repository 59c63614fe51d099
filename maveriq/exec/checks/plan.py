"""Which engines `maveriq engines check` starts: models, formats, splits, and the GPUs of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.calibration_file import BYTES_PER_PARAMETER, layer_parameters
from maveriq.exec.capabilities import unsupported_by
from maveriq.exec.device import Device
from maveriq.exec.gpus import GpuIdentity, least_compute_capability
from maveriq.units import BYTES_PER_GIB, Bytes

_GPU_MODEL = ModelSpec(
    name="check",
    architecture="llama",
    layers=4,
    hidden_size=4096,
    attention_heads=32,
    kv_heads=8,
    intermediate_size=14336,
    vocab_size=8192,
    context_tokens=4096,
)
"""As wide as an 8B llama, so that kernels and shards have real shapes; few layers and tokens, for a fast start."""

_CPU_MODEL = replace(
    _GPU_MODEL,
    hidden_size=256,
    attention_heads=4,
    kv_heads=2,
    head_size=64,
    intermediate_size=1024,
    vocab_size=512,
    context_tokens=512,
)

_SPLITS = (
    ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16),
    ParallelConfig(tp=2, pp=1, weights=WeightType.FLOAT16),
    ParallelConfig(tp=2, pp=2, weights=WeightType.FLOAT16, layer_split=(3, 1)),
)
_FORMATS = (*((weights, KvType.NATIVE) for weights in WeightType), (WeightType.FLOAT16, KvType.INT8))
_BATCH_SIZE = 4

_OVERHEAD_BYTES = 2 * BYTES_PER_GIB  # a CUDA context, workspaces and the KV cache, on each GPU of an engine
_TOO_LARGE = 1.5  # times the memory of a GPU, in one matrix
_MAX_VOCABULARY, _MAX_HIDDEN = 10**8, 8 * 10**6  # one matrix of 3 PB, which no machine allocates

_MAX_GPU = 1023
DEFAULT_CPU_GPUS = tuple(range(8))
"""Without GPUs, engines run on the CPU and GPUs are only numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEngine:
    """An engine to start.

    Args:
        label: its name in results.
        model: what it loads.
        configuration: how it is stored and split.
        gpu_ids: one per rank, stage-major; empty if it is not started.
        why_not: why this backend or machine cannot run it, "" if it can.
    """

    label: str
    model: ModelSpec
    configuration: ParallelConfig
    gpu_ids: tuple[int, ...] = ()
    why_not: str = ""

    @property
    def needed_bytes(self) -> Bytes:
        """Memory that it takes on each of its GPUs at most, roughly."""
        ranks = range(self.configuration.gpus)
        return _OVERHEAD_BYTES + max(self.parameter_bytes(rank, element_bytes=2)[1] for rank in ranks)

    def parameter_bytes(self, rank: int, *, element_bytes: int) -> tuple[Bytes, Bytes]:
        """Return the least and the most that a rank's parameters take.

        Scales, zero points and padding make up the difference; the ranges of float16, int8 and int4 do not overlap.
        Embedding and output matrix are not quantised, and not every engine shards the embedding.

        Args:
            rank: its number, stage-major.
            element_bytes: size of a parameter that is not quantised.
        """
        model, cfg = self.model, self.configuration
        stage = rank // cfg.tp
        stored_bytes = element_bytes if cfg.weights is WeightType.FLOAT16 else BYTES_PER_PARAMETER[cfg.weights]
        layers = cfg.layers_per_stage(model.layers)[stage] * layer_parameters(model) / cfg.tp * stored_bytes
        table = model.vocab_size * model.hidden_size * element_bytes
        embedding, output = table * (stage == 0), table / cfg.tp * (stage == cfg.pp - 1)
        least = layers + embedding / cfg.tp + output
        return int(0.95 * least), int(1.35 * layers + 1.1 * (embedding + output))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPlan:
    """All engines of the checks.

    Args:
        device: what engines compute on.
        matrix: each format and split; the first one is the plainest.
        second: the same as the first of the matrix, on the same GPU.
        too_large: one that no GPU holds.
    """

    device: Device
    matrix: tuple[PlannedEngine, ...]
    second: PlannedEngine
    too_large: PlannedEngine

    @property
    def engines(self) -> tuple[PlannedEngine, ...]:
        """All that are started."""
        return tuple(engine for engine in (*self.matrix, self.second, self.too_large) if not engine.why_not)


def plan_checks(
    backend: str,
    gpu_ids: Sequence[int],
    *,
    gpus: Sequence[GpuIdentity] = (),
    formats: Sequence[tuple[WeightType, KvType]] = _FORMATS,
) -> CheckPlan:
    """Return which engines to start.

    On GPUs these are all formats with all splits. On a CPU, where starts are slow, they are each format on one rank,
    and each split with the first format.

    Args:
        backend: a key of the capability matrix.
        gpu_ids: the GPUs to use.
        gpus: what they are, in the same order; empty for engines on the CPU.
        formats: weight and KV types to check.

    Raises:
        UnknownNameError: no such backend.
    """
    device = Device.CUDA if gpus else Device.CPU
    model = _GPU_MODEL if device is Device.CUDA else _CPU_MODEL
    used: Counter[int] = Counter()
    matrix: list[PlannedEngine] = []
    for number, (weights, kv) in enumerate(formats):
        splits = _SPLITS if device is Device.CUDA or number == 0 else _SPLITS[:1]
        for split in splits:
            cfg = replace(split, weights=weights, kv=kv, batch_size=_BATCH_SIZE)
            engine = PlannedEngine(label=_label(cfg), model=model, configuration=cfg)
            reason = _why_not(backend, engine, device, gpu_ids, gpus)
            if reason:
                matrix.append(replace(engine, why_not=reason))
                if split is _SPLITS[0]:
                    break  # the larger splits of this format would only repeat it
                continue
            matrix.append(replace(engine, gpu_ids=_least_used(gpu_ids, cfg.gpus, used)))
    first = matrix[0]
    return CheckPlan(
        device=device,
        matrix=tuple(matrix),
        second=replace(first, label="second engine"),
        too_large=replace(first, label="too large", model=_enlarged(model, gpus)),
    )


def _label(cfg: ParallelConfig) -> str:
    return replace(cfg, batch_size=1).describe(sum(cfg.layer_split) or 1)


def _why_not(
    backend: str, engine: PlannedEngine, device: Device, gpu_ids: Sequence[int], gpus: Sequence[GpuIdentity]
) -> str:
    cfg = engine.configuration.normalised(engine.model.layers)
    capability = least_compute_capability(gpus)
    if reason := unsupported_by(backend, engine.model, cfg, device, compute_capability=capability):
        return reason
    if cfg.gpus > 1 and any(gpu.is_slice for gpu in gpus):
        return "GPUs of this machine are slices (MIG), and no engine spreads over several"
    if cfg.gpus > len(gpu_ids):
        return f"it needs {cfg.gpus} GPUs, and {len(gpu_ids)} are to be used"
    return ""


def _least_used(gpu_ids: Sequence[int], count: int, used: Counter[int]) -> tuple[int, ...]:
    """Return the GPUs with the fewest ranks so far, and count one more on each."""
    chosen = tuple(sorted(sorted(gpu_ids, key=lambda gpu_id: used[gpu_id])[:count]))
    used.update(chosen)
    return chosen


def _enlarged(model: ModelSpec, gpus: Sequence[GpuIdentity]) -> ModelSpec:
    """Return the model with an embedding that does not fit: its first allocation fails and takes no memory."""
    if not gpus:
        heads = _MAX_HIDDEN // model.head_size
        return replace(
            model, vocab_size=_MAX_VOCABULARY, hidden_size=_MAX_HIDDEN, attention_heads=heads, kv_heads=heads
        )
    memory_bytes = max(gpu.memory_bytes for gpu in gpus)
    tokens = int(_TOO_LARGE * memory_bytes / (2 * model.hidden_size))
    return replace(model, vocab_size=-(-tokens // model.vocab_size) * model.vocab_size)


def parse_gpu_ids(text: str) -> tuple[int, ...]:
    """Return the GPUs that a text such as `0-3,6` names, in order, each once.

    Raises:
        InputError: it names none, or a number is too large.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        if match is None:
            raise InputError(f"--gpus {text[:60]!r}: write GPU numbers such as 0-7 or 0,2,3")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last <= _MAX_GPU:
            raise InputError(f"--gpus {text[:60]!r}: {part.strip()} must go up, to {_MAX_GPU} at most")
        found.update(range(first, last + 1))
    return tuple(sorted(found))
