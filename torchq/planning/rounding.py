"""Weight rounding beyond nearest: GPTQ (arXiv 2210.17323), and bias correction.

Rounding each weight to the nearest code is best for the weight, not for the output. The error of an output is `e·x`
for the weight error e of its row, so what counts is `eᵀ H e` with `H = XᵀX` of the calibration inputs. GPTQ rounds one
input channel after the other, and takes each error back in the channels still to come, as far as the inputs'
correlation allows:

    e_j = (w_j - q_j) / U_jj        w_i -= e_j · U_ji for i > j        U upper triangular, UᵀU = (H + d·I)⁻¹

with d = 1 % of the mean of H's diagonal, and channels in order of falling H_jj. Bias correction then adds the mean
error that is left, `b += mean(y - y_int8)`. Both change numbers only: the layer costs at run time what it did.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchq import ops
from torchq.calibration.calibrate import Calibration
from torchq.calibration.record import MAX_GRAM_DEPTH, Record
from torchq.config import QConfig
from torchq.modules.linear import QuantizedLinear
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import choose_qparams, dequantize, quantize
from torchq.planning.plan import LayerPlan, Plan, plan_of
from torchq.planning.smoothing import scaled_linear, scales_around

MIN_GAIN_DB = 0.5
"""What "auto" wants rounding to gain, in output SQNR on rows it has not seen."""

INPUTS_PER_ROW = 4
"""A layer of K inputs is rounded on K/4 rows at least: the damping fills up H where they leave it singular."""

MIN_LIKENESS_DB = 10.0
"""How alike a weight rounded to nearest and by GPTQ are at the least: by 30 dB and more, in fact."""

_DAMPING, _BLOCK, _PANEL = 0.01, 128, 16  # a panel of channels stays in a near cache

_ROWS = 1024  # of a weight rounded together, in float64

_MIN_REST = 0.01
"""How much of XᵀX must be left without the held-out rows: less, and the difference is float32's rounding errors."""

_MIN_SQUARE = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
"""The least mean square of inputs, of which float32 keeps all digits."""


