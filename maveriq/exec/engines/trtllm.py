"""TensorRT-LLM (PyTorch backend): a configuration of maveriq as its arguments, and the engine itself.

Its package can be imported only on a machine with an NVIDIA GPU, so that arguments are plain values here.
Names are those of 1.2 (`TorchLlmArgs`, which refuses unknown ones).
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
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
    write_files,
)
from maveriq.exec.messages import EngineSpec, Loaded, PromptSequence

NAME = "trtllm"

_BLOCK_TOKENS = 32
_MIN_BATCHED_TOKENS = 8192  # its default; more only where a prompt may be longer
_ALGORITHMS = {WeightType.INT8: "W8A16", WeightType.INT4: "W4A16"}  # weights alone, a scale per channel
_GIVEN: Mapping[WeightType, tuple[str | None, ...]] = {
    WeightType.FLOAT16: (None,),
    WeightType.INT8: ("W8A16",),
    WeightType.INT4: ("W4A16", "W4A16_AWQ"),
}
_QUANTISATION_FILE = "hf_quant_config.json"
_PYTHONS = ((3, 10), (3, 12))  # that its wheels are built for


def translate(spec: EngineSpec, folder: str) -> Translation:
    """Return what starts TensorRT-LLM for a specification.

    Args:
        spec: what to load.
        folder: of the model; the translation's files are to be written there, unless weights are given.

    Raises:
        EngineError: TensorRT-LLM cannot do it.
    """
    wanted = read_spec(NAME, spec)
    weights, given = wanted.configuration.weights, bool(spec.weights_folder)
    if given:
        _check_given(wanted)
    sequence_tokens = wanted.sequence_tokens
    blocks = spec.batch_size * -(-sequence_tokens // _BLOCK_TOKENS)
    arguments: dict[str, Any] = {
        "model": spec.weights_folder or folder,
        "skip_tokenizer_init": True,
        "load_format": "auto" if given else "dummy",
        "dtype": "float16",
        "tensor_parallel_size": spec.tp,
        "pipeline_parallel_size": spec.pp,
        "max_batch_size": spec.batch_size,
        "max_seq_len": sequence_tokens,
        "max_input_len": sequence_tokens,  # else 1024
        "max_num_tokens": max(_MIN_BATCHED_TOKENS, sequence_tokens),
        # Its KV type follows the activations. Prompts that come again must cost what they cost the first time.
        "kv_cache_config": {"dtype": "auto", "enable_block_reuse": False, "max_tokens": blocks * _BLOCK_TOKENS},
        "cuda_graph_config": {"max_batch_size": spec.batch_size},
    }
    if spec.pp > 1:
        arguments["pp_partition"] = list(spec.layer_split)
    files = {} if given else {"config.json": wanted.own_config(None)}
    if not given and weights in _ALGORITHMS:
        files[_QUANTISATION_FILE] = json.dumps(_quantisation(_ALGORITHMS[weights]), indent=2)
    environment = {"HF_HUB_OFFLINE": "1"}
    if wanted.configuration.gpus == 1:
        environment["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"  # else even one GPU gets a process beneath this one
    return Translation(arguments=arguments, files=files, environment=environment)


def _check_given(wanted: EngineRequirements) -> None:
    """Make sure that weights that are given are stored as asked for: it goes by what lies beside them."""
    weights, folder = wanted.configuration.weights, wanted.spec.weights_folder
    file = Path(folder) / _QUANTISATION_FILE
    if weights in _ALGORITHMS and not file.is_file():
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"trtllm does not quantise to {weights} while loading, and {folder} has no {_QUANTISATION_FILE}; quantise "
            "the weights first",
        )
    found = wanted.quantised_ahead
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["quantization"]["quant_algo"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EngineError(FailureKind.UNSUPPORTED, f"{file} cannot be read: {error!r}") from None
    if found not in _GIVEN[weights]:
        raise EngineError(FailureKind.UNSUPPORTED, f"the weights in {folder} are quantised by {found}, not {weights}")


def _quantisation(algorithm: str) -> dict[str, Any]:
    return {
        "producer": {"name": "maveriq"},
        "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    }


def missing() -> str | None:
    """Return in one line what TensorRT-LLM lacks here, None where it lacks nothing that can be seen from outside."""
    from maveriq.exec.gpus import NvmlMeter

    lacks: list[str] = []
    if not sys.platform.startswith("linux"):
        lacks.append(f"it runs on Linux, not on {sys.platform}")
    try:
        NvmlMeter().close()
    except InputError as error:
        lacks.append(str(error).partition(";")[0])  # what to do about it is clear here
    if importlib.util.find_spec("tensorrt_llm") is None:
        lacks.append("the package tensorrt_llm is not installed (pip install tensorrt-llm, or NVIDIA's container)")
        if sys.version_info[:2] not in _PYTHONS:
            here = ".".join(map(str, sys.version_info[:2]))
            wheels = " and ".join(".".join(map(str, one)) for one in _PYTHONS)
            lacks.append(f"this is Python {here}, its wheels are for {wheels}")
    return "; ".join(lacks) or None


class TrtLlmEngine(ExternalEngine):
    """TensorRT-LLM behind the `Engine` protocol: one model, its workers beneath this process."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self._llm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _shut_down(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            _call_off(loop)
            loop.close()
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()

    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        wanted = translate(spec, str(folder))
        write_files(wanted.files, folder)
        os.environ.update(wanted.environment)
        self._max_tokens = wanted.arguments["max_seq_len"]
        try:
            import tensorrt_llm  # type: ignore[import-not-found, unused-ignore]  # an extra
        except Exception as error:  # without a driver it fails in many ways
            reason = missing() or str(error)
            raise EngineError(FailureKind.UNSUPPORTED, f"trtllm cannot be imported: {reason}") from error
        self._loop = asyncio.new_event_loop()
        self._llm = tensorrt_llm.LLM(**wanted.arguments)
        for _ in self._steps((PromptSequence(request_id=0, prompt=(1,), output_tokens=2),)):
            pass
        return Loaded(backend=NAME, version=str(tensorrt_llm.__version__))

    def _steps(self, sequences: tuple[PromptSequence, ...]) -> Iterator[Step]:
        """Yield steps from streams that all run in this engine's own event loop, while it is asked for the next one."""
        loop, llm = self._loop, self._llm
        if loop is None or llm is None:
            raise EngineError(FailureKind.ERROR, "trtllm: nothing is loaded")
        check_lengths(NAME, sequences, self._max_tokens)
        aligner, chunks = StepAligner(len(sequences)), asyncio.Queue[_Chunk]()
        streams = [loop.create_task(_stream(llm, one, position, chunks)) for position, one in enumerate(sequences)]
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
            _call_off(loop)


