"""The direct call: the same bits as the op, NotImplemented where it does not apply, and no hook is skipped."""

import copy
import gc
import threading
import tracemalloc

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchq import _C, QuantizedLinear, kernels, ops
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential
from torchq.numerics.qparams import QParams

op_dynamic = torch.ops.torchq.linear_dynamic.default
op_static = torch.ops.torchq.linear_static.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 20), (20,), (3, 20), (2, 3, 20), (2, 1, 4, 20)]


@pytest.fixture
def layer() -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_float(nn.Linear(20, 9))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)


def direct(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return _C.call_linear(layer, QuantizedLinear, x)


def fused(layer, x, codes_of=None, activation=0, between=(), reader=None) -> Tensor:
    codes = None if codes_of is None else (codes_of, layer.input_qparams)
    y_qparams = None if reader is None else getattr(reader, "input_qparams", None)
    settings = ({},) * len(between) if type(between) is tuple else ()
    return _C.call_fused(layer, QuantizedLinear, x, codes, activation, between, settings, reader, y_qparams)


def reader_in(*pair) -> QuantizedLinear:
    return QuantizedLinear.from_float(nn.Linear(9, 5), input_qparams=QParams(*pair))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [0, 1, 4])
def test_dynamic_is_the_op(layer, shape, dtype, activation):
    x = torch.randn(shape).to(dtype)
    assert same(fused(layer, x, activation=activation), op_dynamic(x, layer.packed, activation))
    assert same(direct(layer, x), op_dynamic(x, layer.packed))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", kernels.runnable())
