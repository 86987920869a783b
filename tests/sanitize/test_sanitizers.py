"""The core and the extension under AddressSanitizer, UBSan and ThreadSanitizer: `make test-sanitize`.

The extension is built once more, into build/sanitize/<name>/lib, and a pytest that is started there imports that one.
The ordinary build is left alone. LeakSanitizer is off: Python and torch keep what lives as long as the process, and
would fill the report.

ThreadSanitizer sees the instrumented extension, and through pthread's functions the GIL; so it sees what Python's
threads do to a layer. It does not see libgomp's barriers, which are futexes in a library that is not instrumented.
There the threads of csrc/run.cpp are std::thread's (threads.cpp, with stand_ins/).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.core import (
    PLAIN,
    PROGRAM,
    SANITIZERS,
    built,
    check_core,
    compile_all,
    compiler,
    core_sources,
    files_under,
    idle_kernels,
    instrumented,
    jobs,
    made,
    run,
)

pytestmark = [pytest.mark.subprocess, pytest.mark.slow(seconds=100)]

HERE = Path(__file__).parent
SANITIZE = ROOT / "build" / "sanitize"
FLAGS = {
    # Not alignment: a packed weight may be a view that starts at any byte (tests/test_ops.py), which every CPU with a
    # kernel here reads as fast. By the letter of C++ it should be copied.
    "address": "-fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
OPTIONS = {
    # allocator_may_return_null: a request for more than there is gets null, as from the system, and not a report.
    # malloc_context_size: that a report names 5 callers of malloc and not 30 is a sixth of the time.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0:malloc_context_size=5",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TORCHQ_FUZZ_MINUTES": "0.001",  # 10,000 corruptions, and no second seed
    "TSAN_OPTIONS": f"exitcode=66:suppressions={HERE}/thread.supp",
}

# What calls C++, in groups of about the same time, which run beside each other.
GROUPS = {
    "ops": ["test_ops.py", "test_kernels.py", "test_golden.py", "test_activations.py", "test_count_bins.py"],
    "layers": ["test_direct.py", "test_linear.py", "test_calls.py", "test_gradients.py", "test_threads.py"],
    "hostile": ["test_rotary.py", "test_hostile_tensors.py", "test_recurrent_op.py"],
    "convolutions": [
        "test_conv_op.py",
        "test_inverted.py",
        "test_layer_norm.py",
        "test_feedback.py",
        "test_direct_sums.py",
        "test_quantize_weight.py",
    ],
    "fuzz": ["fuzz/test_corrupt_weights.py", "fuzz/test_ops_fuzz.py"],
}
# Limits the memory of its process, which then is not enough for the sanitizer's own.
NOT_UNDER_ADDRESS = "not test_out_of_memory_is_a_memory_error"


def extension(name: str) -> Path:
    """Builds torchq under the sanitizer of this name, and gives the folder that has the package."""
    folder = SANITIZE / name
    flags = f"-O1 -g1 {FLAGS[name]}"
    idle = " ".join(map(str, idle_kernels()))
    compile_by = {"CXX": str(HERE / "compiler"), "TORCHQ_CXX": shlex.join(compiler()), "TORCHQ_IDLE": idle}

    def make():
        shutil.rmtree(folder / "lib", ignore_errors=True)  # Python files that are gone; what was compiled is in temp
        build = ["build", "--build-base", folder / "temp", "--build-lib", folder / "lib"]
        command = [sys.executable, "setup.py", "-q", *map(str, build)]
        env = {**os.environ, **compile_by, "TORCHQ_EXTRA_FLAGS": flags}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    files = [path for path in files_under(ROOT / "csrc", ROOT / "torchq") if path.suffix not in {".so", ".pyc"}]
    made(folder, flags + str(compile_by), [*files, ROOT / "setup.py", HERE / "compiler"], make)
    return folder / "lib"


def core_of_extension(name: str) -> list[Path]:
    """The core's object files of that build."""
    extension(name)
    (objects,) = (SANITIZE / name / "temp").glob("temp.*")
    return [objects / source.relative_to(ROOT).with_suffix(".o") for source in core_sources()]


