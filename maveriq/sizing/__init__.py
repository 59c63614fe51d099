"""Sizing: how many GPUs a workload needs to meet its SLOs, found by simulations."""
