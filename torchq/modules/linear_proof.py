"""Whether a module's own forward computes what nn.Linear computes: proven by reading it, and then by running it.

FalconLinear is an nn.Linear with a forward of its own, `x @ weight.T + bias`. The Conv1D of GPT-2 stores its weight as
(in, out). No class is known by name here. First the code is read (`plain_code`): only code that nobody could notice is
run. Then it runs on weights and inputs of the proof's own, in several shapes and dtypes, and every operation of torch
is listed: one product, at most one sum, views, and changes of dtype. The values must be those of `F.linear`.
"""

import functools
import inspect
import types
from collections import Counter
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from torchq.modules.computed_weights import weight_of
from torchq.modules.plain_code import ARITHMETIC, PRODUCTS, is_plain_value, odd_step
from torchq.watching import Watch, name_of


class Proof(NamedTuple):
    """What a forward was found to compute.

    Args:
        transposed: whether the weight is stored as (in_features, out_features).
        reason: why it is not taken for a linear layer; None if it is one.
    """

    transposed: bool = False
    reason: str | None = None


def proof_of(module: nn.Module) -> Proof:
    """What the forward of a module with a 2-D `weight` and a 1-D `bias`, or None, computes.

    It is `x · weightᵀ + bias`, or the same with `weight`, in the dtype of x and whatever the mode, for all inputs of
    one to four dimensions that it takes. Neither the module nor the state of random numbers changes.

    >>> class Swapped(nn.Linear):
    ...     def forward(self, x):
    ...         return torch.addmm(self.bias, x, self.weight.t())
    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(2 * x, self.weight, self.bias)
    >>> proof_of(Swapped(8, 4))
    Proof(transposed=False, reason=None)
    >>> proof_of(Scaled(8, 4)).reason
    'Scaled has a forward of its own, which takes other operations than a product and a sum: aten::mul'
    """
    kind: Any = parametrize.type_before_parametrizations(module)
    if kind.__call__ is not nn.Module.__call__ or kind.__getattr__ is not nn.Module.__getattr__:
        return Proof(reason=f"{kind.__name__} is called in a way of its own")
    forward = vars(module).get("forward", kind.forward)
    if forward is nn.Linear.forward:
        return Proof()
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        forward = forward.__func__
    found: str | Proof = "was wrapped or replaced"
    if isinstance(forward, types.FunctionType):
        numbers = {key: value for key, value in vars(module).items() if is_plain_value(value) and key != "training"}
        weight, bias = weight_of(module), cast(nn.Linear, module).bias
        parts = _Forward(kind, forward, tuple(sorted(numbers.items(), key=str)))
        found = _prove(parts, tuple(weight.shape), None if bias is None else len(bias))
    if isinstance(found, Proof):
        return found
    return Proof(reason=f"{kind.__name__} has a forward of its own, which {found}")


class _Forward(NamedTuple):
    """A forward, and what it may know of its module: the class, and attributes that are numbers and strings."""

    kind: type[nn.Module]
    function: Any  # of Python, as `(module, x)`
    numbers: tuple[tuple[str, Any], ...]

    def stand_in(self, weight: Tensor, bias: Tensor | None, training: bool) -> nn.Module:
        """A module with these parameters, which shares nothing with the user's."""
        module: nn.Module = object.__new__(self.kind)
        held = {"_parameters": {}, "_buffers": {}, "_modules": {}, "training": training}
        vars(module).update(self.numbers, **held, weight=weight, bias=bias)
        return module


_WORDS = ARITHMETIC | PRODUCTS | {"weight", "bias"}
_PRODUCTS = {"mm", "addmm", "bmm", "mv", "addmv"}
_SUMS = {"add", "add_", "addmm", "addmv"}
_VIEWS = {"t", "transpose", "permute", "view", "_unsafe_view", "reshape", "squeeze", "squeeze_", "unsqueeze", "expand"}
_CONVERSIONS = {"_to_copy"}


@functools.lru_cache(maxsize=256)
def _prove(forward: _Forward, shape: tuple[int, int], bias_size: int | None) -> Proof | str:
    """The proof for weights and biases of these shapes; or what the forward does instead.

    A large weight is proven on a small one, with the same numbers but for its sizes; the same code then runs with the
    large one's on the meta device, where operations are seen and nothing is computed.
    """
    if len(inspect.signature(forward.function).parameters) != 2:
        return "takes other arguments than one input"
    sizes = {size: 16 + 8 * i for i, size in enumerate(dict.fromkeys(shape)) if size > _LARGE}
    smaller = tuple((key, sizes.get(value, value) if type(value) is int else value) for key, value in forward.numbers)
    rows, columns, bias = (size and sizes.get(size, size) for size in (*shape, bias_size))
    assert rows is not None
    assert columns is not None
    found = _orientation(forward._replace(numbers=smaller), (rows, columns), bias)
    if not sizes or (isinstance(found, str) and not found.startswith("fails")):
        return found
    if isinstance(found, str):  # it may have its sizes in the code
        return _orientation(forward, shape, bias_size)
    return _refuted_on_meta(forward, shape, bias_size, found.transposed) or found


_LARGE = 128


