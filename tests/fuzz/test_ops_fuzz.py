"""The ops and the layer's call on any tensors, against the arithmetic in plain torch operations, bit for bit.

Shapes, dtypes, strides, offsets, special values, kernels and ways in are drawn. The curved activations are compared
with the reference kernel, which tests/test_activations.py compares with torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import reference
from helpers.compare import assert_identical
from helpers.fuzzing import fuzz
from helpers.numbers import FLT_MAX, FLT_MIN
from torchq import _C, QuantizedLinear, kernels, ops
from torchq.modules.quantized_linear import Codes
from torchq.modules.recurrent import CURVES
from torchq.numerics.qparams import QParams
from torchq.numerics.recurrent import State, run_direction
from torchq.ops import Activation, Cell
from torchq.ops.fine import linear_fine

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.slow(seconds=5)]

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, FLT_MIN, FLT_MIN / 2, 1e-45, FLT_MAX, -FLT_MAX, 65504.0]


# ---- The same values, laid out in other ways ----


def with_gaps(x: Tensor) -> Tensor:
    wide = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def behind_others(x: Tensor) -> Tensor:
    """At an offset, where no vector of the CPU's is aligned."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def odd_strides(x: Tensor) -> Tensor:
    """Strides of dimensions of size 1 may be anything; torch calls such a tensor contiguous."""
    x = x.contiguous()
    strides = [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


def expanded(x: Tensor) -> Tensor:
    """All rows are the first."""
    return x[:1].expand(x.shape) if x.dim() > 1 and x.shape[0] else x


LAYOUTS = [Tensor.contiguous, with_gaps, transposed, behind_others, odd_strides, expanded]


# ---- What is drawn ----


@dataclass
class Case:
    """A product. Its tensors come of `seed`, so that a small case is one of small numbers."""

    kernel: str
    rows: tuple[int, ...]
    n: int
    k: int
    dtype: torch.dtype
    layout: Callable[[Tensor], Tensor]
    special: bool
    has_bias: bool
    activation: Activation
    out: torch.dtype
    qparams: tuple[float, int]
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def x(self) -> Tensor:
        g, shape = self.generator(), (*self.rows, self.k)
        if self.dtype in (torch.uint8, torch.int8):
            info = torch.iinfo(self.dtype)
            return self.layout(torch.randint(info.min, info.max + 1, shape, dtype=self.dtype, generator=g))
        x = torch.randn(shape, generator=g) * torch.randn((*self.rows, 1), generator=g).exp() + 0.3
        if self.special:
            values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=g)]
            x = torch.where(torch.rand(shape, generator=g) < 0.1, values, x)
        return self.layout(x.to(self.dtype))

    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        g = self.generator()
        weight = torch.randint(-128, 128, (self.n, self.k), dtype=torch.int8, generator=g)
        scale, bias = torch.rand(self.n, generator=g) * 0.1 + 1e-3, torch.randn(self.n, generator=g)
        return weight, scale, bias if self.has_bias else None


SIZES = [0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 64, 65]
scales = st.one_of(st.floats(2.0**-13, 1.0, width=32), st.sampled_from([FLT_MIN, FLT_MAX, 1.0]))


def cases(dtypes, outs=(torch.float32,), activations=tuple(Activation)):
    return st.builds(
        Case,
        kernel=st.sampled_from(kernels.runnable()),
        rows=st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 9]), max_size=3).map(tuple),
        n=st.sampled_from(SIZES),
        k=st.one_of(st.sampled_from(SIZES), st.integers(0, 300)),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        special=st.booleans(),
        has_bias=st.booleans(),
        activation=st.sampled_from(activations),
        out=st.sampled_from(outs),
        qparams=st.tuples(scales, st.integers(0, 255)),
        seed=st.integers(0, 2**31),
    )


def every_kernel_like(case: Case, call: Callable[[Tensor], Tensor], expected: Tensor | None) -> None:
    """`call` with the weights packed for the drawn kernel; where nothing is expected, as under the reference kernel."""
    with kernels.use("reference"):
        plain = call(ops.pack(*case.weights()))
    assert_identical(plain, plain if expected is None else expected, "reference")
    with kernels.use(case.kernel):
        assert_identical(call(ops.pack(*case.weights())), plain, case.kernel)


def is_plain(activation: Activation) -> bool:
    return activation in (Activation.NONE, Activation.RELU)


# ---- The ops ----


def test_gemm():
    def check(case):
        a, (weight, *_) = case.x(), case.weights()
        every_kernel_like(case, lambda packed: ops.gemm(a, packed), reference.gemm(a, weight))

    fuzz(check, cases([torch.int8]), examples=100)


def test_quantize_per_token():
    def check(case):
        x = case.x()
        with kernels.use(case.kernel):
            found = ops.quantize_per_token(x)
        for actual, expected in zip(found, reference.quantize_per_token(x), strict=True):
            assert_identical(actual, expected, case.kernel)

    fuzz(check, cases(reference.FLOATS), examples=100)


def called(layer, x, codes, activation, reader=None):
    """The direct call, or the op's where that is left to it."""
    pair = reader and reader.input_qparams
    y = _C.call_fused(layer, QuantizedLinear, x, codes, int(activation), (), (), reader, pair)
    return layer.fused(x, activation, pair, codes=codes) if y is NotImplemented else y


