"""One convolution by every engine, each through its best API: torchq, torch float32, ONNX Runtime and OpenVINO int8.

The int8 peers get one ONNX graph, static and with a scale for each output channel: DequantizeLinear, Conv,
QuantizeLinear. Those called "7 bits" have weights of 7 bits: where a CPU adds pairs of products in int16, 8 bits
saturate (benchmarks/peers.py). Inside a network a layer takes codes and gives codes ("codes"); at its ends it takes and
gives floats, channels first ("floats").
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchq.numerics.qparams import choose_qparams, quantize
from torchq.ops.convolution import Geometry, convolve, pack

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """A layer: channels, kernel, stride, groups and the size of the input along each dimension.

    `padded` with half a kernel of zeros on each side.
    """

    network: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: tuple[int, ...]
    groups: int = 1
    padded: bool = True

    @property
    def padding(self) -> int:
        """The zeros before and after each dimension."""
        return self.kernel // 2 if self.padded else 0

    @property
    def out_size(self) -> list[int]:
        """The size of the output."""
        return [(n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.size]

    @property
    def depth(self) -> int:
        """K: the values of a patch."""
        return int(self.inputs // self.groups * self.kernel ** len(self.size))

    @property
    def products(self) -> int:
        """Multiply-adds of one call."""
        return int(self.depth * self.outputs * torch.Size(self.out_size).numel())

    def __str__(self) -> str:
        kind = "depthwise" if self.groups > 1 else f"to {self.outputs}"
        size = "x".join(map(str, self.size))
        return f"{self.inputs} {kind}, {self.kernel} / {self.stride}, {size}"


class Layer:
    """A shape with weights and an input, in float and in the numbers that all int8 contestants share."""

    def __init__(self, shape: Shape) -> None:
        self.shape, dims = shape, len(shape.size)
        kind: Any = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        torch.manual_seed(0)
        self.float = kind(
            shape.inputs, shape.outputs, shape.kernel, shape.stride, shape.padding, groups=shape.groups
        ).eval()
        self.x = torch.randn(1, shape.inputs, *shape.size)
        with torch.no_grad():
            self.y = self.float(self.x)
        self.weight = self.float.weight.detach()
        self.scale, _ = choose_qparams(self.weight, axis=0)
        self.codes = quantize(self.weight, self.scale, axis=0)
        self.x_qparams, self.y_qparams = (self._range(t) for t in (self.x, self.y))

    def narrowed(self) -> "Layer":
        """With weights of 7 bits."""
        narrow = copy.copy(self)
        narrow.scale = 2 * self.scale
        narrow.codes = quantize(self.weight, narrow.scale, axis=0)
        return narrow

    @staticmethod
    def _range(x: Tensor) -> tuple[float, int]:
        scale, zero_point = choose_qparams(x, dtype=torch.uint8, symmetric=False)
        return float(scale), int(zero_point)

    def quantized_input(self) -> Tensor:
        """u8 codes, channels first."""
        return quantize(self.x, *self.x_qparams, dtype=torch.uint8)

    def dequantized(self, y: Tensor) -> Tensor:
        """Of codes of y, as floats."""
        return (y.float() - self.y_qparams[1]) * self.y_qparams[0]


def torchq_run(layer: Layer, kind: str) -> Run:
    """The op with codes, with floats, or with floats whose channels are last."""
    shape, dims = layer.shape, len(layer.shape.size)
    padding = ((shape.padding, shape.padding),) * dims
    geometry = Geometry(
        shape.inputs, shape.outputs, (shape.kernel,) * dims, (shape.stride,) * dims, padding, (1,) * dims, shape.groups
    )
    packed = pack(layer.codes, layer.scale.view(-1), layer.float.bias.detach(), groups=shape.groups)
    if kind == "codes":
        codes = layer.quantized_input().movedim(1, -1).contiguous()
        return lambda: convolve(codes, packed, geometry, x_qparams=layer.x_qparams, y_qparams=layer.y_qparams)
    x = layer.x.movedim(1, -1).contiguous().movedim(-1, 1) if kind == "channels last" else layer.x
    return lambda: convolve(x, packed, geometry, x_qparams=layer.x_qparams)


def torch_run(layer: Layer, channels_last: bool) -> Run:
    """float32."""
    if not channels_last or layer.x.dim() != 4:
        return lambda: layer.float(layer.x)
    model = copy.deepcopy(layer.float).to(memory_format=torch.channels_last)
    x = layer.x.to(memory_format=torch.channels_last)
    return lambda: model(x)


def save_onnx(layer: Layer, kind: str, path: Path) -> None:
    """Writes the layer from "x" to "y", both with channels first."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape, dims = layer.shape, len(layer.shape.size)
    numbers: dict[str, Tensor] = {
        "x_scale": torch.tensor(layer.x_qparams[0]),
        "x_zero": torch.tensor(layer.x_qparams[1], dtype=torch.uint8),
        "y_scale": torch.tensor(layer.y_qparams[0]),
        "y_zero": torch.tensor(layer.y_qparams[1], dtype=torch.uint8),
        "w": layer.codes,
        "w_scale": layer.scale.view(-1),
        "w_zero": torch.zeros(shape.outputs, dtype=torch.int8),
        "b": (layer.float.bias.detach() / (layer.scale.view(-1) * layer.x_qparams[0])).round().to(torch.int32),
        "b_scale": layer.scale.view(-1) * layer.x_qparams[0],
        "b_zero": torch.zeros(shape.outputs, dtype=torch.int32),
    }
    make = helper.make_node
    attributes = {
        "strides": [shape.stride] * dims,
        "pads": [shape.padding] * 2 * dims,
        "kernel_shape": [shape.kernel] * dims,
        "group": shape.groups,
    }
    codes_in, codes_out = ("x", "y") if kind == "codes" else ("x_codes", "y_codes")
    nodes = [
        make("DequantizeLinear", [codes_in, "x_scale", "x_zero"], ["x_float"]),
        make("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_float"], axis=0),
        make("DequantizeLinear", ["b", "b_scale", "b_zero"], ["b_float"], axis=0),
        make("Conv", ["x_float", "w_float", "b_float"], ["y_float"], **attributes),
        make("QuantizeLinear", ["y_float", "y_scale", "y_zero"], [codes_out]),
    ]
    if kind != "codes":
        nodes.insert(0, make("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_codes"]))
        nodes.append(make("DequantizeLinear", ["y_codes", "y_scale", "y_zero"], ["y"]))
    element = TensorProto.UINT8 if kind == "codes" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element, list(layer.x.shape))],
        [helper.make_tensor_value_info("y", element, list(layer.y.shape))],
        [numpy_helper.from_array(t.numpy(), name) for name, t in numbers.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def with_model(layer: Layer, kind: str, use: Callable[[Path], Run]) -> Run:
    """What `use` makes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        save_onnx(layer, kind, path)
        return use(path)


def onnxruntime_run(layer: Layer, kind: str) -> Run:
    """A session, bound to its input and its output."""
    import onnxruntime

    def use(path: Path) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        x = (layer.quantized_input() if kind == "codes" else layer.x).numpy()
        y = torch.empty(layer.y.shape, dtype=torch.uint8 if kind == "codes" else torch.float32)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, x.dtype, list(x.shape), x.ctypes.data)
        binding.bind_output("y", "cpu", 0, y.numpy().dtype, list(y.shape), y.data_ptr())

        def run(x: object = x) -> Tensor:  # x is kept alive
            session.run_with_iobinding(binding)
            return y

        return run

    return with_model(layer, kind, use)


def openvino_run(layer: Layer, kind: str) -> Run:
    """Instead of codes floats with the channels last, its own order: it takes no codes for a layer alone."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    def use(path: Path) -> Run:
        model, x = openvino.Core().read_model(path), layer.x
        if kind == "codes":
            axes = {3: "NCW", 4: "NCHW"}[x.dim()]
            processor = PrePostProcessor(model)
            for end in (processor.input(), processor.output()):
                end.tensor().set_layout(openvino.Layout(axes[0] + axes[2:] + "C"))
                end.model().set_layout(openvino.Layout(axes))
            model, x = processor.build(), x.movedim(1, -1).contiguous()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        y = torch.from_numpy(request.get_output_tensor().data)
        y = y.movedim(-1, 1) if kind == "codes" else y

        def run(x: object = x) -> Tensor:
            request.infer()
            return y

        return run

    return with_model(layer, "floats", use)


def contestants(layer: Layer, kind: str) -> dict[str, Run]:
    """By name: those that take and give codes, or floats."""
    runs = {"torchq": torchq_run(layer, kind)}
    if kind == "floats":
        runs |= {"torchq, channels last": torchq_run(layer, "channels last")}
    runs |= {"torch": torch_run(layer, False), "torch, channels last": torch_run(layer, True)}
    for bits, given in (("", layer), (", 7 bits", layer.narrowed())):
        runs |= {f"ONNX Runtime{bits}": onnxruntime_run(given, kind), f"OpenVINO{bits}": openvino_run(given, kind)}
    return runs


def answer(layer: Layer, kind: str, name: str, run: Run) -> Tensor:
    """What a contestant gives, as floats with the channels first."""
    with torch.no_grad():
        y = run()
    if y.dtype != torch.uint8:
        return y
    return layer.dequantized(y.movedim(-1, 1) if name == "torchq" else y)