def _call_off(loop: asyncio.AbstractEventLoop) -> None:
    """End the streams that are still open; none is where the loop is closed."""
    streams = set() if loop.is_closed() else asyncio.all_tasks(loop)
    if streams:
        for stream in streams:
            stream.cancel()
        loop.run_until_complete(asyncio.gather(*streams, return_exceptions=True))


_Chunk: TypeAlias = tuple[int, list[int], bool] | Exception
"""The next tokens of the sequence at a position, and whether they were its last; or why a stream broke."""


async def _stream(llm: Any, one: PromptSequence, position: int, chunks: asyncio.Queue[_Chunk]) -> None:
    """Ask for a sequence and pass its tokens on as they come."""
    from tensorrt_llm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    sampling = SamplingParams(
        max_tokens=one.output_tokens,
        temperature=0.0,
        top_k=1,
        end_id=-1,  # required without a tokenizer; no token has this id, so it ends nothing
        pad_id=0,
        ignore_eos=True,
        stop_token_ids=list(one.stop_token_ids) or None,
        include_stop_str_in_output=True,
        detokenize=False,
    )
    try:
        result = llm.generate_async(list(one.prompt), sampling, streaming=True)
        seen = 0
        try:
            async for output in result:
                tokens = list(output.outputs[0].token_ids)  # all so far
                chunks.put_nowait((position, tokens[seen:], False))
                seen = len(tokens)
        except asyncio.CancelledError:
            result.abort()
            raise
        chunks.put_nowait((position, [], True))
    except Exception as error:  # who waits for the chunks is to hear of it
        chunks.put_nowait(error)