@dataclass(frozen=True)
class Rounded:
    """A layer's int8 weight (N, K), its scales (N,) and its bias (N,), rounded with calibration data."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


def gptq(weight: Tensor, scale: Tensor, gram: Tensor, *, factors: "Factors | None" = None) -> Tensor:
    """int8 codes of `weight` that keep `(W - W_int8) · x` small, in blocks of 128 channels.

    Time N·K² + 4/3·K³ multiplications and 3 temporary float64 matrices of K x K.

    Args:
        weight: float32 (N, K).
        scale: float32 (N,), positive.
        gram: XᵀX of the inputs, (K, K). A channel that was always zero is rounded to nearest.
        factors: from the call before, for layers that may share its `gram`.

    Returns:
        int8 (N, K), in [-127, 127].

    >>> weight = torch.tensor([[0.4, 0.4, 127.0]])
    >>> gptq(weight, torch.ones(1), torch.eye(3))  # no correlation: to nearest
    tensor([[  0,   0, 127]], dtype=torch.int8)
    >>> gptq(weight, torch.ones(1), torch.ones(3, 3) + 0.1 * torch.eye(3))  # 0.4 x + 0.4 x is nearly 1 x
    tensor([[  0,   1, 127]], dtype=torch.int8)
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = (factors or Factors()).of(gram.double()[order][:, order])
    rest = weight.detach().T.contiguous()[order].double()  # (K, N): a channel is a row
    codes = torch.empty_like(rest, dtype=torch.int8)
    errors, code = torch.empty_like(rest[:_BLOCK]), torch.empty_like(rest[0])
    scale, inverse = scale.double(), scale.reciprocal().double()
    places, pivots = order.tolist(), factor.diagonal().tolist()
    for start in range(0, len(rest), _BLOCK):
        stop = min(start + _BLOCK, len(rest))
        for first in range(start, stop, _PANEL):
            last = min(first + _PANEL, stop)
            panel, found = rest[first:last], errors[first - start : last - start]
            for j, (w, error) in enumerate(zip(panel, found, strict=True), first):
                torch.mul(w, inverse, out=code).round_().clamp_(-127, 127)
                torch.addcmul(w, code, scale, value=-1, out=error).div_(pivots[j])  # the product is exact in float64
                panel[j + 1 - first :].addr_(factor[j, j + 1 : last], error, alpha=-1)
                codes[places[j]] = code
            rest[last:stop].addmm_(factor[first:last, last:stop].T, found, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return codes.T.contiguous()


class Factors:
    """U by H. The last one is kept, since q, k and v of an attention follow each other and share theirs."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, gram: Tensor) -> Tensor:
        """U of H = `gram`, float64 (K, K)."""
        if self._last is None or not torch.equal(self._last[0], gram):
            self._last = gram, _inverse_factor(gram)
        return self._last[1]


def _inverse_factor(gram: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = (H + d·I)⁻¹."""
    diagonal = gram.diagonal()
    damping = _DAMPING * float(diagonal.mean()) or 1.0  # all zero: the identity
    lower = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=gram.dtype))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def round_weights(
    model: nn.Module, plan: Plan, calibration: Calibration, config: QConfig, *, progress: bool | None = None
) -> tuple[Plan, dict[str, Rounded]]:
    """Rounds the int8 layers of `plan` by GPTQ and corrects their bias: always, or ("auto") where they gain by it.

    Layers trained on weights rounded to nearest stay as trained.

    Half of a layer's sample is taken out of H and judges; the other half gives the bias correction. The records of
    the layers rounded give up their XᵀX.

    Returns:
        The plan, which says what was done and what it gained, and the rounded layers by name.
    """
    plans, rounded = dict(plan.layers), {}
    names = [
        name
        for name, layer in plan.layers.items()
        if layer.kind != "float" and layer.sqnr_db and not isinstance(model.get_submodule(name), QATLinear)
    ]
    factors = Factors()
    for name in tqdm(names, desc="torchq: rounding", disable=None if progress is None else not progress):
        layer, record = plan.layers[name], calibration.records[name]
        why_not = _why_not(record)
        if why_not is not None:
            plans[name] = dataclasses.replace(layer, reason=f"{layer.reason}; weights to nearest: {why_not}")
            continue
        linear = cast(nn.Linear, model.get_submodule(name))
        into, out = scales_around(plan.smoothings, name)
        if into is not None:
            linear = scaled_linear(linear, into=into)
        done, before, after = _round_layer(linear, layer, record, into, factors)
        record.gram = None  # four times the rounded weights of a square layer, which are kept from here on
        reason = f"{layer.reason}; gptq {before:.1f} -> {after:.1f} dB on held-out rows"
        if config.rounding == "gptq" or after >= before + MIN_GAIN_DB:
            measured = {**layer.sqnr_db, "gptq": after}
            plans[name] = dataclasses.replace(layer, reason=reason, rounding="gptq", sqnr_db=measured)
            rounded[name] = done if out is None else Rounded(done.weight, done.scale / out, done.bias / out)
        else:
            plans[name] = dataclasses.replace(layer, reason=f"{reason}, not taken")
    return dataclasses.replace(plan, layers=plans), rounded


def rounded_weights(qmodel: nn.Module) -> dict[str, Rounded]:
    """The weights that `convert` rounded by GPTQ, by layer, as `apply_plan(model, plan, rounded=...)` takes them.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`.
    """
    found = {}
    for name, layer in plan_of(qmodel, "rounding.rounded_weights").layers.items():
        quantized = qmodel.get_submodule(name)
        if layer.rounding == "gptq" and isinstance(quantized, QuantizedLinear):
            weight, scale, bias = ops.unpack(quantized.packed)
            found[name] = Rounded(weight, scale, torch.zeros(len(scale)) if bias is None else bias)
    return found


def take_rounded(name: str, quantized: QuantizedLinear, rounded: Rounded | None) -> None:
    """Gives a layer with its weights rounded to nearest the others; without any, the bias that they would come with.

    Raises:
        ValueError: they are another layer's, or were made for inputs or outputs smoothed otherwise.
    """
    weight, scale, bias = ops.unpack(quantized.packed)
    if rounded is None:
        rounded = Rounded(weight, scale, torch.zeros(len(scale)) if bias is None else bias)
    if rounded.weight.shape != weight.shape or not _alike(weight, scale, rounded):
        raise ValueError(
            f"torchq.apply_plan: rounded[{name!r}] are not this layer's weights as the plan smooths them. Take plan "
            "and weights from the same converted model, and set rounding='nearest' where you edit a smoothing."
        )
    quantized.replace_weight(rounded.weight, rounded.scale, rounded.bias)


