"""One linear layer, y = x · wᵀ + b, by every engine that can compute it on a CPU, each through its best API.

A peer packs its weights and makes its session once, outside the timing. `Peer.make` returns a function without
arguments that computes y from a fixed x, so that engines may bind their buffers. `available()` leaves out peers that
are not installed, and says why. benchmarks/mlp.py uses the same helpers for chains of layers, and
benchmarks/accuracy_peers.py for whole trained networks.

Most peers add pairs of u8 x s8 products in int16, which saturates, where the CPU has no instruction that adds four of
them in int32 (VNNI). There they need 7 bits for one of the two, which is a setting of its own: `reduce_range`, or
`overflow_fix` in NNCF. `wrong()` names contestants that are no baseline for a speed.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchq

Run = Callable[[], Tensor]
MOST_LOST_DB = 15.0  # two and a half bits: coarser scales and 7 bits cost less, and sums that saturate cost more


@dataclass(frozen=True)
class Peer:
    """A contestant: `make(linear, x, threads)` returns the function to time. In mlp.py, `linear` is a chain."""

    name: str
    int8: bool
    make: Callable[[Any, Tensor, int], Run]
    needs: tuple[str, ...] = ()


def available(peers: Sequence[Peer] | None = None) -> tuple[list[Peer], list[str]]:
    """The installed peers (of all for one linear layer, by default), and a line for each that is not installed."""
    peers = PEERS if peers is None else peers
    missing = {peer.name: [need for need in peer.needs if find_spec(need) is None] for peer in peers}
    lines = [f"{name}: skipped (pip install {' '.join(needs)})" for name, needs in missing.items() if needs]
    return [peer for peer in peers if not missing[peer.name]], lines


def wrong(sqnr_db: Mapping[str, float], reference: str) -> list[str]:
    """The contestants whose answers are worse than the reference's by more than MOST_LOST_DB: something saturated.

    >>> wrong({"torchq": 41.5, "7 bits": 35.4, "saturated": 17.2, "nothing": float("nan")}, "torchq")
    ['saturated', 'nothing']
    """
    return [name for name, db in sqnr_db.items() if not db >= sqnr_db[reference] - MOST_LOST_DB]


def _torchq(linear: nn.Linear, x: Tensor, threads: int) -> Run:
    layer = torchq.QuantizedLinear.from_float(linear)
    return lambda: layer(x)


def _torch_float32(linear: nn.Linear, x: Tensor, threads: int) -> Run:
    return lambda: linear(x)


def _torch_bfloat16(linear: nn.Linear, x: Tensor, threads: int) -> Run:
    layer = nn.Linear(linear.in_features, linear.out_features).bfloat16()
    layer.load_state_dict(linear.state_dict())
    half = x.bfloat16()
    return lambda: layer(half)


def _torch_dynamic(engine: str, reduce_range: bool = False) -> Callable[[nn.Linear, Tensor, int], Run]:
    """torch.ops.quantized.linear_dynamic, with 8 bits for activations or, as quantize_dynamic sets it, 7."""

    def make(linear: nn.Linear, x: Tensor, threads: int) -> Run:
        scale, zero_point = torchq.choose_qparams(linear.weight.detach(), axis=0)
        weight = torch.quantize_per_channel(linear.weight.detach(), scale, zero_point, 0, torch.qint8)
        previous = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            packed = torch.ops.quantized.linear_prepack(weight, linear.bias.detach())
        finally:
            torch.backends.quantized.engine = previous
        return lambda: torch.ops.quantized.linear_dynamic(x, packed, reduce_range)

    return make


def _int_mm(linear: nn.Linear, x: Tensor, threads: int) -> Run:
    scale, _ = torchq.choose_qparams(linear.weight.detach(), axis=0)
    weight = torchq.quantize(linear.weight.detach(), scale, axis=0).t().contiguous()
    bias = linear.bias.detach()

    def run() -> Tensor:
        row = x.abs().amax(dim=1, keepdim=True) / 127
        codes = (x / row).round().to(torch.int8)
        return torch._int_mm(codes, weight) * row * scale + bias

    return run


def _torchao(compiled: bool) -> Callable[[nn.Linear, Tensor, int], Run]:
    def make(linear: nn.Linear, x: Tensor, threads: int) -> Run:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features))
        model[0].load_state_dict(linear.state_dict())
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        run = torch.compile(model) if compiled else model
        return lambda: run(x)

    return make


def save_onnx(model: nn.Sequential, path: Path, *, gemm: bool = False) -> None:
    """Writes a chain of nn.Linear and nn.ReLU from "x" to "y": a Gemm for each Linear, or MatMul(x, wᵀ) + b."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, source = [], [], "x"
    for i, layer in enumerate(model):
        target = "y" if i == len(model) - 1 else f"y{i}"
        if isinstance(layer, nn.Linear):
            w, b = f"w{i}", f"b{i}"
            weights.append(numpy_helper.from_array(layer.weight.detach().t().contiguous().numpy(), w))
            weights.append(numpy_helper.from_array(layer.bias.detach().numpy(), b))
            if gemm:
                nodes.append(helper.make_node("Gemm", [source, w, b], [target]))
            else:
                nodes.append(helper.make_node("MatMul", [source, w], [f"xw{i}"]))
                nodes.append(helper.make_node("Add", [f"xw{i}", b], [target]))
        elif isinstance(layer, nn.ReLU):
            nodes.append(helper.make_node("Relu", [source], [target]))
        else:
            raise TypeError(f"save_onnx: expected nn.Linear or nn.ReLU, got {type(layer).__name__}")
        source = target
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", linears[0].in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", linears[-1].out_features])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def onnxruntime_run(path: Path, x: Tensor, shape: Sequence[int], threads: int) -> Run:
    """A session on the graph at `path`, its "x" bound to x and its "y" to a float32 tensor of `shape`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    y = torch.empty(*shape)
    binding = session.io_binding()  # reads x and writes y in place, without copies
    binding.bind_input("x", "cpu", 0, x.numpy().dtype, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, "float32", list(y.shape), y.data_ptr())

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return run


def openvino_run(model: Any, x: Tensor, threads: int, **options: Any) -> Run:
    """An infer request on an OpenVINO model, bound to x and compiled for its shape, with `options` for the plugin."""
    import openvino

    model.reshape({"x": list(x.shape)})
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings |= {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False, **options}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    y = torch.from_numpy(request.get_output_tensor().data)

    def run() -> Tensor:
        request.infer()
        return y

    return run


def openvino_model(model: nn.Sequential) -> Any:
    """A chain of nn.Linear and nn.ReLU as an OpenVINO model."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.onnx"
        save_onnx(model, path)
        return openvino.Core().read_model(path)


