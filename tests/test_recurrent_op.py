"""torchq.ops.recurrent: the bits of its formulas on every kernel, threads, errors, opcheck."""

from functools import partial

import pytest
import torch

from helpers.compare import assert_identical
from helpers.numbers import random_weight
from torchq import ops
from torchq.numerics.recurrent import Curves, State, run_direction
from torchq.ops import Activation, Cell

CURVES = Curves(*(partial(ops.activate, activation=each) for each in (Activation.SIGMOID, Activation.TANH)))
CELLS = pytest.mark.parametrize("cell", Cell)
LSTM = Cell.LSTM


class Layer:
    """Random weights of a layer of these directions, and a state."""

    def __init__(self, generator, cell, hidden, *, directions=1, batch=3, projected=0):
        width = projected or hidden
        self.cell, self.directions, self.hidden = cell, directions, hidden
        self.hh = [ops.pack(*self._weight(cell.gates * hidden, width, generator)) for _ in range(directions)]
        self.hr = [ops.pack(*self._weight(projected, hidden, generator)) for _ in range(directions * bool(projected))]
        self.h = torch.rand(directions, batch, width, generator=generator) * 2 - 1
        self.c = torch.randn(directions, batch, hidden, generator=generator) if cell == LSTM else None

    def _weight(self, n, k, generator):
        weight, scale, bias = random_weight(n, k, generator)
        return weight, scale / k**0.5, bias

    def gates(self, rows, generator):
        return [torch.randn(rows, self.cell.gates * self.hidden, generator=generator) for _ in range(self.directions)]

    def run(self, gates, **others):
        return ops.recurrent(self.cell, gates, self.hh, self.h, self.c, packed_hr=self.hr, **others)

    def expected(self, gates, sizes, multiply=ops.linear_dynamic):
        """The same, step by step in torch's operations and the ops of layers."""
        runs = [
            run_direction(
                self.cell,
                gates[i],
                partial(multiply, packed=self.hh[i]),
                partial(multiply, packed=self.hr[i]) if self.hr else None,
                State(self.h[i], None if self.c is None else self.c[i]),
                sizes,
                backwards=i == 1,
                curves=CURVES,
            )
            for i in range(self.directions)
        ]
        c = torch.stack([last.c for _, last in runs]) if self.cell == LSTM else torch.empty(0)
        return torch.cat([y for y, _ in runs], dim=1), torch.stack([last.h for _, last in runs]), c


def assert_all_identical(actual, expected, case=""):
    for name, got, want in zip(("y", "h", "c"), actual, expected, strict=True):
        assert_identical(got, want, (name, case))


@CELLS
@pytest.mark.parametrize("hidden", [1, 15, 16, 37, 64])  # vectors of 1, 4, 8 and 16 values, and a rest of each
def test_every_kernel_gives_the_formulas_bits(kernel, cell, hidden, generator):
    layer = Layer(generator, cell, hidden, batch=4)
    gates = layer.gates(4 * 5, generator)
    assert_all_identical(layer.run(gates), layer.expected(gates, [4] * 5))


@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_both_directions_of_any_batch(kernel, batch, generator):
    layer = Layer(generator, LSTM, 24, directions=2, batch=batch)
    gates = layer.gates(3 * batch, generator)
    assert_all_identical(layer.run(gates), layer.expected(gates, [batch] * 3))


@pytest.mark.parametrize("projected", [1, 8, 20])
def test_projections(kernel, projected, generator):
    layer = Layer(generator, LSTM, 24, directions=2, projected=projected)
    gates = layer.gates(4 * 3, generator)
    assert_all_identical(layer.run(gates), layer.expected(gates, [3] * 4))


@CELLS
def test_rows_that_end_earlier(cell, generator):
    """Backwards, a row starts at its own last step, from the first state."""
    layer, sizes = Layer(generator, cell, 20, directions=2, batch=4), [4, 4, 2, 1, 1]
    gates = layer.gates(sum(sizes), generator)
    actual = layer.run(gates, batch_sizes=torch.tensor(sizes))
    assert_all_identical(actual, layer.expected(gates, sizes))


