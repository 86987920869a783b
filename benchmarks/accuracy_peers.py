"""Whole trained networks in int8, by every engine that can run them on a CPU, each through its public API.

`Peer.make(task, x, threads)` quantizes the task's model with the task's calibration batches. It returns a function
without arguments that runs the model on x; the caller may overwrite x with other inputs. If a peer has several
settings, each is a contestant "name: setting", and the best of them on each model counts.
"""

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchq
from benchmarks.models import Batch
from benchmarks.peers import Peer, Run, nncf_quantized, onnxruntime_run, openvino_run


class Task(NamedTuple):
    """A float model, the inputs all contestants calibrate on, and the test batches. All batches have one shape."""

    name: str
    model: nn.Module
    calibration: Sequence[Tensor]
    test: Sequence[Batch]


Make = Callable[[Task, Tensor, int], Run]


# ---- In torch -------------------------------------------------------------------------------------------------------


def _torchq(config: torchq.QConfig | None = None) -> Make:
    """torchq.convert, with this config or the defaults."""

    def make(task: Task, x: Tensor, threads: int) -> Run:
        qmodel = torchq.convert(task.model, task.calibration, config=config)
        return lambda: qmodel(x)

    return make


def _torchq_qat(config: torchq.QConfig | None = None) -> Make:
    """Static per layer, then trained to reproduce the float model's outputs on the calibration inputs: no labels."""

    def make(task: Task, x: Tensor, threads: int) -> Run:
        model = torchq.prepare_qat(task.model, task.calibration, config=config)
        _distil(model, task)
        qmodel = torchq.convert(model.eval(), task.calibration)
        return lambda: qmodel(x)

    return make


def _distil(model: nn.Module, task: Task) -> None:
    with torch.no_grad():
        exact = [task.model(batch) for batch in task.calibration]
    optimizer = torch.optim.Adam(model.parameters(), lr=QAT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, QAT_STEPS)
    with torch.enable_grad():
        for step in range(QAT_STEPS):
            which = step % len(exact)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(task.calibration[which]), exact[which]).backward()
            optimizer.step()
            schedule.step()


def _float32(task: Task, x: Tensor, threads: int) -> Run:
    return lambda: task.model(x)


def torch_dynamic(engine: str, per_channel: bool) -> Make:
    """torch.ao.quantization.quantize_dynamic, deprecated in torch 2.13. It always uses 7-bit activations."""

    def make(task: Task, x: Tensor, threads: int) -> Run:
        from torch.ao import quantization

        qconfig = quantization.per_channel_dynamic_qconfig if per_channel else quantization.default_dynamic_qconfig
        previous = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            qmodel = quantization.quantize_dynamic(task.model, {nn.Linear: qconfig})
        finally:
            torch.backends.quantized.engine = previous
        return lambda: qmodel(x)

    return make


def _torchao(task: Task, x: Tensor, threads: int) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    qmodel = copy.deepcopy(task.model)
    quantize_(qmodel, Int8DynamicActivationInt8WeightConfig())
    return lambda: qmodel(x)


# ---- ONNX Runtime ---------------------------------------------------------------------------------------------------


def _onnxruntime(quantize: Callable[[Path, Task], None]) -> Make:
    """Runs the exported and pre-processed graph after `quantize` has changed it in place."""

    def make(task: Task, x: Tensor, threads: int) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(onnx_bytes(task.model, tuple(x.shape), x.dtype))
            quantize(path, task)
            with torch.no_grad():
                shape = task.model(x).shape
            return onnxruntime_run(path, x, shape, threads)

    return make


