"""Builds torchq._C: the cores, the torch ops and the pybind11 module in one library. The rest is in pyproject.toml.

Every file is compiled with baseline flags. A kernel file enables its own instructions in a target region, so that no
AVX gets into code that other CPUs run. The kernel is chosen at run time.
"""

import os
import shutil
import sys

import setuptools

MIN_TORCH = (2, 10)
MIN_SETUPTOOLS = 77  # an older one can't read pyproject.toml
TOOLS = f"pip install 'setuptools>={MIN_SETUPTOOLS}' pybind11 ninja"

# -ffp-contract=off: each float operation is rounded once, on every ISA. See docs/design.md.
# -Wno-*uninitialized: false alarms in the avx512fintrin.h of g++ 12.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Hardened: a smashed stack ends the process, the tables of addresses are read-only once loaded, and no symbol is
# exported but Python's way in, so that no other library's of the same name is taken for ours.
CXX_FLAGS += ["-fstack-protector-strong", "-fvisibility-inlines-hidden"]
LINUX_LINK_FLAGS = ["-Wl,-z,relro,-z,now", f"-Wl,--version-script={os.path.join('csrc', 'exports.map')}"]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of torch 2.10
# Of this build alone, for compiler and linker, after ours: tests/sanitize passes -fsanitize=... here.
EXTRA_FLAGS = os.environ.get("TORCHQ_EXTRA_FLAGS", "").split()

# The kernels of all architectures: a file compiles to nothing on another architecture than its own.
KERNELS = ["reference", "avx2", "avx_vnni", "avx512vl_vnni", "avx512_vnni", "amx_int8"]
KERNELS += ["neon", "neon_dotprod", "neon_i8mm"]
CORE = ["cpu", "dispatch", "pack", "table", "codes", "schedule", "gemm", "feedback", *(f"kernel_{k}" for k in KERNELS)]
ATTENTION_KERNELS = ["reference", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon"]
ATTENTION = ["dispatch", "schedule", "operands", "float_products", "code_products", "attention"]
ATTENTION += [f"kernel_{k}" for k in ATTENTION_KERNELS]
CONV = ["schedule", "image", "patches", "depthwise", "outputs", "conv", "inverted"]
OPS = ["torch_ops", "attention_op", "recurrent_op", "embedding_op", "convolution_op", "norm_op", "fine_op"]
OPS += ["feedback_op", "histogram_op", "weight_op", "clipping_op"]
DIRECT = ["direct", "direct_norm", "direct_residual", "direct_attention", "direct_rotary", "direct_conv", "direct_fine"]
DIRECT += ["direct_gated", "direct_together", "direct_embedding", "direct_steps"]
OTHERS = ["recurrent", "rotary", "run", *DIRECT, "plain_tensor", "classes", "nn_module", "lines", "module"]
SOURCES = [f"csrc/{name}.cpp" for name in [*OPS, *OTHERS]]
SOURCES += [f"csrc/gemm/{name}.cpp" for name in CORE]
SOURCES += [f"csrc/attention/{name}.cpp" for name in ATTENTION]
SOURCES += [f"csrc/conv/{name}.cpp" for name in CONV]
FOLDERS = ["csrc", "csrc/gemm", "csrc/attention", "csrc/conv"]


def check_torch() -> None:
    """Exits with instructions if torch is missing or too old for the stable ABI."""
    advice = f"Install it first (pip install 'torch>=2.10'), then: {TOOLS}; pip install --no-build-isolation ."
    try:
        import torch
    except ImportError:
        sys.exit(f"torchq: building needs torch, and this environment has none. {advice}")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MIN_TORCH:
        sys.exit(f"torchq: needs torch >= 2.10 (the stable ABI), found {torch.__version__}. {advice}")


def check_compiler() -> None:
    """Exits with instructions if there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or ("CXX" not in os.environ and shutil.which("g++"))):
        sys.exit(
            f"torchq: building needs a C++17 compiler, and {compiler!r} was not found. Install g++ (on Debian and "
            "Ubuntu: apt-get install g++) or point CXX at one."
        )


def check_tools() -> None:
    """Exits with instructions if what pip would bring into an isolated build is missing."""
    try:
        import pybind11  # noqa: F401
    except ImportError:
        sys.exit(f"torchq: building needs pybind11, which is missing here. Install what builds need: {TOOLS}")
    if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
        sys.exit(f"torchq: building needs a later setuptools than {setuptools.__version__}. Install it: {TOOLS}")


def extension_arguments() -> dict:
    check_torch()
    check_compiler()
    check_tools()
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    module = CppExtension(
        "torchq._C",
        SOURCES,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=CXX_FLAGS + TORCH_FLAGS + EXTRA_FLAGS,
        extra_link_args=(LINUX_LINK_FLAGS if sys.platform == "linux" else []) + EXTRA_FLAGS,
        depends=[os.path.join(folder, f) for folder in FOLDERS for f in os.listdir(folder) if "." in f],
    )
    if "torch_python" in module.libraries:  # only the stable ABI is linked
        module.libraries.remove("torch_python")
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


# A source distribution and metadata need neither torch nor a compiler.
needs_build = not {"sdist", "egg_info", "dist_info", "--version", "--help"} & set(sys.argv)
setuptools.setup(**(extension_arguments() if needs_build else {}))
