"""Calibration: runs the float model on typical data, and records what each layer reads."""
