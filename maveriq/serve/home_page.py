"""The page at /: what the service offers, for a browser or for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from maveriq import __version__

_METHODS = ("get", "post", "delete")

HTML_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
}
"""Headers of the HTML: it loads nothing, and no other page shows it in a frame."""


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the API."""

    method: str
    path: str
    purpose: str


def routes_of(schema: Mapping[str, Any]) -> list[Route]:
    """Return the routes in an OpenAPI schema."""
    return [
        Route(method.upper(), path, operations[method].get("description", ""))
        for path, operations in schema["paths"].items()
        for method in _METHODS
        if method in operations
    ]


def as_text(status: str, models: Iterable[str], routes: Iterable[Route]) -> str:
    """Return the page as plain text."""
    lines = [
        f"maveriq {__version__}: {status}",
        "",
        f"Models: {', '.join(models) or 'none; deploy one with maveriq console'}",
        "",
        *(f"{route.method:<6} {route.path:<24} {route.purpose}" for route in routes),
        "",
        "GET /openapi.json is the schema. OpenAI clients take this address with /v1 as their base URL.",
    ]
    return "\n".join(lines) + "\n"


def as_html(status: str, models: Iterable[str], routes: Iterable[Route]) -> str:
    """Return the page as HTML."""
    items = "".join(f"<li><code>{escape(model)}</code></li>" for model in models)
    rows = "".join(
        f"<tr><td>{route.method}</td><td><code>{escape(route.path)}</code></td><td>{escape(route.purpose)}</td></tr>"
        for route in routes
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>maveriq</title>'
        "<style>body{font:16px sans-serif;margin:2em;max-width:60em}td{padding:.2em 1em .2em 0}</style>"
        f"<h1>maveriq {escape(__version__)}</h1><p>The service is {escape(status)}.</p>"
        f"<h2>Models</h2><ul>{items or '<li>none; deploy one with <code>maveriq console</code></li>'}</ul>"
        f"<h2>Routes</h2><table>{rows}</table>"
        '<p><a href="/openapi.json">/openapi.json</a> is the schema. OpenAI clients take this address with '
        "<code>/v1</code> as their base URL.</p></html>\n"
    )