@functools.lru_cache(maxsize=1)
def onnx_bytes(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The model for inputs of this kind, exported by torch.onnx and pre-processed by ONNX Runtime."""
    from onnxruntime.quantization import shape_inference

    with tempfile.TemporaryDirectory() as folder:
        raw, path = Path(folder) / "raw.onnx", Path(folder) / "model.onnx"
        example = torch.zeros(shape, dtype=dtype)
        torch.onnx.export(
            model,
            (example,),
            raw,
            input_names=["x"],
            output_names=["y"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        shape_inference.quant_pre_process(raw, path)
        return path.read_bytes()


def onnxruntime_dynamic(per_channel: bool, **options: Any) -> Callable[[Path, Task], None]:
    """quantize_dynamic with signed weights."""

    def quantize(path: Path, task: Task) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(path, path, per_channel=per_channel, weight_type=QuantType.QInt8, **options)

    return quantize


def _static(**options: Any) -> Callable[[Path, Task], None]:
    """quantize_static with its defaults (QDQ, every op, per tensor, signed, min-max), except for `options`."""

    def quantize(path: Path, task: Task) -> None:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.feeds: Iterator[dict[str, Any]] = iter([{"x": batch.numpy()} for batch in task.calibration])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        quantize_static(path, path, Reader(), **options)

    return quantize


def onnxruntime_static_linear(method: str, **options: Any) -> Callable[[Path, Task], None]:
    """What ONNX Runtime documents as best for x86: u8 activations, per-channel int8 weights. Only for linear layers."""

    def quantize(path: Path, task: Task) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantType

        static = _static(
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            # Products of two activations (attention) and the outputs of layers stay in float, which is more accurate.
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            **options,
        )
        static(path, task)

    return quantize


# ---- OpenVINO -------------------------------------------------------------------------------------------------------


def openvino_model(model: nn.Module, x: Tensor) -> Any:
    """The model as OpenVINO traces it on x; its input is named "x"."""
    import openvino

    graph = openvino.convert_model(model, example_input=x)
    graph.inputs[0].get_tensor().set_names({"x"})
    return graph


def _openvino_float32(task: Task, x: Tensor, threads: int) -> Run:
    return openvino_run(openvino_model(task.model, x), x, threads)


def _nncf(options: Callable[[], dict[str, Any]]) -> Make:
    """nncf.quantize, calibrated on the same inputs one at a time, which NNCF requires for transformers."""

    def make(task: Task, x: Tensor, threads: int) -> Run:
        singles = [row for batch in task.calibration for row in batch.split(1)]
        return openvino_run(nncf_quantized(openvino_model(task.model, x), singles, **options()), x, threads)

    return make


def preset(name: str) -> dict[str, Any]:
    """Activations symmetric ("PERFORMANCE") or asymmetric ("MIXED")."""
    import nncf

    return {"preset": nncf.QuantizationPreset[name]}


def smooth(alpha: float) -> dict[str, Any]:
    """model_type TRANSFORMER: SmoothQuant (NNCF's default alpha is 0.95), and special handling of attention."""
    import nncf

    smooth = nncf.AdvancedSmoothQuantParameters(matmul=alpha)
    return {
        "model_type": nncf.ModelType.TRANSFORMER,
        "advanced_parameters": nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
    }


def _openvino_dynamic(group: int) -> Make:
    """Weights compressed to int8 by NNCF, activations quantized at run time, with a scale per `group` of channels.

    This is OpenVINO's path for language models. It needs no calibration, and is finer than one scale per token.
    """

    def make(task: Task, x: Tensor, threads: int) -> Run:
        import nncf

        compressed = nncf.compress_weights(openvino_model(task.model, x), mode=nncf.CompressWeightsMode.INT8_SYM)
        return openvino_run(compressed, x, threads, DYNAMIC_QUANTIZATION_GROUP_SIZE=group)

    return make


OURS, FLOAT = "torchq auto", "torch float32"
QAT_STEPS, QAT_RATE = 200, 1e-4
ONNXRUNTIME, OPENVINO = ("onnx", "onnxscript", "onnxruntime"), ("openvino",)
CONTESTANTS = [  # "contestant: setting"; the most accurate setting of each counts
    Peer(FLOAT, False, _float32),
    Peer(OURS, True, _torchq()),
    Peer("torchq dynamic", True, _torchq(torchq.QConfig(activation="dynamic"))),
    Peer("torchq static", True, _torchq(torchq.QConfig(activation="static"))),
    Peer("torchq QAT", True, _torchq_qat()),
    Peer("torch.ao dynamic: default", True, torch_dynamic("x86", per_channel=False)),
    Peer("torch.ao dynamic: per channel", True, torch_dynamic("x86", per_channel=True)),
    Peer("torch.ao dynamic: per channel, onednn", True, torch_dynamic("onednn", per_channel=True)),
    Peer("torchao dynamic", True, _torchao, ("torchao",)),
    Peer("onnxruntime dynamic: default", True, _onnxruntime(onnxruntime_dynamic(per_channel=False)), ONNXRUNTIME),
    Peer("onnxruntime dynamic: per channel", True, _onnxruntime(onnxruntime_dynamic(per_channel=True)), ONNXRUNTIME),
    Peer("onnxruntime static: default", True, _onnxruntime(_static()), ONNXRUNTIME),
    *(
        Peer(
            f"onnxruntime static: linear u8s8, {method}",
            True,
            _onnxruntime(onnxruntime_static_linear(method)),
            ONNXRUNTIME,
        )
        for method in ("MinMax", "Entropy", "Percentile")
    ),
    *(
        Peer(f"openvino static: {name}", True, _nncf(functools.partial(preset, name)), (*OPENVINO, "nncf"))
        for name in ("PERFORMANCE", "MIXED")
    ),
    *(
        Peer(f"openvino static: SmoothQuant {a:g}", True, _nncf(functools.partial(smooth, a)), (*OPENVINO, "nncf"))
        for a in (0.95, 0.5)
    ),
    *(Peer(f"openvino dynamic: groups of {g}", True, _openvino_dynamic(g), (*OPENVINO, "nncf")) for g in (32, 128)),
    Peer("onnxruntime float32", False, _onnxruntime(lambda path, task: None), ONNXRUNTIME),
    Peer("openvino float32", False, _openvino_float32, OPENVINO),
]

_PLAIN = torchq.QConfig(margin_db=1.0, smoothing="none", rounding="nearest")
STEPS = [  # show what each part of torchq auto gains; run only if asked for by name ("step")
    Peer("step 0: margin 1 dB", True, _torchq(_PLAIN)),
    Peer("step 1: and smoothing", True, _torchq(dataclasses.replace(_PLAIN, smoothing="auto"))),
    Peer("step 2: and margin 0.3 dB", True, _torchq(torchq.QConfig(rounding="nearest"))),
    Peer("step 3: and rounding", True, _torchq()),
    Peer("step QAT: without smoothing", True, _torchq_qat(torchq.QConfig(smoothing="none"))),
]
