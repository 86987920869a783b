"""report(): what a converted model is made of, layer by layer, as text and as plain data."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from torchq import kernels
from torchq.modules.linear import QuantizedLinear
from torchq.plan import Plan


@dataclass(frozen=True)
class LayerReport:
    """One nn.Linear of the original model: bytes of weight, scales and bias before and after, and the error made."""

    name: str
    kind: str
    kernel: str | None
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    reason: str


@dataclass(frozen=True)
class Report:
    """Prints as a table; `to_dict()` gives the same as plain data."""

    layers: tuple[LayerReport, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all Linear layers in float."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same layers now, resident."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        layers = [asdict(layer) for layer in self.layers]
        return {"layers": layers, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def __str__(self) -> str:
        head = ("layer", "scheme", "kernel", "before", "after", "SQNR", "reason")
        rows = [
            (
                layer.name or "(root)",
                layer.kind,
                layer.kernel or "-",
                _bytes(layer.bytes_before),
                _bytes(layer.bytes_after),
                "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB",
                layer.reason,
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        ratio = self.bytes_before / max(1, self.bytes_after)
        total = f"Linear layers: {_bytes(self.bytes_before)} -> {_bytes(self.bytes_after)} ({ratio:.2f}x smaller)"
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], total])


def report(qmodel: nn.Module) -> Report:
    """What became of every nn.Linear of a converted model: scheme, kernel, bytes, output SQNR, reason.

    SQNR is that of the layer's output on its own calibration sample, None where there was no calibration.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`.

    >>> from torchq.convert import convert
    >>> report(convert(nn.Linear(64, 64))).layers[0].kind
    'int8 dynamic'
    """
    plan = getattr(qmodel, "torchq_plan", None)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"torchq.report: this {type(qmodel).__name__} has no torchq_plan. Pass the model that torchq.convert "
            "returned."
        )
    layers = []
    for name, layer in plan.layers.items():
        module = qmodel.get_submodule(name)
        before, after = _layer_bytes(module)
        kernel = kernels.active() if isinstance(module, QuantizedLinear) else None
        layers.append(LayerReport(name, layer.kind, kernel, before, after, layer.measured_db, layer.reason))
    return Report(tuple(layers))


def _layer_bytes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, QuantizedLinear):
        values = module.out_features * (module.in_features + module.has_bias)
        return values * module.dtype.itemsize, module.packed.numel()
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return size, size


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
