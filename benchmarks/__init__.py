"""Scripts that measure: run them as modules, `python -m benchmarks.demo`."""
