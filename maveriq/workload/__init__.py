"""Workloads: arrivals, request lengths, model sets, latency objectives."""
