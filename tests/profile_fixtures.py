"""Profiles that contain only measurements of whole models."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.measured import COLUMNS
from maveriq.units import gib


def write_profile(folder: Path, rows: str) -> Path:
    """Write a profile with these measurements, and return its path."""
    (folder / "measured.csv").write_text(",".join(COLUMNS) + "\n" + rows)
    (folder / "load.toml").write_text("fixed_s = 1\nper_gpu_s = 0\nper_gib_s = 0\n")
    (folder / "hardware.toml").write_text(
        'kind = "cpu"\nmemory_gib = 1\nidle_gib = 0\n'
        "[dispatch]\ntick_ms = 0\nafter_arrival_ms = 0\nafter_release_ms = 0\nregistration_delay_s = 0\n"
        "[run]\ndrain_s = 10\n[load_window]\nsamples = 120\nsample_s = 1\nlook_s = 0.2\nbusy_percent = 1\n"
        '[tables]\nload_fit = "load.toml"\nmeasured = "measured.csv"\n'
    )
    (folder / "profile.toml").write_text('name = "mine"\nprompt_tokens = 16\nhardware = "hardware.toml"\n')
    return folder / "profile.toml"


def rows_of(source: Estimator, requested: Iterable[tuple[ModelSpec, ParallelConfig]]) -> Iterator[str]:
    """Yield measurements that follow another estimator, at two prompt lengths and two batch sizes."""
    for model, cfg in requested:
        memory_gib = gib(source.memory(model, cfg))
        for batch in (1, 16):
            for prompt_tokens in (10, 900):
                took = source.service(model, cfg, prompt_tokens=prompt_tokens, output_tokens=20, batch=batch)
                case = (model.name, cfg.weights, cfg.kv, cfg.tp, cfg.pp, batch, prompt_tokens)
                yield ",".join(map(str, (*case, took.ttft_s, took.tpot_s, memory_gib + 0.1 * batch)))
