"""The TensorRT-LLM engine (PyTorch backend), and the translation of an `EngineSpec` into its arguments.

The package can be imported only on a machine with an NVIDIA GPU, so the translation uses plain values. Argument names
are those of `TorchLlmArgs` of version 1.2, which rejects unknown ones.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from maveriq.domain.models import WeightType
from maveriq.errors import InputError
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
from maveriq.exec.messages import EngineSpec, Inspected, Loaded, PromptSequence
from maveriq.exec.model_files import matrix_types, read_model_file

NAME = "trtllm"

_BLOCK_TOKENS = 32
# int8 and int4 are weight-only, with one scale per channel; fp8 multiplies activations of fp8 too.
_ALGORITHMS = {WeightType.INT8: "W8A16", WeightType.INT4: "W4A16", WeightType.FP8: "FP8"}
_CHECKPOINT_ALGORITHMS: Mapping[WeightType, tuple[str | None, ...]] = {
    WeightType.FLOAT16: (None,),
    WeightType.INT8: ("W8A16",),
    WeightType.INT4: ("W4A16", "W4A16_AWQ"),
    WeightType.FP8: ("FP8",),
}
_QUANTISATION_FILE = "hf_quant_config.json"
_RANDOM_WEIGHTS_TYPE = "float16"
# The types that 16-bit weights may have: the name in a `config.json`, and that in a safetensors file.
_SIXTEEN_BIT_TYPES = {"float16": "F16", "bfloat16": "BF16"}


def translate(spec: EngineSpec, folder: str) -> Translation:
    """Return the arguments, files and environment to start TensorRT-LLM with.

    Args:
        spec: what to load.
        folder: where the translation's files will be written; not used if the spec has a folder of weights.

    Raises:
        EngineError: TensorRT-LLM does not support the spec.
    """
    requirements = read_spec(NAME, spec)
    weights, has_checkpoint = requirements.configuration.weights, bool(spec.weights_folder)
    torch_dtype = _RANDOM_WEIGHTS_TYPE
    if has_checkpoint:
        _check_checkpoint(requirements)
        torch_dtype = _checkpoint_type(requirements)
    sequence_tokens = requirements.sequence_tokens
    arguments: dict[str, Any] = {
        "model": spec.weights_folder or folder,
        "skip_tokenizer_init": True,
        "load_format": "auto" if has_checkpoint else "dummy",
        "dtype": torch_dtype,
        "tensor_parallel_size": spec.tp,
        "pipeline_parallel_size": spec.pp,
        "max_batch_size": spec.batch_size,
        "max_seq_len": sequence_tokens,
        "max_input_len": sequence_tokens,  # the default is 1024
        "max_num_tokens": requirements.step_tokens,
        # The KV type follows the activations. Without block reuse a repeated prompt takes as long as the first time.
        "kv_cache_config": {
            "dtype": "auto",
            "enable_block_reuse": False,
            "max_tokens": requirements.kv_blocks(_BLOCK_TOKENS) * _BLOCK_TOKENS,
        },
        # With padding, a batch of a size that has no graph takes the next larger one; otherwise it runs without.
        "cuda_graph_config": {"max_batch_size": spec.batch_size, "enable_padding": True},
    }
    if spec.pp > 1:
        arguments["pp_partition"] = list(spec.layer_split)
    # Layers have the type of `torch_dtype` in the configuration, float32 without it; `dtype` above does not reach them.
    files = {} if has_checkpoint else {"config.json": requirements.random_weights_config(None, torch_dtype=torch_dtype)}
    if not has_checkpoint and weights in _ALGORITHMS:
        files[_QUANTISATION_FILE] = json.dumps(_quantisation_config(_ALGORITHMS[weights]), indent=2)
    environment = {
        "HF_HUB_OFFLINE": "1",
        # Version 1.2 takes the index of a visible GPU for the driver's, and binds workers to the cores of another GPU.
        "TLLM_NUMA_AWARE_WORKER_AFFINITY": "0",
    }
    if requirements.configuration.gpus == 1:
        environment["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"  # do not start a worker process for one GPU
    return Translation(arguments=arguments, files=files, environment=environment)


def _check_checkpoint(requirements: EngineRequirements) -> None:
    """Check that a checkpoint is quantised as requested; TensorRT-LLM would use it however it is."""
    weights, folder = requirements.configuration.weights, requirements.spec.weights_folder
    file = Path(folder) / _QUANTISATION_FILE
    try:
        text = read_model_file(Path(folder), _QUANTISATION_FILE, what="quantisation")
    except InputError as error:
        raise EngineError(FailureKind.UNSUPPORTED, str(error)) from None
    if weights in _ALGORITHMS and text is None:
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"trtllm does not quantise to {weights} while loading, and {folder} has no {_QUANTISATION_FILE}; quantise "
            "the weights first",
        )
    algorithm = requirements.checkpoint_quantisation
    if text is not None:
        try:
            algorithm = json.loads(text)["quantization"]["quant_algo"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EngineError(FailureKind.UNSUPPORTED, f"{file} cannot be read: {error!r}") from None
    if algorithm not in _CHECKPOINT_ALGORITHMS[weights]:
        raise EngineError(
            FailureKind.UNSUPPORTED, f"the weights in {folder} are quantised by {algorithm}, not {weights}"
        )


def _checkpoint_type(requirements: EngineRequirements) -> str:
    """Return the `torch_dtype` of a checkpoint.

    Raises:
        EngineError: the layers or the weights would not have 16 bits, or the weights have another type than the layers.
    """
    folder, torch_dtype = requirements.spec.weights_folder, requirements.stated_type
    if torch_dtype not in _SIXTEEN_BIT_TYPES:
        found = f"has torch_dtype {torch_dtype}" if torch_dtype else "has no torch_dtype, so they would be float32"
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"trtllm builds layers of the type in config.json, and that in {folder} {found}; convert the weights to "
            f"{' or '.join(_SIXTEEN_BIT_TYPES)}, and set torch_dtype to it",
        )
    if requirements.configuration.weights is not WeightType.FLOAT16:
        return torch_dtype  # the matrices are quantised
    try:
        types = matrix_types(Path(folder))
    except InputError as error:
        raise EngineError(FailureKind.UNSUPPORTED, f"trtllm: {error}") from None
    for stored, name in types.items():
        if stored != _SIXTEEN_BIT_TYPES[torch_dtype]:
            raise EngineError(
                FailureKind.UNSUPPORTED,
                f"the weights in {folder} are not {torch_dtype} as their config.json says: {name} is stored as "
                f"{stored}; convert them",
            )
    return torch_dtype


def _quantisation_config(algorithm: str) -> dict[str, Any]:
    return {
        "producer": {"name": "maveriq"},
        "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    }


def _import_tensorrt_llm() -> Any:
    try:
        import tensorrt_llm  # type: ignore[import-not-found, unused-ignore]  # an extra
    except Exception as error:  # without a driver the import fails in many ways
        raise EngineError(FailureKind.UNSUPPORTED, f"trtllm cannot be imported: {error}") from error
    return tensorrt_llm


class TrtLlmEngine(ExternalEngine):
    """TensorRT-LLM as an `Engine`; its workers are children of `orted`, which MPI starts from this process."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self._llm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _shut_down(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            _cancel_streams(loop)
            loop.close()
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()

    def inspect(self, spec: EngineSpec) -> Inspected:
        """Compare the arguments with the fields of the installed classes; see `Inspectable`."""
        tensorrt_llm = _import_tensorrt_llm()
        from tensorrt_llm import llmapi  # type: ignore[import-not-found, unused-ignore]

        arguments = translate(spec, "").arguments
        sampling = _sampling_arguments(PromptSequence(request_id=0, prompt=(1,), output_tokens=1))
        unknown = unknown_names(arguments, llmapi.TorchLlmArgs) | unknown_names(sampling, tensorrt_llm.SamplingParams)
        for name, part in (("kv_cache_config", "KvCacheConfig"), ("cuda_graph_config", "CudaGraphConfig")):
            if not hasattr(llmapi, part):
                unknown.add(part)
            else:
                unknown |= {f"{name}.{field}" for field in unknown_names(arguments[name], getattr(llmapi, part))}
        return Inspected(version=str(tensorrt_llm.__version__), unknown_arguments=tuple(sorted(unknown)))

    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        translation = translate(spec, str(folder))
        write_files(translation.files, folder)
        os.environ.update(translation.environment)
        self._max_tokens = translation.arguments["max_seq_len"]
        tensorrt_llm = _import_tensorrt_llm()
        self._loop = asyncio.new_event_loop()
        self._llm = tensorrt_llm.LLM(**translation.arguments)
        for _ in self._steps((PromptSequence(request_id=0, prompt=(1,), output_tokens=2),)):
            pass
        return Loaded(backend=NAME, version=str(tensorrt_llm.__version__))

    def _steps(self, sequences: tuple[PromptSequence, ...]) -> Iterator[Step]:
        """Yield the steps of one stream per sequence; the event loop runs only while this waits for a chunk."""
        loop, llm = self._loop, self._llm
        if loop is None or llm is None:
            raise EngineError(FailureKind.ERROR, "trtllm: nothing is loaded")
        check_lengths(NAME, sequences, self._max_tokens)
        aligner, chunks = StepAligner(len(sequences)), asyncio.Queue[_Chunk]()
        streams = [
            loop.create_task(_stream(llm, sequence, position, chunks)) for position, sequence in enumerate(sequences)
        ]
        try:
            open_streams = len(streams)
            while open_streams:
                chunk = loop.run_until_complete(chunks.get())
                if isinstance(chunk, Exception):
                    raise chunk
                position, tokens, ended = chunk
                aligner.add(position, tokens, ended=ended)
                open_streams -= ended
                yield from aligner.steps()
        finally:
            _cancel_streams(loop)


