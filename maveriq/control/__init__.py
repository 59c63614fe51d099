"""The clock-free brain that the simulator and the executor share."""
