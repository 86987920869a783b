"""RMSNorm: norms without a mean, faster than their own code on the CPU, for converted models.

    y = x · (1 / sqrt(mean(x²) + eps)) · (gain + weight)        of each row; gain is 0, or 1 as in Gemma

Each family of transformers has a copy of this class. One is known by what it computes: its code is read, since code
that somebody could notice must not run, and then run on stand-ins. nn.RMSNorm is known by its class.
"""

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.parameter import is_lazy

from torchq import _C, ops
from torchq.modules import gradients, simulation
from torchq.modules.classes import computes_as_known, functions_of
from torchq.modules.facts import Facts
from torchq.modules.plain_code import ARITHMETIC, forward_of, odd_step
from torchq.modules.straight import is_usual
from torchq.modules.straight_forms import Form, become, may_become

_WEIGHT = "weight"
_WORDS = ARITHMETIC | {"mean", _WEIGHT}
_GAINS = (0.0, 1.0)


class RMSNormCode(NamedTuple):
    """What the code of a class of modules computes with.

    Args:
        forward: the function.
        methods: the names of those that it calls.
        facts: the codes of all these functions, which may be replaced, and torch's functions that they call.
        eps: the attribute that is added to the mean square.
        default_eps: what None means there; None where it means nothing.
        gain: what is added to each weight.
    """

    forward: types.FunctionType
    methods: tuple[str, ...]
    facts: Facts
    eps: str
    default_eps: float | None
    gain: float

    def attributes(self) -> tuple[str, ...]:
        """The names that it looks up in the module."""
        return (_WEIGHT, self.eps, *self.methods)


def rms_norm_of(kind: type[nn.Module]) -> RMSNormCode | None:
    """What modules of a class compute with, if that is an RMSNorm of one weight for each value of a row.

    >>> class Norm(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight, self.small = nn.Parameter(torch.ones(8)), 1e-6
    ...     def forward(self, x):
    ...         return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.small))
    >>> rms_norm_of(Norm)[3:], rms_norm_of(nn.LayerNorm)
    (('small', None, 0.0), None)
    """
    known: Any = kind  # for mypy, a class of torch has no hash
    forward = forward_of(kind)
    if not isinstance(forward, types.FunctionType) or not is_usual(kind):
        return None
    if kind is nn.RMSNorm:
        return _of_torch(forward, forward.__code__)
    if kind.__module__.startswith("torch.") or forward is nn.RMSNorm.forward or forward.__code__.co_argcount != 2:
        return None
    methods = _methods(kind, forward)
    return _read(known, tuple(methods), tuple((each, each.__code__) for each in (forward, *methods.values())))


