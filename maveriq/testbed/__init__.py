"""The published recordings of the testbed: reading, run records, and replay."""
