"""A chain of linear layers, 784-1024-1024-10 with ReLU, in static int8 against its peers: latency by batch size.

    taskset -c 0 python -m benchmarks.mlp
    python -m benchmarks.mlp --threads 2 --json out.json --markdown out.md

torchq static passes u8 codes from layer to layer. Every engine calibrates on the same batches and runs through its best
API (benchmarks/peers.py). If it has several settings, all are timed, and of those whose answers are right the fastest
at each batch size counts. Each answer is first compared with float.

At batch 1 the 1.9 MB of weights nearly fill the L2 of some CPUs. How much of them stays there depends on the memory
pages they happen to get. So every contestant is built several times, each time in other pages. Its time is the best of
interleaved rounds for each build, and the median over the builds.
"""

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchq
from benchmarks.demo import digits, markdown
from benchmarks.peers import (
    Peer,
    Run,
    available,
    nncf_quantized,
    onnxruntime_run,
    openvino_model,
    openvino_run,
    overflow_fix,
    save_onnx,
    wrong,
)
from benchmarks.timing import interleaved, machine
from torchq.config import ActivationScheme
from torchq.numerics.metrics import sqnr_db

BATCHES = (1, 16, 128)
SIDE, WIDTH, CLASSES = 28, 1024, 10
OURS = "torchq static"
MIN_SQNR_DB = 15.0  # below this it is a bug and not quantization: static 8 bits give about 30 dB here


class Chain(NamedTuple):
    """The float model, and the batches that all contestants calibrate on."""

    model: nn.Sequential
    batches: Sequence[Tensor]


