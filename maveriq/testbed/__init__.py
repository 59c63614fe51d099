"""The published recordings of the testbed: readers, conversion to run records, and replay."""
