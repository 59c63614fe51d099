"""The vLLM engine, which runs in this process, and the translation of an `EngineSpec` into its arguments.

The names of arguments, quantisation methods and variables are those of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maveriq.domain.models import KvType, WeightType
from maveriq.exec.device import Device
from maveriq.exec.engines.engine import EngineError, FailureKind, Step, StepAligner
from maveriq.exec.engines.external import (
    EngineRequirements,
    ExternalEngine,
    Translation,
    check_lengths,
    read_spec,
    unknown_names,
    write_files,
)
from maveriq.exec.engines.failures import as_engine_error
from maveriq.exec.messages import EngineSpec, Inspected, Loaded, PromptSequence, RankShard
from maveriq.units import Bytes

NAME = "vllm"

_BLOCK_TOKENS = 128  # vLLM's largest KV block; capacity is computed in whole blocks
_SCALE_BYTES = 4
_GROUP_SIZE = 128
_SEED_LIMIT = 2**32  # vLLM also seeds numpy, which accepts no larger seed

# vLLM quantises these weights while it loads them: fp8 with one scale per channel, for activations with one per token.
_ONLINE_QUANTISATION = {WeightType.FP8: "fp8_per_channel"}
_KV_CACHE_DTYPE = {KvType.NATIVE: "auto", KvType.INT8: "int8_per_token_head"}


def _pack_quantized(bits: int) -> Mapping[str, Any]:
    """Return the `quantization_config` of weights with one scale per output channel."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


# These weights must be quantised in the checkpoint; random weights get this `quantization_config`. What vLLM calls
# `int8_per_channel_weight_only` quantises the experts of a mixture alone and leaves all other layers at 16 bits.
_CHECKPOINT_QUANTISATION: Mapping[WeightType, Mapping[str, Any]] = {
    WeightType.INT8: _pack_quantized(8),
    WeightType.INT4: _pack_quantized(4),
    WeightType.INT4_GPTQ: {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": _GROUP_SIZE,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    },
}

_HALF_ONLY_METHODS = ("awq", "gptq")  # some of their kernels compute in float16 alone

# The `quant_method` that a checkpoint may have.
_CHECKPOINT_METHODS: Mapping[WeightType, tuple[str | None, ...]] = {
    WeightType.FLOAT16: (None,),
    WeightType.INT8: ("compressed-tensors",),
    WeightType.INT4: ("compressed-tensors", "awq"),
    WeightType.INT4_GPTQ: ("gptq",),
    WeightType.FP8: (None, "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"),
}


def translate(spec: EngineSpec, folder: str, *, cpus: tuple[int, ...] = ()) -> Translation:
    """Return the arguments, files and environment to start vLLM with.

    Args:
        spec: what to load.
        folder: where the translation's files will be written; not used if the spec has a folder of weights.
        cpus: the CPU cores to divide among the ranks; empty leaves this to vLLM. Not used on GPUs.

    Raises:
        EngineError: vLLM does not support the spec.
    """
    requirements = read_spec(NAME, spec)
    cfg = requirements.configuration
    has_checkpoint = bool(spec.weights_folder)
    if has_checkpoint:
        _check_checkpoint(requirements)
    # Values of bfloat16 may not fit float16.
    keeps_bfloat16 = (
        has_checkpoint
        and requirements.stated_type == "bfloat16"
        and requirements.checkpoint_quantisation not in _HALF_ONLY_METHODS
    )
    arguments: dict[str, Any] = {
        "model": spec.weights_folder or folder,
        "skip_tokenizer_init": True,
        "load_format": "safetensors" if has_checkpoint else "dummy",
        "dtype": "bfloat16" if keeps_bfloat16 else "float16",
        "seed": spec.seed % _SEED_LIMIT,
        "tensor_parallel_size": spec.tp,
        "pipeline_parallel_size": spec.pp,
        "max_num_seqs": spec.batch_size,
        "max_num_batched_tokens": requirements.step_tokens,
        "max_model_len": requirements.sequence_tokens,
        "kv_cache_dtype": _KV_CACHE_DTYPE[cfg.kv],
        # A fixed size: engines share GPUs, and by default vLLM takes a share of the whole GPU.
        "kv_cache_memory_bytes": _kv_bytes(requirements),
        "gpu_memory_utilization": 0.01,
        "enable_prefix_caching": False,
        "enforce_eager": requirements.device is Device.CPU,
    }
    if cfg.gpus > 1:
        arguments["distributed_executor_backend"] = "mp"
    if cfg.weights in _ONLINE_QUANTISATION and not (has_checkpoint and requirements.checkpoint_quantisation):
        arguments["quantization"] = _ONLINE_QUANTISATION[cfg.weights]
    files = (
        {}
        if has_checkpoint
        else {"config.json": requirements.random_weights_config(_CHECKPOINT_QUANTISATION.get(cfg.weights))}
    )
    return Translation(arguments=arguments, files=files, environment=_environment(requirements, cpus))


def _check_checkpoint(requirements: EngineRequirements) -> None:
    """Check that a checkpoint is quantised as requested; vLLM would use it however it is."""
    weights, method = requirements.configuration.weights, requirements.checkpoint_quantisation
    if weights in _CHECKPOINT_QUANTISATION and method is None:
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"vllm does not quantise to {weights} while loading, and the weights of {requirements.spec.model} are not "
            "quantised",
        )
    if method not in _CHECKPOINT_METHODS[weights]:
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"the weights of {requirements.spec.model} are quantised by {method}, not {weights}",
        )


