"""The report as a page: its numbers are the report's, it needs nothing else, and a browser shows it on any screen."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from helpers.browser import look
from helpers.numbers import normal
from torchq import QConfig, convert, profile_layers, report, text
from torchq.planning.describe import HISTOGRAM_BINS
from torchq.planning.frontier import Frontier, Step
from torchq.planning.plan import InputHistogram, LayerStats
from torchq.reporting.page import bar, bars, curve, headline, level, page, totals, tree
from torchq.reporting.report import LayerReport, Report, TableReport

pytestmark = pytest.mark.usefixtures("seeded")


class Text(HTMLParser):
    """What a page holds: its texts, and its tags with their attributes."""

    def __init__(self, source):
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are closed in the order they were opened"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.texts.append(" ".join(data.split()))


class Network(nn.Module):
    """A table, an attention, layers that stay in float, and a long chain of modules."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(400, 64)
        self.encoder = nn.ModuleDict({"block": nn.ModuleDict({"dense": nn.Linear(64, 64), "out": nn.Linear(64, 64)})})
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(64, 6))

    def forward(self, ids):
        x = self.table(ids)
        x = self.encoder.block["out"](torch.relu(self.encoder.block["dense"](x)))
        return self.head(self.attention(x, x, x)[0])


IDS = [torch.randint(0, 400, (4, 20), generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = QConfig(exclude=("head.0",), activation="static", rounding="nearest", smoothing="none")
    return convert(Network().eval(), IDS, config=config)


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """A page with all that a page can have."""
    steps = (Step(0, 0.91, 1e-3, 3.0, 1 << 20), Step(2, 0.925, 2e-3, 1.5, 2 << 20), Step(5, 0.93, 3e-3, 1.0, 4 << 20))
    result = report(network, profile=profile_layers(network, rounds=1))
    result = Report(**{**vars(result), "frontier": Frontier(0.01, {}, steps, 1)})
    path = tmp_path_factory.mktemp("page") / "report.html"
    result.save(path)
    return path, result


def test_the_page_has_the_reports_numbers(saved):
    path, result = saved
    source = path.read_text(encoding="utf-8")
    texts = Text(source).texts
    assert "Network" in texts
    assert f"{result.model.output_db:.1f} dB" in texts
    for layer in result.layers:
        assert f"{text.size(layer.bytes_before)} → {text.size(layer.bytes_after)}" in texts
        if layer.kind != "float":
            assert f"{layer.sqnr_db:.1f} dB" in texts
            assert f"{layer.weight_db:.1f} dB" in texts
            assert f"{layer.clipped:.2%}" in texts
            assert text.duration(layer.int8_seconds) in texts
            assert text.duration(layer.float_seconds) in texts
    assert "excluded by 'head.0'" in texts
    assert result.tables["table"].reason in texts
    assert any(each.startswith(f"Attention in {result.attentions['attention'].scheme}:") for each in texts)
    assert [each for each in texts if each.endswith(", taken")] == ["2 of 5 layers in float, taken", "2 of 5, taken"]
    assert {"0.925", "0.91", "1.50×"} <= set(texts)


def test_the_page_needs_no_other_file(saved):
    source = saved[0].read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    for tag, attributes in Text(source).tags:
        assert tag not in ("img", "iframe", "object")
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"


def test_names_and_reasons_are_text_and_not_markup():
    hostile = LayerReport("a<script>alert(1)</script>", "float", None, 8, 8, None, 'because "<b>" & more')
    source = page(Report((hostile,), model_type="<i>"))
    assert "<script>alert" not in source
    assert "<b>&" not in source
    texts = Text(source).texts
    assert "<i>" in texts
    assert 'because "<b>" & more' in texts


@pytest.mark.filterwarnings("ignore:torchq.convert. nothing became int8")
@pytest.mark.parametrize("kind", ["one layer", "no data", "nothing in int8"])
def test_small_reports(kind):
    config = QConfig(exclude=("0",)) if kind == "nothing in int8" else None
    model = nn.Linear(64, 32) if kind == "one layer" else nn.Sequential(nn.Linear(64, 32))
    data = None if kind == "no data" else [normal(80, 64)]
    parsed = Text(page(report(convert(model, data, config=config))))
    assert parsed.open == []
    assert ("(the model itself)" in parsed.texts) == (kind == "one layer")
    assert (sum(tag == "figure" for tag, _ in parsed.tags)) == (kind == "one layer")
    assert "Sequential" in parsed.texts or kind == "one layer"


# ---- The tree ----


def row(name, kind="int8 static", **values):
    return LayerReport(name, kind, None, 400, 100, values.pop("sqnr_db", 40.0), "", **values)


def test_modules_with_one_child_are_one_row():
    root = tree(Report((row("a.b.c"), row("a.b.d"), row("e.f"))))
    assert list(root.children) == ["a.b", "e.f"]
    assert root.children["e.f"].is_leaf
    assert list(root.children["a.b"].children) == ["c", "d"]
    assert root.children["a.b"].children["d"].path == "a.b.d"
    assert root.children["a.b"].summary == "2/2 int8"


def test_attentions_and_tables_have_their_place(network):
    root = tree(report(network))
    assert list(root.children) == ["table", "encoder.block", "attention", "head.0"]
    assert root.children["attention"].attention.scheme == network.torchq_plan.attentions["attention"].scheme
    assert root.children["table"].table is not None
    assert list(root.children["attention"].children) == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_a_module_that_is_a_layer_and_holds_others_is_no_leaf():
    root = tree(Report((row("a"), row("a.b"))))
    assert not root.children["a"].is_leaf
    assert len(root.children["a"].parts()) == 2


def test_totals():
    parts = [row("a", sqnr_db=31.0, clipped=0.1, float_seconds=4.0, int8_seconds=1.0), row("b"), row("c", sqnr_db=None)]
    parts.append(TableReport("int8", 40, 10, 12.0, ""))
    assert totals(parts) == {"before": 1240, "after": 310, "db": 31.0, "clipped": 0.1, "float": 4.0, "int8": 1.0}
    assert totals([row("b")])["int8"] is None


def test_headline(saved):
    found = {what: number for number, what, _ in headline(saved[1])}
    model = saved[1].model
    assert found["smaller"] == f"{model.bytes_before / model.bytes_after:.2f}×"
    assert found["of weights in int8"] == f"{model.int8_weights / model.weights:.1%}"
    assert found["your metric"] == "0.925"
    assert list(found) == ["smaller", "of weights in int8", "output SQNR", "faster layers", "your metric"]


def test_bars_of_sqnr():
    assert [level(db) for db in (None, 19.9, 20, 30)] == ["", "poor", "fair", "good"]
    assert [bar(db) for db in (-5, 0, 30, 60, float("inf"))] == [0, 0, 50, 100, 100]


# ---- Pictures ----


def test_a_histogram_spans_its_range_too():
    drawn = bars(InputHistogram(-1.0, 3.0, (9, 0, 0, 99)), (0.0, 7.0))
    assert (drawn["lo"], drawn["hi"], drawn["ends"]) == ("-1", "7", (50.0, 400.0))
    assert [(x, width) for x, width, _ in drawn["boxes"]] == [(0.0, 49.5), (150.0, 49.5)]  # no box for no values
    assert [height for *_, height in drawn["boxes"]] == [40.0, 80.0]  # log 10 and log 100
    assert bars(InputHistogram(2.0, 2.0, (0, 5)), None)["boxes"][0][1] >= 1  # all values are one


def test_the_plan_keeps_histograms():
    x = torch.cat([normal(80, 64), torch.full((1, 64), 9.0)])
    plan = convert(nn.Sequential(nn.Linear(64, 32)), [x]).torchq_plan
    stats = plan.layers["0"].stats
    assert sum(stats.histogram.counts) == x.numel()
    assert len(stats.histogram.counts) == HISTOGRAM_BINS
    assert (stats.histogram.lo, stats.histogram.hi) == (x.min().item(), 9.0)
    assert stats.histogram.counts[-1] == 64
    assert type(plan).from_dict(plan.to_dict()) == plan
    assert LayerStats.from_dict({"weight_db": 1, "input_db": 2, "clipped_below": 0, "clipped_above": 0, "rows": 3})


def test_a_frontier_is_drawn_in_its_box():
    steps = (Step(0, 0.5, 1e-3, 3.0, 1), Step(1, float("-inf"), 2e-3, 2.0, 2), Step(3, 1.0, 4e-3, 1.0, 3))
    drawn = curve(Frontier(0.25, {}, steps, 2))
    (x0, y0, returned, taken), (x1, y1, *_, last) = drawn["points"]  # what has no number is left out
    assert (returned, taken, last) == (0, False, True)
    assert 52 < x0 < x1 < 366
    assert 14 < y1 < y0 < 180
    assert drawn["budget"] == pytest.approx((y0 + y1) / 2, abs=0.1)
    one = curve(Frontier(0.0, {}, (Step(0, 0.0, 1e-3, 1.0, 1),), 0))
    assert len(one["points"]) == 1


# ---- What a person sees ----

MEASURE = """
const seen = element => element.checkVisibility() && element.getBoundingClientRect().height > 0;
const luminance = color => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const [r, g, b] = color.match(/[0-9.]+/g).map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
const back = luminance(getComputedStyle(document.querySelector(".panel")).backgroundColor);
const wide = [...document.querySelectorAll("main *")].filter(each =>
  seen(each) && !each.closest(".wide") && each.getBoundingClientRect().right > innerWidth + 1);
const texts = [...document.querySelectorAll("h1, h2, .card, .row span, .dim, td")].filter(seen);
const overlap = [...document.querySelectorAll("#layers .row")].filter(seen).filter(row => {
  const boxes = [...row.children].filter(seen).map(each => each.getBoundingClientRect());
  return boxes.some((a, i) => boxes.slice(i + 1).some(b =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1));
});
return {
  text: document.querySelector("main").innerText, width: innerWidth, scroll: document.documentElement.scrollWidth,
  wide: wide.map(each => each.outerHTML.slice(0, 120)), dark: back < .2, overlap: overlap.length,
  contrast: Math.min(...texts.map(each => contrast(luminance(getComputedStyle(each).color), back))),
  small: Math.min(...texts.map(each => parseFloat(getComputedStyle(each).fontSize))),
};
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_person_can_read_it(saved, width, dark):
    found, console = look(saved[0], width, MEASURE, dark=dark)
    assert console == []
    assert (found["width"], found["dark"]) == (width, dark)
    assert (found["scroll"], found["wide"], found["overlap"]) == (width, [], 0)
    assert found["contrast"] >= 4.5  # WCAG AA
    assert found["small"] >= 12
    for word in ("Network", "smaller", "of weights in int8", "output SQNR", "encoder.block", "head.0", "float"):
        assert word in found["text"]
    assert "input SQNR" not in found["text"]  # what a row hides until it is opened


@pytest.mark.subprocess
def test_rows_open_and_are_filtered(saved):
    script = """
    const rows = () => [...document.querySelectorAll("#layers .name")].filter(each => each.checkVisibility())
      .map(each => each.innerText.trim());
    const text = () => document.querySelector("main").innerText;
    const type = value => {
      const field = document.getElementById("filter");
      field.value = value;
      field.dispatchEvent(new Event("input"));
      return rows();
    };
    const found = {first: rows()};
    document.getElementById("open").click();
    found.open = text();
    found.pictures = [...document.querySelectorAll("figure svg")].filter(each => each.checkVisibility()).length;
    document.getElementById("close").click();
    found.closed = rows();
    found.filtered = type("PROJ");
    found.none = type("nothing like it");
    found.all = type("").length;
    return found;
    """
    found, console = look(saved[0], 1000, script)
    layers = ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert console == []
    assert found["first"] == ["table", "encoder.block", "dense", "out", "attention", *layers, "head.0"]
    assert "input SQNR" in found["open"]
    assert "excluded by 'head.0'" in found["open"]
    assert found["pictures"] == 6 + 1  # a histogram of each int8 layer, and the frontier
    assert found["closed"] == ["table", "encoder.block", "attention", "head.0"]
    assert found["filtered"] == ["attention", *layers]
    assert found["none"] == []
    assert found["all"] == 4 + len(layers)
