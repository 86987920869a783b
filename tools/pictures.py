"""Makes the pictures of the report page and of the terminal in docs/img: `python -m tools.pictures`.

They are of one network: a transformer encoder that reads the rows of handwritten digits, trained here in a minute.
The page is photographed by a headless Chromium.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import torchq
from torchq.command_line.app import app
from torchq.command_line.console import out

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "img"
COLUMNS = 126
SHOTS = {"report-wide": (1100, 1180, False), "report-phone": (390, 1180, True)}


class DigitReader(nn.Module):
    """Reads an image row by row, (N, 8, 8) to (N, 10)."""

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """The scores of the ten digits."""
        y: Tensor = self.head(self.encoder(self.embed(rows) + self.place).mean(1))
        return y


def converted() -> nn.Module:
    """The trained network in int8, within an accuracy budget."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = slice(0, 1300), slice(1300, None)
    model = DigitReader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(200):
        batch = torch.randperm(1300, generator=torch.Generator().manual_seed(step))[:128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()

    def confidence(model: nn.Module) -> float:
        return float(model(images[test]).softmax(-1).gather(1, labels[test, None]).mean())

    batches = list(images[train].split(100))
    return torchq.convert(model.eval(), batches, evaluate=confidence, max_drop=1e-5)


def photograph(page: Path, name: str, width: int, height: int, dark: bool) -> None:
    """Saves docs/img/<name>.png: the page in a window of this size."""
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if browser is None:
        sys.exit("tools.pictures needs a browser: apt-get install chromium-headless-shell")
    flags = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    picture = f"--screenshot={IMAGES / name}.png"
    subprocess.run([browser, "--headless", *flags, picture, page.as_uri()], check=True, capture_output=True)


def record_terminal(commands: list[list[str]], name: str) -> None:
    """Saves docs/img/<name>.svg: what these commands print on a terminal."""
    out.record, out.width, out.file, out._force_terminal = True, COLUMNS, io.StringIO(), True
    for command in commands:
        out.print(f"[bold]$ torchq {' '.join(command)}[/bold]")
        app(command, standalone_mode=False)
        out.print()
    svg = out.export_svg(title="torchq")
    (IMAGES / f"{name}.svg").write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))  # no network


def small_bert(folder: Path) -> None:
    """A directory with a BERT of four layers, its weights random."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=4, vocab_size=8000, **sizes)).save_pretrained(folder)


def main() -> None:
    """Makes all of them."""
    page = Path("build/report.html").resolve()
    page.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        small_bert(Path("bert"))
        commands = [["env"], ["convert", "bert", "bert-int8"], ["verify", "bert-int8"], ["bench", "bert-int8"]]
        record_terminal(commands, "terminal")
        os.chdir(page.parent)
    qmodel = converted()
    torchq.report(qmodel, profile=torchq.profile_layers(qmodel)).save(page)
    for name, (width, height, dark) in SHOTS.items():
        photograph(page, name, width, height, dark)


if __name__ == "__main__":
    main()