def test_a_batch_that_the_first_step_does_not_fill(generator):
    """The rows that take part in no step keep their state."""
    layer = Layer(generator, Cell.GRU, 20, batch=4)
    gates = layer.gates(3, generator)
    y, h, _ = layer.run(gates, batch_sizes=torch.tensor([2, 1]))
    assert_identical(h[0, 2:], layer.h[0, 2:])
    assert_all_identical((y, h, torch.empty(0)), layer.expected(gates, [2, 1]))


def test_static_ranges(kernel, generator):
    """Of h, of what is projected, or of one of them."""
    layer = Layer(generator, LSTM, 24, projected=8)
    gates = layer.gates(4 * 3, generator)
    for hh, hr in (((1 / 100, 120), (1 / 90, 3)), ((0.0, 0), (1 / 90, 3)), ((1 / 100, 120), (0.0, 0))):
        pairs = {layer.hh[0].data_ptr(): hh, layer.hr[0].data_ptr(): hr}

        def multiply(x, packed, pairs=pairs):
            scale, zero_point = pairs[packed.data_ptr()]
            static = scale > 0
            return ops.linear_static(x, packed, scale, zero_point, x.dtype) if static else ops.linear_dynamic(x, packed)

        actual = layer.run(gates, qparams=[*hh, *hr])
        assert_all_identical(actual, layer.expected(gates, [3] * 4, multiply), (hh, hr))


def test_nan_stays_in_its_row(kernel, generator):
    layer = Layer(generator, LSTM, 24)
    gates = layer.gates(4 * 3, generator)
    clean = layer.run(gates)
    gates[0][1, 5] = torch.nan  # step 0, row 1
    y, h, c = layer.run(gates)
    others = [0, 2]
    assert_identical(y.view(4, 3, 24)[:, others], clean[0].view(4, 3, 24)[:, others])
    assert y.view(4, 3, 24)[1:, 1].isnan().all()
    assert h[0, 1].isnan().all()
    assert c[0, 1].isnan().all()


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("hidden", [32, 384])  # of which products stay on one thread, and take several
def test_threads_change_no_bit(directions, hidden, set_threads, generator):
    layer = Layer(generator, LSTM, hidden, directions=directions, batch=8)
    gates = layer.gates(2 * 8, generator)
    results = []
    for threads in (1, 2, 4):
        set_threads(threads)
        results.append(layer.run(gates))
    for other in results[1:]:
        assert_all_identical(other, results[0])


def test_the_given_state_is_left_alone(generator):
    layer = Layer(generator, LSTM, 16)
    h, c = layer.h.clone(), layer.c.clone()
    layer.run(layer.gates(3, generator))
    assert_identical(layer.h, h)
    assert_identical(layer.c, c)


def test_no_steps(generator):
    layer = Layer(generator, LSTM, 16, directions=2)
    y, h, c = layer.run(layer.gates(0, generator))
    assert y.shape == (0, 32)
    assert_identical(h, layer.h)
    assert_identical(c, layer.c)


def test_strided_gates_and_states(generator):
    layer = Layer(generator, LSTM, 16)
    gates = layer.gates(6, generator)
    expected = layer.run(gates)
    wide = torch.zeros(6, 80)
    wide[:, 8:72] = gates[0]
    layer.h, layer.c = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (layer.h, layer.c))
    assert_all_identical(layer.run([wide[:, 8:72]]), expected)


def packed(n, k):
    return ops.pack(torch.zeros(n, k, dtype=torch.int8), torch.ones(n))


