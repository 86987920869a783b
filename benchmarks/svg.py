"""Pictures as SVG text, without a library: a canvas, and axes for points and lines.

One file serves light and dark, since an SVG may ask for the reader's colour scheme. Colours are CSS classes.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
  svg { font: 13px system-ui, sans-serif; background: #fff }
  .ink { fill: #1f2328 } .soft { fill: #59636e } .paper { fill: #fff } .panel { fill: #f6f8fa; stroke: #d1d9e0 }
  .line { stroke: #59636e; fill: none } .grid { stroke: #e4e8ec; fill: none }
  .ours { fill: #0969da } .theirs { fill: #bc4c00 } .third { fill: #1a7f37 }
  .ours-line { stroke: #0969da; fill: none } .theirs-line { stroke: #bc4c00; fill: none }
  .third-line { stroke: #1a7f37; fill: none } .mono { font-family: ui-monospace, monospace }
  .title { font-weight: 600; font-size: 15px } .small { font-size: 11px }
  @media (prefers-color-scheme: dark) {
    svg { background: #0d1117 }
    .ink { fill: #f0f6fc } .soft { fill: #9198a1 } .paper { fill: #0d1117 } .panel { fill: #151b23; stroke: #3d444d }
    .line { stroke: #9198a1 } .grid { stroke: #252c35 }
    .ours { fill: #58a6ff } .theirs { fill: #f0883e } .third { fill: #3fb950 }
    .ours-line { stroke: #58a6ff } .theirs-line { stroke: #f0883e } .third-line { stroke: #3fb950 }
  }
"""


class Canvas:
    """Collects shapes. Coordinates are pixels, from the upper left corner."""

    def __init__(self, width: int, height: int, description: str) -> None:
        self.width, self.height, self.description = width, height, description
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "ink", *, anchor: str = "start") -> None:
        """Words that begin, end or are centred at x; y is their base line."""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place} class="{kind}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str = "panel", radius: int = 6) -> None:
        """A rectangle."""
        size = f'width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
        self.shapes.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 4) -> None:
        """A filled circle."""
        self.shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>')

    def cross(self, x: float, y: float, kind: str, size: float = 4) -> None:
        """A cross of two strokes."""
        path = f"M{x - size:.1f},{y - size:.1f}l{2 * size},{2 * size}m0,{-2 * size}l{-2 * size},{2 * size}"
        self.shapes.append(f'<path d="{path}" class="{kind}" stroke-width="1.6"/>')

    def path(
        self, points: Sequence[tuple[float, float]], kind: str, *, dashed: bool = False, arrow: bool = False
    ) -> None:
        """A line through points."""
        d = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        more = ' stroke-dasharray="5 4"' if dashed else ""
        more += ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(f'<path d="{d}" class="{kind}" stroke-width="1.5"{more}/>')

    def write(self, path: Path) -> None:
        """Writes the file."""
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" class="soft"/></marker></defs>'
        )
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.description)}">'
        path.write_text("\n".join([head, f"<style>{STYLE}</style>", arrow, *self.shapes, "</svg>"]) + "\n")


class Axes:
    """A part of a canvas where points are placed by their values, on linear or logarithmic scales.

    Args:
        canvas: what is drawn on.
        box: left, upper, right and lower end in pixels.
        x: the least and the largest value, from left to right.
        y: the same, from the bottom to the top.
        log: whether both scales are logarithmic.
    """

    def __init__(
        self,
        canvas: Canvas,
        box: tuple[int, int, int, int],
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        log: bool = False,
    ) -> None:
        self.canvas, self.box, self.x, self.y, self.log = canvas, box, x, y, log

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a pair of values."""
        left, upper, right, lower = self.box
        return (
            left + (right - left) * self._share(x, self.x),
            lower - (lower - upper) * self._share(y, self.y),
        )

    def _share(self, value: float, ends: tuple[float, float]) -> float:
        if self.log:
            return math.log(value / ends[0]) / math.log(ends[1] / ends[0])
        return (value - ends[0]) / (ends[1] - ends[0])

    def frame(self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str) -> None:
        """Grid lines at these values, with their numbers, and the names of the axes."""
        left, upper, right, lower = self.box
        for x in xs:
            place = self.at(x, self.y[0])[0]
            self.canvas.path([(place, upper), (place, lower)], "grid")
            self.canvas.text(place, lower + 18, f"{x:g}", "soft", anchor="middle")
        for y in ys:
            place = self.at(self.x[0], y)[1]
            self.canvas.path([(left, place), (right, place)], "grid")
            self.canvas.text(left - 8, place + 4, f"{y:g}", "soft", anchor="end")
        self.canvas.text((left + right) / 2, lower + 38, x_label, "soft", anchor="middle")
        self.canvas.text(left - 40, upper - 12, y_label, "soft")
