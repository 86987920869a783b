"""Reports: what became of each layer, how fast it is, and whether the data have moved since."""
