"""load_state_dict of another checkpoint while others call the layer: each call computes with all of the old or the new.

Not by chance: at every bytecode of the one that another thread could run between, the other one runs.
"""

import sys

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, simulate
from torchq.modules import int8_sequential, packed_weights, quantized_linear
from torchq.numerics.qparams import QParams

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.slow(seconds=3)]

FILES = {module.__file__ for module in (int8_sequential, packed_weights, quantized_linear)}
X = normal(5, 16)


def at_each_bytecode(call, action):
    """Calls `action(i)` before the i-th bytecode of the layer's own files that `call()` runs. Gives its result."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            action(count)
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # without it CPython 3.12 traces opcodes from the second time on
    sys.settrace(trace)
    try:
        y = call()
    finally:
        sys.settrace(before)
    assert count > 10
    return y


def layer(seed, width=16):
    torch.manual_seed(seed)
    weight, scale = torch.randint(-128, 128, (8, width), dtype=torch.int8), torch.rand(8) * 0.1 + 0.01
    return QuantizedLinear(weight, scale, torch.randn(8), input_qparams=QParams(0.02 * (seed + 1), 100 + seed))


def simulated(layer):
    with simulate():
        return layer(X)


def with_gradient(layer):
    with torch.enable_grad():
        return layer(X.clone().requires_grad_()).detach()


def saved(layer):
    return torch.cat([tensor.reshape(-1).double() for tensor in layer.state_dict().values()])


READS = {
    "called": lambda layer: layer(X),
    "op": lambda layer: layer.forward(X),
    "autocast": lambda layer: torch.autocast("cpu")(layer.forward)(X),
    "simulated": simulated,
    "with gradient": with_gradient,
    "saved": saved,
}


def is_one_of(y, wanted):
    return any(torch.equal(y, right) for right in wanted)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_call_in_the_midst_of_a_load(read):
    old, new = layer(0), layer(1)
    wanted, state = [read(old), read(new)], new.state_dict()
    assert not torch.equal(*wanted)
    seen = []
    at_each_bytecode(lambda: old.load_state_dict(state), lambda i: seen.append(read(old)))
    assert all(is_one_of(y, wanted) for y in seen)
    assert torch.equal(seen[0], wanted[0])
    assert torch.equal(read(old), wanted[1])


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_load_in_the_midst_of_a_call(read):
    served, states = layer(0), [layer(seed).state_dict() for seed in (0, 1)]
    wanted = [read(layer(seed)) for seed in (0, 1)]
    bytecodes = []
    at_each_bytecode(lambda: read(served), bytecodes.append)
    seen = []
    for at in bytecodes:
        served.load_state_dict(states[0])
        load = lambda i, at=at: served.load_state_dict(states[1]) if i == at else None  # noqa: E731
        seen.append(at_each_bytecode(lambda: read(served), load))
    assert all(is_one_of(y, wanted) for y in seen)
    assert torch.equal(seen[0], wanted[1])
    assert torch.equal(seen[-1], wanted[0])


def test_what_is_replaced_is_destroyed_afterwards():
    """Destroying it may let other threads run, which then must see all of the new."""
    old, new, seen = layer(0), layer(1), []

    class Told(QParams):
        def __del__(self):
            seen.append((old.input_qparams, old.packed, old.weight))

    old.input_qparams = Told(*old.input_qparams)
    old.load_state_dict(new.state_dict())
    pair, packed, weight = seen[0]
    assert pair == new.input_qparams
    assert torch.equal(packed, new.packed)
    assert torch.equal(weight, new.weight)


@pytest.mark.parametrize("read", [READS["called"], READS["simulated"], READS["with gradient"]])
def test_codes_are_read_in_the_range_they_were_made_in(read):
    """Another range arrives anywhere between the layer that makes codes and the layer that reads them."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    qmodel = convert(model, [normal(64, 16)], config=QConfig(activation="static", observer="minmax"))
    assert qmodel[0].fold.codes
    reader, ranges, wanted = qmodel[2], [qmodel[2].input_qparams, QParams(0.5, 3)], []
    for reader.input_qparams in ranges:
        wanted.append(read(qmodel))
    assert not torch.equal(*wanted)
    bytecodes, seen = [], []
    at_each_bytecode(lambda: read(qmodel), bytecodes.append)
    for at in bytecodes:
        reader.input_qparams = ranges[0]
        change = lambda i, at=at: setattr(reader, "input_qparams", ranges[1]) if i == at else None  # noqa: E731
        seen.append(at_each_bytecode(lambda: read(qmodel), change))
    assert all(is_one_of(y, wanted) for y in seen)
    assert torch.equal(seen[0], wanted[1])
    assert torch.equal(seen[-1], wanted[0])
