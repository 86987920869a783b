"""The overhead of one call: the time of each step of a call of a 1 x 1 layer, which has hardly any arithmetic.

taskset -c 0 python -m benchmarks.call
"""

import torch
from torch import nn

import torchq
from benchmarks.demo import markdown
from benchmarks.timing import interleaved, machine
from torchq import _C
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential


def steps() -> dict[str, float]:
    """Seconds of each step on (1, 1) inputs."""
    linear, x = nn.Linear(1, 1), torch.ones(1, 1)
    layer = torchq.QuantizedLinear.from_float(linear)
    dynamic, static = torch.ops.torchq.linear_dynamic.default, torch.ops.torchq.linear_static.default
    packed, identity = layer.packed, nn.Identity()
    relu = torchq.QuantizedLinear.from_float(linear, fold=Fold(torchq.ops.Activation.RELU))
    fused, apart = (of(relu, nn.ReLU()) for of in (Int8Sequential, nn.Sequential))
    direct, is_plain = _C.call_linear, _C.is_plain
    return interleaved(
        {
            "nn.Linear, the whole call": lambda: linear(x),
            "F.linear alone": lambda: nn.functional.linear(x, linear.weight, linear.bias),
            "QuantizedLinear, the whole call": lambda: layer(x),
            "its direct call alone": lambda: direct(layer, torchq.QuantizedLinear, x),
            "of that, asking whether something hooks in": lambda: is_plain(layer, torchq.QuantizedLinear),
            "of that, a new tensor: no more than torch.empty(1, 1)": lambda: torch.empty(1, 1),
            "the long way: nn.Module's __call__, forward(), the op": lambda: nn.Module.__call__(layer, x),
            "of that, the op, linear_dynamic": lambda: dynamic(x, packed, 0),
            "or linear_static, with its eight arguments": lambda: static(x, packed, 0.05, 3, torch.float32, 1.0, 0, 0),
            "nn.Identity": lambda: identity(x),
            "a layer and nn.ReLU in an nn.Sequential": lambda: apart(x),
            "the same in an Int8Sequential": lambda: fused(x),
        },
        rounds=31,
    )


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [[name, f"{seconds * 1e6:.2f} us"] for name, seconds in steps().items()]
    print(markdown([["step", "time"], *rows]))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