def kv_bytes_per_token(requirements: EngineRequirements) -> Bytes:
    """Return the KV cache size of a token, on the GPU that holds most of it."""
    int8 = requirements.configuration.kv is KvType.INT8
    return requirements.kv_bytes_per_token(element_bytes=1 if int8 else 2, per_head_bytes=_SCALE_BYTES if int8 else 0)


def _kv_bytes(requirements: EngineRequirements) -> Bytes:
    """Return the KV cache size per GPU: the blocks of a batch, and one that vLLM keeps empty."""
    return (requirements.kv_blocks(_BLOCK_TOKENS) + 1) * _BLOCK_TOKENS * kv_bytes_per_token(requirements)


def _environment(requirements: EngineRequirements, cpus: tuple[int, ...]) -> dict[str, str]:
    cfg = requirements.configuration
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the core in this process, so that its exceptions arrive unchanged
        # A forked worker inherits the threads' locks of this process, and CUDA where it is initialised.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if cfg.pp > 1:
        variables["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, requirements.spec.layer_split))
    if requirements.device is Device.CPU and len(cpus) >= cfg.tp > 1:
        # By default every rank requires a NUMA node of its own.
        cores_per_rank = len(cpus) // cfg.tp
        shares = [cpus[rank * cores_per_rank : (rank + 1) * cores_per_rank] for rank in range(cfg.tp)]
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    return variables


def _own_cpus() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0)))


def _import_vllm() -> Any:
    try:
        import vllm  # type: ignore[import-not-found, unused-ignore]  # an extra
    except ImportError as error:
        raise EngineError(FailureKind.UNSUPPORTED, f"vllm cannot be imported: {error}") from error
    return vllm


def sampling_arguments(sequence: PromptSequence) -> dict[str, Any]:
    """Return the arguments of vLLM's `SamplingParams` for a sequence."""
    return {
        "temperature": 0.0,
        "max_tokens": sequence.output_tokens,
        "ignore_eos": True,
        "stop_token_ids": list(sequence.stop_token_ids),
        "detokenize": False,
    }