def mlp() -> Chain:
    """The model with torch's own initial weights, and half of the training digits."""
    torch.manual_seed(0)
    layers = [nn.Linear(SIDE * SIDE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]
    return Chain(nn.Sequential(*layers).eval(), enlarged(digits()[0].tensors[0][:640]).split(64))


def enlarged(images: Tensor) -> Tensor:
    """Enlarges digits of 8 x 8, (R, 64), to 28 x 28, (R, 784)."""
    grown = nn.functional.interpolate(images.view(-1, 1, 8, 8), size=(SIDE, SIDE), mode="bilinear")
    return grown.flatten(1).contiguous()


# ---- Contestants ----------------------------------------------------------------------------------------------------


def _torchq(scheme: ActivationScheme) -> Callable[[Chain, Tensor, int], Run]:
    def make(chain: Chain, x: Tensor, threads: int) -> Run:
        qmodel = torchq.convert(chain.model, chain.batches, config=torchq.QConfig(activation=scheme))
        return lambda: qmodel(x)

    return make


def _torch_float32(chain: Chain, x: Tensor, threads: int) -> Run:
    return lambda: chain.model(x)


def _onnxruntime(gemm: bool, quantize: Callable[[Chain, Path], None]) -> Callable[[Chain, Tensor, int], Run]:
    """Runs the graph, of Gemm or of MatMul and Add, after `quantize` has changed it in place."""

    def make(chain: Chain, x: Tensor, threads: int) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mlp.onnx"
            save_onnx(chain.model, path, gemm=gemm)
            quantize(chain, path)
            return onnxruntime_run(path, x, (len(x), CLASSES), threads)

    return make


def _as_it_is(chain: Chain, path: Path) -> None:
    pass


def _dynamic(**options: Any) -> Callable[[Chain, Path], None]:
    def quantize(chain: Chain, path: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(path, path, per_channel=True, weight_type=QuantType.QInt8, **options)

    return quantize


def _static(op: str, form: str, output: str, **options: Any) -> Callable[[Chain, Path], None]:
    """Per-channel int8 weights, asymmetric u8 activations, min-max calibration."""

    def quantize(chain: Chain, path: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.feeds: Iterator[dict[str, Any]] = iter([{"x": batch.numpy()} for batch in chain.batches])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        quantize_static(
            path,
            path,
            Reader(),
            quant_format=QuantFormat[form],
            op_types_to_quantize=[op, "Relu"],  # without Add, which fuses with a MatMul only in float
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # The input of a layer is quantized in any case, so "float" affects only the model's last output.
            extra_options={"OpTypesToExcludeOutputQuantization": [op] if output == "float" else []},
            **options,
        )

    return quantize


def _openvino_float32(chain: Chain, x: Tensor, threads: int) -> Run:
    return openvino_run(openvino_model(chain.model), x, threads)


def _openvino_static(preset: str, options: Callable[[], dict[str, Any]]) -> Callable[[Chain, Tensor, int], Run]:
    """NNCF post-training quantization; activations symmetric ("PERFORMANCE") or asymmetric ("MIXED")."""

    def make(chain: Chain, x: Tensor, threads: int) -> Run:
        import nncf

        chosen = nncf.QuantizationPreset[preset]
        graph = nncf_quantized(openvino_model(chain.model), chain.batches, preset=chosen, **options())
        return openvino_run(graph, x, threads)

    return make


SEVEN_BITS: dict[str, dict[str, Any]] = {"": {}, ", reduce_range": {"reduce_range": True}}
OPS, ONNXRUNTIME, OPENVINO = ("Gemm", "MatMul"), ("onnx", "onnxruntime"), ("onnx", "openvino")
CONTESTANTS = [  # "contestant: setting"; the fastest setting of each counts
    Peer(OURS, True, _torchq("static")),
    Peer("torchq auto", True, _torchq("auto")),
    Peer("torchq dynamic", True, _torchq("dynamic")),
    *(
        Peer(
            f"onnxruntime static: {form} {op}, {output} output{bits}",
            True,
            _onnxruntime(op == "Gemm", _static(op, form, output, **options)),
            ONNXRUNTIME,
        )
        for form, op, output, (bits, options) in product(("QDQ", "QOperator"), OPS, ("float", "u8"), SEVEN_BITS.items())
    ),
    *(
        Peer(f"onnxruntime dynamic: {op}{bits}", True, _onnxruntime(op == "Gemm", _dynamic(**options)), ONNXRUNTIME)
        for op, (bits, options) in product(OPS, SEVEN_BITS.items())
    ),
    *(
        Peer(f"openvino static: {preset}{bits}", True, _openvino_static(preset, options), (*OPENVINO, "nncf"))
        for preset, (bits, options) in product(
            ("PERFORMANCE", "MIXED"), {"": dict, ", overflow_fix": overflow_fix}.items()
        )
    ),
    *(Peer(f"onnxruntime float32: {op}", False, _onnxruntime(op == "Gemm", _as_it_is), ONNXRUNTIME) for op in OPS),
    Peer("openvino float32", False, _openvino_float32, OPENVINO),
    Peer("torch float32", False, _torch_float32),
]


# ---- Measuring ------------------------------------------------------------------------------------------------------


def measure(
    chain: Chain, x: Tensor, contestants: list[Peer], *, threads: int, rounds: int, builds: int
) -> dict[str, Any]:
    """Microseconds and lowest output SQNR of each contestant on x."""
    exact = chain.model(x)
    kept, times, errors = [], defaultdict(list), defaultdict(list)
    for _ in range(builds):
        runs = {contestant.name: contestant.make(chain, x, threads) for contestant in contestants}
        kept.append(runs)  # keeps the memory, so that the next build gets other pages
        for name, run in runs.items():
            errors[name].append(sqnr_db(exact, run()))
            if name == OURS and errors[name][-1] < MIN_SQNR_DB:
                problem = f"output SQNR {errors[name][-1]:.1f} dB, the answer is wrong"
                raise RuntimeError(f"{name} at batch {len(x)}: {problem}")
        for name, seconds in interleaved(runs, rounds=rounds).items():
            times[name].append(seconds * 1e6)
    us = {name: statistics.median(values) for name, values in times.items()}
    least = {name: min(values) for name, values in errors.items()}
    return {"batch": len(x), "us": us, "us_of_builds": times, "sqnr_db": least, "wrong": wrong(least, OURS)}


def table(results: list[dict[str, Any]]) -> str:
    """A row per batch size, a column per contestant, the output SQNR below; then the speed-ups over the best peers."""
    settings: dict[str, list[str]] = {}
    for name in results[0]["us"]:
        settings.setdefault(name.partition(":")[0], []).append(name)
    rows, ratios, errors = [["us", *settings]], [], dict.fromkeys(settings, float("inf"))
    for r in results:
        right = {name: [choice for choice in choices if choice not in r["wrong"]] for name, choices in settings.items()}
        best = {name: min(choices, key=lambda choice: r["us"][choice]) for name, choices in right.items()}
        rows.append([f"batch {r['batch']}", *(f"{r['us'][choice]:.1f}" for choice in best.values())])
        errors = {name: min(errors[name], r["sqnr_db"][choice]) for name, choice in best.items()}
        peer = min((c for c in best.values() if not c.startswith("torchq")), key=lambda choice: r["us"][choice])
        ratios.append(f"batch {r['batch']}: {r['us'][peer] / r['us'][OURS]:.2f}x ({peer})")
    rows.append(["least SQNR", *("-" if error > 100 else f"{error:.1f} dB" for error in errors.values())])
    failed = [
        f"{name} at batch {r['batch']}, {r['us'][name]:.1f} us, {r['sqnr_db'][name]:.1f} dB"
        for r in results
        for name in r["wrong"]
    ]
    lines = [f"Left out, because their answers are wrong: {'; '.join(failed)}."] if failed else []
    return "\n\n".join([markdown(rows), f"{OURS} over the best peer: {'; '.join(ratios)}.", *lines])


def main() -> None:
    """Measures each batch size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--builds", type=int, default=7, help="of every contestant")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # the peers warn about caching and deprecation
    logging.disable(logging.WARNING)  # ONNX Runtime advises pre-processing, which would change nothing here

    contestants, skipped = available(CONTESTANTS)
    print("\n".join(skipped), end="\n" if skipped else "")
    chain, test = mlp(), enlarged(digits()[1].tensors[0])
    results = []
    with torch.inference_mode():
        for batch in BATCHES:
            x = test[:batch].clone()
            counts = {"threads": arguments.threads, "rounds": arguments.rounds, "builds": arguments.builds}
            results.append(measure(chain, x, contestants, **counts))
    text = f"{table(results)}\n\n{machine()}."
    print("\n" + text)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
