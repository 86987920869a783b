"""Fixtures: each kernel in turn, seeds, gradients, threads, blocks. A file lists those of its tests in `pytestmark`."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from torchq import kernels, ops
from torchq.modules.conv_block import ConvBlock
from torchq.planning import budget, layers
from torchq.timing import interleaved

pytest.register_assert_rewrite("helpers", "emulation")  # before any test imports them
SEED = int(os.environ.get("TORCHQ_SEED", "0"))
# The kernels this machine must run: skipping one of them is a failure. CI sets it.
REQUIRED = {name.strip() for name in os.environ.get("TORCHQ_REQUIRED_KERNELS", "").split(",") if name.strip()}

TOO_SMALL = layers.too_small  # which layers stay in float for being small

SLOW = 2  # seconds; a slower test needs the mark slow(seconds=...)

# What cross-compiles, or builds everything again: `make test-arm`, `make test-sanitize` and `make fuzz` ask for it.
ON_REQUEST = {"arm/*": "TORCHQ_ARM", "sanitize/*": "TORCHQ_SANITIZE", "fuzz/test_core_fuzz.py": "TORCHQ_FUZZ_MINUTES"}
collect_ignore = ["users_script.py"]  # for mypy only
collect_ignore_glob = [files for files, asked in ON_REQUEST.items() if not os.environ.get(asked)]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "subprocess: starts another program, which an emulated Python cannot")
    config.addinivalue_line("markers", "small_layers_stay_float: as for users; without it they become int8")
    config.addinivalue_line("markers", f"slow(seconds): more than {SLOW}; about so many, two workers on two cores")
    torch.set_num_threads(1)  # most tensors are tiny, and more threads would only spin: see set_threads
    absent = REQUIRED - set(kernels.names())
    if absent:
        raise pytest.UsageError(
            f"TORCHQ_REQUIRED_KERNELS: {', '.join(sorted(absent))} not among the compiled: {', '.join(kernels.names())}"
        )


@pytest.fixture(autouse=True, scope="module")
def small_layers_become_int8() -> Iterator[None]:
    """Small layers become int8 in the tests, which are of other things, and quick by them. So do those of fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "too_small", lambda layer: None)
        yield


@pytest.fixture(autouse=True)
def small_layers_stay_float(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """That small layers stay in float has tests of its own, marked `small_layers_stay_float`."""
    if request.node.get_closest_marker("small_layers_stay_float"):
        monkeypatch.setattr(layers, "too_small", TOO_SMALL)


def pytest_pycollect_makemodule() -> None:
    """Seeds torch before each file is imported, so that what it makes for its parameters depends on nothing else."""
    torch.manual_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds torch before each test and its fixtures, so that its numbers don't depend on which tests ran before."""
    torch.manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that start Python under emulation: qemu-user would start the child process on the host."""
    if os.environ.get("TORCHQ_EMULATED"):
        reason = "emulated by qemu-user: the program it starts would be the host's, or not run at all"
        for item in items:
            if item.get_closest_marker("subprocess"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists slow tests without the mark. It is no failure, because the machine may just have been busy."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    slow = [r for r in reports if r.when == "call" and r.duration > 2 * SLOW and "slow" not in r.keywords]
    if slow and not os.environ.get("TORCHQ_EMULATED"):
        terminalreporter.section(f"more than {2 * SLOW} s, and not marked slow(seconds=...)")
        for report in sorted(slow, key=lambda report: -report.duration):
            terminalreporter.line(f"{report.duration:.1f} s  {report.nodeid}")


def pytest_report_header() -> list[str]:
    return [
        f"torch {torch.__version__}, {torch.get_num_threads()} thread unless a test sets more, TORCHQ_SEED={SEED}",
        f"kernels: {kernels.active()} active; runnable: {', '.join(kernels.runnable())}",
    ]


# Kernels that leave small problems to another one, which then is the one that ran.
LEAVES_SMALL_PROBLEMS_TO = {"amx_int8": "avx512_vnni"}


def may_run(name: str) -> set[str]:
    """The kernels of which one runs where this one is forced."""
    return {name, LEAVES_SMALL_PROBLEMS_TO.get(name, name)}


@pytest.fixture(params=kernels.names())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces each kernel in turn, and proves that it ran. Yields its name.

    A probe runs first, large enough that no kernel leaves it to another. So a test whose matrices are all empty, and
    which thus runs no kernel, passes too.
    """
    name: str = request.param
    if name not in kernels.runnable():
        if name in REQUIRED:
            pytest.fail(f"this CPU cannot run {name}, which TORCHQ_REQUIRED_KERNELS asks for")
        pytest.skip(f"this CPU cannot run {name}")
    probe = torch.ones(64, 64, dtype=torch.int8)
    with kernels.use(name):
        ops.gemm(probe, ops.pack(probe, torch.ones(64)))
        assert kernels.last_used() == name, "another kernel than the forced one ran"
        yield name
        assert kernels.last_used() in may_run(name), "another kernel than the forced one ran"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[ConvBlock]:
    """Lists the blocks of convolutions that ran as one."""
    seen: list[ConvBlock] = []
    usual = ConvBlock._run

    def spy(block: ConvBlock, x: torch.Tensor) -> object:
        y = usual(block, x)
        if y is not NotImplemented:
            seen.append(block)
        return y

    monkeypatch.setattr(ConvBlock, "_run", spy)
    return seen


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers from TORCHQ_SEED, which pytest shows beside a failure as captured output."""
    print(f"TORCHQ_SEED={SEED}")
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads; the number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def seeded(no_grad: None) -> None:
    """Seeds torch's global generator with 0, and turns gradients off."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Lets torch.compile forget what it has compiled, before the test and behind it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def brief_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the timing of the accuracy budget, since few tests check the times."""
    monkeypatch.setattr(budget, "interleaved", lambda calls, **settings: interleaved(calls, rounds=1, seconds=1e-5))


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """Transformers shows neither its progress bars nor its warnings."""
    import transformers

    transformers.logging.disable_progress_bar()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
