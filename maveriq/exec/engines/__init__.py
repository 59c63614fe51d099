"""Engines: run a model in processes of their own. The libraries of an engine are imported when it is created."""
