"""Studies of how models scale over layers, batches, splits and formats, from measurements of any machine."""
