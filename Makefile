# Every command sets up .venv first, if it needs it.
#
#   make demo        train, convert, and measure a small network
#   make test        the whole suite
#   make docs        the site, into build/site; a broken link or an unknown name is an error
#   make dist        the source distribution and a wheel, checked and tried in an empty folder, into dist
#   make lint        ruff, mypy, clang-format
#   make test-arm    the Arm kernels under qemu, and torchq with torch on an emulated arm64 Python
#   make test-arm-full  the same with every test
#   make test-sanitize  the core and the extension under ASan, UBSan and TSan
#   make fuzz MINUTES=1  random ops, models, checkpoints and bytes, each test for so long; a failure prints how to repeat it;
#                    FROM=n starts at a seed instead of a random one
#   make endurance SECONDS=60  threads that serve while others load, convert and simulate; every answer is checked
#   make guard       int8 against float32: prints the speed, checks the answers
#   make bench-core  percent of peak of every kernel this CPU can run
#   make clean       remove everything that was built

PYTHON ?= python3
CXX ?= g++
VENV := .venv
BIN := $(VENV)/bin
SLOWEST := --durations=15 --durations-min=2  # a test listed there needs the mark @pytest.mark.slow(seconds=...)
CORE := $(wildcard csrc/gemm/*)
ATTENTION := $(wildcard csrc/attention/*)
CONV := $(wildcard csrc/conv/*)
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/gemm/* csrc/attention/* csrc/conv/* tests/core/* tests/*/*.cpp tests/arm/stand_ins/*.* benchmarks/*.c*)
MINUTES ?= 1
FROM ?=
SECONDS ?= 60

.PHONY: demo test test-arm test-arm-full test-sanitize fuzz endurance docs dist lint guard bench-core clean

demo: $(VENV)/built
	$(BIN)/python -m benchmarks.demo

# A worker takes whole files, as long as there are: their tests share what they build.
test: $(VENV)/built
	$(BIN)/python -m pytest -n auto --dist worksteal $(SLOWEST)

# The tests of a file run on one worker, since they share what they build. tests/arm/emulation.py lists the packages that
# this needs. An emulated CPU is 20 to 50 times slower, so the quick run has only the tests whose result can depend on the
# architecture: test_arm_core.py, test_arm_torch.py and test_arm_bits.py say which.
test-arm: $(VENV)/built
	TORCHQ_ARM=quick $(BIN)/python -m pytest -n auto --dist loadfile $(SLOWEST) tests/arm

test-arm-full: $(VENV)/built
	TORCHQ_ARM=full $(BIN)/python -m pytest -n auto --dist loadfile $(SLOWEST) tests/arm

test-sanitize: $(VENV)/built
	TORCHQ_SANITIZE=1 $(BIN)/python -m pytest -n auto $(SLOWEST) tests/sanitize

fuzz: $(VENV)/built
	TORCHQ_FUZZ_MINUTES=$(MINUTES) TORCHQ_FUZZ_FROM=$(FROM) $(BIN)/python -m pytest -n auto $(SLOWEST) tests/fuzz

endurance: $(VENV)/built
	$(BIN)/python -m benchmarks.endurance --seconds $(SECONDS)

docs: $(VENV)/installed
	$(BIN)/zensical build --strict --clean

dist: $(VENV)/installed
	$(BIN)/python -m tools.packages dist

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

# If pip finds torch only with CUDA, that takes gigabytes: README, Install, says how to get the CPU build.
$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "torchq needs Python >= 3.10")'
	$(PYTHON) -m venv $(VENV) || { echo "Creating .venv failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(CORE) $(ATTENTION) $(CONV) $(wildcard csrc/*.cpp)
	@command -v $(firstword $(CXX)) > /dev/null || { echo "No C++ compiler. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build $(VENV) torchq.egg-info torchq/*.so
