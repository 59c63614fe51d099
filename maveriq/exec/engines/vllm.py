"""vLLM: a configuration of maveriq as its arguments, and the engine itself, in this process.

Names of arguments, of quantisations and of variables are those of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maveriq.domain.models import KvType, WeightType
from maveriq.exec.capabilities import Device
from maveriq.exec.engines.engine import EngineError, FailureKind, Step, StepAligner
from maveriq.exec.engines.external import (
    EngineRequirements,
    ExternalEngine,
    Translation,
    check_lengths,
    read_spec,
    write_files,
)
from maveriq.exec.messages import EngineSpec, Loaded, PromptSequence
from maveriq.units import Bytes

NAME = "vllm"

_BLOCK_TOKENS = 128  # the largest of vLLM's cache blocks; room is counted in whole ones
_SCALE_BYTES = 4
_GROUP = 128
_SEEDS = 2**32  # numpy's generator, which it seeds too, takes no others

# Weights that vLLM quantises while it loads; others must come quantised, or random in that form.
_ONLINE = {WeightType.INT8: "int8_per_channel_weight_only"}
_KV = {KvType.NATIVE: "auto", KvType.INT8: "int8_per_token_head"}
_AHEAD: Mapping[WeightType, Mapping[str, Any]] = {
    WeightType.INT4: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
            }
        },
    },
    WeightType.INT4_GPTQ: {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": _GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    },
}

# What the configuration of weights that are given may call the way they were quantised.
_GIVEN: Mapping[WeightType, tuple[str | None, ...]] = {
    WeightType.FLOAT16: (None,),
    WeightType.INT8: (None,),
    WeightType.INT4: ("compressed-tensors", "awq"),
    WeightType.INT4_GPTQ: ("gptq",),
}


def translate(spec: EngineSpec, folder: str, *, cpus: tuple[int, ...] = ()) -> Translation:
    """Return what starts vLLM for a specification.

    Args:
        spec: what to load.
        folder: of the model; the translation's files are to be written there, unless weights are given.
        cpus: on a CPU, the cores to share out among the ranks; as vLLM likes where there are none.

    Raises:
        EngineError: vLLM cannot do it.
    """
    wanted = read_spec(NAME, spec)
    cfg = wanted.configuration
    given = bool(spec.weights_folder)
    if given:
        _check_given(wanted)
    arguments: dict[str, Any] = {
        "model": spec.weights_folder or folder,
        "skip_tokenizer_init": True,
        "load_format": "auto" if given else "dummy",
        "dtype": _dtype(wanted),
        "seed": spec.seed % _SEEDS,
        "tensor_parallel_size": spec.tp,
        "pipeline_parallel_size": spec.pp,
        "max_num_seqs": spec.batch_size,
        "max_model_len": wanted.sequence_tokens,
        "kv_cache_dtype": _KV[cfg.kv],
        # Its share of a GPU that others use as well is what it is given, not a share of the whole.
        "kv_cache_memory_bytes": _kv_bytes(wanted),
        "gpu_memory_utilization": 0.01,
        "enable_prefix_caching": False,
        "enforce_eager": wanted.device is Device.CPU,
    }
    if cfg.gpus > 1:
        arguments["distributed_executor_backend"] = "mp"
    if cfg.weights in _ONLINE:
        arguments["quantization"] = _ONLINE[cfg.weights]
    files = {} if given else {"config.json": wanted.own_config(_AHEAD.get(cfg.weights))}
    return Translation(arguments=arguments, files=files, environment=_environment(wanted, cpus))


def _check_given(wanted: EngineRequirements) -> None:
    """Make sure that weights that are given are stored as asked for: vLLM goes by what their configuration says."""
    weights, method = wanted.configuration.weights, wanted.quantised_ahead
    if weights in _AHEAD and method is None:
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"vllm does not quantise to {weights} while loading, and the weights of {wanted.spec.model} are not "
            "quantised",
        )
    if method not in _GIVEN[weights]:
        raise EngineError(
            FailureKind.UNSUPPORTED, f"the weights of {wanted.spec.model} are quantised by {method}, not {weights}"
        )


def _dtype(wanted: EngineRequirements) -> str:
    if wanted.device is Device.CUDA:
        return "float16"
    # CPUs compute float32; the kernel for int8 weights wants bfloat16.
    return "bfloat16" if wanted.configuration.weights is WeightType.INT8 else "float32"


def _kv_bytes(wanted: EngineRequirements) -> Bytes:
    """Return the KV cache of a GPU: whole blocks for each sequence of a batch, and the one that vLLM keeps empty."""
    int8 = wanted.configuration.kv is KvType.INT8
    native_bytes = 4 if _dtype(wanted) == "float32" else 2
    per_token = wanted.kv_bytes_per_token(
        element_bytes=1 if int8 else native_bytes, per_head_bytes=_SCALE_BYTES if int8 else 0
    )
    blocks = wanted.spec.batch_size * -(-wanted.sequence_tokens // _BLOCK_TOKENS) + 1
    return blocks * _BLOCK_TOKENS * per_token


def _environment(wanted: EngineRequirements, cpus: tuple[int, ...]) -> dict[str, str]:
    cfg = wanted.configuration
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its core runs here, so that errors are seen as they are
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if cfg.pp > 1:
        variables["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, wanted.spec.layer_split))
    if wanted.device is Device.CPU and len(cpus) >= cfg.tp > 1:
        # Without this every rank asks for a NUMA node of its own.
        each = len(cpus) // cfg.tp
        shares = [cpus[rank * each : (rank + 1) * each] for rank in range(cfg.tp)]
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    return variables


class VllmEngine(ExternalEngine):
    """vLLM behind the `Engine` protocol: one model, its workers beneath this process."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        self._executions = 0

    def _shut_down(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()

    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        wanted = translate(spec, str(folder), cpus=tuple(sorted(os.sched_getaffinity(0))))
        write_files(wanted.files, folder)
        os.environ.update(wanted.environment)
        self._max_tokens = wanted.arguments["max_model_len"]
        try:
            import vllm  # type: ignore[import-not-found, unused-ignore]  # an extra
            from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise EngineError(FailureKind.UNSUPPORTED, f"vllm cannot be imported: {error}") from error

        self._engine = LLMEngine.from_engine_args(vllm.EngineArgs(**wanted.arguments))
        for _ in self._steps((PromptSequence(request_id=0, prompt=(1,), output_tokens=2),)):
            pass
        kv_bytes = wanted.arguments["kv_cache_memory_bytes"] * spec.tp * spec.pp
        return Loaded(backend=NAME, version=str(vllm.__version__), kv_cache_bytes=kv_bytes)

    def _steps(self, sequences: tuple[PromptSequence, ...]) -> Iterator[Step]:
        if self._engine is None:
            raise EngineError(FailureKind.ERROR, "vllm: nothing is loaded")
        check_lengths(NAME, sequences, self._max_tokens)
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found, unused-ignore]

        self._executions += 1
        positions = {f"{self._executions}-{position}": position for position in range(len(sequences))}
        aligner = StepAligner(len(sequences))
        try:
            for name, one in zip(positions, sequences, strict=True):
                sampling = SamplingParams(
                    temperature=0.0,
                    max_tokens=one.output_tokens,
                    ignore_eos=True,
                    stop_token_ids=list(one.stop_token_ids),
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                self._engine.add_request(name, {"prompt_token_ids": list(one.prompt)}, sampling)
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    tokens = output.outputs[0].token_ids
                    aligner.add(positions[output.request_id], tokens, ended=output.finished)
                yield from aligner.steps()
        finally:
            if self._engine is not None and self._engine.has_unfinished_requests():
                self._engine.abort_request(list(positions))
