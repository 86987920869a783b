"""Threads that share a layer: what one forces, simulates or reloads never changes what another computes."""

import asyncio
import copy
import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from torchq import _C, QuantizedLinear, convert, kernels, ops, simulate
from torchq.numerics.qparams import QParams
from torchq.scopes import Scoped

pytestmark = pytest.mark.usefixtures("seeded")
SETTINGS = {"use": lambda: kernels.use("reference"), "simulate": simulate}
another_kernel = pytest.mark.skipif(kernels.runnable()[0] == "reference", reason="one kernel only")


@pytest.fixture
def layer():
    return QuantizedLinear.from_float(nn.Linear(256, 64))


@pytest.fixture
def x():
    return torch.randn(32, 256) * 7


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def state(layer, x):
    """What both settings change: the active kernel, and whether the layer's bits are the simulated ones."""
    return kernels.active(), layer(x)


def same(one, other):
    return one[0] == other[0] and torch.equal(one[1], other[1])


@another_kernel
@pytest.mark.parametrize("enter", SETTINGS.values(), ids=SETTINGS)
def test_a_block_is_its_threads_alone(layer, x, enter):
    """Also for threads that are started inside."""
    outside = state(layer, x)
    with enter():
        inside = state(layer, x)
        assert not same(inside, outside)
        assert same(in_a_thread(lambda: state(layer, x)), outside)
        assert same(state(layer, x), inside)
    assert same(state(layer, x), outside)


def test_the_two_paths_differ_in_these_tests(layer, x):
    with simulate():
        simulated = layer(x)
    assert not torch.equal(simulated, layer(x))


@another_kernel
def test_every_way_into_a_product_asks_for_the_kernel_of_its_thread(layer, x):
    """The op releases the GIL and has to ask for it; the direct call holds it. last_used() tells what ran."""
    calls = {
        "op": lambda: ops.linear_dynamic(x, layer.packed),
        "direct": lambda: _C.call_linear(layer, QuantizedLinear, x),
        "module": lambda: layer(x),
        "rows": lambda: ops.quantize_per_token(x),
    }
    best = kernels.active()
    for name, call in calls.items():
        with kernels.use("reference"):
            call()
            assert kernels.last_used() == "reference", name
            in_a_thread(call)
            assert kernels.last_used() != "reference", name
        call()
        assert kernels.last_used() != "reference", name
    assert kernels.active() == best


@another_kernel
def test_torchs_own_threads_take_the_callers_kernel(set_threads, x):
    set_threads(2)
    wide = QuantizedLinear.from_float(nn.Linear(256, 512))
    with kernels.use("reference"):
        again = QuantizedLinear(wide.weight_int8, wide.weight_scale, wide.bias)
        y = again(x)
        assert kernels.last_used() == "reference"
    assert_identical(y, wide(x))


@another_kernel
@pytest.mark.parametrize("enter", SETTINGS.values(), ids=SETTINGS)
def test_overlapping_threads_leave_nothing_behind(layer, x, enter):
    """Each waits inside for the other, and they leave in the order they came."""
    outside, both_in, first_out = state(layer, x), threading.Barrier(2), threading.Event()

    def first():
        with enter():
            both_in.wait()
        left = state(layer, x)
        first_out.set()
        return left

    def second():
        with enter():
            both_in.wait()
            first_out.wait()
            inside = state(layer, x)
        return inside, state(layer, x)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        inside, left = two.result()
    assert same(one.result(), outside)
    assert same(left, outside)
    assert not same(inside, outside)
    assert same(state(layer, x), outside)


@another_kernel
@pytest.mark.parametrize("enter", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_generators_suspended_inside_may_end_in_any_order(layer, x, enter, order):
    def suspended():
        with enter():
            yield

    outside = state(layer, x)
    generators = [suspended(), suspended()]
    for generator in generators:
        next(generator)
    assert not same(state(layer, x), outside)
    generators[order[0]].close()
    assert not same(state(layer, x), outside)  # the other one is inside yet
    generators[order[1]].close()
    assert same(state(layer, x), outside)


@another_kernel
@pytest.mark.parametrize("enter", SETTINGS.values(), ids=SETTINGS)
def test_a_block_that_another_thread_ends_is_over(layer, x, enter):
    def suspended():
        with enter():
            yield

    outside, generator = state(layer, x), suspended()
    next(generator)
    assert not same(state(layer, x), outside)
    in_a_thread(generator.close)
    assert same(state(layer, x), outside)
    forgotten = suspended()
    next(forgotten)
    del forgotten, generator
    gc.collect()
    assert same(state(layer, x), outside)


@another_kernel
@pytest.mark.parametrize("enter", SETTINGS.values(), ids=SETTINGS)
def test_asyncio_tasks_do_not_see_each_others_blocks(layer, x, enter):
    outside = state(layer, x)

    async def inside(entered, leave):
        with enter():
            entered.set()
            await leave.wait()
            return state(layer, x)

    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, leave))
        await entered.wait()
        seen = state(layer, x)
        leave.set()
        return seen, await task

    seen, there = asyncio.run(main())
    assert same(seen, outside)
    assert not same(there, outside)


