"""Reports: what each layer became, how fast it is, and whether the data have drifted since calibration."""
