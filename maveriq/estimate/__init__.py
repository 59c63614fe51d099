"""Estimators of latency and memory, fed by measured fingerprints."""