def test_linear_dynamic():
    """The op, and the layer by its direct call and by forward()."""

    def check(case):
        x, (weight, scale, bias) = case.x(), case.weights()
        relu, expected = case.activation == Activation.RELU, None
        if is_plain(case.activation):
            expected = reference.linear_dynamic(x, weight, scale, bias, relu)
        every_kernel_like(case, lambda packed: ops.linear_dynamic(x, packed, case.activation), expected)
        with kernels.use(case.kernel):
            layer = QuantizedLinear(weight, scale, bias)
            assert_identical(layer(x), ops.linear_dynamic(x, layer.packed), "layer")
            y = ops.linear_dynamic(x, layer.packed, case.activation)
            assert_identical(called(layer, x, None, case.activation), y, "fused")
            assert_identical(layer.fused(x, case.activation), y, "fused, by the op")

    fuzz(check, cases(reference.FLOATS), examples=150)


def test_linear_fine():
    def check(case):
        x, (weight, scale, bias) = case.x(), case.weights()
        expected = None
        if case.activation == Activation.NONE:
            expected = reference.linear_fine(x, weight, scale, bias)
        every_kernel_like(case, lambda packed: linear_fine(x, packed, case.activation), expected)

    fuzz(check, cases([torch.float32]), examples=100)


def test_linear_static():
    outs = [*reference.FLOATS, torch.uint8]

    def check(case):
        x, (weight, scale, bias), y_qparams = case.x(), case.weights(), (0.07, 93)
        relu, expected = case.activation == Activation.RELU, None
        if is_plain(case.activation):
            expected = reference.linear_static(x, weight, scale, bias, case.qparams, case.out, y_qparams, relu)
        call = ops.linear_static
        every_kernel_like(case, lambda p: call(x, p, *case.qparams, case.out, *y_qparams, case.activation), expected)
        codes_in, codes_out = case.dtype == torch.uint8, case.out == torch.uint8
        if not codes_in and not codes_out and case.out != case.dtype:  # only codes have another dtype than the output
            return
        with kernels.use(case.kernel):
            layer = QuantizedLinear(weight, scale, bias, input_qparams=QParams(*case.qparams))
            y = call(x, layer.packed, *case.qparams, case.out, *y_qparams, case.activation)
            codes = Codes(torch.float32 if codes_out else case.out, QParams(*case.qparams)) if codes_in else None
            pair, reader = QParams(*y_qparams), None
            if codes_out:
                reader = QuantizedLinear.from_float(torch.nn.Linear(1, 1), input_qparams=pair)
            assert_identical(called(layer, x, codes, case.activation, reader), y, "fused")
            by_op = layer.fused(x, case.activation, pair if codes_out else None, codes=codes)
            assert_identical(by_op, y, "fused, by the op")

    fuzz(check, cases(outs, outs), examples=150)


def test_recurrent():
    """The op against the same steps by the ops of layers, on any kernel and by the reference."""

    def check(kernel, cell, hidden, sizes, projected, directions, special, seed):
        g, width = torch.Generator().manual_seed(seed), projected or hidden
        project = bool(projected) and cell == Cell.LSTM
        width = width if project else hidden
        shapes = [(cell.gates * hidden, width)] * directions + [(width, hidden)] * (directions * project)
        weights = [torch.randint(-128, 128, shape, dtype=torch.int8, generator=g) for shape in shapes]
        scales = [torch.rand(len(weight), generator=g) * 0.02 + 1e-3 for weight in weights]
        gates = [torch.randn(sum(sizes), cell.gates * hidden, generator=g) for _ in range(directions)]
        if special:
            gates[0].view(-1)[:: max(1, gates[0].numel() // 3)] = torch.tensor(SPECIAL)[seed % len(SPECIAL)]
        h = torch.randn(directions, sizes[0], width, generator=g)
        c = torch.randn(directions, sizes[0], hidden, generator=g) if cell == Cell.LSTM else None
        results = []
        for name in ("reference", kernel):
            with kernels.use(name):
                packed = [ops.pack(*each) for each in zip(weights, scales, strict=True)]
                hh, hr = packed[:directions], packed[directions:]
                found = ops.recurrent(cell, gates, hh, h, c, packed_hr=hr, batch_sizes=torch.tensor(sizes))
                for i in range(directions):
                    multiply, shrink = (partial(ops.linear_dynamic, packed=p) for p in (hh[i], (hr or hh)[i]))
                    state = State(h[i], None if c is None else c[i])
                    y, last = run_direction(
                        cell, gates[i], multiply, shrink if hr else None, state, sizes, backwards=i == 1, curves=CURVES
                    )
                    assert_identical(found[0][:, i * width : (i + 1) * width].contiguous(), y, name)
                    assert_identical(found[1][i], last.h, name)
                results.append(found)
        for actual, expected in zip(results[1], results[0], strict=True):
            assert_identical(actual, expected, kernel)

    arguments = {
        "kernel": st.sampled_from(kernels.runnable()),
        "cell": st.sampled_from(list(Cell)),
        "hidden": st.integers(1, 70),
        "sizes": st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda sizes: sorted(sizes, reverse=True)),
        "projected": st.sampled_from([0, 0, 1, 9, 32]),
        "directions": st.integers(1, 2),
        "special": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
    fuzz(lambda drawn: check(**drawn), st.fixed_dictionaries(arguments), examples=60)
