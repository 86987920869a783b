"""Frontier: what each model on the way from int8 to float costs, and how well it does. Plain data, table and plot."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchq import text


@dataclass(frozen=True)
class Step:
    """One model that was measured.

    Args:
        returned: how many of the int8 layers were returned to float, most sensitive first.
        metric: what `evaluate` gave.
        seconds: a forward pass of the first calibration batch: the best of a few, interleaved with the float model's.
        speedup: the float model's seconds, of the same rounds, over these.
        bytes: of all parameters and buffers.
    """

    returned: int
    metric: float
    seconds: float
    speedup: float
    bytes: int


@dataclass(frozen=True)
class Frontier:
    """The search of an accuracy budget: every model measured, and which one was taken.

    Args:
        max_drop: the budget: how much metric may be lost against float.
        sensitivity_db: per int8 layer, the SQNR that is left with this layer alone in int8, most sensitive first.
            Empty where int8 fitted at once.
        steps: by `returned`, fewest first. The last is the float model.
        chosen: the place in `steps` of the one taken.

    >>> frontier = Frontier(0.01, {}, (Step(0, 0.98, 0.001, 3.0, 1024), Step(2, 0.98, 0.003, 1.0, 4096)), 0)
    >>> print(frontier)
    in float  metric  drop  latency  speed-up  bytes
    ------------------------------------------------
    0 of 2    0.98    0     1.0 ms   3.00x     1.0 KiB  <- taken
    2 of 2    0.98    0     3.0 ms   1.00x     4.0 KiB
    2 evaluations; max_drop = 0.01
    >>> Frontier.from_dict(frontier.to_dict()) == frontier
    True
    """

    max_drop: float
    sensitivity_db: dict[str, float]
    steps: tuple[Step, ...]
    chosen: int

    def drop(self, step: Step) -> float:
        """The metric this step loses against float."""
        return self.steps[-1].metric - step.metric

    def __str__(self) -> str:
        layers = self.steps[-1].returned
        rows = [
            (
                f"{step.returned} of {layers}",
                f"{step.metric:.6g}",
                f"{self.drop(step):.3g}",
                text.duration(step.seconds),
                f"{step.speedup:.2f}x",
                text.size(step.bytes) + ("  <- taken" if i == self.chosen else ""),
            )
            for i, step in enumerate(self.steps)
        ]
        head, _, *lines = text.table(("in float", "metric", "drop", "latency", "speed-up", "bytes"), rows)
        end = f"{len(self.steps)} evaluations; max_drop = {self.max_drop:g}"
        return "\n".join([head, "-" * len(head), *lines, end])

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        data: dict[str, Any] = text.to_json(dataclasses.asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Frontier":
        """The inverse of `to_dict`."""
        sensitivity = {name: float(value) for name, value in data["sensitivity_db"].items()}
        steps = tuple(Step(**{**step, "metric": float(step["metric"])}) for step in data["steps"])
        return cls(data["max_drop"], sensitivity, steps, data["chosen"])

    def plot(self, path: str | Path) -> None:
        """Draws the metric against latency and against bytes, one point a step, into an image file.

        Args:
            path: its ending says the format: .png, .svg, .pdf.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "torchq: plot() needs matplotlib. Install it with: pip install 'torchq[plot]'."
            ) from error
        finite = [step for step in self.steps if abs(step.metric) != float("inf")]
        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        sides = (("latency [ms]", [s.seconds * 1e3 for s in finite]), ("size [MiB]", [s.bytes / 2**20 for s in finite]))
        for axes, (label, x) in zip(panels, sides, strict=True):
            axes.plot(x, [step.metric for step in finite], "o-")
            for step, at in zip(finite, x, strict=True):
                taken = " (taken)" if step == self.steps[self.chosen] else ""
                axes.annotate(f"{step.returned}{taken}", (at, step.metric), (4, 4), textcoords="offset points")
            axes.axhline(self.steps[-1].metric - self.max_drop, linestyle="--", color="gray", label="budget")
            axes.set_xlabel(label)
        panels[0].set_ylabel("metric")
        panels[0].legend()
        figure.suptitle(f"layers returned to float, of {self.steps[-1].returned}")
        figure.savefig(path)
