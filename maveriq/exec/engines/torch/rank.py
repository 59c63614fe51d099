"""The process of one rank: `python -m maveriq.exec.engines.torch.rank FD`, where FD is its end of a socket.

It lives as long as the other end is open. A thread of its own waits on the socket, so that the process ends at once
with its engine even while it computes or waits for another rank.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path

from maveriq.exec.engines.base import EngineError, FailureKind
from maveriq.exec.engines.torch.wire import (
    TO_RANK,
    FromRank,
    LoadRank,
    RankFailed,
    RankLoaded,
    Run,
    Stepped,
    ToRank,
    hear,
    say,
)


def main(argument: str) -> None:
    """Serve the engine at the other end of a socket until it goes away."""
    # Ctrl-C is for the executor, which stops its engines in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=int(argument))
    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    try:
        _serve(channel, inbox)
    except EngineError as error:
        _fail(channel, error.kind, str(error))
    except BrokenPipeError:
        return
    except Exception as error:  # whatever it is, the engine must hear of it
        _fail(channel, FailureKind.ERROR, f"{type(error).__name__}: {error}")
        raise


def _listen(channel: socket.socket, inbox: queue.SimpleQueue[ToRank]) -> None:
    while (body := hear(channel)) is not None:
        inbox.put(TO_RANK.decode(body))
    # Not sys.exit: the thread that computes may be waiting for ranks that are gone.
    os._exit(0)


def _serve(channel: socket.socket, inbox: queue.SimpleQueue[ToRank]) -> None:
    from maveriq.exec.engines.torch.worker import NoRoomError, Worker, links_of

    load = inbox.get()
    if not isinstance(load, LoadRank):
        raise TypeError(f"the first message must be a LoadRank, not {load!r}")
    worker = Worker(load.spec, load.rank, links_of(load.spec, load.rank, Path(load.meeting_point)))
    stage = worker.stage
    say(channel, RankLoaded(weights_bytes=stage.weights_bytes, kv_cache_bytes=stage.kv_cache_bytes))
    while True:
        order = inbox.get()
        if not isinstance(order, Run):
            raise TypeError(f"a loaded rank can only run, not {order!r}")
        try:
            for tokens, last in worker.run(order.work.sequences):
                if worker.reports:
                    say(channel, Stepped(tokens=tokens, last=last))
        except EngineError as error:
            # In the midst of an execution other ranks are left waiting.
            if len(load.spec.devices) > 1 and not isinstance(error, NoRoomError):
                raise
            say(channel, RankFailed(kind=error.kind, message=str(error), serves=True))


def _fail(channel: socket.socket, kind: str, message: str) -> None:
    failure: FromRank = RankFailed(kind=kind, message=message)
    say(channel, failure)


if __name__ == "__main__":
    main(sys.argv[1])
