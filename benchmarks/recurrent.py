"""nn.LSTM and nn.GRU in int8 against torch's in float32, and torch.ao's dynamic int8 of each engine: time, and SQNR.

taskset -c 1 python -m benchmarks.recurrent
python -m benchmarks.recurrent --threads 2 --bidirectional
pip install --no-deps resemblyzer && python -m benchmarks.recurrent --encoder

160 steps of one layer with as many inputs as hidden values, initialized as torch does, on inputs of unit scale. Every
contestant's answer is compared with float32's. One thread is timed by its CPU time, so that other work disturbs less.

--encoder: how near to float32 the output of a trained speaker encoder is: the LSTM of the package resemblyzer (3 layers
of 256 from 40 mel bands), on power spectra of sounds like speech: voiced and noisy phones, and pauses. Nothing of the
package is imported but its weights.
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo import markdown
from benchmarks.timing import interleaved, machine
from torchq import convert, sqnr_db

STEPS = 160
SHAPES = [(hidden, batch) for hidden in (256, 512, 1024) for batch in (1, 4, 16)]
FLOAT, OURS = "torch float32", "torchq"


def by_peers(rnn: nn.Module) -> dict[str, nn.Module]:
    """torch.ao's dynamic int8, by each engine that packs its weights."""
    made: dict[str, nn.Module] = {}
    before = torch.backends.quantized.engine
    for engine in torch.backends.quantized.supported_engines:
        if engine not in ("fbgemm", "x86", "onednn"):
            continue
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made[f"torch.ao {engine}"] = torch.ao.quantization.quantize_dynamic(
                nn.ModuleList([rnn]), {nn.LSTM, nn.GRU}, dtype=torch.qint8
            )[0]
    torch.backends.quantized.engine = before
    return made


def row(kind: Callable[..., nn.RNNBase], hidden: int, batch: int, *, bidirectional: bool) -> list[str]:
    """The time of float32, and of each other with its ratio and SQNR."""
    torch.manual_seed(0)
    rnn = kind(hidden, hidden, bidirectional=bidirectional).eval()
    x = torch.randn(STEPS, batch, hidden)
    models = {FLOAT: rnn, OURS: convert(nn.Sequential(rnn))[0], **by_peers(rnn)}
    calls: dict[str, Callable[[], Any]] = {name: partial(model, x) for name, model in models.items()}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleaved(calls, rounds=7, seconds=0.02, clock=clock)
    exact = calls[FLOAT]()[0]
    cells = [f"{times[FLOAT] * 1e3:.2f}"]
    for name in calls:
        if name != FLOAT:
            error = sqnr_db(exact, calls[name]()[0])
            cells.append(f"{times[name] * 1e3:.2f} ({times[FLOAT] / times[name]:.2f}x, {error:.0f} dB)")
    return [f"{rnn._get_name()} {hidden}, {batch}", *cells]


