"""A whole transformer by every engine that can run it on a CPU, in int8, bfloat16 and float32.

`Peer.make(task, x, threads)` returns a function without arguments that runs the task's model on x. If a contestant has
several settings, "contestant: setting", the fastest of them in each cell counts. Graphs that ONNX Runtime and NNCF
made are kept in `build/transformers`, since making them takes up to a minute.
"""

import contextlib
import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchq
from benchmarks import accuracy_peers
from benchmarks.accuracy_peers import Make, Task, onnx_bytes, openvino_model, preset, smooth
from benchmarks.peers import Peer, Run, nncf_quantized, onnxruntime_run, openvino_run, overflow_fix

CACHE = Path(__file__).parent.parent / "build" / "transformers"


# ---- In torch -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _converted(model: nn.Module, batches: tuple[Tensor, ...]) -> nn.Module:
    return torchq.convert(model, batches)


def _torchq(compiled: bool) -> Make:
    def make(task: Task, x: Tensor, threads: int) -> Run:
        qmodel = _converted(task.model, tuple(task.calibration))
        run = torch.compile(qmodel, options=torchq.compile_options()) if compiled else qmodel
        return lambda: run(x)

    return make


def _torch_ao(engine: str) -> Make:
    """Converts transformers' Conv1D, which it does not know, to nn.Linear first."""
    quantize = accuracy_peers.torch_dynamic(engine, per_channel=True)
    return lambda task, x, threads: quantize(task._replace(model=_with_linears(task.model)), x, threads)


def _with_linears(model: nn.Module) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.load_state_dict({"weight": child.weight.t(), "bias": child.bias})
                setattr(parent, name, linear)
    return model


def _bfloat16(task: Task, x: Tensor, threads: int) -> Run:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError("this CPU has no bfloat16 instructions")
    model, half = copy.deepcopy(task.model).bfloat16(), x.bfloat16() if x.is_floating_point() else x
    return lambda: model(half)


# ---- From graphs ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _exportable() -> Iterator[None]:
    """nn.TransformerEncoder's fused op, which no exporter knows, is not taken."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@functools.lru_cache(maxsize=1)
def _fingerprint(model: nn.Module, batches: tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256(str(model).encode())
    for tensor in (*model.state_dict().values(), *batches):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:12]


def _kept(task: Task, setting: str, packages: Sequence[str], suffix: str, write: Callable[[Path], object]) -> Path:
    """Where the graph of a setting lies. `write(path)` writes it if it is not there yet."""
    key = f"{_fingerprint(task.model, tuple(task.calibration))} {setting} {[version(name) for name in packages]}"
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        with _exportable():
            write(unfinished)
        for part in CACHE.glob(f"{unfinished.stem}*"):  # OpenVINO writes a second file, with the weights
            part.rename(part.with_name(part.name.removeprefix("unfinished-")))
    return path


def _onnxruntime(setting: str, quantize: Callable[[Path, Task], None]) -> Make:
    def make(task: Task, x: Tensor, threads: int) -> Run:
        def write(path: Path) -> None:
            path.write_bytes(onnx_bytes(task.model, tuple(x.shape), x.dtype))
            quantize(path, task)

        path = _kept(task, f"{setting} {tuple(x.shape)}", ONNXRUNTIME, ".onnx", write)
        return onnxruntime_run(path, x, task.model(x).shape, threads)

    return make


def _openvino(setting: str, quantize: Callable[[Any, Task], Any], options: Callable[[], dict[str, Any]] = dict) -> Make:
    def make(task: Task, x: Tensor, threads: int) -> Run:
        import openvino

        def write(path: Path) -> None:
            openvino.save_model(quantize(openvino_model(task.model, x), task), path, compress_to_fp16=False)

        path = _kept(task, f"{setting} {tuple(x.shape)}", ("openvino", "nncf"), ".xml", write)
        return openvino_run(openvino.Core().read_model(path), x, threads, **options())

    return make


def _openvino_bfloat16(task: Task, x: Tensor, threads: int) -> Run:
    with _exportable():
        model = openvino_model(task.model, x)
    return openvino_run(model, x, threads, **_bfloat16_hint())


def _bfloat16_hint() -> dict[str, Any]:
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this CPU has no bfloat16 instructions")
    return {"INFERENCE_PRECISION_HINT": "bf16"}


def _nncf(options: Callable[[], dict[str, Any]]) -> Callable[[Any, Task], Any]:
    """Calibrated on the same inputs one at a time, which NNCF requires for transformers."""

    def quantize(model: Any, task: Task) -> Any:
        singles = [row for batch in task.calibration for row in batch.split(1)]
        return nncf_quantized(model, singles, **options())

    return quantize


def _usual() -> dict[str, Any]:
    import nncf

    return {"model_type": nncf.ModelType.TRANSFORMER}


def _usual_in_7_bits() -> dict[str, Any]:
    return _usual() | overflow_fix()


OURS, COMPILED, USUAL = "torchq", "torchq compiled", "openvino int8: usual"
ONNXRUNTIME, OPENVINO = ("onnx", "onnxscript", "onnxruntime"), ("openvino", "nncf")
CONTESTANTS = [
    Peer(OURS, True, _torchq(compiled=False)),
    Peer(COMPILED, True, _torchq(compiled=True)),
    Peer(USUAL, True, _openvino("usual", _nncf(_usual)), OPENVINO),
    Peer("openvino int8: usual, bf16 hint", True, _openvino("usual", _nncf(_usual), _bfloat16_hint), OPENVINO),
    Peer("openvino int8: SmoothQuant 0.5", True, _openvino("0.5", _nncf(lambda: smooth(0.5))), OPENVINO),
    Peer("openvino int8: usual, overflow_fix", True, _openvino("7 bits", _nncf(_usual_in_7_bits)), OPENVINO),
    Peer("openvino int8: MIXED", True, _openvino("MIXED", _nncf(lambda: preset("MIXED"))), OPENVINO),
    Peer(
        "onnxruntime int8: dynamic",
        True,
        _onnxruntime("dynamic", accuracy_peers.onnxruntime_dynamic(per_channel=True)),
        ONNXRUNTIME,
    ),
    Peer(
        "onnxruntime int8: dynamic, reduce_range",
        True,
        _onnxruntime("dynamic 7", accuracy_peers.onnxruntime_dynamic(per_channel=True, reduce_range=True)),
        ONNXRUNTIME,
    ),
    Peer(
        "onnxruntime int8: static",
        True,
        _onnxruntime("static", accuracy_peers.onnxruntime_static_linear("MinMax")),
        ONNXRUNTIME,
    ),
    Peer(
        "onnxruntime int8: static, reduce_range",
        True,
        _onnxruntime("static 7", accuracy_peers.onnxruntime_static_linear("MinMax", reduce_range=True)),
        ONNXRUNTIME,
    ),
    Peer("torch.ao int8: x86", True, _torch_ao("x86")),
    Peer("torch.ao int8: onednn", True, _torch_ao("onednn")),
    Peer("openvino bfloat16", False, _openvino_bfloat16, OPENVINO),
    Peer("torch bfloat16", False, _bfloat16),
    Peer("torch float32", False, lambda task, x, threads: lambda: task.model(x)),
]
