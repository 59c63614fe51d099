"""The work behind `maveriq serve`: token, socket, state, cluster, and then the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import typer

from maveriq.cli.engine_site import Engines, Site
from maveriq.cli.extras import extra
from maveriq.cli.local_gpus import cluster_here
from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError, MaveriqError
from maveriq.files import is_folder
from maveriq.scenario.options import Options

with extra("serve", for_whom="maveriq serve"):
    from maveriq.serve.app import create_app
    from maveriq.serve.auth import read_token
    from maveriq.serve.cluster import ClusterPlan, open_cluster, plan_cluster
    from maveriq.serve.server import listen, serve, url_of
    from maveriq.serve.service import Service
    from maveriq.serve.settings import ServeSettings
    from maveriq.serve.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a user says of a service beside its cluster; fields as the options."""

    models_folder: Path | None
    state: Path
    host: str
    port: int
    token_file: Path | None
    max_requests: int
    max_body_kib: int
    max_prompt_tokens: int
    max_output_tokens: int
    grace_period_s: float
    quiet: bool


def run_service(options: Options, engines: Engines, serving: Serving) -> None:
    """Serve until told to stop.

    Raises:
        InputError: an option, a file or an address that cannot be used.
        MaveriqError: the executor failed.
    """
    logging.basicConfig(format="maveriq: %(message)s", level=logging.ERROR if serving.quiet else logging.WARNING)
    if serving.models_folder is not None and not is_folder(serving.models_folder):
        raise InputError(f"--models-folder {str(serving.models_folder)!r} is no folder")
    settings = ServeSettings(
        token=read_token(serving.token_file),
        models_folder=serving.models_folder,
        max_in_flight=serving.max_requests,
        max_body_bytes=serving.max_body_kib * 1024,
        max_prompt_tokens=serving.max_prompt_tokens,
        max_output_tokens=serving.max_output_tokens,
        grace_period_s=serving.grace_period_s,
    )
    with contextlib.ExitStack() as held:
        site = held.enter_context(contextlib.closing(Site(engines.name)))
        plan = plan_cluster(options, planning=site.planning, clusters=cluster_here)
        listening = held.enter_context(contextlib.closing(listen(serving.host, serving.port, settings)))
        store = held.enter_context(contextlib.closing(Store(serving.state, kept_requests=settings.kept_requests)))
        asyncio.run(_serve(plan, engines, site, serving, settings, listening, store))


async def _serve(
    plan: ClusterPlan,
    engines: Engines,
    site: Site,
    serving: Serving,
    settings: ServeSettings,
    listening: socket.socket,
    store: Store,
) -> None:
    url = url_of(listening)
    say: Callable[[str], None] = (lambda _line: None) if serving.quiet else _say
    logs = serving.state.with_suffix(".logs")

    def folder_of(model: ModelSpec) -> Path | None:
        service: Service = app.state.service
        return service.models.folder_of(model)

    async with open_cluster(
        plan,
        backend=engines.name,
        time_scale=engines.time_scale,
        supervision=engines.supervision(),
        logs=logs,
        folder_of=folder_of,
        devices=site.devices(plan.cluster),
        watch=site.watch(),
        sampler=site.sampler(plan.cluster),
    ) as body:
        app = create_app(body, store, settings, plan.placements)
        ready = partial(say, f"serving {plan.cluster.name} on {url}; Ctrl-C ends it")
        await serve(app, listening, ready, fault=body.fault)
        if body.fault.done() and (fault := body.fault.exception()) is not None:
            raise MaveriqError(f"the executor failed ({type(fault).__name__}: {fault}); requests are ended") from fault
    say("stopped")


def _say(line: str) -> None:
    typer.echo(line, file=sys.stderr)
