"""A server on the fake cluster in a thread, on a port of its own."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from fakes import FakeCluster, placements

from maveriq.policy.pinned import PinnedPlacementPolicy
from maveriq.serve.app import create_app
from maveriq.serve.model_registry import ModelRegistry
from maveriq.serve.server import listen, serve, url_of
from maveriq.serve.service import Service
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store
from maveriq.serve.tokenizer_process import TokenizerLimits

MODEL = "llama-2-7b"
TIMEOUT_S = 120.0  # generous: a test machine may be busy


@dataclass
class Running:
    """A server; its parts live in another thread's loop, so only look at them, or use `call`."""

    url: str
    cluster: FakeCluster
    service: Service
    policy: PinnedPlacementPolicy
    loop: asyncio.AbstractEventLoop

    def client(self, **more: object) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "timeout": TIMEOUT_S, **more})  # type: ignore[arg-type]

    def call(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(TIMEOUT_S)

    def hold_tokens(self) -> None:
        """Let the fake engine generate no tokens until `release_tokens`."""
        self.call(lambda: setattr(self.cluster, "permits", asyncio.Semaphore(0)))

    def release_tokens(self, count: int = 100_000) -> None:
        """Let the fake engine generate more tokens."""

        def release() -> None:
            assert self.cluster.permits is not None
            for _ in range(count):
                self.cluster.permits.release()

        self.call(release)

    def deploy(self, model: str = MODEL, **more: object) -> int:
        with self.client() as http:
            made = http.post("/endpoints", json={"model": model, "output_tokens": 6, **more}).json()
            until(lambda: http.get(f"/endpoints/{made['id']}").json()["status"] != "loading")
        return int(made["id"])


@contextlib.contextmanager
def running(
    state: Path, settings: ServeSettings | None = None, tokenizers: TokenizerLimits | None = None, **cluster: float
) -> Iterator[Running]:
    up: list[Running] = []
    ends: list[asyncio.Future[None]] = []
    ready = threading.Event()

    async def main() -> None:
        policy = placements()
        fake = FakeCluster(policy, **cluster)  # type: ignore[arg-type]
        limits = settings or ServeSettings(grace_period_s=2)
        store = Store(state)
        models = ModelRegistry(store, folder=limits.models_folder, max_models=limits.max_models, limits=tokenizers)
        app = create_app(fake, store, limits, policy, models)
        listening = listen("127.0.0.1", 0, limits)
        loop = asyncio.get_running_loop()
        ends.append(loop.create_future())
        up.append(Running(url_of(listening), fake, app.state.service, policy, loop))
        await serve(app, listening, ready.set, fault=ends[0])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(TIMEOUT_S), "the server did not come up"
    try:
        yield up[0]
    finally:
        up[0].loop.call_soon_threadsafe(ends[0].set_result, None)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    latest_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < latest_s, "the condition did not become true"
        time.sleep(0.02)
