"""Whether an installed torchq works: `python smoke.py`, in any folder, with any Python and torch.

It converts, calls, trains, saves, loads and exports small models, compares each with what it must be, and prints one
line, which ends in a hash of int8 outputs: the same on every CPU, Python and torch.
"""

import hashlib
import platform
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

import torchq
from torchq import _C

warnings.simplefilter("ignore")  # torch's own, which differ from version to version


def grid(*shape: int, step: int) -> Tensor:
    """Numbers in [-1, 1] by integer arithmetic, which no version of torch rounds in another way."""
    count = torch.arange(torch.Size(shape).numel())
    return ((count * step) % 251 - 125).float().div(125).reshape(shape)


def network() -> nn.Sequential:
    """Three layers, the same in every process."""
    model = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(grid(*parameter.shape, step=37 + 2 * i) / 8)
    return model


def check(passed: bool, what: str) -> None:
    """Ends the program where something is not as it must be."""
    if not passed:
        sys.exit(f"smoke test failed: {what} (torch {torch.__version__}, Python {platform.python_version()})")


@torch.no_grad()
def outputs() -> Tensor:
    """What converted layers give: dynamic and static, fused, called directly and through torch's dispatcher."""
    model, x = network(), grid(7, 96, step=29)
    dynamic = torchq.convert(model)
    check(_C.call_linear(dynamic[0], torchq.QuantizedLinear, x) is not NotImplemented, "no direct calls")
    check(torch.equal(dynamic[0](x), dynamic[0].forward(x)), "a direct call gives other bits than the op")
    config = torchq.QConfig(activation="static", rounding="nearest", smoothing="none", observer="minmax")
    static = torchq.convert(model, [grid(64, 96, step=step) for step in (31, 33)], config=config)
    check(torchq.sqnr_db(model(x), dynamic(x)) > 25, "int8 is not close to float")
    return torch.cat([dynamic(x), static(x)])


def save_and_load(folder: Path) -> None:
    """A file of torchq.save, a program of torch.export, and a plan, come back as the same model."""
    model, x = network(), grid(7, 96, step=29)
    qmodel = torchq.convert(model, [grid(64, 96, step=31)])
    y = qmodel(x).detach()
    torchq.save(qmodel, folder / "model.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    check(torch.equal(torchq.load(folder / "model.safetensors", empty)(x), y), "a file gives another model")
    torch.export.save(torch.export.export(qmodel, (x,)), folder / "model.pt2")
    check(torch.equal(torch.export.load(folder / "model.pt2").module()(x), y), "a program gives other bits")
    check(torch.equal(torchq.apply_plan(model, torchq.plan_of(qmodel))(x), y), "a plan gives another model")


def train() -> None:
    """A step of quantization-aware training changes the weights, and converts to what was trained."""
    x = grid(64, 96, step=31)
    qat_model = torchq.prepare_qat(network(), [x])
    optimizer = torch.optim.SGD(qat_model.parameters(), lr=0.1)
    qat_model(x).square().mean().backward()
    optimizer.step()
    check(not torch.equal(qat_model[0].weight, network()[0].weight), "training changes nothing")
    qmodel = torchq.convert(qat_model, [x])
    with torchq.simulate():
        check(torch.equal(qmodel(x), qat_model(x)), "the converted model is not what was trained")


def main() -> None:
    """Runs all of it."""
    check(torchq.__version__ == metadata.version("torchq"), "the metadata are of another version")
    entries = {entry.value for entry in metadata.entry_points(group="torch.backends") if entry.name == "torchq"}
    check(entries == {"_torchq_autoload:announce"}, "torch does not know where torch.ops.torchq comes from")
    bits = hashlib.sha256(bytes(outputs().contiguous().view(torch.uint8).flatten().tolist())).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        save_and_load(Path(folder))
    train()
    print(
        f"torchq {torchq.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, kernel {torchq.kernels.active()}: works, bits {bits[:16]}"
    )


if __name__ == "__main__":
    main()
