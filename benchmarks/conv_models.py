"""Whole models with convolutions in int8, against torch float32 in both memory formats, OpenVINO and ONNX Runtime.

    taskset -c 0 python -m benchmarks.conv_models                       # one thread
    taskset -c 0 python -m benchmarks.conv_models --cells ResNet --contestants openvino

Models are built from their configs with fixed seeds: nothing is downloaded. In a cell all contestants run in one
process, interleaved, and each is calibrated on the same 16 inputs. Beside each time stands the SQNR of the output
against float32, in dB. `torchq static` is `QConfig(activation="static")`: u8 codes pass from layer to layer.
"""

import copy
import gc
from typing import Any

import torch
from torch import Tensor, nn

import torchq
from benchmarks import accuracy_peers, transformer_peers
from benchmarks.accuracy_peers import Make, Task, preset
from benchmarks.peers import Peer, Run, overflow_fix
from benchmarks.timing import machine
from benchmarks.transformer_models import Cell, First, _normal, _whisper_encoder, with_weights
from benchmarks.transformers import begin, measure, parser_of, shown, versions

OPENVINO, ONNXRUNTIME = ("openvino", "nncf"), ("onnx", "onnxscript", "onnxruntime")


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    return First(ResNetModel(ResNetConfig()).eval())


def _mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2Model

    # transformers' own initial weights, of 0.02, leave 1e-20 of an image, and no engine's int8 means anything then.
    # With the statistics of data in its batch norms a random network amplifies any error by 37 dB.
    torch.manual_seed(0)
    return First(with_weights(MobileNetV2Model(MobileNetV2Config())))


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return First(with_weights(Wav2Vec2Model(Wav2Vec2Config())))


class Conformer(nn.Module):
    """The encoder of Wav2Vec2-Conformer on features, without a stem: feed forwards, attention, pointwise, depthwise."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Wav2Vec2ConformerConfig
        from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

        config = Wav2Vec2ConformerConfig(
            hidden_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            intermediate_size=1024,
            position_embeddings_type=None,
            attn_implementation="sdpa",  # as the whole model would choose
        )
        self.encoder = Wav2Vec2ConformerEncoder(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 256) -> the same."""
        return self.encoder(x).last_hidden_state  # type: ignore[no-any-return]


def _conformer() -> nn.Module:
    torch.manual_seed(0)
    return with_weights(Conformer())


CELLS = [
    Cell("ResNet-50 1x3x224x224", "encoder", _resnet50, _normal(3, 224, 224), 1),
    Cell("MobileNetV2 1x3x224x224", "encoder", _mobilenet_v2, _normal(3, 224, 224), 1),
    Cell("wav2vec2-base 2 s", "encoder", _wav2vec2, _normal(32000), 1),
    Cell("Whisper-base encoder 30 s", "encoder", _whisper_encoder, _normal(80, 3000), 1),
    Cell("conformer 400x256", "encoder", _conformer, _normal(400, 256), 1),
]


def _torchq(last: bool, **options: Any) -> Make:
    def make(task: Task, x: Tensor, threads: int) -> Run:
        qmodel = torchq.convert(task.model, task.calibration, config=torchq.QConfig(**options))
        given = _last(x) if last else x

        return lambda: qmodel(given)

    return make


def _float32(last: bool) -> Make:
    def make(task: Task, x: Tensor, threads: int) -> Run:
        model = copy.deepcopy(task.model)
        if last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given = _last(x) if last else x
        return lambda: model(given)

    return make


def _last(x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise ValueError("only images have channels last")
    return x.contiguous(memory_format=torch.channels_last)


CONTESTANTS = [
    Peer("torchq", True, _torchq(last=False)),
    Peer("torchq static", True, _torchq(last=False, activation="static")),
    Peer("torchq static, channels last", True, _torchq(last=True, activation="static")),
    Peer(
        "openvino int8",
        True,
        transformer_peers._openvino("MIXED", transformer_peers._nncf(lambda: preset("MIXED"))),
        OPENVINO,
    ),
    Peer(
        "openvino int8: overflow_fix",
        True,
        transformer_peers._openvino("MIXED, 7 bits", transformer_peers._nncf(lambda: preset("MIXED") | overflow_fix())),
        OPENVINO,
    ),
    Peer(
        "openvino int8: transformer",
        True,
        transformer_peers._openvino("usual", transformer_peers._nncf(transformer_peers._usual)),
        OPENVINO,
    ),
    Peer(
        "onnxruntime int8: static",
        True,
        transformer_peers._onnxruntime("static all", accuracy_peers._static()),
        ONNXRUNTIME,
    ),
    Peer(
        "onnxruntime int8: static, reduce_range",
        True,
        transformer_peers._onnxruntime("static all 7", accuracy_peers._static(reduce_range=True)),
        ONNXRUNTIME,
    ),
    Peer("torch float32", False, _float32(last=False)),
    Peer("torch float32, channels last", False, _float32(last=True)),
]


def main() -> None:
    """Measures the cells, and prints each."""
    parser = parser_of(__doc__, CELLS)
    arguments = parser.parse_args()
    cells, peers = begin(arguments, CELLS, CONTESTANTS)
    for cell in cells:
        result = measure(cell, peers, arguments.threads, arguments.rounds, arguments.clock)
        print(f"{cell.name}, ms (dB): {'; '.join(f'{name} {shown(result, name)}' for name in result['ms'])}")
        for name, reason in result["failed"].items():
            print(f"  not built: {name}: {reason}")
        gc.collect()
    print(f"\n{machine()}, {versions()}.", flush=True)


if __name__ == "__main__":
    main()