@pytest.mark.parametrize("rows", [1, 6, 7, 33, 130])
@pytest.mark.parametrize("pair", [None, QParams(0.02, 7)])
def test_in_two_halves_it_is_the_op(rows, kernel, threads, pair, set_threads):
    torch.manual_seed(0)
    x = torch.randn(rows, 300)
    set_threads(threads)
    with kernels.use(kernel):
        layer = QuantizedLinear.from_float(nn.Linear(300, 70), input_qparams=pair)
        expected = [layer.fused(x, activation) for activation in (2, 0)]
        begun = _C.begin_linear(layer, QuantizedLinear, x)
    x.zero_()
    del layer
    assert same(_C.end_linear(begun, 2), expected[0])
    assert same(_C.end_linear(begun, 0), expected[1])
    assert _C.end_linear(begun, 99) is NotImplemented
    with pytest.raises(ValueError, match="PyCapsule"):
        _C.end_linear(object(), 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("y_dtype", [*DTYPES, torch.uint8])
def test_static_is_the_op(layer, shape, x_dtype, y_dtype):
    x = (torch.rand(shape) * 200).to(x_dtype)
    layer.input_qparams = QParams(0.02, 7)
    gives_codes, takes_codes = y_dtype == torch.uint8, x_dtype == torch.uint8
    codes_of = y_dtype if takes_codes and not gives_codes else torch.float16 if takes_codes else None
    y = fused(layer, x, codes_of, 1, (), reader_in(0.5, 120) if gives_codes else None)
    expected = y_dtype if gives_codes or takes_codes else x_dtype
    assert same(y, op_static(x, layer.packed, 0.02, 7, expected, 0.5, 120, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_answers_in_the_dtype_of_x(layer, dtype):
    x, layer.input_qparams = torch.randn(2, 20).to(dtype), QParams(0.02, 7)
    assert same(direct(layer, x), op_static(x, layer.packed, 0.02, 7, dtype))


class Marked(Tensor):
    pass


def refused() -> dict[str, object]:
    x = torch.randn(4, 20)
    return {
        "wrong K": torch.randn(4, 21),
        "a scalar": torch.tensor(1.0),
        "no rows": torch.randn(0, 20),
        "float64": x.double(),
        "int64": x.long(),
        "codes": x.to(torch.uint8),
        "strided": torch.randn(4, 40)[:, ::2],
        "rows of a wider tensor": torch.randn(4, 40)[:, :20],
        "a row of a wider tensor": torch.randn(4, 40)[:1, :20],  # exact strides are asked for, in all dimensions
        "a tensor of one number's width": torch.randn(1, 2, 20)[:, :1],
        "transposed": torch.randn(20, 4).t(),
        "a subclass": x.as_subclass(Marked),
        "a parameter": nn.Parameter(x),
        "wants a gradient": x.clone().requires_grad_(),
        "lazily negated": torch._neg_view(x),
        "lazily negated, from complex numbers": torch.complex(torch.randn(1, 20), torch.randn(1, 20)).conj().imag,
        "sparse": x.to_sparse(),
        "meta": torch.empty(4, 20, device="meta"),
        "a list": [[1.0] * 20],
        "None": None,
    }


@pytest.mark.parametrize("case", refused())
def test_what_needs_the_op_is_left_to_it(layer, case):
    assert direct(layer, refused()[case]) is NotImplemented
    assert _C.begin_linear(layer, QuantizedLinear, refused()[case]) is NotImplemented


BAD = {
    "packed": [torch.zeros(8, dtype=torch.uint8), torch.zeros(99), None, "x"],
    "input_qparams": [QParams(s, 3) for s in (0.0, -1.0, float("nan"), float("inf"), 1)]
    + [QParams(0.5, z) for z in (-1, 256, 1.0)]
    + [(0.5,), 0.5],
}


@pytest.mark.parametrize("attribute", BAD)
def test_attributes_that_make_no_sense(layer, attribute):
    x = torch.randn(2, 20)
    layer.input_qparams = QParams(0.5, 3)
    assert direct(layer, x) is not NotImplemented
    for value in BAD[attribute]:
        (layer._buffers if attribute == "packed" else layer.__dict__)[attribute] = value
        assert direct(layer, x) is NotImplemented, value
        assert fused(layer, x) is NotImplemented, value


def test_what_a_fused_call_is_not_given(layer):
    x, codes = torch.randn(2, 20), torch.zeros(2, 20, dtype=torch.uint8)
    layer.input_qparams = QParams(0.5, 3)
    assert fused(layer, x) is not NotImplemented
    for activation in (-1, 11, None, 1 << 70, 1.0):
        assert fused(layer, x, activation=activation) is NotImplemented, activation
    assert fused(layer, codes, torch.float32) is not NotImplemented
    for x_, codes_of in ((codes, None), (codes, torch.int8), (codes, torch.uint8), (codes, "x"), (x, torch.float32)):
        assert fused(layer, x_, codes_of) is NotImplemented, codes_of
    for pair in ((0.0, 3), (float("nan"), 3), (0.5, 256)):
        reader = reader_in(0.5, 3)
        reader.input_qparams = pair
        assert fused(layer, x, reader=reader) is NotImplemented, pair
    for reader in (QuantizedLinear.from_float(nn.Linear(9, 5)), nn.Linear(9, 5), layer.packed, 1):
        assert fused(layer, x, reader=reader) is NotImplemented
    layer.input_qparams = None
    assert fused(layer, x, reader=reader_in(0.5, 3)) is NotImplemented  # a dynamic layer has no kernel for it
    assert fused(layer, codes, torch.float32) is NotImplemented


def test_what_lies_between_must_be_plain(layer):
    x, relu, dropout = torch.randn(2, 20), nn.ReLU(), nn.Dropout(0.5).eval()
    between = (relu, dropout)
    assert fused(layer, x, activation=1, between=between) is not NotImplemented
    for module, kind in ((relu, "forward_pre_hook"), (dropout, "forward_hook"), (relu, "full_backward_hook")):
        handle = getattr(module, f"register_{kind}")(lambda *_: None)
        assert fused(layer, x, activation=1, between=between) is NotImplemented
        handle.remove()
    assert fused(layer, x, activation=1, between=between) is not NotImplemented
    dropout.train()
    assert fused(layer, x, activation=1, between=between) is NotImplemented
    assert fused(layer, x, between=[relu]) is NotImplemented
    assert fused(layer, x, between=(1,)) is NotImplemented


def test_arguments_that_make_no_sense(layer):
    assert _C.call_linear() is NotImplemented
    assert _C.call_fused() is NotImplemented
    assert _C.call_fused(layer, QuantizedLinear, torch.ones(2, 20)) is NotImplemented
    assert _C.call_linear(object(), object, torch.ones(2, 20)) is NotImplemented
    assert _C.call_linear(nn.Linear(20, 9), nn.Linear, torch.ones(2, 20)) is NotImplemented
    assert not _C.is_plain(object(), object)


def test_codes_only_where_they_are_expected(layer):
    codes, layer.input_qparams = torch.zeros(2, 20, dtype=torch.uint8), QParams(0.5, 3)
    assert direct(layer, codes) is NotImplemented
    assert fused(layer, codes, torch.float16).dtype == torch.float16
    assert fused(layer, codes, torch.float16, reader=reader_in(0.5, 3)).dtype == torch.uint8


def test_the_op_says_what_is_wrong(layer):
    with pytest.raises(RuntimeError, match="packed for 20 input features, but x has 21"):
        layer(torch.randn(2, 21))
    static = QuantizedLinear.from_float(nn.Linear(20, 9), input_qparams=QParams(0.1, 3))
    with pytest.raises(TypeError, match="got uint8"):
        static(torch.zeros(2, 20, dtype=torch.uint8))


# ---- What torch puts between a call and its computation -------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_op(layer):
    with Seen() as mode:
        layer(torch.randn(2, 20))
    assert mode.ops.count(op_dynamic) == 1


def test_function_modes_see_the_op(layer):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        layer(torch.randn(2, 20))
    assert op_dynamic in seen


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.10
def test_the_profiler_sees_the_op(layer):
    with torch.profiler.profile() as profile:
        layer(torch.randn(2, 20))
    assert "torchq::linear_dynamic" in {event.name for event in profile.events()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_vmap_and_jit_trace(layer):
    x = torch.randn(3, 2, 20)
    assert same(torch.vmap(layer)(x), layer(x))
    assert same(torch.jit.trace(layer, x)(x + 1), layer(x + 1))


def test_fx_sees_the_module_a_tracer_calls_a_leaf(layer):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, QuantizedLinear)

    graph = Tracer().trace(nn.Sequential(layer))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_has_its_tangent(layer):
    """A dual tensor is a plain one to look at."""
    x = torch.randn(2, 20)
    with torch.autograd.forward_ad.dual_level():
        assert direct(layer, torch.autograd.forward_ad.make_dual(x, x)) is NotImplemented
    assert direct(layer, x) is not NotImplemented


def test_inference_mode(layer):
    x = torch.randn(2, 20)
    expected = op_dynamic(x, layer.packed, 0)
    with torch.inference_mode():
        y = layer(x)
    assert y.is_inference()
    assert torch.equal(y, expected)


# ---- What nn.Module puts there --------------------------------------------------------------------------------------

HOOKS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]


def sequential() -> Int8Sequential:
    return Int8Sequential(QuantizedLinear.from_float(nn.Linear(20, 9), fold=Fold(1)), nn.ReLU())


@pytest.mark.parametrize("make", [lambda: QuantizedLinear.from_float(nn.Linear(20, 9)), sequential])
@pytest.mark.parametrize("where", ["own", "global"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run(make, where, kind):
    module, calls = make(), []
    cls = type(module)
    assert _C.is_plain(module, cls)
    target = getattr(module, f"register_{kind}") if where == "own" else None
    target = target or getattr(torch.nn.modules.module, f"register_module_{kind}")
    handle = target(lambda *_: calls.append(kind))
    try:
        assert not _C.is_plain(module, cls)
        module(torch.randn(2, 20))
    finally:
        handle.remove()
    modules = len(list(module.modules())) if where == "global" else 1
    assert len(calls) == (modules if "backward" not in kind else 0)
    assert _C.is_plain(module, cls)


def test_a_forward_of_its_own_runs(layer):
    class Doubled(QuantizedLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(2, 20)
    y = layer(x)
    doubled = copy.deepcopy(layer)
    doubled.__class__ = Doubled
    assert torch.equal(doubled(x), 2 * y)
    layer.forward = lambda x: "patched"
    assert layer(x) == "patched"


def test_compiled_modules_stay_compiled(layer):
    layer.compile(backend="eager", fullgraph=True)
    assert not _C.is_plain(layer, QuantizedLinear)
    x = torch.randn(2, 20)
    assert torch.equal(layer(x), op_dynamic(x, layer.packed, 0))


# ---- The result is a tensor like any other --------------------------------------------------------------------------


def test_results_are_theirs_alone_and_freed(layer):
    x = torch.randn(64, 20)
    first = layer(x)
    kept = first.clone()
    others = [layer(-x) for _ in range(8)]
    assert torch.equal(first, kept)
    assert len({y.data_ptr() for y in [first, *others]}) == 9
    first.add_(1).t_()
    assert not first.is_contiguous()

    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(1000):
        layer(x)
        direct(layer, None)
    assert tracemalloc.get_traced_memory()[0] - before < 20_000  # one leaked tensor object is 80 bytes
    tracemalloc.stop()


def test_callers_on_many_threads(layer):
    """Each thread has its own scratch memory, and larger products release the GIL."""
    big = QuantizedLinear.from_float(nn.Linear(512, 600))
    x = torch.randn(4, 30, 512)
    expected, wrong = ops.linear_dynamic(x, big.packed), []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(big(x[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_codes_do_not_reach_weights_with_a_channel_scale():
    layer = QuantizedLinear.from_float(
        nn.Linear(20, 9), input_qparams=QParams(0.5, 3), channel_scale=torch.full((20,), 2.0)
    )
    assert fused(layer, torch.zeros(2, 20, dtype=torch.uint8), torch.float32) is NotImplemented
    assert fused(layer, torch.zeros(2, 20)) is not NotImplemented
