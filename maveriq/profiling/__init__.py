"""Profiling: what models take on the engines of this machine, measured and written down as a hardware profile."""