def test_scopes_end_where_they_were_copied_to():
    """And whoever is told whether any is entered hears of it at once."""
    told = []
    setting: Scoped[int] = Scoped("test", told.append)
    context = Context()
    block = setting.of(1)
    context.run(block.__enter__)
    assert context.run(setting.get) == 1
    assert setting.get() is None
    copied = context.copy()
    with setting.of(2):
        assert setting.get() == 2
    assert told == [True, True, True]
    block.__exit__(None, None, None)
    assert context.run(setting.get) is copied.run(setting.get) is None
    assert told == [True, True, True, False]


def test_a_compiled_graph_simulates_on_the_thread_that_does(layer, x):
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    expected = layer(x)
    assert_identical(compiled(x), expected)
    with simulate():
        simulated = layer(x)
        assert_identical(compiled(x), simulated)
        assert_identical(in_a_thread(lambda: compiled(x)), expected)
    assert_identical(compiled(x), expected)
    assert not torch.equal(simulated, expected)
    torch.compiler.reset()


# ---- Changing a layer while others call it ----------------------------------------------------------------------


def serve_while(change, call, wanted, rounds=40):
    """`call` on two threads while `change` runs again and again on a third: the answers that were not `wanted`."""
    wrong, done = [], threading.Event()

    def serve():
        for _ in range(rounds):
            y = call()
            if not any(torch.equal(y, right) for right in wanted):
                wrong.append(y)

    def reload():
        while not done.is_set():
            change()

    reloader = threading.Thread(target=reload)
    servers = [threading.Thread(target=serve) for _ in range(2)]
    reloader.start()
    for thread in servers:
        thread.start()
    for thread in servers:
        thread.join()
    done.set()
    reloader.join()
    return wrong


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (64, 512)], ids=["holding the GIL", "giving it away"])
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_reloading_while_others_serve(rows, width, scheme):
    """The weights that a call began with stay until it has ended, whoever replaces them. Big ones are freed at once."""
    static = QParams(0.05, 128) if scheme == "static" else None
    layer = QuantizedLinear.from_float(nn.Linear(width, 2048), input_qparams=static)
    x, state = torch.randn(rows, width), layer.state_dict()
    y = layer(x)
    assert serve_while(lambda: layer.load_state_dict(state), lambda: layer(x), [y]) == []


def test_replacing_weights_gives_the_old_output_or_the_new():
    layers = [QuantizedLinear.from_float(nn.Linear(512, 2048)) for _ in range(2)]
    x = torch.randn(64, 512)
    served, wanted = layers[0], [layer(x) for layer in layers]
    packed = [layer.packed for layer in layers]
    turn = [0]

    def change():
        turn[0] ^= 1
        served.packed = packed[turn[0]].clone()

    assert serve_while(change, lambda: served(x), wanted) == []


# ---- The GIL ----------------------------------------------------------------------------------------------------


def others_ran_during(call):
    """How often another Python thread, which sleeps for 0.2 ms again and again, got to run during this call.

    Nobody asks for the GIL, so it runs only where the call gives the GIL away: torch's functions do so for a moment, to
    make a tensor, and a product for all of its time.
    """
    interval, ran, over = sys.getswitchinterval(), [0], threading.Event()

    def other():
        while not over.is_set():
            time.sleep(0.0002)
            ran[0] += 1

    thread = threading.Thread(target=other)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        time.sleep(0.01)
        before = ran[0]
        call()
        return ran[0] - before
    finally:
        over.set()
        sys.setswitchinterval(interval)
        thread.join()


def test_a_large_product_gives_the_gil_away():
    """For some 10 ms, in which the other thread runs some 40 times. On a busy machine there are more tries."""
    layer, x = QuantizedLinear.from_float(nn.Linear(65536, 64)), torch.randn(256, 65536)
    assert any(others_ran_during(lambda: _C.call_linear(layer, QuantizedLinear, x)) >= 8 for _ in range(50))
    small, row = QuantizedLinear.from_float(nn.Linear(64, 64)), torch.randn(1, 64)
    assert others_ran_during(lambda: _C.call_linear(small, QuantizedLinear, row)) <= 1


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(48, 48), nn.LayerNorm(48)

    def forward(self, x, residual):
        return self.norm(self.dense(x) + residual)


def test_children_of_a_sum_are_replaced_while_others_call_it():
    """What the product reads is held: else this reads freed memory, and crashes."""
    module, x = convert(Sum().eval()).requires_grad_(False), torch.randn(16, 48)
    expected, wrong, over, interval = module(x, x), [], threading.Event(), sys.getswitchinterval()

    def call():
        with torch.no_grad():
            while not over.is_set():
                wrong.extend(y for y in [module(x, x)] if not torch.equal(y, expected))

    threads = [threading.Thread(target=call) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(400):
            module.norm = copy.deepcopy(module.norm)
            module.norm.weight = nn.Parameter(module.norm.weight.clone(), requires_grad=False)
            module.dense = copy.deepcopy(module.dense)
    finally:
        sys.setswitchinterval(interval)
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong
