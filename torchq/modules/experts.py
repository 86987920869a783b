"""Experts of a mixture-of-experts layer, whose matrices stand stacked in parameters of three dimensions.

    y[t] = Σ_j weights[t, j] · down[e](gate(up[e](x[t])))        e = ids[t, j]

This is what transformers' `ALL_EXPERTS_FUNCTIONS` computes, in several ways. An experts module has `gate_up_proj`
(E, 2 I, H), or `up_proj` (E, I, H) without a gate, and `down_proj` (E, H, I), or all of them transposed, biases
`gate_up_proj_bias` (E, 2 I), a method `_apply_gate` or an `act_fn`, and maybe a norm of its outputs. Its class is not
asked for. Whether it computes the formula is proven by calling it (`ExpertsType.why_float`).
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.parameter import is_lazy

from torchq.modules.base import FLOATS, MODULE_OWN, Int8Module, Matrix, float_class
from torchq.modules.float_view import FloatView, read_only
from torchq.modules.qat_parts import QAT_PARTS, QATParts, TrainableParts, TrainedParts
from torchq.modules.tracing import exporting

_PROBES, _PROBED_EXPERTS = 6, 5
_LEAST_DB = {torch.float32: 80.0, torch.bfloat16: 30.0, torch.float16: 45.0}
"""How near a module must come to the formula: what rounding in its dtype leaves, and no other formula gives."""


class _Form(NamedTuple):
    """How an experts module stores its matrices: the name of the first one, and whether they are (in, out)."""

    up: str
    transposed: bool

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two matrices of each expert."""
        return self.up, "down_proj"


def _form(module: nn.Module) -> _Form | None:
    """The form of an experts module; None if `module` is none."""
    parameters = module._parameters
    up = next((name for name in ("gate_up_proj", "up_proj") if parameters.get(name) is not None), None)
    if up is None or parameters.get("down_proj") is None:
        return None
    first, second = parameters[up], parameters["down_proj"]
    if first is None or second is None or is_lazy(first) or is_lazy(second) or first.dim() != 3 or second.dim() != 3:
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    (width, hidden), (out, inner) = (w.shape[:0:-1] if transposed else w.shape[1:] for w in (first, second))
    fits = len(first) == len(second) and hidden == out and width == inner * (2 if up == "gate_up_proj" else 1)
    return _Form(up, transposed) if fits else None


def _count(module: nn.Module) -> int:
    """How many experts the module has."""
    if isinstance(module, QuantizedExperts):
        return module._count
    down = module._parameters["down_proj"]
    return 0 if down is None else len(down)


def _matrix(module: nn.Module, part: str) -> Matrix:
    """The matrix of this name, "3.down_proj", of a module with float parameters."""
    expert, _, name = part.partition(".")
    form, weights = _form(module), module._parameters[name]
    biases = module._parameters.get(f"{name}_bias")
    assert form is not None
    assert weights is not None
    weight = weights[int(expert)]
    return Matrix(weight.T if form.transposed else weight, None if biases is None else biases[int(expert)])


def _gate(owner: nn.Module, up: str, y: Tensor) -> Tensor:
    """What lies between an expert's two matrices, as the class of the float module computes it."""
    own: Callable[..., Tensor] | None = getattr(float_class(owner), "_apply_gate", None)
    if up == "up_proj":
        return owner.act_fn(y)  # type: ignore[no-any-return, operator]
    if own is not None:
        return own(owner, y)
    gate, value = y.chunk(2, dim=-1)
    return owner.act_fn(gate) * value  # type: ignore[no-any-return, operator]


class _Call(NamedTuple):
    """The arguments of a call: hidden states (..., H), the ids (..., k) of the experts of each row, their weights."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor


def _arguments(source: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    """A call of a module of class `source`, whose parameters may have any names."""
    if len(args) < 3:
        names = [name for name in inspect.signature(source.forward).parameters if name != "self"]
        args = (*args, *(kwargs[name] for name in names[len(args) : 3]))
    return _Call(*args[:3])


def _routed(call: _Call, count: int, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The formula above: the rows of each expert together, `expert(e, rows)`, and their weighted sums.

    An id of `count` says that the row has no expert there, as transformers means it.

    Raises:
        IndexError: an id beyond that.
    """
    rows = call.hidden.reshape(-1, call.hidden.shape[-1])
    per_row, ids = call.ids.shape[-1], call.ids.reshape(-1)
    counts = torch.bincount(ids, minlength=count).tolist()
    if len(counts) > count + 1:
        raise IndexError(f"torchq: the id of an expert is {len(counts) - 1}, but there are {count} experts.")
    order = ids.argsort(stable=True)[: sum(counts[:count])]
    source = order.div(per_row, rounding_mode="floor")
    gathered, start, parts = rows[source], 0, []
    for each, size in enumerate(counts[:count]):
        if size:
            parts.append(expert(each, gathered[start : start + size]))
            start += size
    if not parts:
        return torch.zeros_like(call.hidden)
    y = torch.cat(parts) * call.weights.reshape(-1, 1)[order]
    total = torch.zeros(rows.shape, dtype=y.dtype, device=y.device).index_add(0, source, y)
    return total.to(rows.dtype).reshape(call.hidden.shape)


