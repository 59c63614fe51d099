"""How near the times that a policy expects at a load are to those of the simulation that follows.

`python experiments/at_load/check.py` simulates docs/examples/four-models.toml at several rates, each model at its
share, and prints the fleet that min-cost chooses on 32 H100 under a TTFT SLO of 500 ms, and both times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import maveriq

MODELS = Path(__file__).parents[2] / "docs" / "examples" / "four-models.toml"
_SET_RPS = 20.0  # of all models of the set


def scaled(text: str, factor: float) -> str:
    """Return a model set in which every model expects so many times the requests."""
    lines = []
    for line in text.splitlines():
        key, _, value = line.partition(" = ")
        lines.append(f"{key} = {factor * float(value)}" if key == "expected_rps" else line)
    return "\n".join(lines)


def rows(rps: float, duration_s: float) -> Iterator[str]:
    """Simulate the set at a rate, and yield a line for each model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "models.toml"
        path.write_text(scaled(MODELS.read_text(encoding="utf-8"), rps / _SET_RPS), encoding="utf-8")
        run = maveriq.simulate(
            models=path, gpus="32xH100-SXM", service_times="physics", trace="synthetic", arrivals="poisson", rate=rps,
            duration_s=duration_s, prompt_tokens="uniform:512-1536", output_tokens="lognormal:200,0.5", slo_ttft_ms=500,
        )  # fmt: skip
    for name, metrics in run.summary.models.items():
        plans = [each.plan for each in run.record.deployments if each.endpoint.model.name == name and each.plan]
        latency, ttft = metrics.latency_s, metrics.ttft_s
        if not plans or latency is None or ttft is None:
            yield f"{rps:6g}  {name:13}  none deployed"
            continue
        expected_s = plans[0].est_latency_s
        yield (
            f"{rps:6g}  {name:13}  {len(plans)} x {plans[0].configuration!s:28}  expected {expected_s:6.2f} s  "
            f"simulated {latency.mean:6.2f} s  {100 * (expected_s / latency.mean - 1):+5.1f} %  "
            f"TTFT p95 {1e3 * ttft.p95:4.0f} ms"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[20.0, 80.0])
    parser.add_argument("--duration-s", type=float, default=60.0)
    arguments = parser.parse_args()
    lines = ["  rate  model          replicas and configuration         mean latency of a request"]
    for rps in arguments.rates:
        lines += rows(rps, arguments.duration_s)
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
