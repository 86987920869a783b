"""These tests cross-compile and emulate, so `make test` leaves them out: `make test-arm` and `make test-arm-full` set
TORCHQ_ARM to quick or full."""

import emulation

collect_ignore_glob = [] if emulation.MODE else ["test_*.py"]
