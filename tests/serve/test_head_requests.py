"""HEAD on every GET route: as GET, without the body."""

import re
import socket
from urllib.parse import urlsplit

from running import MODEL, Running


def test_head_has_the_status_and_the_headers_of_get(server: Running) -> None:
    with server.client() as http:
        paths = [path for path, methods in http.get("/openapi.json").json()["paths"].items() if "get" in methods]
        assert len(paths) > 5
        filled = [re.sub(r"\{\w+\}", MODEL if "model" in path else "1", path) for path in paths]
        for path in [*filled, "/", "/openapi.json", "/endpoints/999", "/nothing"]:
            got, head = http.get(path), http.head(path)
            assert head.status_code == got.status_code, path
            assert head.content == b""
            assert head.headers["content-type"] == got.headers["content-type"]
            if path != "/metrics":  # it counts these requests
                assert head.headers["content-length"] == str(len(got.content))


def test_a_route_without_get_has_no_head(server: Running) -> None:
    with server.client() as http:
        assert http.head("/v1/completions").status_code == 405


def test_no_body_follows_the_head_on_the_connection(server: Running) -> None:
    at = urlsplit(server.url)
    head = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"HEAD /endpoints/999 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection((at.hostname, at.port), timeout=60) as connection:
        connection.sendall(head * 2 + last)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    answers = received.split(b"\r\n\r\n")
    assert [answer[:12] for answer in answers[:3]] == [b"HTTP/1.1 200"] * 2 + [b"HTTP/1.1 404"]
    assert answers[3:] == [b""]