def _orientation(forward: _Forward, shape: tuple[int, int], bias_size: int | None) -> Proof | str:
    """Which way the forward multiplies by a weight of this shape; or what it does instead."""
    generator = Generator("cpu").manual_seed(0)
    weight = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    bias = None if bias_size is None else torch.randn(bias_size, generator=generator, device="cpu", dtype=torch.float32)
    odd = odd_step(forward.function, forward.stand_in(weight, bias, False), _WORDS)
    if odd is not None:
        return f"uses {odd!r}"
    problems = []
    for transposed in (False, True):
        if bias_size not in (None, shape[transposed]):
            continue
        problem = _refuted(forward, weight, bias, transposed)
        if problem is None:
            return Proof(transposed)
        problems.append(problem)
    return next((problem for problem in problems if not problem.startswith("fails")), problems[0])


def _refuted_on_meta(forward: _Forward, shape: tuple[int, int], bias_size: int | None, transposed: bool) -> str | None:
    """What the forward does instead with a weight of this shape, as far as operations and shapes tell."""
    weight, bias = (
        None if s is None else torch.empty(s, dtype=torch.float32, device="meta") for s in (shape, bias_size)
    )
    assert weight is not None
    for training in (False, True):
        x = torch.empty(2, 3, weight.shape[not transposed], dtype=torch.float32, device="meta")
        try:
            y, operations = _run(forward, forward.stand_in(weight, bias, training), x)
        except Exception as error:
            return f"fails on an input of shape {tuple(x.shape)} ({type(error).__name__})"
        if _unlike(operations, bias) is not None or y.shape != (2, 3, weight.shape[transposed]):
            return _unlike(operations, bias) or "gives another output than F.linear"
    return None


def _refuted(forward: _Forward, weight: Tensor, bias: Tensor | None, transposed: bool) -> str | None:
    """What the forward does instead of multiplying by this weight; None if it does that."""
    failure: str | None = "fails"
    for dtype in (torch.float32, torch.bfloat16):
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        for x in _inputs(w.shape[not transposed], dtype):
            for training in (False, True):
                given = x.clone()
                try:
                    y, operations = _run(forward, forward.stand_in(w, b, training), given)
                except Exception as error:  # what F.linear takes need not be taken
                    failure = failure and f"fails on an input of shape {tuple(x.shape)} ({type(error).__name__})"
                    continue
                problem = _unlike(operations, bias) or _wrong(y, x, w.t() if transposed else w, b)
                if problem is not None or not torch.equal(given, x):
                    return problem or "writes into its input"
                failure = None
    return failure or _casts(forward, weight, bias, transposed)


def _inputs(k: int, dtype: torch.dtype) -> list[Tensor]:
    generator = Generator("cpu").manual_seed(1)
    shapes = [(5, k), (2, 3, k), (1, 1, 2, k), (k,)]
    return [
        (10.0**i * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)).to(dtype)
        for i, shape in enumerate(shapes)
    ]


class _Operations(Watch):
    """Counts the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen[name_of(func)] += 1
        return func(*args, **(kwargs or {}))


def _run(forward: _Forward, module: nn.Module, x: Tensor) -> tuple[Any, Counter[str]]:
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _Operations() as operations:
        return forward.function(module, x), operations.seen


def _unlike(operations: Counter[str], bias: Tensor | None) -> str | None:
    """Whether these are other operations than one product, a sum if there is a bias, views and changes of dtype."""
    names = {name: name.removeprefix("aten::") for name in operations}
    products, sums = (sum(operations[n] for n, name in names.items() if name in group) for group in (_PRODUCTS, _SUMS))
    odd = [name for name, short in names.items() if short not in _PRODUCTS | _SUMS | _VIEWS | _CONVERSIONS]
    if not odd and (products, sums) == (1, int(bias is not None)):
        return None
    what = ", ".join(odd) or f"{products} of products, {sums} of sums"
    return f"takes other operations than a product and a sum: {what}"


def _wrong(y: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Whether y is another tensor than `x · weightᵀ + bias`, but for rounding."""
    if type(y) is not Tensor or (y.dtype, y.shape) != (x.dtype, (*x.shape[:-1], len(weight))):
        return "gives another output than F.linear"
    floats = [None if each is None else each.float() for each in (x, weight, bias)]
    exact = nn.functional.linear(*floats)  # type: ignore[arg-type]
    size = nn.functional.linear(*(None if each is None else each.abs() for each in floats))  # type: ignore[arg-type]
    step = 2.0**-6 if x.dtype == torch.bfloat16 else 2.0**-23 * (x.shape[-1] + 2)  # of each sum, or of all roundings
    return None if bool(((y.float() - exact).abs() <= step * size).all()) else "gives other values than F.linear"


def _casts(forward: _Forward, weight: Tensor, bias: Tensor | None, transposed: bool) -> str | None:
    """What the forward does with an input of another dtype than the weight, which is an error to F.linear.

    An int8 layer gives outputs of the input's dtype. So does code that converts the weight, as Whisper's does.
    """
    for given, own in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        w, b = weight.to(own), None if bias is None else bias.to(own)
        x = _inputs(w.shape[not transposed], given)[1]
        try:
            y, operations = _run(forward, forward.stand_in(w, b, False), x)
        except Exception:
            continue
        if _unlike(operations, bias) is not None or _wrong(y, x, w.t() if transposed else w, b) is not None:
            return "converts its input"
    return None
