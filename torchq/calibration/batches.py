"""How the model is called with a batch of the user's loader, and what is said where that fails."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_origin

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchq.errors import BadTypeError, BadValueError

Forward = Callable[[nn.Module, Any], object]
"""`forward(model, batch)`: runs one batch."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_HINT = "Pass forward=lambda model, batch: ... to say how to call"


def call_with_batch(model: nn.Module, batch: Any, which: str = "a batch of calib_loader") -> object:
    """Calls `model` with a batch in one of the usual forms: a tensor, (input, label, ...), or a dict.

    >>> import torch
    >>> call_with_batch(nn.ReLU(), (torch.tensor(-1.0), "a label"))
    tensor(0.)
    """
    args, kwargs = _arguments(model, batch, which)
    return model(*args, **kwargs)


def run_batch(model: nn.Module, batch: Any, index: int, forward: Forward | None) -> object:
    """One batch through the model. An error of the model's own keeps its type, and learns which batch it was.

    Where the model's forward could not even begin with the arguments it got, the error is torchq's, of the same type.
    """
    which = f"batch {index} of calib_loader"
    try:
        return call_with_batch(model, batch, which) if forward is None else forward(model, batch)
    except (BadTypeError, BadValueError):
        raise
    except Exception as error:
        if forward is not None:
            _note(error, f"torchq: raised by forward(model, batch) for {which}, {_described(batch)}.")
            raise
        name = type(error).__name__
        said = f"{name}: {error}" if str(error) else name
        if _is_of_call(error, model):
            message = (
                f"{type(_inner(model)).__name__}.forward can't be called with {which}, {_described(batch)}, as it is: "
                f"{said}. {_HINT} the model with it."
            )
            raise _of_type(error, message) from error
        _note(error, f"torchq: raised by {which}, {_described(batch)}. {_HINT} the model, if not so.")
        raise


def check_loader(loader: object) -> None:
    """Refuses what is no iterable of batches, and single batches whose iteration would give something else.

    Raises:
        TypeError: it says what to pass instead.
    """
    if isinstance(loader, Mapping):
        keys = ", ".join(map(repr, list(loader)[:3]))
        raise BadTypeError(
            f"calib_loader is a {type(loader).__name__}, which looks like one batch: iterating over it gives its keys "
            f"({keys}). Wrap it in a list: [calib_loader]."
        )
    if isinstance(loader, Tensor) or hasattr(loader, "__array__"):
        shape = list(getattr(loader, "shape", ()))
        raise BadTypeError(
            f"calib_loader is a {type(loader).__name__} of shape {shape}: iterating over it gives single rows, not "
            "batches. If it is one batch of input, wrap it in a list: [calib_loader]. If its first dimension counts "
            "batches, pass list(calib_loader)."
        )
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes)):
        indexed = hasattr(loader, "__getitem__") and not isinstance(loader, (str, bytes))
        hint = " Wrap a dataset: torch.utils.data.DataLoader(dataset, batch_size=32)." if indexed else ""
        raise BadTypeError(f"calib_loader must be an iterable of batches, got {type(loader).__name__}.{hint}")


def has_forward(model: nn.Module) -> bool:
    """Whether the model can be called at all."""
    forward = getattr(type(_inner(model)), "forward", None)
    return forward is not nn.Module.forward or "forward" in vars(_inner(model))


@dataclass
class _Signature:
    """What the model's forward takes, by name."""

    required: list[str] = field(default_factory=list)
    """Positional parameters without a default."""
    optional: list[str] = field(default_factory=list)
    """Positional parameters with one."""
    keywords: list[str] = field(default_factory=list)
    """Parameters that can only be given by keyword; `needed`, those of them without a default."""
    needed: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    """Parameters that can't be given by keyword."""
    any_args: bool = False
    any_kwargs: bool = False
    first_is_list: bool = False

    def __str__(self) -> str:
        return f"({', '.join([*self.required, *self.optional, *self.keywords])})"