def library(name: str) -> str:
    """The path of a library of the compiler's."""
    return run([*compiler(), f"-print-file-name={name}"]).strip()


def fixed_addresses() -> list[str]:
    """The command before a command that gives it the addresses which TSan of g++ 12 can take, where allowed."""
    setarch = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*setarch, "true"], capture_output=True).returncode == 0
    return setarch if allowed else []


def sanitized_python(name: str, *arguments: str) -> str:
    """Runs Python, with torchq under this sanitizer, in the folder of the package. Gives all it printed."""
    libraries = {"address": "libasan.so", "thread": "libtsan.so"}
    env = {
        **os.environ,
        **OPTIONS,
        # The sanitizer has to come first in a program that was built without it. libstdc++ is there so that the
        # sanitizer finds the function that throws, which Python itself does not load.
        "LD_PRELOAD": f"{library(libraries[name])} {library('libstdc++.so.6')}",
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide what is done to its objects
    }
    command = [*(fixed_addresses() if name == "thread" else []), sys.executable, *arguments]
    done = subprocess.run(command, cwd=extension(name), env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"exit code {done.returncode}"
    assert not re.search(r"runtime error:|SUMMARY: \w+Sanitizer", done.stdout)
    return done.stdout


def sanitized_tests(name: str, *arguments: str | Path) -> None:
    # The sanitizer writes past Python's streams, so pytest captures those only.
    options = ["-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    assert re.search(r"\d+ passed", sanitized_python(name, *options, *map(str, arguments)))


@pytest.mark.parametrize("name", FLAGS)
def test_it_is_this_extension_that_is_tested(name):
    code = "import torchq._C; print(torchq._C.__file__)"
    assert str(SANITIZE / name / "lib") in sanitized_python(name, "-c", code)
    symbols = run(["nm", "-D", *(SANITIZE / name / "lib/torchq").glob("_C*.so")])
    assert {"address": "__asan_init", "thread": "__tsan_init"}[name] in symbols


def test_core_under_address_and_undefined(tmp_path):
    """The core alone, with its own tests.

    The tile registers of AMX are in memory: so any CPU with AVX512-VNNI tests the kernel amx_int8, and one with
    AVX512-BF16 attention's amx_bf16 too. The sanitizers see what loads and stores of tiles touch, which in assembly
    they do not.
    """
    tiles = f'-DTORCHQ_TILES="{PROGRAM / "tiles_in_memory.inc"}"'
    core = built("sanitized", instrumented(*PLAIN, "-O1", "-g1", *SANITIZERS, tiles))
    check_core(core, SANITIZERS, ["--quick"], tmp_path)


@pytest.mark.parametrize("group", GROUPS)
def test_extension_under_address_and_undefined(group):
    sanitized_tests("address", *(ROOT / "tests" / file for file in GROUPS[group]), "-k", NOT_UNDER_ADDRESS)


def test_layers_on_pythons_threads_under_thread():
    """All that keep torch's own threads out: those are libgomp's."""
    files = [ROOT / "tests" / "test_threads.py", ROOT / "tests" / "test_convert_threads.py"]
    sanitized_tests("thread", *files, "-k", "not torchs_own_threads")


def test_parts_on_threads_under_thread(tmp_path):
    """csrc/run.cpp itself with what it runs, on threads that TSan can see."""
    flags = [*PLAIN, "-O1", "-g1", *FLAGS["thread"].split()]
    core = core_of_extension("thread")
    stand_ins = ["-I", str(HERE / "stand_ins")]
    own = [*(ROOT / "csrc" / f"{name}.cpp" for name in ("run", "recurrent", "rotary")), HERE / "threads.cpp"]
    sources = jobs(own, *flags, *stand_ins)
    program = tmp_path / "threads"
    run([*compiler(), *flags, *core, *compile_all(sources, tmp_path), "-o", program, "-pthread"])
    said = run([*fixed_addresses(), program])
    assert re.fullmatch(r"[1-9]\d* answers, 0 wrong\n", said), said
