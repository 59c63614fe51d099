"""The simulator: a SimPy clock feeds the controller, and estimates take the place of engines."""
