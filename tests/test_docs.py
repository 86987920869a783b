"""README and docs/: their code runs, what they name exists, and the site has every page.

The ```python blocks of a page run in order, in one namespace and an empty folder, as a reader would copy them. A block
that is not meant to run says so where the reader sees it: ```python title="not run: why".
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from torch import nn

import torchq
from helpers import ROOT
from torchq.modules import registry

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
OPTIONAL = {
    "transformers",
    "tokenizers",
    "peft",
    "sentence_transformers",
    "fastapi",
    "ray",
}  # a page that imports one is skipped where it is absent
FENCE = re.compile(r"^(?P<indent> *)```python(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A ```python block: the line of its page where its code begins, what follows ```python, and the code."""

    line: int
    info: str
    code: str

    @property
    def not_run(self) -> bool:
        return 'title="not run: ' in self.info


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["info"].strip(), textwrap.dedent(found["code"]))
        for found in FENCE.finditer(text)
    ]


def put_stand_ins() -> None:
    """Small models with random weights in the place of those that pages download, in the current folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

    folder = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
    words = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "few": 3, "texts": 4, "own": 5}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = DistilBertConfig(vocab_size=64, dim=64, hidden_dim=128, n_layers=2, n_heads=2, max_position_embeddings=32)
    DistilBertForSequenceClassification(config).save_pretrained(folder)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def check_the_budget(names, printed):
    """Int8 ruins the metric, and one layer in float restores it."""
    qmodel = names["qmodel"]
    frontier = qmodel.torchq_plan.frontier
    whole, taken, exact = frontier.steps
    assert frontier.drop(whole) > 0.1
    assert frontier.drop(taken) <= 0.01
    assert (taken.returned, frontier.chosen, exact.metric > 0.9) == (1, 1, True)
    assert [type(qmodel[i]) for i in (0, 3, 5)] == [torchq.QuantizedLinear, nn.Linear, torchq.QuantizedLinear]
    assert names["drift"].recalibrate == ("0",)
    assert "recalibrate layer '0': " in printed


# What a page says and its code does not assert.
CHECKS = {"docs/accuracy-budget.md": check_the_budget}


@pytest.mark.small_layers_stay_float
@pytest.mark.slow(seconds=10)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers for it
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    module = ModuleType("docs_page")  # found by pickle, which looks classes up in their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "TYPES", list(registry.TYPES))  # a page adds to it
    if "distilbert/" in page.read_text():
        pytest.importorskip("transformers", reason="transformers is not installed")
        put_stand_ins()
    for block in blocks(page):
        if block.not_run:
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")  # a traceback shows the page's lines
        try:
            exec(code, vars(module))
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            pytest.skip(f"{error.name} is not installed")
    if name(page) in CHECKS:
        CHECKS[name(page)](vars(module), capsys.readouterr().out)


def test_few_blocks_are_not_run():
    """Only those that show the code of another project, which reads its files or needs its engine."""
    counts = {name(page): sum(block.not_run for block in blocks(page)) for page in PAGES}
    assert {page for page, count in counts.items() if count} <= {"docs/from-onnx-openvino.md", "docs/from-torchao.md"}
    assert sum(counts.values()) <= 4
    titles = [block.info for page in PAGES for block in blocks(page) if block.info]
    assert [title for title in titles if "title=" not in title] == []


def commands(pattern: str) -> Iterator[tuple[str, str]]:
    """What the pages, CONTRIBUTING.md and the CHANGELOG name by this pattern, and where."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        yield from ((name(page), found) for found in re.findall(pattern, page.read_text()))


def test_every_module_that_a_command_names_exists():
    named = list(commands(r"python -m ((?:benchmarks|tests|torchq)[\w.]*\w)"))
    assert len(named) > 20
    assert [(page, module) for page, module in named if find_spec(module) is None] == []


def test_every_make_target_that_is_named_exists():
    named = list(commands(r"`make ([\w-]+)")) + list(commands(r"(?m)^make ([\w-]+)"))
    assert len(named) > 5
    assert [(page, target) for page, target in named if target not in MAKE_TARGETS] == []


FIGURE = re.compile(
    r"\d ?%"
    r"|\d (?:dB|ps|ns|us|ms|s|min|seconds|minutes|hours|cycles|points|times|GB/s|Gop/s|[KMG]i?B)\b"
    r"|(?<![\w.])\d+(?:[.]\d+)?x\b"  # a ratio; 64x64 is a shape
    r"|^[|].*[|] *[+-]?\d+[.]\d"  # a cell of a table
)
SOURCE = re.compile(
    r"python (?:-m|examples/|tools/)|`make [a-z]|build/bench_core|\btests/\w|\btest_\w+"
    r"|[Bb]y hand|[Bb]y definition|from the tables?\b"  # docs/performance.md says what these mean
)
BLOCK_OF_CODE = re.compile(r"(?ms)^ *```.*?^ *```")  # what it prints, it does itself
FOOTNOTE = re.compile(r"(?m)^\[\^([\w-]+)\]: (.+)$")
MARK = re.compile(r"\[\^([\w-]+)\]")
BORDER = re.compile(r"\n\s*\n|\n(?= *(?:[*-]|\d+[.]) )")  # an empty line, or where a list item begins


def paragraphs(text: str) -> list[str]:
    """Each paragraph, list item and table in one line: without blocks of code, with the footnotes in their places."""
    notes = dict(FOOTNOTE.findall(text))
    parts = BORDER.split(FOOTNOTE.sub("", BLOCK_OF_CODE.sub("", text)))
    lines = [" ".join(part.split()) for part in parts if part.strip()]
    return [MARK.sub(lambda mark: f" ({notes.get(mark[1], '')})", line) for line in lines]


def test_every_figure_has_the_command_that_prints_it():
    """In the same paragraph, list item or table, or in the paragraph before or behind the table.

    A figure without a command says "by hand", "from the table" or "by definition".
    """
    silent = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        parts = paragraphs(page.read_text())
        for i, part in enumerate(parts):
            near = parts[max(0, i - 1) : i + 2] if part[0] == "|" else [part]
            named = any(SOURCE.search(other) for other in near if other is part or other[0] not in "|#")
            if FIGURE.search(part) and not named:
                silent.append((name(page), part[:100]))
    assert silent == []


def test_every_footnote_is_defined_and_used():
    """On its page, once. README.md has none, since the package index would show the marks as text."""
    for page in PAGES:
        text = BLOCK_OF_CODE.sub("", page.read_text())
        defined = [note for note, _ in FOOTNOTE.findall(text)]
        assert sorted(defined) == sorted(set(MARK.findall(FOOTNOTE.sub("", text)))), name(page)
    assert not MARK.search((ROOT / "README.md").read_text())


def in_nav(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from in_nav(part)


def test_the_site_has_every_page_once():
    yaml = pytest.importorskip("yaml", reason="pyyaml reads mkdocs.yml")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(in_nav(nav)) == sorted(pages)


def test_every_public_name_has_its_place_in_the_api_page():
    """`torchq.kernels` and the like by their own entries; what they hold, by theirs."""
    described = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(described) == len(set(described))
    tops = {path.split(".")[1] for path in described}
    assert set(torchq.__all__) - tops == set()
