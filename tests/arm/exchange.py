"""Saves quantized models with inputs and outputs, or loads them and checks the bits: x86-64 to aarch64 and back.

python tests/arm/exchange.py save|check FOLDER [save|check FOLDER]
"""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from torchq import QConfig, convert, kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMES = ["dynamic", "static"]


class QuickGELU(nn.Module):
    """Of CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SquaredReLU(nn.Module):
    """Of Primer."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x).square()


def network(generator: torch.Generator) -> nn.Sequential:
    """Has every activation of the epilogue, and no K or N that is a multiple of a group, panel or vector."""
    curves = [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), QuickGELU(), nn.Hardswish(), SquaredReLU(), nn.Tanh()]
    sizes = [75, 130, 67, 50, 33, 41, 66, 35, 70, 39, 33]
    layers: list[nn.Module] = []
    for wide, narrow, between in zip(sizes, sizes[1:], [*curves, nn.Sigmoid(), nn.ReLU6()], strict=False):
        linear = nn.Linear(wide, narrow)
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / wide**0.5
        layers += [linear, between]
    return nn.Sequential(*layers).eval()


def assert_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fails unless values are equal, and zeros have the same sign."""
    assert actual.dtype == expected.dtype, what
    same = torch.equal(actual, expected) and torch.equal(actual.signbit(), expected.signbit())
    assert same, f"{what}: other bits than where the model was saved"


def save(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = network(generator)
    x = torch.randn(59, 75, generator=generator)  # so many rows that no kernel passes a layer on to another kernel
    for scheme in SCHEMES:
        qmodel = convert(model, [x], config=QConfig(activation=scheme))
        torch.save(qmodel, folder / f"{scheme}.model.pt")
        torch.save(qmodel.state_dict(), folder / f"{scheme}.state.pt")
        with torch.no_grad():
            outputs = {name: (x.to(dtype), qmodel(x.to(dtype))) for name, dtype in DTYPES.items()}
        torch.save(outputs, folder / f"{scheme}.outputs.pt")


def check(folder: Path) -> None:
    for scheme in SCHEMES:
        state = torch.load(folder / f"{scheme}.state.pt", weights_only=True)
        outputs = torch.load(folder / f"{scheme}.outputs.pt", weights_only=True)
        for kernel in kernels.runnable():
            with kernels.use(kernel):
                loaded = torch.load(folder / f"{scheme}.model.pt", weights_only=False)
                filled = copy.deepcopy(loaded)
                for tensor in filled.state_dict().values():
                    tensor.zero_()
                filled.load_state_dict(state)
                for name, (x, y) in outputs.items():
                    for how, qmodel in (("the model", loaded), ("the state_dict", filled)):
                        with torch.no_grad():
                            assert_bits(qmodel(x), y, f"{kernel}, {scheme}, {name}, {how}")
                assert kernels.last_used() == kernel
                print(f"{scheme}: {kernel} gives the saved bits")


if __name__ == "__main__":
    for command, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        {"save": save, "check": check}[command](Path(folder))