def _alike(weight: Tensor, scale: Tensor, rounded: Rounded) -> bool:
    some = slice(None, None, max(1, len(weight) // 64))  # rows: whole float layers would double the memory
    exact = dequantize(weight[some], scale[some], axis=0)
    found = sqnr_db(exact, dequantize(rounded.weight[some], rounded.scale[some], axis=0))
    return found > MIN_LIKENESS_DB or not exact.any()


def warn_of_missing(plan: Plan, rounded: Mapping[str, Rounded]) -> None:
    """Warns of the layers of a plan whose rounded weights are not there."""
    missing = [
        name
        for name, layer in plan.layers.items()
        if layer.kind != "float" and layer.rounding == "gptq" and name not in rounded
    ]
    if missing:
        warnings.warn(
            f"torchq.apply_plan: {len(missing)} layers ({', '.join(map(repr, missing[:3]))}"
            f"{', ...' if len(missing) > 3 else ''}) have weights rounded with calibration data, which no plan holds: "
            "they are rounded to nearest now. Pass rounded=torchq.rounding.rounded_weights(qmodel), or load the "
            "converted model's state_dict.",
            UserWarning,
            stacklevel=3,
        )


def _why_not(record: Record) -> str | None:
    """Why H would mean nothing, or cost too much."""
    depth, rows = record.sample.rows.shape[1], record.sample.seen - len(record.sample.rows[::2])
    if record.gram is None:
        rounding = record.config.rounding
        return f"{depth} inputs, rounding={rounding!r} takes gptq up to {MAX_GRAM_DEPTH[rounding]}"
    if INPUTS_PER_ROW * rows < depth:
        needed = -(-depth // INPUTS_PER_ROW)
        return f"{rows} calibration rows beside the held-out ones, gptq needs {needed} for {depth} inputs"
    whole = float(record.gram.trace())
    rest = whole - float(_held_out_of_gram(record).square().sum())
    if not rest > max(_MIN_REST * whole, depth * _MIN_SQUARE):  # nan is not
        return f"the squares of its inputs sum to {whole:.3g}, {rest:.3g} of it outside of the held-out rows"
    return None


def _held_out_of_gram(record: Record) -> Tensor:
    """The held-out rows that XᵀX took in, (R, K)."""
    return record.sample.rows[::2][record.sample.positions[::2] < record.gram_rows]


@torch.no_grad()
def _round_layer(
    linear: nn.Linear, plan: LayerPlan, record: Record, into: Tensor | None, factors: Factors
) -> tuple[Rounded, float, float]:
    """The layer rounded, and its output SQNR on held-out rows before and after; all of inputs divided by `into`."""
    rows, counted = record.sample.rows, _held_out_of_gram(record)
    gram = cast(Tensor, record.gram) - counted.T @ counted
    if into is not None:
        rows, gram = rows / into, gram / torch.outer(into, into)
    held_out, seen = rows[::2], rows[1::2]
    weight = linear.weight.float()
    scale = choose_qparams(weight, axis=0 if plan.per_channel else None)[0].expand(len(weight)).contiguous()
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.float()

    def run(x: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
        packed = ops.pack(codes, scale, bias)
        if plan.kind == "int8 static" and plan.input_qparams is not None:
            return ops.linear_static(x, packed, *plan.input_qparams, torch.float32)
        return ops.linear_dynamic(x, packed)

    exact = nn.functional.linear(held_out, weight, bias)
    nearest = run(held_out, quantize(weight, scale, axis=0), bias)
    pieces = zip(weight.split(_ROWS), scale.split(_ROWS), strict=True)  # each row by itself: less memory
    codes = torch.cat([gptq(w, s, gram, factors=factors) for w, s in pieces])
    corrected = bias + mean_error(nn.functional.linear(seen, weight, bias), run(seen, codes, bias))
    after = run(held_out, codes, corrected)
    return Rounded(codes, scale, corrected), sqnr_db(exact, nearest), sqnr_db(exact, after)


def mean_error(exact: Tensor, actual: Tensor) -> Tensor:
    """What bias correction adds: `mean(exact - actual)` over the rows, (R, N) -> (N,); 0 for no rows.

    >>> mean_error(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.5, 2.0], [2.5, 2.0]]))
    tensor([0.5000, 0.0000])
    """
    return (exact - actual).double().sum(dim=0).div(max(1, len(exact))).float()
