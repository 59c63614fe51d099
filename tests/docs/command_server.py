"""Runs `maveriq` commands in forks of one process that has imported everything, so that starting takes no time.

Documents have more than a hundred commands, most of whose time is the import. A script `maveriq` hands the process the
arguments, folder, environment and standard streams of each call.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_CLIENT = """#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps({{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
server.sendmsg([len(call).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(call)
sys.exit((server.recv(1) or b"\\x01")[0])  # nothing comes where the command was killed
"""


@contextlib.contextmanager
def command_server(folder: Path) -> Iterator[Path]:
    """Start the process, and yield the folder of the script `maveriq` that calls it."""
    commands, address = folder / "bin", folder / "commands.socket"
    commands.mkdir()
    client = commands / "maveriq"
    client.write_text(_CLIENT.format(python=sys.executable, address=str(address)), encoding="utf-8")
    client.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield commands
        process.terminate()


def _serve(address: str) -> None:
    from maveriq.cli.app import COMMANDS, load_command

    for name in COMMANDS:
        load_command(name)
    import maveriq.report.results
    import maveriq.scenario.build
    import maveriq.sim.simulator  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _run(connection)


def _run(connection: socket.socket) -> None:
    """Run the command of a connection in this fork, answer its exit code, and end."""
    code = 1
    try:
        head, streams, _, _ = socket.recv_fds(connection, 8, 3)
        call = json.loads(_read(connection, int.from_bytes(head, "big")))
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(call["folder"])
        os.environ.clear()
        os.environ.update(call["environment"])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.argv = ["maveriq", *call["arguments"]]
        code = _exit_code()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        connection.send(bytes([code]))
        os._exit(code)


def _read(connection: socket.socket, length: int) -> bytes:
    text = b""
    while len(text) < length:
        text += connection.recv(length - len(text))
    return text


def _exit_code() -> int:
    from maveriq.cli.app import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
