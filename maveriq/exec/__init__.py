"""The executor: runs the controller on a real clock, with engines in processes of their own.

`maveriq.exec.replay` replays a scenario, as `maveriq.sim` does; `maveriq.exec.executor` keeps a cluster running for a
service. docs/executor.md explains how they work. This package imports nothing, because every engine process imports it.
"""
