"""Estimators of latency and memory, based on hardware profiles."""