G, HH, H, C = torch.zeros(6, 32), packed(32, 8), torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)
BAD = {
    "cell": ((9, [G], [HH], [], H, C), r"cell must be a torchq.ops.Cell, 0 \(lstm\) to 3 \(rnn_relu\), got 9"),
    "no direction": ((0, [], [], [], H, C), r"one or two directions.*got 0, 0 and 0"),
    "directions": ((0, [G], [HH, HH], [], H, C), r"lists of one tensor for each .*got 1, 2 and 0"),
    "gates dtype": ((0, [G.double()], [HH], [], H, C), r"gates must be float32 .*got float64 \(6, 32\)"),
    "gates shape": ((0, [G[:, :31]], [HH], [], H, C), r"gates must be float32 .* = \(6, 32\).*got float32 \(6, 31\)"),
    "gates of a step": ((0, [G[:5]], [HH], [], H, C), r"gates must have rows of whole steps of 3 rows, got 5"),
    "gates scalar": ((0, [G[0, 0]], [HH], [], H, C), r"gates must be float32"),
    "packed": ((0, [G], [torch.zeros(9)], [], H, C), r"packed_hh must be the uint8 vector that .*got float32 \(9\)"),
    "no packed": ((0, [G], [torch.zeros(99).byte()], [], H, C), r"packed_hh holds no packed weights \(99 bytes"),
    "packed shape": ((0, [G], [packed(32, 9)], [], H, C), r"packed_hh must have \(4 x hidden, hidden\).*got \(32, 9\)"),
    "packed gates": ((1, [G], [HH], [], H), r"packed_hh must have \(3 x hidden, hidden\) weights, got \(32, 8\)"),
    "projection": ((0, [G], [packed(32, 4)], [packed(4, 7)], H, C), r"packed_hr must have .*8 hidden.*got \(4, 7\)"),
    "no lstm": ((2, [G], [packed(32, 4)], [packed(4, 32)], H), r"packed_hr must have .* of an LSTM"),
    "h0": ((0, [G], [HH], [], H[:, :, :7], C), r"h0 must be float32 .* = \(1, 3, 8\), got float32 \(1, 3, 7\)"),
    "h0 dimensions": ((0, [G], [HH], [], H[0], C), r"h0 must be float32 \(directions, batch, features\), got \(3, 8\)"),
    "h0 dtype": ((0, [G], [HH], [], H.half(), C), r"h0 must be float32 .*got float16 \(1, 3, 8\)"),
    "c0": ((0, [G], [HH], [], H, C[:, :2]), r"c0 must be float32 .* = \(1, 3, 8\), got float32 \(1, 2, 8\)"),
    "no c0": ((0, [G], [HH], [], H), r"c0 is the state of an LSTM"),
    "c0 of another": ((1, [G[:, :24]], [packed(24, 8)], [], H, C), r"c0 is the state of an LSTM"),
    "sizes dtype": ((0, [G], [HH], [], H, C, torch.tensor([3.0, 3])), r"batch_sizes must be int64.*got float32 \(2\)"),
    "sizes sum": ((0, [G], [HH], [], H, C, torch.tensor([3, 2])), r"batch_sizes add up to 5 rows, but gates has 6"),
    "sizes grow": ((0, [G], [HH], [], H, C, torch.tensor([1, 2])), r"not increase; got 2 at step 1"),
    "sizes large": ((0, [G], [HH], [], H, C, torch.tensor([4, 2])), r"at most 3, the batch of h0.*got 4 at step 0"),
    "sizes zero": ((0, [G], [HH], [], H, C, torch.tensor([3, 3, 0])), r"must be positive.*got 0 at step 2"),
    "qparams": ((0, [G], [HH], [], H, C, None, [1.0]), r"got 1 numbers for 1 weights"),
    "scale": ((0, [G], [HH], [], H, C, None, [-1.0, 0]), r"qparams must be pairs of a positive.*got -1 and 0"),
    "zero point": ((0, [G], [HH], [], H, C, None, [1.0, 256]), r"qparams must be pairs of .*got 1 and 256"),
    "device": ((0, [G], [HH], [], H.to("meta"), C), r"gates is on cpu, h0 on meta"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(args, message):
    with pytest.raises(RuntimeError, match=f"torchq::recurrent: .*{message}|torchq::recurrent: {message}"):
        torch.ops.torchq.recurrent(*args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@CELLS
def test_opcheck(cell, generator):
    layer = Layer(generator, cell, 8, directions=2)
    arguments = (int(cell), layer.gates(6, generator), layer.hh, layer.hr, layer.h, layer.c)
    torch.library.opcheck(torch.ops.torchq.recurrent.default, arguments)
    sizes = torch.tensor([3, 2, 1])
    torch.library.opcheck(torch.ops.torchq.recurrent.default, (*arguments, sizes, [0.01, 3.0, 0.0, 0.0]))
