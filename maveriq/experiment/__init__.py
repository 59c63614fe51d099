"""The published evaluation: its tables and figures simulated, beside what was published."""
