"""Take the pictures of reports and of the dashboard in docs/images, in Chromium.

Usage: python scripts/render_report_images.py [FOLDER] [--only KIND,...]

Needs `pip install --group browser` and Chromium (MAVERIQ_CHROMIUM, or `chromium` on the path). The results are
simulated here, with fixed seeds; the dashboard is that of a server with emulated engines, which gets requests for a
minute and a half.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

import maveriq
from maveriq.streams import generator

_ROOT = Path(__file__).parent.parent
_IMAGES = _ROOT / "docs" / "images"
_SIZE = {"width": 1280, "height": 1180}
_SHOWN_WIDTH = 960
_COLOURS = 96
_LOAD_S, _RATE = 90.0, 3.0


def _run(folder: Path) -> Path:
    return maveriq.simulate(slo_scale=5).to_html(folder / "run.html")


def _comparison(folder: Path) -> Path:
    policies = ("packing", "llf", "hybrid")
    paths = [maveriq.simulate(slo_scale=5, policy=policy).save(folder / policy) for policy in policies]
    return maveriq.compare(*paths).to_html(folder / "comparison.html")


def _sweep(folder: Path) -> Path:
    grid = {"policy": ["hybrid", "packing", "llf"], "scale": [0.1, 0.2, 0.3, 0.4], "seed": [1, 2, 3]}
    spec = {"name": "three policies at four loads", "options": {"slo_scale": 5, "limit": 1000}, "grid": grid}
    maveriq.sweep(spec, out=folder / "sweep")
    return maveriq.load_sweep(folder / "sweep").to_html(folder / "sweep.html")


def _sizing(folder: Path) -> Path:
    sized = maveriq.size(
        models=str(_ROOT / "docs" / "examples" / "four-models.toml"),
        gpus=["H100-SXM", "L40S"],
        rate=20.0,
        duration_s=60.0,
        trace="synthetic",
        prompt_tokens="lognormal:800,0.8",
        output_tokens="lognormal:200,0.5",
        service_times="physics",
        slo_ttft_ms=500.0,
        slo_tpot_ms=50.0,
        attainment=98.0,
    )
    return sized.to_html(folder / "sizing.html")


_REPORTS: dict[str, Callable[[Path], Path]] = {
    "run": _run,
    "comparison": _comparison,
    "sweep": _sweep,
    "sizing": _sizing,
}
DASHBOARD = "dashboard"
_DARK = ("comparison", DASHBOARD)


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Yield the URL of a server with three models that has had requests for some time."""
    command = [sys.executable, "-m", "maveriq", "serve", "--backend", "emulated", "--port", "8917", "--quiet"]
    url = "http://127.0.0.1:8917"
    process = subprocess.Popen([*command, "--state", str(folder / "state.db")])  # noqa: S603  (our own command)
    try:
        with httpx.Client(base_url=url, timeout=60) as http:
            _wait_until(lambda: _answers(http))
            models = {"llama-2-7b": 3, "llama-2-13b": 2, "llama-2-70b": 1}
            for model in models:
                http.post("/endpoints", json={"model": model, "slo_ms": 4000}).raise_for_status()
            _wait_until(lambda: all(endpoint["status"] == "up" for endpoint in http.get("/endpoints").json()))
            _send_requests(http, [model for model, weight in models.items() for _ in range(weight)])
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.2)
    raise SystemExit("the server did not come up in two minutes")


def _send_requests(http: httpx.Client, models: list[str]) -> None:
    random, until_s = generator(1, "requests of the picture"), time.monotonic() + _LOAD_S
    with ThreadPoolExecutor(64) as pool:
        while time.monotonic() < until_s:
            body = {
                "model": models[int(random.integers(len(models)))],
                "prompt": "x" * int(random.integers(10, 400)),
                "max_tokens": int(random.integers(10, 120)),
                "slo_ms": 4000,
            }
            pool.submit(http.post, "/v1/completions", json=body)
            time.sleep(float(random.exponential(1 / _RATE)))


def _picture(browser: Any, url: str, file: Path, *, scheme: str) -> None:
    context = browser.new_context(viewport=_SIZE, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector('html[data-state="drawn"]', timeout=60_000)
    shot = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    height = round(shot.height * _SHOWN_WIDTH / shot.width)
    small = shot.convert("RGB").resize((_SHOWN_WIDTH, height), Image.Resampling.LANCZOS)
    small.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def main(folder: Path, kinds: list[str]) -> None:
    """Take the pictures of some kinds."""
    chromium = os.environ.get("MAVERIQ_CHROMIUM") or shutil.which("chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for kind in kinds:
            scheme = "dark" if kind in _DARK else "light"
            if kind == DASHBOARD:
                with _server(Path(name)) as url:
                    _picture(browser, f"{url}/dashboard", folder / "dashboard.png", scheme=scheme)
                continue
            report = _REPORTS[kind](Path(name))
            _picture(browser, report.as_uri(), folder / f"report-{kind}.png", scheme=scheme)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=_IMAGES, help="output folder (default: docs/images)")
    parser.add_argument("--only", default=",".join([*_REPORTS, DASHBOARD]), help="kinds, separated by commas")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.only.split(","))
