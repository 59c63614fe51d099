"""The executor: the controller on a real clock, driving engines that are processes of their own.

`maveriq.exec.replay` runs a scenario as `maveriq.sim` does, `maveriq.exec.executor` keeps a cluster up;
docs/executor.md tells how they work. Nothing is imported here: an engine's process starts with this package.
"""
