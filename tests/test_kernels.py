"""Choosing a kernel: the table, and forcing with use() and TORCHQ_KERNEL. last_used() proves which one ran."""

import copy
import os
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from conftest import may_run
from helpers.commands import run_code
from torchq import QuantizedLinear, convert, kernels, ops

X = torch.ones(64, 64)  # large enough that no kernel leaves the product to another


def packed():
    """In the layout that the active kernel reads."""
    return ops.pack(torch.ones(64, 64, dtype=torch.int8), torch.ones(64))


CALLS = {
    "gemm": lambda: ops.gemm(X.char(), packed()),
    "linear_dynamic": lambda: ops.linear_dynamic(X, packed()),
    "linear_static": lambda: ops.linear_static(X, packed(), 1.0, 0, torch.float32),
    "linear_static, codes": lambda: ops.linear_static(X.byte(), packed(), 1.0, 0, torch.uint8),
    "quantize_per_token": lambda: ops.quantize_per_token(X),
    "QuantizedLinear": lambda: QuantizedLinear(torch.ones(64, 64, dtype=torch.int8), torch.ones(64))(X),
}


def another(name):
    """Another runnable kernel than this one, or None."""
    return next((other for other in kernels.runnable() if other != name), None)


@pytest.fixture
def table(monkeypatch):
    """Replaces the kernel table that the compiled part reports."""

    def replace(*rows, features=("avx2",)):
        monkeypatch.setattr(kernels._C, "table", lambda: [SimpleNamespace(**row) for row in rows])
        monkeypatch.setattr(kernels._C, "cpu_features", lambda: list(features))

    return replace


@pytest.fixture
def not_said_yet(monkeypatch):
    """The warning has not been given in this process, and nobody forces a kernel."""
    monkeypatch.setattr(kernels, "_slow", threading.Lock())
    monkeypatch.setattr(kernels._C, "forced", lambda: None)


REFERENCE = {"name": "reference", "needs": [], "tile": (1, 16, 4), "runnable": True}
FAST = {"name": "avx512_vnni", "needs": ["avx512_vnni", "avx2"], "tile": (6, 64, 4), "runnable": False}


def test_the_table():
    """Every build has `reference`, last, for any CPU. Names are unique. Tiles are panels of 16 x 4 or 16 x 8."""
    names, runnable = kernels.names(), kernels.runnable()
    assert names[-1] == runnable[-1] == "reference"
    assert len(set(names)) == len(names)
    assert runnable == [name for name in names if name in runnable]
    for name in names:
        rows, columns, depth = kernels.tile(name)
        assert rows >= 1
        assert columns % 16 == 0
        assert depth in (4, 8)
    assert kernels.tile("reference") == (1, 16, 4)


@pytest.mark.parametrize("keys", [1, 63, 64, 511, 512])
def test_the_schemes_of_attention_that_pay(kernel, keys):
    """Measured: docs/performance-avx2.md and docs/performance-amx.md."""
    schemes = kernels.attention_schemes(keys)
    if kernel == "avx2":
        assert schemes == (("int8",) if keys >= 64 else ())
    elif kernels.active_attention() == "amx_bf16":
        assert schemes == (("int8", "bfloat16") if keys >= 512 else ("bfloat16",))
    else:
        assert schemes == ("int8", "int8_bfloat16")
    CALLS["gemm"]()  # so that last_used() is what the fixture checks


@pytest.mark.skipif(kernels.ENVIRONMENT_VARIABLE in os.environ, reason="TORCHQ_KERNEL forces a kernel")
def test_the_best_runnable_kernel_is_active():
    assert kernels.active() == kernels.runnable()[0]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_forced_kernel_is_the_one_that_runs(kernel, call):
    """Another kernel runs first, so that last_used() must change."""
    if other := another(kernel):
        with kernels.use(other):
            CALLS["gemm"]()
        assert kernels.last_used() == other
    assert kernels.active() == kernel
    call()
    assert kernels.last_used() == kernel


def test_empty_matrices_and_packing_run_no_kernel(kernel):
    if not (other := another(kernel)):
        pytest.skip("needs two runnable kernels")
    with kernels.use(other):
        CALLS["gemm"]()
    ops.linear_dynamic(X[:0], packed())
    ops.gemm(X.char(), ops.pack(torch.ones(0, 64, dtype=torch.int8), torch.ones(0)))
    ops.unpack(packed())
    assert kernels.last_used() == other
    CALLS["gemm"]()  # so that last_used() is what the fixture checks


def test_nested_use_restores(kernel):
    before = kernels.active()
    with kernels.use("reference"):
        with kernels.use(kernel):
            assert kernels.active() == kernel
            with kernels.use("reference"):
                assert kernels.active() == "reference"
            assert kernels.active() == kernel
        assert kernels.active() == "reference"
    assert kernels.active() == before == kernel


