"""`torchq bench`: int8 against float on this machine, of layers by themselves or of a model."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn.functional import linear

import torchq
from torchq import QuantizedLinear, kernels, text
from torchq.command_line.console import UserError, err, note, print_table
from torchq.command_line.models import float_twin, is_int8, open_float, open_int8, random_batch
from torchq.timing import interleaved

LAYERS = ((768, 768), (768, 3072), (3072, 768), (4096, 4096))
"""(in, out) of layers as they are in BERT-base and in models of 7e9 parameters."""

ROWS = (1, 16, 128)
SHAPES = ((1, 16), (1, 128), (8, 128))
"""(batch, tokens) of a whole model."""


def layer_shapes(given: Sequence[str] | None) -> list[tuple[int, ...]]:
    """What `--shape` says of layers, (rows, in, out) each; usual ones without."""
    return [(m, k, n) for k, n in LAYERS for m in ROWS] if not given else [_numbers(each, 3) for each in given]


def model_shapes(given: Sequence[str] | None) -> list[tuple[int, ...]]:
    """What `--shape` says of models, (batch, tokens) each; usual ones without."""
    return list(SHAPES) if not given else [_numbers(each, 2) for each in given]


def _numbers(shape: str, count: int) -> tuple[int, ...]:
    parts = shape.lower().split("x")
    if len(parts) != count or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        form = "BATCHxTOKENS, such as 8x128" if count == 2 else "ROWSxINxOUT, such as 16x768x3072"
        raise UserError(f"--shape {shape}: expected {form}.")
    return tuple(map(int, parts))


@torch.inference_mode()
def bench_layers(cases: Sequence[tuple[int, ...]], rounds: int) -> list[dict[str, Any]]:
    """The times of one dynamic int8 layer and of torch's float one, for each (rows, in, out)."""
    found = []
    for m, k, n in track(cases, "timing layers", console=err, transient=True, disable=not err.is_terminal):
        layer = nn.Linear(k, n, dtype=torch.float32, device="cpu")
        quantized, x = QuantizedLinear.from_float(layer), torch.randn(m, k, dtype=torch.float32, device="cpu")
        calls: dict[str, Callable[[], object]] = {
            "float": partial(linear, x, layer.weight.detach(), layer.bias.detach()),
            "int8": partial(quantized, x),
        }
        found.append({"rows": m, "in": k, "out": n, **_seconds(interleaved(calls, rounds=rounds))})
    return found


@torch.inference_mode()
def bench_model(directory: Path, shapes: Sequence[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """The times of a whole model in float and in int8, for each batch size and number of tokens."""
    if is_int8(directory):
        opened = open_int8(directory)
        note("the float model has its shape, and random weights")
        int8, float_model = opened.model, float_twin(opened)
    else:
        opened = open_float(directory)
        note("converting without texts, every layer dynamic")
        float_model, int8 = opened.model, torchq.convert(copy.deepcopy(opened.model), inplace=True)
    found = []
    for batch, tokens in track(shapes, "timing the model", console=err, transient=True, disable=not err.is_terminal):
        example = random_batch(opened, batch, tokens)
        calls: dict[str, Callable[[], object]] = {
            "float": partial(float_model, **example),
            "int8": partial(int8, **example),
        }
        found.append({"batch": batch, "tokens": tokens, **_seconds(interleaved(calls, rounds=rounds, seconds=0.1))})
    whole = torchq.report(int8).model
    assert whole is not None
    sizes = {"bytes_float": whole.bytes_before, "bytes_int8": whole.bytes_after}
    return {"model": type(int8).__name__, "takes_ids": opened.takes_ids, **sizes, "shapes": found}


def _seconds(times: dict[str, float]) -> dict[str, float]:
    ratio = times["float"] / times["int8"]
    return {"float_seconds": times["float"], "int8_seconds": times["int8"], "speedup": ratio}


def show_layers(found: list[dict[str, Any]]) -> None:
    """Prints what `bench_layers` found."""
    rows = [(str(each["rows"]), f"{each['in']} -> {each['out']}", *_times(each)) for each in found]
    print_table(_title("one layer, dynamic"), ("rows", "layer", "float", "int8", "faster"), rows)


def show_model(found: dict[str, Any]) -> None:
    """Prints what `bench_model` found."""
    rows = []
    for each in found["shapes"]:
        count = each["batch"] * (each["tokens"] if found["takes_ids"] else 1)
        shape = f"{each['batch']} x {each['tokens']}" if found["takes_ids"] else str(each["batch"])
        rows.append((shape, *_times(each), f"{count / each['int8_seconds']:,.0f}"))
    unit = "tokens" if found["takes_ids"] else "inputs"
    sizes = f"{text.size(found['bytes_float'])} -> {text.size(found['bytes_int8'])}"
    head = (f"batch x {unit}" if found["takes_ids"] else "batch", "float", "int8", "faster", f"{unit}/s in int8")
    print_table(_title(f"{found['model']}, {sizes}"), head, rows)


def _times(each: dict[str, Any]) -> tuple[str, str, str]:
    return text.duration(each["float_seconds"]), text.duration(each["int8_seconds"]), f"{each['speedup']:.2f}x"


def _title(what: str) -> str:
    threads = torch.get_num_threads()
    return f"{what}; kernel {kernels.active()}, {threads} thread{'s' * (threads > 1)}"
