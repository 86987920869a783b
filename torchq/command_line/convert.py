"""`torchq convert`: a directory in float becomes one in int8."""

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torchq
from torchq import QConfig, text
from torchq.command_line.console import UserError, note, out
from torchq.command_line.models import model_folder, open_float, read_texts, runs, tokenized

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.h5", "*.msgpack", "*.ot", "*.gguf")
"""What is not copied: weights in float, of this and of other frameworks."""

OTHERS = ("onnx", "openvino", ".git", ".cache")
"""Folders that are not copied."""


def convert(
    source: Path,
    target: Path,
    texts: Path | None,
    *,
    config: QConfig,
    batch_size: int,
    max_length: int | None,
    limit: int,
) -> None:
    """Converts the model in `source`, calibrated on the lines of `texts`, and writes `target`: all of it or nothing."""
    if target.exists():
        raise UserError(f"{target} exists. Remove it, or choose another name.")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no directory. Create it first.")
    lines = None if texts is None else read_texts(texts, limit)
    opened = open_float(source)
    batches: list[Any] | None = None
    if lines is not None:
        batches = list(tokenized(opened, lines, batch_size, max_length))
        runs(opened, batches[0])
        note(f"calibrating on {len(lines)} texts in {len(batches)} batches")
    else:
        note("converting without texts: every layer dynamic. --calib texts.txt measures and chooses")
    qmodel = torchq.convert(opened.model, batches, config=config)
    note(f"writing {target}")
    write(qmodel, source, target)
    for line in str(torchq.report(qmodel)).split("\n\n")[0].splitlines():
        out.print(line, markup=False)
    out.print(
        f"wrote {target}, {text.size(directory_bytes(target))}; next: torchq verify {shlex.quote(str(target))}",
        markup=False,
    )


def write(qmodel: Any, source: Path, target: Path) -> None:
    """Writes a converted model, and what lies beside its float model: tokenizer, pooling, README. All or nothing."""
    inside = model_folder(source).relative_to(source)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        made = Path(temporary) / "model"
        shutil.copytree(source, made, ignore=shutil.ignore_patterns(*WEIGHTS, *OTHERS))
        qmodel.save_pretrained(made / inside)
        made.rename(target)


def directory_bytes(directory: Path) -> int:
    """The size of all files in it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