def encoder() -> nn.LSTM:
    """The LSTM of resemblyzer's speaker encoder."""
    found = importlib.util.find_spec("resemblyzer")
    if found is None or found.origin is None:
        raise SystemExit("--encoder needs the weights in the package: pip install --no-deps resemblyzer")
    weights = torch.load(Path(found.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)
    rnn = nn.LSTM(40, 256, 3)
    rnn.load_state_dict(
        {k.removeprefix("lstm."): v for k, v in weights["model_state"].items() if k.startswith("lstm.")}
    )
    return rnn.eval()


def speech(count: int, seed: int) -> Tensor:
    """Mel power spectra (STEPS, count, 40) of sounds like speech, at -30 dB of full scale."""
    rate, window, hop = 16000, 400, 160
    generator = torch.Generator().manual_seed(seed)
    filters = _mel_filters(rate, window)
    sounds = torch.stack([_sound(STEPS * hop + window, rate, generator) for _ in range(count)])
    frames = sounds.unfold(1, window, hop)[:, :STEPS] * torch.hann_window(window)
    power: Tensor = torch.fft.rfft(frames).abs().square() @ filters
    return power.transpose(0, 1).contiguous()


def _mel_filters(rate: int, window: int) -> Tensor:
    """Forty triangles of equal area, (frequencies, 40)."""
    mel = torch.linspace(0, 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700)).item(), 42)
    edges = 700 * (10 ** (mel / 2595) - 1)
    lo, middle, hi = edges[:-2], edges[1:-1], edges[2:]
    f = torch.linspace(0, rate / 2, window // 2 + 1).unsqueeze(1)
    shape: Tensor = torch.minimum((f - lo) / (middle - lo), (hi - f) / (hi - middle)).clamp(min=0)
    return shape * (2 / (hi - lo))


def _sound(length: int, rate: int, generator: torch.Generator) -> Tensor:
    """Phones of 60 to 160 ms: harmonics with formants, noise of a band, or nothing; and some noise over all."""

    def uniform(lo: float, hi: float) -> float:
        return lo + (hi - lo) * float(torch.rand(1, generator=generator))

    pitch, size = uniform(90, 250), uniform(0.85, 1.2)
    phones: list[Tensor] = []
    while sum(phone.numel() for phone in phones) < length:
        n, choice = int(uniform(0.06, 0.16) * rate), uniform(0, 1)
        t, spectrum = torch.arange(n) / rate, torch.zeros(n // 2 + 1)
        f = torch.fft.rfftfreq(n, 1 / rate)
        sound = torch.zeros(n)
        if choice < 0.6:
            formants = [(300, 900, 1.0, 80), (900, 2500, 0.5, 110), (2400, 3200, 0.25, 160), (3300, 4200, 0.12, 220)]
            for lo, hi, height, width in formants:
                spectrum += height / (1 + ((f - uniform(lo, hi) * size) / width) ** 2)
            own = pitch * (1 + 0.075 * float(torch.randn(1, generator=generator)))
            for h in range(1, int(7500 / own)):
                weight = spectrum[min(int(h * own * n / rate), n // 2)] / (1 + (h * own / 500) ** 0.5)
                sound += weight * torch.sin(2 * torch.pi * h * own * t + uniform(0, 6.28))
            level = uniform(0.3, 1)
        elif choice < 0.85:
            band = torch.exp(-(((f - uniform(2500, 6500)) / 1800) ** 2))
            sound = torch.fft.irfft(torch.fft.rfft(torch.randn(n, generator=generator)) * band, n)
            level = uniform(0.05, 0.3)
        else:
            level = 0.0
        ramp = (torch.minimum(torch.arange(n), torch.arange(n).flip(0)) / (0.01 * rate)).clamp(max=1)
        phones.append(level * ramp * sound / sound.std().clamp(min=1e-9))
    whole = torch.cat(phones)[:length] + 0.003 * torch.randn(length, generator=generator)
    scaled: Tensor = whole * (10 ** (-30 / 20) / whole.square().mean().sqrt())
    return scaled


def encoder_rows() -> list[list[str]]:
    """SQNR of the output over all steps, and of the last state, which speakers are told by."""
    rnn = encoder()
    model, x = nn.Sequential(rnn), speech(16, 0)
    contestants = {
        "torchq, calibrated": convert(model, [speech(16, seed) for seed in range(1, 7)])[0],
        "torchq, no data": convert(model)[0],
        **by_peers(rnn),
    }
    exact, (h, _) = rnn(x)
    rows = []
    for name, each in contestants.items():
        y, (last, _) = each(x)
        rows.append([name, f"{sqnr_db(exact, y):.1f}", f"{sqnr_db(h[-1], last[-1]):.1f}"])
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--encoder", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        if options.encoder:
            print(markdown([["speaker encoder", "output, dB", "last state, dB"], *encoder_rows()]))
            return
        kinds: list[Callable[..., nn.RNNBase]] = [nn.LSTM, nn.GRU]
        rows = [row(kind, *shape, bidirectional=options.bidirectional) for kind in kinds for shape in SHAPES]
        names = [OURS, *by_peers(nn.LSTM(8, 8))]
    print(markdown([["layer, hidden, batch", "float32, ms", *names], *rows]))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
