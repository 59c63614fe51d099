"""Scenarios: turns the user's options into the system that the simulator or the real executor runs."""