def nncf_quantized(model: Any, batches: Sequence[Tensor], **options: Any) -> Any:
    """An OpenVINO model in int8, calibrated on these batches."""
    import logging

    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    dataset = nncf.Dataset([batch.numpy() for batch in batches])
    with contextlib.redirect_stdout(io.StringIO()):  # hides its progress bars
        return nncf.quantize(model, dataset, subset_size=len(batches), fast_bias_correction=True, **options)


def overflow_fix() -> dict[str, Any]:
    """An option for NNCF: 7 bits for the weights of every layer, not only of the first convolutions."""
    import nncf

    return {"advanced_parameters": nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)}


def _onnxruntime(int8: bool, **options: Any) -> Callable[[nn.Linear, Tensor, int], Run]:
    def make(linear: nn.Linear, x: Tensor, threads: int) -> Run:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "linear.onnx"
            save_onnx(nn.Sequential(linear), path)
            if int8:
                quantize_dynamic(path, path, per_channel=True, weight_type=QuantType.QInt8, **options)
            return onnxruntime_run(path, x, (len(x), linear.out_features), threads)

    return make


def _openvino(int8: bool, options: Callable[[], dict[str, Any]] = dict) -> Callable[[nn.Linear, Tensor, int], Run]:
    def make(linear: nn.Linear, x: Tensor, threads: int) -> Run:
        model = openvino_model(nn.Sequential(linear))
        model.reshape({"x": list(x.shape)})
        return openvino_run(nncf_quantized(model, [x], **options()) if int8 else model, x, threads)

    return make


PEERS = [
    Peer("torchq", True, _torchq),
    Peer("torch float32", False, _torch_float32),
    Peer("torch bfloat16", False, _torch_bfloat16),
    Peer("torch.ao x86", True, _torch_dynamic("x86")),
    Peer("torch.ao x86, reduce_range", True, _torch_dynamic("x86", reduce_range=True)),
    Peer("torch.ao onednn", True, _torch_dynamic("onednn")),
    Peer("torch.ao onednn, reduce_range", True, _torch_dynamic("onednn", reduce_range=True)),
    Peer("torch._int_mm", True, _int_mm),
    Peer("torchao", True, _torchao(compiled=False), ("torchao",)),
    Peer("torchao compiled", True, _torchao(compiled=True), ("torchao",)),
    Peer("onnxruntime float32", False, _onnxruntime(int8=False), ("onnx", "onnxruntime")),
    Peer("onnxruntime int8", True, _onnxruntime(int8=True), ("onnx", "onnxruntime")),
    Peer("onnxruntime int8, reduce_range", True, _onnxruntime(int8=True, reduce_range=True), ("onnx", "onnxruntime")),
    Peer("openvino float32", False, _openvino(int8=False), ("onnx", "openvino")),
    Peer("openvino int8", True, _openvino(int8=True), ("onnx", "openvino", "nncf")),
    Peer("openvino int8, overflow_fix", True, _openvino(int8=True, options=overflow_fix), ("onnx", "openvino", "nncf")),
]
