"""Metrics, saturation, run folders, comparisons, and how they are shown and drawn."""