def _dense(call: _Call, count: int, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The same where shapes may not depend on values, as in torch.export: every expert computes every row."""
    total = torch.zeros_like(call.hidden, dtype=torch.float32)
    for each in range(count):
        hit = call.ids == each
        share = torch.where(hit, call.weights, 0).sum(dim=-1, keepdim=True)
        y = expert(each, call.hidden) * share
        total = total + torch.where(hit.any(dim=-1, keepdim=True), y, 0)
    return total.to(call.hidden.dtype)


def _run(module: nn.Module, expert: Callable[[int, Tensor], Tensor], args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """A call of `module`, one of the two classes below."""
    call, count = _arguments(float_class(module), args, kwargs), _count(module)
    if exporting():
        return _dense(call, count, expert)
    # A graph can't know how many rows an expert gets. Disabled here: at import, that would import torch._dynamo.
    run = torch.compiler.disable(_routed) if torch.compiler.is_compiling() else _routed
    return run(call, count, expert)


class QuantizedExperts(Int8Module):
    """An experts module whose matrices are QuantizedLinear layers: `experts.3.down_proj` is that of expert 3.

    A call takes and gives what one of the float module does, and has its attributes. The stacked parameters, such as
    `experts.down_proj`, are read-only float tensors, dequantized where they are used. torch.export gets a graph in
    which every expert computes every row; elsewhere an expert computes its own rows only, outside of compiled graphs.

    Args:
        module: the float experts module.
        parts: the layers by name, "3.down_proj": each a QuantizedLinear, or an nn.Linear that stays in float.
    """

    def __init__(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        form = _form(module)
        assert form is not None
        kept = {key: value for key, value in vars(module).items() if key not in MODULE_OWN}
        self.__dict__.update(copy.deepcopy(kept))  # the modules and tensors in it are the float model's
        children = {name: child for name, child in module._modules.items() if name != QAT_PARTS}
        self._modules.update(copy.deepcopy(children))
        self.float_class, self._form, self._count = float_class(module), form, _count(module)
        self._stacked = {
            name: (tuple(parameter.shape), parameter.dtype)
            for name, parameter in module._parameters.items()
            if parameter is not None and name.removesuffix("_bias") in form.names
        }
        for name, parameter in module._parameters.items():
            if name not in self._stacked:
                self.register_parameter(name, copy.deepcopy(parameter))
        self._buffers.update(copy.deepcopy(module._buffers))
        for expert in range(self._count):
            both = nn.Module()
            for name in form.names:
                both.add_module(name, parts[f"{expert}.{name}"])
            self.add_module(str(expert), both)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states (..., H), ids (..., k) and weights (..., k), to (..., H)."""
        return _run(self, self._expert, args, kwargs)

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        both: Any = self._modules[str(expert)]
        up, down = both._modules[self._form.up], both._modules["down_proj"]
        y: Tensor = down(_gate(self, self._form.up, up(rows)))
        return _normed(self, y)

    @property
    def float_bytes(self) -> int:
        """The bytes of the stacked parameters."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._stacked.values())

    def group(self, part: str) -> str | None:
        """The same part of all experts."""
        return _group(part)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_stacked", ()):
            return self._view(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_stacked", ()):
            raise read_only(name)
        super().__setattr__(name, value)

    def _view(self, name: str) -> FloatView:
        """A stacked parameter, in float."""
        shape, dtype = self._stacked[name]
        matrix = name.removesuffix("_bias")

        def make() -> Tensor:
            layers: list[Any] = [self.get_submodule(f"{expert}.{matrix}") for expert in range(self._count)]
            if name != matrix:
                return torch.stack([layer.bias + 0 for layer in layers])
            weights = torch.stack([layer.weight + 0 for layer in layers])
            return weights.transpose(1, 2).contiguous() if self._form.transposed else weights

        return FloatView(make, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))

    def extra_repr(self) -> str:
        """How many experts, for `repr`."""
        return f"{self.float_class.__name__}, {self._count} experts"


def _group(part: str) -> str:
    return f"*.{part.partition('.')[2]}"


def _normed(module: nn.Module, y: Tensor) -> Tensor:
    """The output of an expert, by the norm that the module may have for it."""
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y  # type: ignore


class QATExperts(QATParts):
    """Stacked experts in training: the products of their int8 form, on the rows of each expert."""

    def matrix(self, part: str) -> Matrix:
        """The matrix of this name, "3.down_proj"."""
        return _matrix(self, part)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As that of the float module."""
        return _run(self, self._expert, args, kwargs)

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        form = _form(self)
        assert form is not None
        y = _gate(self, form.up, self.multiplied(f"{expert}.{form.up}", rows))
        return _normed(self, self.multiplied(f"{expert}.down_proj", y))

    def extra_repr(self) -> str:
        """How many experts, for `repr`."""
        return f"{self.float_class.__name__}, {_count(self)} experts"


class ExpertsType(TrainableParts):
    """Stacked experts: two matrices for each, "3.gate_up_proj" and "3.down_proj"."""

    name = "stacked experts"
    form = QATExperts
    routed = True

    def __init__(self) -> None:
        self._proofs: WeakKeyDictionary[nn.Module, tuple[object, str | None]] = WeakKeyDictionary()

    def matches(self, module: nn.Module) -> bool:
        return "down_proj" in module._parameters and _form(module) is not None

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        form, count = _form(module), _count(module)
        assert form is not None
        parts = [f"{expert}.{name}" for expert in range(count) for name in form.names]
        return {part: self.matrix(module, part) for part in parts}

    def matrix(self, module: nn.Module, part: str) -> Matrix:
        return _matrix(module, part)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The rows of each expert that has any, and what its gate makes of them in float."""
        form, call = _form(module), _arguments(float_class(module), args, kwargs)
        assert form is not None
        rows, ids = call.hidden.reshape(-1, call.hidden.shape[-1]), call.ids.reshape(-1, call.ids.shape[-1])
        found, count = {}, _count(module)
        for expert in ids.unique().tolist():
            if expert < count:
                x = rows[(ids == expert).any(dim=-1)]
                found[f"{expert}.{form.up}"] = x
                y = linear(x, *self.matrix(module, f"{expert}.{form.up}"))
                found[f"{expert}.down_proj"] = _gate(module, form.up, y)
        return found

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return QuantizedExperts(module, parts)

    def group(self, part: str) -> str | None:
        return _group(part)

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        state = [(id(p), p._version) for p in module._parameters.values() if p is not None]
        known = self._proofs.get(module)
        if known is None or known[0] != state:
            self._proofs[module] = known = (state, self._unproven(module))
        return known[1]

    @torch.no_grad()
    def _unproven(self, module: nn.Module) -> str | None:
        """Why this module is not known to compute the formula: it is called on a few rows, without its hooks."""
        form, kind = _form(module), type(module).__name__
        down = module._parameters["down_proj"]
        assert form is not None
        assert down is not None
        if "forward" in vars(module):
            return f"{kind} has a forward of its own"
        if down.dtype not in FLOATS or not len(down):
            return None  # said of each matrix
        random = torch.Generator(device="cpu").manual_seed(0)
        width = self.matrix(module, f"0.{form.up}").weight.shape[1]
        hidden = torch.randn(_PROBES, width, generator=random, dtype=torch.float32, device="cpu")
        ids = torch.arange(2 * _PROBES, dtype=torch.long, device="cpu").reshape(_PROBES, 2) % min(
            len(down), _PROBED_EXPERTS
        )
        weights = torch.rand(_PROBES, 2, generator=random, dtype=torch.float32, device="cpu") + 0.5
        call = _Call(hidden.to(down.dtype), ids, weights.to(down.dtype))
        try:
            exact = _routed(call, len(down), lambda expert, rows: self._float_expert(module, form, expert, rows))
            found = type(module).forward(module, *call)
            if not isinstance(found, Tensor) or found.shape != exact.shape or found.dtype != exact.dtype:
                return f"{kind} gives something else than the weighted sums of its experts' outputs"
        except Exception as error:
            return f"{kind} can't be called as experts are, with rows, ids and weights ({type(error).__name__})"
        exact, found = exact.double().nan_to_num(), found.double().nan_to_num()
        noise = (exact - found).square().sum() * 10 ** (_LEAST_DB[down.dtype] / 10)
        return None if bool(noise <= exact.square().sum()) else f"{kind} computes another formula than experts do"

    def _float_expert(self, module: nn.Module, form: _Form, expert: int, rows: Tensor) -> Tensor:
        y = linear(rows, *self.matrix(module, f"{expert}.{form.up}"))
        y = linear(_gate(module, form.up, y), *self.matrix(module, f"{expert}.down_proj"))
        return _normed(module, y)


class QATExpertsType(TrainedParts, ExpertsType):
    """What `prepare_qat` made of stacked experts."""
