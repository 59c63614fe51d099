"""Sessions among requests: which requests are the turns of one conversation."""

from __future__ import annotations

from typing import Any

import numpy as np


def session_order(session_id: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the order of requests in which the turns of each session follow each other, where its first one is.

    Args:
        session_id: of each request, from 1; 0 for none.
    """
    _, first, which = np.unique(_units(session_id), return_index=True, return_inverse=True)
    return np.argsort(first[which], kind="stable")


def requests_of_sessions(session_id: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return how many requests each session has, in the order of their first ones; a request of none counts by itself.

    Args:
        session_id: of each request, from 1; 0 for none.
    """
    _, first, counts = np.unique(_units(session_id), return_index=True, return_counts=True)
    ordered: np.ndarray[Any, Any] = counts[np.argsort(first)]
    return ordered


def _units(session_id: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a number for each request that only those of its session share."""
    return np.where(session_id > 0, session_id, -1 - np.arange(len(session_id)))
