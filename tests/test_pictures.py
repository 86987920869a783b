"""The pictures of the documentation show what was measured, and what torchq computes now."""

from xml.etree import ElementTree

import pytest

from benchmarks import pictures
from helpers import ROOT

IMAGES = ROOT / "docs" / "img"


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("row", pictures.draw_row),
        ("frontier", pictures.draw_frontier),
        ("roofline-zen4", lambda path: pictures.draw_roofline(path, "zen4")),
        ("roofline-amx", lambda path: pictures.draw_roofline(path, "amx")),
    ],
)
def test_a_picture_is_drawn_from_what_is_there(name, draw, tmp_path):
    """If this fails, `python -m benchmarks.pictures` draws them again."""
    draw(tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_text() == (IMAGES / f"{name}.svg").read_text()


def test_whole_models_are_read_from_their_table(tmp_path):
    cells = pictures.models()
    assert len(cells) >= 10
    assert all(ms > 0 and 0 < db < 80 for contestants in cells.values() for ms, db in contestants.values())
    pictures.draw_models(tmp_path / "models.svg")
    dots = ElementTree.parse(tmp_path / "models.svg").findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 3 + 2 * sum(len(contestants) for contestants in cells.values())


def test_a_grid_is_read_whole():
    shapes = pictures.grid_of(ROOT / "docs/measured/linear-zen4-1-thread.md")
    assert len(shapes) == 100
    assert shapes[0] == (1, pytest.approx(2 * 768 * 768 / 8.0 / 1e3), pytest.approx(2 * 768 * 768 / 12.9 / 1e3))
