"""What one call costs before any arithmetic: a 1 x 1 layer, taken apart from the outside in.

taskset -c 0 python -m benchmarks.call
"""

import torch
from torch import nn

import torchq
from benchmarks.demo import markdown
from benchmarks.timing import interleaved, machine


def steps() -> dict[str, float]:
    """Seconds of each step on (1, 1) inputs; a later step is a part of an earlier one."""
    linear, x = nn.Linear(1, 1), torch.ones(1, 1)
    layer = torchq.QuantizedLinear.from_float(linear)
    packed, op = layer.packed, torch.ops.torchq.linear_dynamic.default
    return interleaved(
        {
            "nn.Linear, the whole call": lambda: linear(x),
            "F.linear alone": lambda: nn.functional.linear(x, linear.weight, linear.bias),
            "QuantizedLinear, the whole call": lambda: layer(x),
            "its forward, without nn.Module's __call__": lambda: layer.forward(x),
            "the op alone": lambda: op(x, packed),
            "torch.empty(1, 1), for scale": lambda: torch.empty(1, 1),
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