def _cancel_streams(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the streams that are still open and wait until they have ended."""
    streams = set() if loop.is_closed() else asyncio.all_tasks(loop)
    if streams:
        for stream in streams:
            stream.cancel()
        loop.run_until_complete(asyncio.gather(*streams, return_exceptions=True))


def _sampling_arguments(sequence: PromptSequence) -> dict[str, Any]:
    return {
        "max_tokens": sequence.output_tokens,
        "temperature": 0.0,
        "top_k": 1,
        # Required without a tokenizer. No token has this id, so it ends nothing; newer versions ignore stop tokens
        # where `ignore_eos` is set.
        "end_id": -1,
        "pad_id": 0,
        "stop_token_ids": list(sequence.stop_token_ids) or None,
        "include_stop_str_in_output": True,
        "detokenize": False,
    }


_Chunk: TypeAlias = tuple[int, list[int], bool] | Exception
"""Position of a sequence, its next tokens, and whether they are its last; or the exception that ended a stream."""


async def _stream(llm: Any, sequence: PromptSequence, position: int, chunks: asyncio.Queue[_Chunk]) -> None:
    """Generate a sequence and put its tokens into the queue as they arrive."""
    from tensorrt_llm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    sampling = SamplingParams(**_sampling_arguments(sequence))
    try:
        result = llm.generate_async(list(sequence.prompt), sampling, streaming=True)
        sent = 0
        try:
            async for output in result:
                tokens = list(output.outputs[0].token_ids)  # all so far
                chunks.put_nowait((position, tokens[sent:], False))
                sent = len(tokens)
        except asyncio.CancelledError:
            result.abort()
            raise
        chunks.put_nowait((position, [], True))
    except Exception as error:  # raised by the consumer of the queue
        chunks.put_nowait(error)
