"""Frontier: cost and metric of each model between all int8 and all float. Plain data, with a table and a plot."""

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
        metric: what `evaluate` returned.
        seconds: time of a forward pass on the first calibration batch: the best of a few, interleaved with the float
            model's.
        speedup: the float model's time in the same rounds, divided by `seconds`.
        bytes: size of all parameters and buffers.
    """

    returned: int
    metric: float
    seconds: float
    speedup: float
    bytes: int


@dataclass(frozen=True)
class Frontier:
    """The search for an accuracy budget: every model that was measured, and the one that was taken.

    Args:
        max_drop: the budget: the most that the metric may fall below the float model's.
        sensitivity_db: per int8 layer, the SQNR of the model's output with only this layer in int8, most sensitive
            first. Empty if the model with every layer in int8 met the budget.
        steps: the models, sorted by `returned`. The last is the float model.
        chosen: the index in `steps` of the model that was taken.

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
        """How far this step's metric lies below the float model's."""
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
        """The frontier as JSON values."""
        data: dict[str, Any] = text.to_json(dataclasses.asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Frontier":
        """The inverse of `to_dict`."""
        sensitivity = {name: float(value) for name, value in data["sensitivity_db"].items()}
        steps = tuple(Step(**{**step, "metric": float(step["metric"])}) for step in data["steps"])
        return cls(data["max_drop"], sensitivity, steps, data["chosen"])

    def plot(self, path: str | Path) -> None:
        """Draws the metric against latency and against size, one point per step, into an image file.

        Args:
            path: the suffix selects the format: .png, .svg, .pdf.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("torchq: plot() needs matplotlib. Install it with: pip install matplotlib.") from error
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
