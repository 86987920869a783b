"""Calibration: runs of the float model on typical data, and what they showed of each layer."""
