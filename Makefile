# One command each; every one sets up .venv first if it has to.
#
#   make demo        train, convert, and measure a small network
#   make test        the whole suite
#   make lint        ruff, mypy, clang-format
#   make test-arm    the Arm kernels under qemu, and torchq with torch on an emulated arm64 Python; test-arm-full: all of it
#   make guard      int8 against float32: a look at the speed, and a check of the answers
#   make bench-core  percent of peak of every kernel this CPU runs
#   make clean       remove what was built

PYTHON ?= python3
CXX ?= g++
VENV := .venv
BIN := $(VENV)/bin
SLOWEST := --durations=15 --durations-min=2  # a test that stands there should say so: @pytest.mark.slow(seconds=...)
CORE := $(wildcard csrc/gemm/*)
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/gemm/* tests/core/* tests/arm/stand_ins/*.* benchmarks/*.c*)

.PHONY: demo test test-arm test-arm-full lint guard bench-core clean

demo: $(VENV)/built
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/built
	$(BIN)/python -m pytest -n auto $(SLOWEST)

# Each file of tests on one worker: they share what they build. See tests/arm/emulation.py for the packages it needs.
# What the quick run leaves out is in test_arm_core.py, test_arm_torch.py and test_arm_bits.py: under emulation a CPU is
# 20 to 50 times slower, so it takes what an architecture can change.
test-arm: $(VENV)/built
	TORCHQ_ARM=quick $(BIN)/python -m pytest -n auto --dist loadfile $(SLOWEST) tests/arm

test-arm-full: $(VENV)/built
	TORCHQ_ARM=full $(BIN)/python -m pytest -n auto --dist loadfile $(SLOWEST) tests/arm

lint: $(VENV)/built
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

guard: $(VENV)/built
	$(BIN)/python -m benchmarks.guard

bench-core: build/bench_core
	build/bench_core

build/bench_core: benchmarks/core.cpp benchmarks/peak.cpp $(CORE)
	mkdir -p build
	$(CXX) -std=c++17 -O3 -ffp-contract=off -w -o $@ $(filter %.cpp,$^)

# torch is named first and alone: a plain `torch` would bring gigabytes of CUDA (see README, Install).
$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "torchq needs Python >= 3.10")'
	$(PYTHON) -m venv $(VENV) || { echo "Creating .venv failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(CORE) $(wildcard csrc/*.cpp)
	@command -v $(firstword $(CXX)) > /dev/null || { echo "No C++ compiler. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build $(VENV) torchq.egg-info torchq/*.so
