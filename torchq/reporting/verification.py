"""verify(): whether every kernel that this CPU can run gives the right numbers, on the shapes of one call of the model.

One call of the model is watched, op by op (`Watch`). Each op of torchq is computed again by every runnable
kernel, on the same arguments, and compared with `reference`. Weights are packed anew for each kernel, as for a model
that is loaded where this kernel is active.

    linear      the same bits as `reference`; and as the simulated path within the rounding of float32 (`exact.py`)
    convolution the same of both
    recurrent   the same bits
    attention   the same bits in "int8"; otherwise within the rounding of its scheme, for sums of floats have an order

A table's rows are looked up by one function on all CPUs, so they are not compared.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from torchq import kernels, ops
from torchq.calibration.batches import Forward, call_with_batch
from torchq.calibration.isolation import uncompiled
from torchq.errors import BadValueError, door
from torchq.modules.attention_offer import attention_modules
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.ops import ATTENTION_SCHEMES, Activation
from torchq.ops import convolution as conv_ops
from torchq.planning.plan import attached_plan
from torchq.reporting.exact import Given, attention_allowance, convolved, share_of_allowed, simulated, simulated_finely
from torchq.reporting.verified import Call, Difference, First, Verification, first_difference
from torchq.timing import interleaved
from torchq.watching import Watch

REFERENCE = "reference"
_ROUNDS, _SECONDS = 3, 0.002  # of timing, a call
_SLOW = 0.01  # seconds; a reference that takes longer is timed by the one call that is needed anyway

_DYNAMIC = torch.ops.torchq.linear_dynamic.default
_STATIC = torch.ops.torchq.linear_static.default
_FINE = torch.ops.torchq.linear_fine.default
_KINDS = {_DYNAMIC: "int8 dynamic", _STATIC: "int8 static", _FINE: "int8 dynamic, two codes"}
_CONVOLUTION = torch.ops.torchq.convolution.default
_RECURRENT = torch.ops.torchq.recurrent.default
_ATTENTION = torch.ops.torchq.attention.default


@door("torchq.verify")
@torch.no_grad()
def verify(qmodel: nn.Module, example: Any, *, forward: Forward | None = None) -> Verification:
    """Runs every kernel that this CPU can run on what `example` gives each layer, and compares the results.

    Every kernel must give the bits of `reference`, and int8 must be the simulated path's to the rounding of float32:
    `|y - ŷ| <= 4u · (|x̂·ŵ| + |b|)`, u = 2⁻²⁴. The int8 layers run as planned: with the activation that is fused, from
    and to u8 codes. Attention and recurrent steps are compared too. Times of each kernel, and of a float layer of the
    same shape, stand beside. Layers of one shape and scheme are timed once.

    Args:
        qmodel: from `torchq.convert`. It is called once, and not changed.
        example: one batch in the form of those of `convert`'s calib_loader: a tensor, (input, label), or a dict.
        forward: `forward(model, batch)`: how to run the batch, if `model(batch)` and the like do not work.

    Returns:
        A `Verification`: it prints, `.ok` says whether all agree, and `.differences` names layer, kernel and the first
        element for each result that is wrong.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`, or `example` reaches none of its int8 layers.

    >>> from torchq.conversion import convert
    >>> qmodel = convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    >>> result = verify(qmodel, torch.randn(8, 64))
    >>> result.ok, [call.layer for call in result.calls]
    (True, ['0', '2'])
    """
    attached_plan(qmodel)
    checks = _Checks(qmodel)
    with checks.attention_named(qmodel), uncompiled(), checks:
        if forward is None:
            call_with_batch(qmodel, example, "example")
        else:
            forward(qmodel, example)
    if not checks.calls:
        raise BadValueError("example reaches no int8 layer of this model. Pass a batch as convert() takes them.")
    unreached = tuple(name for name in checks.layers if name not in checks.reached)
    return Verification(tuple(checks.calls), tuple(kernels.runnable()), kernels.active(), unreached)


class _Checks(Watch):
    """Inside, every op of torchq is computed by each kernel, once for each layer and shape."""

    def __init__(self, qmodel: nn.Module) -> None:
        super().__init__()
        modules = qmodel.named_modules()
        kinds = (QuantizedLinear, QuantizedConv)
        self.layers = {name or "(root)": module for name, module in modules if isinstance(module, kinds)}
        self.reached: set[str] = set()
        self.calls: list[Call] = []
        self._names = {layer.packed.data_ptr(): name for name, layer in self.layers.items()}
        self._done: set[object] = set()
        self._timed: dict[object, dict[str, float]] = {}
        self._attention = "attention"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and looks at it if it is torchq's."""
        y = func(*args, **(kwargs or {}))
        if func in _KINDS:
            self._linear(func, *args)
        elif func is _CONVOLUTION:
            self._convolution(func, *args)
        elif func is _RECURRENT:
            self._recurrent(func, *args)
        elif func is _ATTENTION:
            self._attend(func, *args)
        return y

    @contextmanager
    def attention_named(self, qmodel: nn.Module) -> Iterator[None]:
        """Inside, an attention is known by the module that calls it."""

        def named(name: str) -> Callable[..., None]:
            return lambda *_: setattr(self, "_attention", name or "(root)")

        with ExitStack() as stack:
            for name, module in attention_modules(qmodel).items():
                stack.enter_context(module.register_forward_pre_hook(named(name)))
            yield

    # ---- One kind of op each -----------------------------------------------------------------------------------------

    def _linear(self, func: Any, x: Tensor, packed: Tensor, *rest: Any) -> None:
        name = self._names.get(packed.data_ptr())
        if name is None:
            return
        layer = self.layers[name]
        rest = _as_planned(func, layer, rest)
        if not self._is_new(func, name, x, *rest):
            return
        contestants = {kernel: _multiplied_by(func, x, packed, rest, kernel) for kernel in kernels.runnable()}
        given = Given(x, packed, *rest[:2]) if func is _STATIC else Given(x, packed)
        exact, allowed = (simulated_finely if func is _FINE else simulated)(given)
        y = _in_float32(given, packed) if func is _STATIC else func(given.floats, packed)
        found = first_difference(y, exact, allowed)
        differences = [] if found is None else [_difference(found, name, kernels.last_used() or "", "simulated")]
        floats = torch.zeros(x.shape, dtype=layer.dtype, device="cpu")
        weight = (layer.weight.t() if layer.transposed else layer.weight.flatten(1)).contiguous().clone()
        bias = None if layer.bias is None else layer.bias.clone()
        kind = _KINDS[func]
        shape = (x.numel() // max(layer.in_features, 1), layer.in_features, layer.out_features)
        key = (kind, shape, x.dtype, *rest[2:3], *rest[5:])
        others = {"float": lambda: linear(floats, weight, bias)}
        self._compare(name, kind, shape, contestants, key, others, differences, share_of_allowed(y, exact, allowed))

    def _convolution(self, func: Any, x: Tensor, packed: Tensor, numbers: Any, qparams: Any, *rest: Any) -> None:
        name = self._names.get(packed.data_ptr())
        if name is None or not self._is_new(func, name, x, *rest):
            return
        layer = cast(QuantizedConv, self.layers[name])
        rest = (*rest, *(x.dtype, False, Activation.NONE, None)[len(rest) :])
        rest = (*rest[:2], int(rest[2]) or int(layer.fold.activation), rest[3])

        def by(kernel: str) -> Callable[[], Tensor]:
            with kernels.use(kernel):
                own = conv_ops.pack(*conv_ops.unpack(packed, layer.geometry), layer.groups)
            return lambda: func(x, own, numbers, qparams, *rest)

        contestants = {kernel: by(kernel) for kernel in kernels.runnable()}
        exact, allowed = convolved(Given(x, packed, *qparams[:2]), layer.geometry)
        y = func(x, packed, numbers, qparams[:2], torch.float32)
        found = first_difference(y, exact, allowed)
        differences = [] if found is None else [_difference(found, name, kernels.last_used() or "", "simulated")]
        floats = torch.zeros_like(x.movedim(-1, 1) if x.dtype == torch.uint8 else x, dtype=layer.dtype)
        weight, bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
        shape = (y.numel() // layer.out_channels, layer.geometry.depth, layer.out_channels)
        kind = "conv static" if qparams else "conv dynamic"
        others = {"float": lambda: layer._convolve(floats, weight, bias)}
        key = (kind, shape, x.shape, x.dtype, *numbers, *rest[:3])
        self._compare(name, kind, shape, contestants, key, others, differences, share_of_allowed(y, exact, allowed))

    def _recurrent(self, func: Any, cell: int, gates: Any, hh: Any, hr: Any, *rest: Any) -> None:
        name = ", ".join(self._names.get(packed.data_ptr(), "") for packed in (*hh, *hr))
        if not self._is_new(func, name, *gates):
            return

        def steps(kernel: str) -> Callable[[], Tensor]:
            with kernels.use(kernel):
                own = [[ops.pack(*ops.unpack(packed)) for packed in each] for each in (hh, hr)]
            return lambda: func(cell, gates, *own, *rest)[0]

        contestants = {kernel: steps(kernel) for kernel in kernels.runnable()}
        shape = (gates[0].shape[0], rest[0].shape[2], gates[0].shape[1])
        self._compare(name, f"{ops.Cell(cell).name} steps", shape, contestants, (cell, shape, len(gates)))

    def _attend(self, func: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        name, scheme = self._attention, ATTENTION_SCHEMES[rest[5] if len(rest) > 5 else 0]
        if not self._is_new(func, name, q, k, v, scheme):
            return
        contestants = dict.fromkeys(kernels.runnable(), lambda: func(q, k, v, *rest))
        shape = (q.shape[0] * q.shape[1] * q.shape[2], q.shape[3], k.shape[2])
        allowed = attention_allowance(q, k, v, scheme, *rest[:3])
        kind = f"attention {scheme}"
        self._compare(name, kind, shape, contestants, (kind, q.shape, k.shape, q.dtype), allowed=allowed)

    # ---- What they share ---------------------------------------------------------------------------------------------

    def _is_new(self, func: Any, name: str, *arguments: Any) -> bool:
        """Whether this layer has not been looked at on such a shape."""
        self.reached.update(name.split(", "))
        key = (func, name, *(each.shape if isinstance(each, Tensor) else each for each in arguments))
        new = key not in self._done
        self._done.add(key)
        return new

    def _compare(
        self,
        layer: str,
        kind: str,
        shape: tuple[int, int, int],
        contestants: Mapping[str, Callable[[], Tensor]],
        key: object,
        others: Mapping[str, Callable[[], object]] | None = None,
        differences: list[Difference] | None = None,
        share: float | None = None,
        allowed: float = 0.0,
    ) -> None:
        """Adds a Call: each contestant's result against the reference's, and the times, taken once for a `key`."""
        with kernels.use(REFERENCE):
            start = time.perf_counter()
            expected = contestants[REFERENCE]()
            seconds = time.perf_counter() - start
        differences, ran = list(differences or ()), {}
        for kernel, call in contestants.items():
            if kernel == REFERENCE:
                continue
            with kernels.use(kernel):
                y = call()
                ran[kernel] = (kernels.last_used() if "attention" not in kind else kernels.active_attention()) or kernel
            found = first_difference(y, expected, allowed)
            if found is not None:
                differences.append(_difference(found, layer, kernel, REFERENCE))
        if key not in self._timed:
            self._timed[key] = _times(contestants, others or {}, seconds)
        self.calls.append(Call(layer, kind, shape, self._timed[key], ran, tuple(differences), share))


def _difference(first: First, layer: str, kernel: str, against: str) -> Difference:
    return Difference(**asdict(first), layer=layer, kernel=kernel, against=against)


def _as_planned(func: Any, layer: QuantizedLinear | QuantizedConv, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments behind the weight, with the activation of the plan: a watched layer does not wait for it."""
    defaults = (None, None, None, 1.0, 0, Activation.NONE) if func is _STATIC else (Activation.NONE,)
    complete = (*given, *defaults[len(given) :])
    return (*complete[:-1], int(complete[-1]) or int(layer.fold.activation))


def _multiplied_by(func: Any, x: Tensor, packed: Tensor, rest: tuple[Any, ...], kernel: str) -> Callable[[], Tensor]:
    """The op on weights packed for this kernel."""
    with kernels.use(kernel):
        own = ops.pack(*ops.unpack(packed))
    return lambda: func(x, own, *rest)


def _in_float32(given: Given, packed: Tensor) -> Tensor:
    assert given.scale is not None
    x = given.x if given.x.dtype == torch.uint8 else given.floats
    return ops.linear_static(x, packed, given.scale, given.zero_point, torch.float32)


def _times(
    contestants: Mapping[str, Callable[[], Tensor]], others: Mapping[str, Callable[[], object]], reference: float
) -> dict[str, float]:
    """The best times, each kernel forced in turn; the reference's as given if it is long."""
    times = {REFERENCE: reference}
    for _ in range(_ROUNDS):
        for name, call in {**others, **contestants}.items():
            if name == REFERENCE and reference > _SLOW:
                continue
            with kernels.use(name if name in contestants else kernels.active()):
                found = interleaved({name: call}, rounds=1, seconds=_SECONDS)[name]
            times[name] = min(found, times.get(name, found))
    return times