def _signature(model: nn.Module) -> _Signature:
    found = _Signature()
    try:
        parameters = inspect.signature(_inner(model).forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is not written in Python
        return _Signature(required=["input"], unnamed=["input"])
    for p in parameters:
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            if not found.required and not found.optional:
                found.first_is_list = p.annotation is list or get_origin(p.annotation) is list
            (found.required if p.default is p.empty else found.optional).append(p.name)
        if p.kind is p.POSITIONAL_ONLY:
            found.unnamed.append(p.name)
        if p.kind is p.KEYWORD_ONLY:
            found.keywords.append(p.name)
            if p.default is p.empty:
                found.needed.append(p.name)
        found.any_args |= p.kind is p.VAR_POSITIONAL
        found.any_kwargs |= p.kind is p.VAR_KEYWORD
    return found


def _inner(model: nn.Module) -> nn.Module:
    """The model within torch.compile's wrapper and those of torch.nn.parallel, which take any arguments."""
    while True:
        wrapped = model._modules.get("_orig_mod")
        if wrapped is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            wrapped = model.module
        if wrapped is None:
            return model
        model = wrapped


def _arguments(model: nn.Module, batch: Any, which: str) -> Arguments:
    """The arguments to call the model with."""
    takes, name = _signature(model), type(_inner(model)).__name__
    if isinstance(batch, Mapping):
        return _from_dict(takes, batch, name, which)
    if isinstance(batch, (Tensor, PackedSequence)):
        return _from_elements(takes, (batch,), name, f"{which} is one tensor")
    if isinstance(batch, (tuple, list)):
        if isinstance(batch, list) and len(takes.required) <= 1 and _is_one_argument(batch, takes):
            return (batch,), {}
        if batch and isinstance(batch[0], Mapping) and len(takes.required) <= 1:
            return _from_dict(takes, batch[0], name, which)
        return _from_elements(takes, tuple(batch), name, f"{which} has {len(batch)} elements")
    raise BadTypeError(
        f"{which} is of type {type(batch).__name__}; expected a tensor, a tuple or a dict. {_HINT} the model with it."
    )


def _is_one_argument(batch: list[Any], takes: _Signature) -> bool:
    """Whether forward takes this list as its one argument: a list of objects such as graphs, and not of inputs."""
    is_input = bool(batch) and (isinstance(batch[0], (Tensor, Mapping, tuple, list)) or hasattr(batch[0], "__array__"))
    return bool(batch) and (not is_input or takes.first_is_list)


def _from_elements(takes: _Signature, elements: tuple[Any, ...], name: str, has: str) -> Arguments:
    """Inputs by position: the leading elements that forward requires, or all where it takes any number (*args)."""
    if not takes.required and not takes.optional:
        if takes.any_args:
            return elements, {}
        raise BadTypeError(
            f"{name}.forward takes its inputs by keyword only, {takes}; {has}. Let calib_loader give dicts, or pass "
            "forward=lambda model, batch: ... to say how to call it."
        )
    required = max(1, len(takes.required))
    if len(elements) < required:
        raise BadValueError(f"{name}.forward requires {required} inputs, {has}. {_HINT} it.")
    return elements[:required], {}


def _from_dict(takes: _Signature, batch: Mapping[Any, Any], name: str, which: str) -> Arguments:
    """Arguments by keyword, without those forward does not know; or the dict itself, where forward takes one as it is.

    The latter where forward has one input, which is no key of the dict, and knows no other key either.
    """
    by_name = [each for each in (*takes.required, *takes.optional, *takes.keywords) if each not in takes.unnamed]
    known = {key: value for key, value in batch.items() if key in by_name}
    missing = [each for each in (*takes.required, *takes.needed) if each not in known]
    if not missing and (known or takes.any_kwargs):
        return (), dict(batch) if takes.any_kwargs else known
    inputs = takes.required or takes.optional or (["*"] if takes.any_args else [])
    if len(inputs) == 1 and not known and not takes.needed:
        return (batch,), {}
    keys = ", ".join(map(repr, list(batch)[:6]))
    raise BadValueError(f"{name}.forward takes {takes}, {which} is a dict with the keys {keys}. {_HINT} it.")


def _is_of_call(error: Exception, model: nn.Module) -> bool:
    """Whether forward was called in the wrong way: Python refused its arguments, or it failed in taking them apart.

    That is: one of the errors that wrong types of arguments give, raised in the call or in the lines of this very
    forward, and not in a module below it.
    """
    if type(error) not in (TypeError, ValueError, IndexError, KeyError, AttributeError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, forward = trace.tb_frame.f_code, inspect.unwrap(_inner(model).forward)
    here = (__file__, nn.Module.__call__.__code__.co_filename)
    return code.co_filename in here or code is getattr(forward, "__code__", None)


def _of_type(error: Exception, message: str) -> Exception:
    """A new error of the type of `error`; its function's name is put in front where `door` does so."""
    if isinstance(error, (TypeError, ValueError)):
        return BadTypeError(message) if isinstance(error, TypeError) else BadValueError(message)
    return type(error)(f"torchq: {message}")


def _note(error: Exception, note: str) -> None:
    """Shown below the error's traceback; before Python 3.11, as its cause."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.__cause__ is None:
        error.__cause__ = RuntimeError(note)


def _described(batch: Any) -> str:
    """A batch in a few words.

    >>> import torch
    >>> _described((torch.ones(2, 3), {"mask": None}))
    'a tuple of (a float32 tensor [2, 3], a dict with the keys mask)'
    """
    if isinstance(batch, Tensor):
        dtype = str(batch.dtype).removeprefix("torch.")
        if batch.is_nested:
            return f"a nested {dtype} tensor"
        return f"{'an' if dtype[0] in 'iu' else 'a'} {dtype} tensor {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {', '.join(str(key) for key in list(batch)[:6])}"
    if isinstance(batch, (tuple, list)):
        inner = ", ".join(
            _described(each) if isinstance(each, (Tensor, Mapping)) else type(each).__name__ for each in batch[:4]
        )
        return f"a {type(batch).__name__} of ({inner}{', ...' if len(batch) > 4 else ''})"
    return f"a {type(batch).__name__}"
