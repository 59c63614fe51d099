"""Scenarios: from what a user says to everything that a body needs to run."""