def test_use_restores_after_an_exception():
    before = kernels.active()
    with pytest.raises(KeyError), kernels.use("reference"):
        raise KeyError
    assert kernels.active() == before
    with kernels.use("reference"):
        with pytest.raises(ValueError, match="is not a kernel"), kernels.use("nonsense"):
            pass
        assert kernels.active() == "reference"
    assert kernels.active() == before


def test_use_gives_the_automatic_choice_back():
    """Not the kernel that happened to be active: nothing is forced after the outermost block."""
    forced = kernels._C.forced()
    kernels._C.force(None)
    try:
        with kernels.use("reference"):
            assert kernels._C.forced() == "reference"
        assert kernels._C.forced() is None
        assert kernels.active() == kernels.runnable()[0]
    finally:
        kernels._C.force(forced)


def in_layout(packed, layout):
    """The same bytes with a header that says P16c4 (1) or P16c8 (2)."""
    forged = packed.clone()
    forged[4] = layout
    return forged


def test_weights_in_another_layout_are_refused(kernel):
    """Every op refuses them and says what to do. `reference` reads all layouts: see the next test."""
    weight, scale = torch.tensor([[1, -2, 3], [4, 5, -128]], dtype=torch.int8), torch.ones(2)
    a = torch.tensor([[1, 10, 100]], dtype=torch.int8)
    mine = ops.pack(weight, scale)
    own, other = (1, 2) if kernels.tile(kernel)[2] == 4 else (2, 1)
    assert mine[4] == own
    foreign = in_layout(mine, other)
    if kernel == "reference":
        return
    calls = [
        ("gemm", lambda: ops.gemm(a, foreign)),
        ("linear_dynamic", lambda: ops.linear_dynamic(a.float(), foreign)),
        ("linear_static", lambda: ops.linear_static(a.float(), foreign, 1.0, 0, torch.float32)),
    ]
    for op, call in calls:
        message = (
            rf"torchq::{op}: the weight was packed in layout P16c{4 * other} while another kernel was active; the "
            rf"kernel active now, {kernel}, reads P16c{4 * own}\. Pack it again under this one"
        )
        with pytest.raises(RuntimeError, match=message):
            call()
    assert ops.gemm(a, mine).tolist() == [[281, -12746]]


def test_the_best_reader_is_taken_unless_a_kernel_is_forced():
    """A program exported elsewhere contains packed weights. `reference` reads them only if forced: it is too slow."""
    forced = kernels._C.forced()
    weight, scale = torch.tensor([[1, -2, 3], [4, 5, -128]], dtype=torch.int8), torch.ones(2)
    a = torch.tensor([[1, 10, 100]], dtype=torch.int8)
    kernels._C.force(None)
    try:
        depths = {kernels.tile(name)[2] for name in kernels.runnable() if name != "reference"}
        for name in kernels.runnable():
            with kernels.use(name):
                packed = ops.pack(weight, scale)
            assert ops.gemm(a, packed).tolist() == [[281, -12746]]
            readers = [k for k in kernels.runnable() if kernels.tile(k)[2] == kernels.tile(name)[2]]
            assert kernels.last_used() in may_run(readers[0])
        if depths == {4}:
            with pytest.raises(RuntimeError, match="packed in layout P16c8 while another kernel was active"):
                ops.gemm(a, in_layout(packed, 2))
    finally:
        kernels._C.force(forced)


def test_repacking_is_what_the_message_says(kernel):
    """Weights packed for one kernel work with any other after unpack and pack; a layer, after a deepcopy."""
    weight = torch.arange(-60, 60, dtype=torch.int8).reshape(5, 24)
    x = torch.linspace(-1, 1, 72).reshape(3, 24)
    expected = QuantizedLinear(weight, torch.ones(5))(x)
    for name in kernels.runnable():
        with kernels.use(name):
            packed, layer = ops.pack(weight, torch.ones(5)), QuantizedLinear(weight, torch.ones(5))
        with kernels.use("reference"):
            assert torch.equal(ops.linear_dynamic(x, packed), expected)
        assert torch.equal(ops.linear_dynamic(x, ops.pack(*ops.unpack(packed))), expected)
        assert torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("name", ["avx512", "AVX2", "", "reference ", "référence"])
@pytest.mark.parametrize("function", ["use", "tile"])
def test_an_unknown_name(function, name):
    compiled = ", ".join(kernels.names())
    message = f"kernels.{function}(): {name!r} is not a kernel. Compiled in: {compiled}."
    with pytest.raises(ValueError, match="is not a kernel") as error:
        call(function, name)
    assert str(error.value) == message


@pytest.mark.parametrize("function", ["use", "tile"])
def test_a_kernel_that_is_not_compiled_in(table, function):
    table(REFERENCE)
    message = r"^kernels\.\w+\(\): kernel 'avx2' is not compiled into this build .* Compiled in: reference\.$"
    with pytest.raises(ValueError, match=message):
        call(function, "avx2")


