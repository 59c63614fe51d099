"""Scores tokens with vLLM, in a process of vLLM's own interpreter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import MaveriqError
from maveriq.exec.device import Device
from maveriq.exec.engine_python import NOT_INHERITED, link_package, process_group, python_environment
from maveriq.exec.engines.interpreter import module_command
from maveriq.exec.engines.vllm_scores import ScoreJob, Scores
from maveriq.exec.messages import one_line
from maveriq.exec.model_files import ModelFiles


class VllmScorer:
    """A model in one format. It is a `maveriq.profiling.accuracy.Scorer`; each call starts vLLM, so call it once.

    Args:
        model: the model.
        files: its configuration and weights.
        weights: the format of its weights.
        kv: that of the KV cache.
        device: what vLLM runs on.
        batch_size: sequences that are computed at once.
        python: the interpreter with vLLM.
    """

    def __init__(
        self,
        model: ModelSpec,
        files: ModelFiles,
        *,
        weights: WeightType,
        kv: KvType,
        device: Device,
        batch_size: int,
        python: Path,
    ) -> None:
        self._python = python
        self._spec = files.engine_spec(
            model,
            ParallelConfig(tp=1, pp=1, weights=weights, kv=kv),
            batch_size=batch_size,
            devices=("cuda:0" if device is Device.CUDA else "cpu",),
        )

    def log_probabilities(self, prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log probabilities of tokens after prompts.

        Raises:
            MaveriqError: vLLM cannot load the model, or fails.
        """
        sequences = tuple((*prompt, token) for prompt, tokens in zip(prompts, wanted, strict=True) for token in tokens)
        with tempfile.TemporaryDirectory(prefix="maveriq-scores-") as folder:
            values = iter(self._run(ScoreJob(spec=self._spec, sequences=sequences), Path(folder)).log_probabilities)
        return [[next(values) for _ in tokens] for tokens in wanted]

    def _run(self, job: ScoreJob, folder: Path) -> Scores:
        (folder / "job.json").write_bytes(msgspec.json.encode(job))
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment = inherited | python_environment(inherited, link_package(folder), self._python)
        command = module_command(str(self._python), "maveriq.exec.engines.vllm_scores")
        command += [str(folder / "job.json"), str(folder / "scores.json")]
        with (
            (folder / "log").open("wb") as log,
            process_group(command, environment=environment, stdout=log.fileno(), stderr=log.fileno()) as process,
        ):
            code = process.wait()
        if not (folder / "scores.json").exists():
            last = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise MaveriqError(f"vllm ended with code {code} before it had scored: {one_line(''.join(last))}")
        scores = msgspec.json.decode((folder / "scores.json").read_bytes(), type=Scores)
        if scores.error:
            raise MaveriqError(f"{job.spec.model} in {job.spec.weights}: {scores.error}")
        return scores
