"""Policies: which configuration, which layers on which stage, which GPUs. Pure functions of a view."""
