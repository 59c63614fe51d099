"""Engines: what runs a model in processes of its own. Nothing heavy is imported before an engine is asked for."""
