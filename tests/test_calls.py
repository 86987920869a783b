"""Ways to call a layer, and the errors that come out of it."""

import sys

import pytest
import torch
from torch import nn

from helpers.commands import run_code
from helpers.compare import assert_identical
from torchq import QuantizedLinear, simulate
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded")
LAYERS = {
    "dynamic": lambda: QuantizedLinear.from_float(nn.Linear(16, 4)),
    "static": lambda: QuantizedLinear.from_float(nn.Linear(16, 4), input_qparams=QParams(0.05, 128)),
    "prepared": lambda: QATLinear(16, 4),
    "sequential": lambda: Int8Sequential(
        QuantizedLinear.from_float(nn.Linear(16, 4), fold=Fold(Activation.RELU)), nn.ReLU()
    ),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_argument_is_called_input(make):
    """As nn.Linear's and nn.Sequential's; with hooks and inside simulate() too."""
    layer, x = make(), torch.randn(3, 16)
    expected = layer(x)
    assert_identical(layer(input=x), expected)
    assert_identical(layer.forward(input=x), expected)
    with simulate():
        assert_identical(layer(input=x), layer(x))
    layer.register_forward_hook(lambda *_: None)
    assert_identical(layer(input=x), expected)
    for call in (lambda: layer(), lambda: layer(x, x), lambda: layer(other=x)):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_a_traced_graph_keeps_the_layer(scheme):
    layer, x = LAYERS[scheme](), torch.randn(3, 16)
    model = nn.Sequential(layer, nn.Tanh())
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    assert_identical(traced(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(traced(x), model(x))
    alone = torch.fx.symbolic_trace(layer)  # nothing around it: its own operations
    assert_identical(alone(x), layer(x))
    for graph in (traced, alone):
        with pytest.raises((TypeError, RuntimeError), match="uint8"):
            graph(torch.zeros(3, 16, dtype=torch.uint8))


STARVED = """
import resource, torch
from torchq import QuantizedLinear
torch.set_num_threads({threads})
layer = QuantizedLinear(torch.ones(16 * {threads}, 65536, dtype=torch.int8), torch.ones(16 * {threads}))
x = torch.randn({rows}, 65536)
call = layer if {direct} else lambda x: torch.nn.Module.__call__(layer, x)
pages = int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 65536, limits[1]))
held = []  # what the heap has left in large pieces, which would do
try:
    while True:
        held.append(bytearray(1 << 17))
except MemoryError:
    pass
try:
    call(x)
    print("an answer")
except Exception as error:
    said = f"{{type(error).__name__}}: {{error}}"
    resource.setrlimit(resource.RLIMIT_AS, limits)
    print(said, float(call(x).isfinite().all()))
"""


@pytest.mark.subprocess
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("direct", [True, False])
def test_out_of_memory_is_a_memory_error_and_the_layer_works_again(direct):
    code = STARVED.format(threads=1, rows=6, direct=direct)
    exit_code, printed, err = run_code(code)
    assert exit_code == 0, err
    assert printed.startswith("MemoryError: "), printed
    assert "out of memory for" in printed
    assert printed.endswith("1.0\n")
    assert ".cpp" not in printed


def test_an_output_that_no_memory_holds():
    """The reason, and no line of the build machine's sources."""
    layer = QuantizedLinear.from_float(nn.Linear(1, 4096))
    with pytest.raises(MemoryError, match="out of memory for its output") as error:
        layer(torch.ones(1, 1).expand(1 << 45, 1))
    assert "csrc" not in str(error.value)
