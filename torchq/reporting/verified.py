"""Verification: what verify() found, as plain data that prints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchq import text

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class First:
    """The first element that differs.

    Args:
        index: where it lies in the layer's output.
        got: what it is.
        expected: what it should be.
        count: how many elements differ.
        of: of how many.
    """

    index: tuple[int, ...]
    got: float
    expected: float
    count: int
    of: int


@dataclass(frozen=True)
class Difference(First):
    """One result that is wrong.

    Args:
        layer: the layer's name.
        kernel: the kernel that gave it.
        against: what it was compared with: "reference", or "simulated".
    """

    layer: str
    kernel: str
    against: str

    def __str__(self) -> str:
        return (
            f"layer {self.layer!r}: kernel {self.kernel} differs from {self.against} in {self.count} of {self.of} "
            f"elements, first at {self.index}: {self.got!r}, expected {self.expected!r}"
        )


@dataclass(frozen=True)
class Call:
    """One op on one shape.

    Args:
        layer: the layer's name; of attention, the module's.
        kind: "int8 static", "int8 dynamic", "LSTM steps", "attention int8" and so on.
        shape: rows, input features and output features; of attention its rows, head size and keys.
        seconds: by kernel, and "float" for torch's float layer of the shape.
        ran: by kernel the one that really ran, since some leave small problems to others.
        differences: what was wrong.
        share: the largest difference from the simulated path, in units of what float32's rounding allows.
    """

    layer: str
    kind: str
    shape: tuple[int, int, int]
    seconds: Mapping[str, float]
    ran: Mapping[str, str]
    differences: tuple[Difference, ...] = ()
    share: float | None = None


@dataclass(frozen=True)
class Verification:
    """What `torchq.verify` found. Prints a table of times, and each difference.

    Args:
        calls: one for each layer and shape, in the order of the model's call.
        kernels: those that this CPU can run, best first.
        active: the kernel that the model uses.
        unreached: int8 layers that the example did not reach, and which so were not verified.
    """

    calls: tuple[Call, ...]
    kernels: tuple[str, ...]
    active: str
    unreached: tuple[str, ...] = ()

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Every result that is wrong."""
        return tuple(each for call in self.calls for each in call.differences)

    @property
    def ok(self) -> bool:
        """Whether there is none."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        data: dict[str, Any] = text.to_json({**asdict(self), "ok": self.ok})
        return data

    def __str__(self) -> str:
        columns = [*self.kernels, "float"]
        rows = [
            (
                shortened(call.layer),
                call.kind,
                " x ".join(map(str, call.shape)),
                *(text.duration(call.seconds[name]) if name in call.seconds else "-" for name in columns),
            )
            for call in self.calls
        ]
        return "\n".join([*text.table(("layer", "kind", "shape", *columns), rows), *self.words()])

    def words(self) -> list[str]:
        """What stands below the table: each difference, or that there is none; and what was not looked at."""
        lines = [f"WRONG: {each}" for each in self.differences]
        shares = [call.share for call in self.calls if call.share is not None]
        if self.ok:
            lines.append(f"ok: {', '.join(self.kernels)} agree on {len(self.calls)} calls; {self.active} is active")
            if shares:
                lines.append(f"ok: int8 is the simulated path to rounding, {max(shares):.0%} of what float32 allows")
        small = {(asked, ran) for call in self.calls for asked, ran in call.ran.items() if _is_other(call, asked, ran)}
        lines += [f"{asked} leaves small problems to {ran}" for asked, ran in sorted(small)]
        if self.unreached:
            more = f" and {len(self.unreached) - 6} more" if len(self.unreached) > 6 else ""
            lines.append(f"not reached by the example, so not verified: {', '.join(self.unreached[:6])}{more}")
        return lines


def _is_other(call: Call, asked: str, ran: str) -> bool:
    return asked != ran and not call.kind.startswith("attention")


def shortened(name: str, room: int = 32) -> str:
    """A layer's name in few columns. Its end is kept, where layers differ."""
    return name if len(name) <= room else "..." + name[3 - room :]


def first_difference(got: Tensor, expected: Tensor, allowed: Tensor | float = 0.0) -> First | None:
    """Where `|got - expected| > allowed`; with 0, where the bits differ. Any NaN equals any other; None if all agree.

    >>> first_difference(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.5]))
    First(index=(1,), got=2.0, expected=2.5, count=2, of=3)
    """
    if isinstance(allowed, Tensor) or allowed > 0:
        gap = (got.double() - expected.double()).abs()
        apart = ~(gap <= allowed) & (got != expected)
    else:
        apart = _bits(got) != _bits(expected)
    apart &= ~(got.isnan() & expected.isnan())
    if isinstance(allowed, Tensor):  # what the formula does not say may be anything
        apart &= ~expected.isnan()
    if not bool(apart.any()):
        return None
    index = tuple(apart.nonzero()[0].tolist())
    return First(index, got[index].item(), expected[index].item(), int(apart.sum()), got.numel())


def _bits(t: Tensor) -> Tensor:
    return t.view(_BITS[t.element_size()]) if t.is_floating_point() else t
