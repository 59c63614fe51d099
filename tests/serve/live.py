"""A server on the fake cluster, as a process of its own; prints its URL.

python live.py STATE SECONDS_PER_TOKEN DRAIN_S
"""

import asyncio
import sys
from pathlib import Path

from fakes import FakeCluster, placements

from maveriq.serve.app import create_app
from maveriq.serve.auth import read_token
from maveriq.serve.model_registry import ModelRegistry
from maveriq.serve.server import listen, serve, url_of
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main(state: str, step: str, drain: str) -> None:
    settings = ServeSettings(token=read_token(None), grace_period_s=float(drain), max_in_flight=64)
    listening = listen("127.0.0.1", 0, settings)
    policy = placements()
    store = Store(Path(state))
    models = ModelRegistry(store, folder=None, max_models=settings.max_models)
    app = create_app(FakeCluster(policy, token_s=float(step)), store, settings, policy, models)
    await serve(app, listening, lambda: say(url_of(listening)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
