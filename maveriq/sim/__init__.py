"""The simulator: a SimPy clock that feeds the controller and answers with estimates.

from maveriq.sim.simulator import simulate
"""