class RMSNorm(Form):
    """An RMSNorm whose plain eager calls are computed by `torchq.ops.rms_norm`.

    All else is the user's: its parameters, its state, and what it computes for other dtypes, where a gradient is
    wanted, in a compiled or exported graph, under autocast and inside `torchq.simulate()`.
    """

    line: RMSNormCode  # type: ignore[assignment]
    reads = staticmethod(rms_norm_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module an RMSNorm, if this is its code, with a weight for each value of a row."""
        code = rms_norm_of(type(module))
        if code is None or module._modules or not may_become(RMSNorm, module):
            return
        weight = module._parameters.get(_WEIGHT)
        if weight is not None and not is_lazy(weight) and weight.dim() == 1:
            become(RMSNorm, module, code)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), skipping nn.Module's and the dispatcher's part of the call if they have nothing to do."""
        if len(args) == 1 and not kwargs and not is_dynamo_compiling() and not simulation.anywhere:
            line = self.line
            if line.facts.hold():
                y = _C.call_rms_norm(self, type(self), self.numbers(), args[0])
                if y is not NotImplemented:
                    return y
        return super().__call__(*args, **kwargs)

    def numbers(self) -> tuple[str, float | None, float]:
        """What C++ computes with besides the parameters (`call_rms_norm`)."""
        line = self.line
        return line.eps, line.default_eps, line.gain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(..., len(weight)) -> the same shape and dtype."""
        if not is_compiling() and not simulation.simulating.get() and len(args) == 1 and not kwargs:
            eps = _eps_of(self, args[0])
            if eps is not None:
                return ops.rms_norm(args[0], cast(Tensor, self.weight), self.line.gain, eps)
        return super().forward(*args, **kwargs)


def _eps_of(norm: RMSNorm, x: Any) -> float | None:
    """What the op takes for x; None where the user's code must run: the op is float32's, without gradients."""
    line, weight = norm.line, norm._parameters.get(_WEIGHT)
    eps = vars(norm).get(line.eps)
    eps = line.default_eps if eps is None else eps
    if type(eps) is not float or type(x) is not Tensor or weight is None or _WEIGHT in vars(norm):
        return None
    if any(each.dtype != torch.float32 or each.device.type != "cpu" or gradients.wanted(each) for each in (x, weight)):
        return None
    if x.dim() == 0 or weight.dim() != 1 or x.shape[-1] != len(weight) or torch.is_autocast_enabled("cpu"):
        return None
    return eps if line.facts.hold() and computes_as_known(type(norm)) else None


# ---- Recognition ----------------------------------------------------------------------------------------------------


def _methods(kind: type[nn.Module], function: types.FunctionType) -> dict[str, types.FunctionType]:
    """The methods of its own that a method of a class names, and those that they name."""
    found: dict[str, types.FunctionType] = {}
    waiting = [function]
    while waiting:
        for name in _attributes(waiting.pop()):
            value = inspect.getattr_static(kind, name, None)
            own = isinstance(value, types.FunctionType) and inspect.getattr_static(nn.Module, name, None) is not value
            if own and name not in found and value is not function:
                found[name] = value
                waiting.append(value)
    return found


def _attributes(function: types.FunctionType) -> Iterator[str]:
    """The names that code looks up in objects."""
    return (step.argval for step in dis.get_instructions(function) if step.opname in ("LOAD_ATTR", "LOAD_METHOD"))


@functools.lru_cache(maxsize=1)
def _of_torch(forward: types.FunctionType, code: types.CodeType) -> RMSNormCode:
    return RMSNormCode(forward, (), _facts(((forward, code),)), "eps", torch.finfo(torch.float32).eps, 0.0)


Codes = tuple[tuple[types.FunctionType, types.CodeType], ...]


@functools.lru_cache(maxsize=256)
def _read(kind: type[nn.Module], methods: tuple[str, ...], codes: Codes) -> RMSNormCode | None:
    """By the codes of the forward and of the methods that it calls."""
    forward = codes[0][0]
    names = {name for function, _ in codes for name in _attributes(function)}
    own = {name for name in names - _WORDS if inspect.getattr_static(kind, name, None) is None}
    own -= {name for function, _ in codes for name in _of_globals(function)}
    if _WEIGHT not in names or len(own) != 1 or inspect.getattr_static(kind, _WEIGHT, None) is not None:
        return None
    (eps,) = own
    if odd_step(forward, _stand_in(kind, eps, 1e-6, torch.ones(8, device="cpu", dtype=torch.float32)), _WORDS):
        return None
    gain = next((gain for gain in _GAINS if _is_rms_norm(kind, forward, eps, gain)), None)
    return None if gain is None else RMSNormCode(forward, methods, _facts(codes), eps, None, gain)


def _facts(codes: Codes) -> Facts:
    facts = Facts()
    for function, code in codes:
        facts.add(getattr, function, "__code__", code)
        for scope, name, value in functions_of(function):
            facts.add(dict.get, scope, name, value)
    return facts


def _of_globals(function: types.FunctionType) -> Iterator[str]:
    """What code looks up in torch and other modules by their names, as `torch.rsqrt`."""
    owner: Any = None
    for step in dis.get_instructions(function):
        if step.opname == "LOAD_GLOBAL":
            owner = function.__globals__.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(owner, types.ModuleType):
            yield step.argval
            owner = vars(owner).get(step.argval)
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "NOP"):
            owner = None


def _stand_in(kind: type[nn.Module], eps: str, value: float, weight: Tensor, *, training: bool = False) -> nn.Module:
    """A module with these numbers, which shares nothing with the user's."""
    module: nn.Module = object.__new__(kind)
    held = {"_parameters": {}, "_buffers": {}, "_modules": {}, "training": training}
    vars(module).update({**held, eps: value, _WEIGHT: weight})
    return module


_LARGEST = ((1e-4, 1.0), (0.03, 30.0), (1.0, 1.0), (1.0, 1e6), (40.0, 1e-3), (1e5, 1.0))
"""Of x and of the weight: what is clipped somewhere is another function."""

_SHAPES = ((8,), (3, 8), (2, 257), (2, 3, 33), (2, 3, 2, 8))
_PROBE_EPS = (1e-6, 1e-3)


def _is_rms_norm(kind: type[nn.Module], forward: Any, eps: str, gain: float) -> bool:
    """Whether this forward gives what the formula does, for rows of all sizes, in eval and in training mode."""
    generator = Generator("cpu").manual_seed(0)
    try:
        for shape, largest, value in itertools.product(_SHAPES, _LARGEST, _PROBE_EPS):
            x, weight = (
                (torch.rand(size, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1).pow(5) * each
                for size, each in zip((shape, shape[-1:]), largest, strict=True)
            )
            for training in (False, True):
                stand_in = _stand_in(kind, eps, value, weight.clone(), training=training)
                if not _gives(forward, stand_in, x, value, gain):
                    return False
    except Exception:  # a forward that takes no such input
        return False
    return True


def _gives(forward: Any, module: nn.Module, x: Tensor, eps: float, gain: float) -> bool:
    given, weight = x.clone(), vars(module)[_WEIGHT].double()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        y = forward(module, given)
    if type(y) is not Tensor or (y.shape, y.dtype) != (x.shape, x.dtype) or not torch.equal(given, x):
        return False
    exact = x.double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt() * (gain + weight)
    return torch.allclose(y.double(), exact, rtol=2**-20, atol=0.0)
