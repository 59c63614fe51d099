"""Sweeps: many simulated runs that differ in chosen options, on local processes or a Ray cluster."""