def test_a_kernel_that_this_cpu_cannot_run(table):
    """The message names the features it lacks, and only those; nothing is forced."""
    before = kernels.active()
    table(FAST, REFERENCE, features=["avx2"])
    message = (
        r"^kernels\.use\(\): this CPU lacks avx512_vnni, which kernel 'avx512_vnni' needs\. It can run: reference\.$"
    )
    with pytest.raises(RuntimeError, match=message), kernels.use("avx512_vnni"):
        pass
    assert kernels.active() == before
    assert kernels.tile("avx512_vnni") == (6, 64, 4)
    assert (kernels.names(), kernels.runnable()) == (["avx512_vnni", "reference"], ["reference"])


def test_every_real_kernel_that_cannot_run_is_refused():
    for name in set(kernels.names()) - set(kernels.runnable()):
        with pytest.raises(RuntimeError, match=rf"this CPU lacks .*, which kernel '{name}' needs"), kernels.use(name):
            pass
        with pytest.raises(ValueError, match="cannot run here"):  # the compiled part refuses too
            kernels._C.force(name)


def call(function, name):
    if function == "tile":
        return kernels.tile(name)
    with kernels.use(name):
        return None


def last_line(text):
    return (text.strip().splitlines() or [""])[-1]


SHOW = """
import torch, torchq
one = torch.ones(64, 64, dtype=torch.int8)
before = torchq.kernels.last_used()
torchq.ops.gemm(one, torchq.ops.pack(one, torch.ones(64)))
with torchq.kernels.use(torchq.kernels.runnable()[0]):
    inside = torchq.kernels.active()
print(before, torchq.kernels.last_used(), inside, torchq.kernels.active())
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("forced", sorted({"", kernels.runnable()[-1], kernels.runnable()[-2:][0]}))
def test_the_environment_variable_forces_a_kernel(forced):
    """It applies from the start, and again after use(). An empty value counts as unset."""
    best = kernels.runnable()[0]
    expected = forced or best
    assert run_code(SHOW, TORCHQ_KERNEL=forced) == (0, f"None {expected} {best} {expected}\n", "")


@pytest.mark.subprocess
def test_a_bad_environment_variable_fails_at_import():
    """The message contains the variable's name."""
    compiled = ", ".join(kernels.names())
    code, output, error = run_code("import torchq; print('imported')", TORCHQ_KERNEL="avxvnni")
    assert (code, output) == (1, "")
    assert last_line(error) == f"ValueError: TORCHQ_KERNEL: 'avxvnni' is not a kernel. Compiled in: {compiled}."


@pytest.mark.subprocess
def test_an_environment_variable_this_cpu_cannot_obey_fails_at_import():
    """Never a silent fallback."""
    impossible = [name for name in kernels.names() if name not in kernels.runnable()]
    if not impossible:
        pytest.skip("this CPU runs every kernel")
    code, output, error = run_code("import torchq; print('imported')", TORCHQ_KERNEL=impossible[0])
    assert (code, output) == (1, "")
    assert last_line(error).startswith("RuntimeError: TORCHQ_KERNEL: this CPU lacks ")
    assert f"kernel {impossible[0]!r}" in error


# ---- What can't run, and why ----


def test_why_not(table):
    table(FAST, REFERENCE, features=("avx2",))
    assert kernels.why_not("reference") is None
    assert kernels.why_not("avx512_vnni") == "this CPU lacks avx512_vnni"
    assert kernels.why_not("neon").startswith("not compiled into this build")
    with pytest.raises(
        ValueError, match=r"^kernels.why_not\(\): 'fast' is not a kernel. There are: amx_int8, .*reference"
    ):
        kernels.why_not("fast")


def test_every_kernel_of_this_build_is_known():
    known = kernels._C.known_names()
    assert set(kernels.names()) <= set(known)
    assert len(set(known)) == len(known) == 9
    assert all(kernels._C.is_kernel_name(name) for name in known)


def test_a_cpu_without_a_fast_kernel_is_told_so_once(table, not_said_yet, monkeypatch):
    table(FAST, REFERENCE)
    monkeypatch.setattr(kernels._C, "active", lambda: "reference")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.warns(
        UserWarning, match=r"no fast kernel runs on this CPU \(avx512_vnni: this CPU lacks avx512_vnni\)"
    ):
        convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)


def test_whoever_forces_the_reference_is_not_told(not_said_yet, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.warn_if_slow()  # a fast kernel is active, or the machine has none
        monkeypatch.setattr(kernels._C, "active", lambda: "reference")
        monkeypatch.setattr(kernels._C, "forced", lambda: "reference")
        kernels.warn_if_slow()