def sampling_params(sequence: PromptSequence) -> Any:
    """Return vLLM's `SamplingParams` for a sequence; each step returns what is new."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found, unused-ignore]

    return SamplingParams(**sampling_arguments(sequence), output_kind=RequestOutputKind.DELTA)


def layers_bytes_pid(model: Any) -> tuple[int, int, int]:
    """Return a rank's transformer layers, bytes of parameters, and process; runs in vLLM's worker.

    Layers of other stages are in the list of layers as `PPMissingLayer`.
    """
    stacks = [module for module in model.modules() if type(module).__name__ == "ModuleList"]
    layers = [type(layer).__name__ for layer in max(stacks, key=len, default=())]
    size = sum(parameter.nbytes for parameter in model.parameters())
    # On some CPUs a kernel keeps a packed copy of a matrix, and the layer an empty one.
    for module in model.modules():
        matrix = getattr(module, "weight", None)
        if hasattr(module, "input_size_per_partition") and matrix is not None and not matrix.numel():
            size += module.input_size_per_partition * module.output_size_per_partition * matrix.element_size()
    return len(layers) - layers.count("PPMissingLayer"), size, os.getpid()


def _last_log_probabilities(engine: Any, sequences: Sequence[Sequence[int]]) -> list[float]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # With 0 a prompt's tokens come with their own log probability alone.
    params = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False, "prompt_logprobs": 0}
    for number, tokens in enumerate(sequences):
        sampling = SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(f"score-{number}", {"prompt_token_ids": list(tokens)}, sampling)
    found: dict[str, float] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                token = output.prompt_token_ids[-1]
                found[output.request_id] = float(output.prompt_logprobs[-1][token].logprob)
    return [found[f"score-{number}"] for number in range(len(sequences))]


class VllmEngine(ExternalEngine):
    """vLLM as an `Engine`; its workers are child processes of this process."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        self._executions = 0

    def _shut_down(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()

    def inspect(self, spec: EngineSpec) -> Inspected:
        """Compare arguments and environment variables with what the installed vLLM knows; see `Inspectable`."""
        vllm = _import_vllm()
        from vllm import envs  # type: ignore[import-not-found, unused-ignore]

        translation = self._translate(spec, "", _own_cpus())
        sampling = sampling_arguments(PromptSequence(request_id=0, prompt=(1,), output_tokens=1))
        variables = {name for name in translation.environment if name.startswith("VLLM_")}
        unknown = (
            unknown_names(translation.arguments, vllm.EngineArgs)
            | unknown_names(sampling, vllm.SamplingParams)
            | (variables - set(envs.environment_variables))
        )
        return Inspected(version=str(vllm.__version__), unknown_arguments=tuple(sorted(unknown)))

    def _translate(self, spec: EngineSpec, folder: str, cpus: tuple[int, ...]) -> Translation:
        return translate(spec, folder, cpus=cpus)

    def _loaded_engine(self) -> Any:
        if self._engine is None:
            raise EngineError(FailureKind.ERROR, "vllm: nothing is loaded")
        return self._engine

    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        translation = self._translate(spec, str(folder), _own_cpus())
        write_files(translation.files, folder)
        os.environ.update(translation.environment)
        self._max_tokens = translation.arguments["max_model_len"]
        vllm = _import_vllm()
        from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]

        self._engine = LLMEngine.from_engine_args(vllm.EngineArgs(**translation.arguments))
        for _ in self._steps((PromptSequence(request_id=0, prompt=(1,), output_tokens=2),)):
            pass
        kv_bytes = translation.arguments.get("kv_cache_memory_bytes", 0) * spec.tp * spec.pp
        shards = self._shards()
        return Loaded(
            backend=NAME,
            version=str(vllm.__version__),
            weights_bytes=sum(shard.weights_bytes for shard in shards),
            kv_cache_bytes=kv_bytes,
            shards=shards,
        )

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the log probability of the last token of each sequence, after those before it.

        Args:
            sequences: tokens, at least two in each.

        Raises:
            EngineError: nothing is loaded, a sequence is too long, or vLLM fails.
        """
        engine = self._loaded_engine()
        longest = tuple(PromptSequence(request_id=0, prompt=tuple(tokens), output_tokens=1) for tokens in sequences)
        check_lengths(NAME, longest, self._max_tokens)
        try:
            return _last_log_probabilities(engine, sequences)
        except Exception as error:
            raise as_engine_error(NAME, error) from error

    def _shards(self) -> tuple[RankShard, ...]:
        """Return what each rank holds, in rank order."""
        engine = self._engine
        dtype = str(engine.model_config.dtype).removeprefix("torch.")
        held = engine.collective_rpc("apply_model", args=(layers_bytes_pid,))
        return tuple(RankShard(layers=layers, weights_bytes=size, dtype=dtype, pid=pid) for layers, size, pid in held)

    def _steps(self, sequences: tuple[PromptSequence, ...]) -> Iterator[Step]:
        self._loaded_engine()
        check_lengths(NAME, sequences, self._max_tokens)
        self._executions += 1
        positions = {f"{self._executions}-{position}": position for position in range(len(sequences))}
        aligner = StepAligner(len(sequences))
        try:
            for request_id, sequence in zip(positions, sequences, strict=True):
                prompt = {"prompt_token_ids": list(sequence.prompt)}
                self._engine.add_request(request_id, prompt, sampling_params(sequence))
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    tokens = output.outputs[0].token_ids
                    aligner.add(positions[output.request_id], tokens, ended=output.finished)
                yield from aligner.steps()
        finally:
            if self._engine is not None and self._engine.has_unfinished_requests():
                self._engine.abort_request(list(positions))
