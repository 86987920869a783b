"""What code does with modules, past calling its own: `self.block.conv(x)`, `self.stage[0](x)`, `self.proj.weight`.

A convolution that includes the norm behind it must be called by nobody else, and where no run has shown that, code
must. All code that a forward of the model may run is looked through: it reaches for the names that it looks up on
anything but its own module, and it holds a child of its own that it does not just call, as an index or a loop does.
Code that asks for children by other ways than their names may reach for all.

A module whose code reads the weight of a child and does nothing else with it does not call that child. Here it is
enough to know the code of its own class, and that no other code names such a child: an error costs time, no values.
"""

import dis
import functools
import types
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from torchq.modules.plain_code import forward_of
from torchq.planning import references

_WAYS = {
    *("children", "named_children", "modules", "named_modules", "get_submodule", "_modules", "__dict__"),
    *("getattr", "vars", "eval", "exec", "attrgetter", "methodcaller"),
}
"""What gives children by other ways than their names."""

_DIRECT = {"children", "named_children"}
"""What gives those of one module, and none of theirs."""

_LOOKS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD")
_SKIPPED = ("CACHE", "EXTENDED_ARG", "PUSH_NULL")
_LISTS = (nn.ModuleList, nn.ModuleDict)


_HELD = {
    *("weight", "bias", "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups"),
}
"""What code may look up on a layer that it does not call."""

_ABOUT = {
    *("dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "type", "element_size"),
}
"""What it may ask about a weight without reading its values."""


class _Look(NamedTuple):
    """What code looks up: on other objects, on its own module without calling it, and functions that it may run.

    Of what it looks up on its own module: those of which it reads the weight, and those that it uses otherwise.
    """

    others: frozenset[str]
    held: frozenset[str]
    own: frozenset[str]
    read: frozenset[str]
    used: frozenset[str]
    functions: tuple[types.FunctionType, ...]


class Reach:
    """What the code of a model reaches for."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._names, self._all = model, set[str](), False
        self._held: dict[type[nn.Module], set[str]] = {}
        self._opened: set[type[nn.Module]] = set()  # by their own code, which asks for all their children
        self._read: dict[type[nn.Module], set[str]] = {}  # of which their own code reads the weight
        self._used: dict[type[nn.Module], set[str]] = {}  # with which their own code may do anything else
        self._unknown: set[type[nn.Module]] = set()  # whose code can't be read
        self._kept = {key for values, name in references.attributes(model) for key in references.held(values[name])}
        modules: list[Any] = list(model.modules())  # for mypy, a class of torch has no hash
        for kind in {type(module) for module in modules}:
            if not kind.__module__.startswith("torch."):
                self._look_through(kind, [forward_of(kind), *_functions(kind, {"forward", "__call__"})])
        for module in modules:
            if "forward" in vars(module):
                self._look_through(type(module), [vars(module)["forward"]])

    def reaches(self, path: str) -> bool:
        """Whether code may call the module of this name, but for the one that holds it."""
        owner, _, name = path.rpartition(".")
        kept = id(self._model.get_submodule(path)) in self._kept
        opened = type(self._model.get_submodule(owner)) in self._opened or self._is_opened(owner)
        return self._all or kept or name in self._names or opened

    def only_reads(self, path: str) -> bool:
        """Whether the code of the module that holds this one reads its weight, and no code seems to call it."""
        owner, _, name = path.rpartition(".")
        holder, module = self._model.get_submodule(owner), self._model.get_submodule(path)
        kind = type(holder)
        if name not in self._read.get(kind, ()) or name in self._used[kind] | self._names:
            return False
        places = [each for each in self._model.modules() for child in each._modules.values() if child is module]
        return len(places) == 1 and id(module) not in self._kept and kind not in self._opened | self._unknown

    def _is_opened(self, path: str) -> bool:
        """Whether code may take single modules out of an nn.Sequential, which has no code of its own."""
        module = self._model.get_submodule(path)
        if not path or not isinstance(module, (nn.Sequential, *_LISTS)):
            return False
        owner, _, name = path.rpartition(".")
        holder = self._model.get_submodule(owner)
        if isinstance(module, _LISTS) or isinstance(holder, _LISTS) or id(module) in self._kept:
            return True
        if isinstance(holder, nn.Sequential):
            usual = "forward" not in vars(holder) and forward_of(type(holder)) is nn.Sequential.forward
            return not usual or self._is_opened(owner)
        asked = type(holder) in self._opened or name in self._held.get(type(holder), ())
        return asked or name in self._names

    def _look_through(self, kind: Any, roots: list[Any]) -> None:
        """Looks through these functions of a class, and through all that they may run."""
        held, waiting, seen = self._held.setdefault(kind, set()), roots, set[Any]()
        read, used = self._read.setdefault(kind, set()), self._used.setdefault(kind, set())
        while waiting:
            function = waiting.pop()
            function = _function_in(function)
            if not isinstance(function, types.FunctionType):
                self._all = True
                self._unknown.add(kind)
            elif function not in seen:
                seen.add(function)
                look = _look(function, function.__code__)
                held |= look.held
                read |= look.read
                used |= look.used
                self._names |= look.others
                self._all = self._all or not _WAYS.isdisjoint(look.others | (look.own - _DIRECT))
                self._opened.update(() if _DIRECT.isdisjoint(look.own) else (kind,))
                waiting += [*look.functions, *_functions(kind, look.own | look.others)]


def _functions(kind: Any, names: Collection[str]) -> Iterator[types.FunctionType]:
    """Those that a class of the user and its bases have under these names."""
    for each in kind.__mro__:
        if each in nn.Module.__mro__ or _is_library(each.__module__):
            continue
        for name in vars(each).keys() & names:
            value = _function_in(vars(each)[name])
            if isinstance(value, types.FunctionType):
                yield value


def _function_in(value: Any) -> Any:
    """That of a property or a method; what else a class may hold is asked nothing."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return value.__func__ if isinstance(value, classmethod | staticmethod | types.MethodType) else value


def _is_library(module: str | None) -> bool:
    """Whether code of this module reaches into no model by itself: torch's, and transformers' but for its models'.

    timm's checkpoint_seq calls all children of an nn.Sequential, one after the other, as that itself does.
    """
    top, *rest = (module or "").split(".")
    of_transformers = top == "transformers" and rest[:1] != ["models"]
    return top in ("torch", "torchq") or of_transformers or module == "timm.models._manipulate"


@functools.lru_cache(maxsize=1024)
def _look(function: types.FunctionType, code: types.CodeType) -> _Look:
    cells = [cell for cell in function.__closure__ or () if cell != types.CellType()]  # but empty ones
    functions = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, types.FunctionType)]
    is_method = "." in function.__qualname__.rpartition("<locals>.")[2]
    others, held, own, read, used = (set[str]() for _ in range(5))
    others.update("__dict__" for cell in cells if isinstance(cell.cell_contents, nn.Module))  # code has it already
    for part in (code, *_inner(code)):
        first = part.co_varnames[:1] if part is code and is_method and part.co_argcount else ()
        others.update(each for each in part.co_consts if isinstance(each, str) and each.isidentifier())
        steps = [step for step in dis.get_instructions(part) if step.opname not in _SKIPPED]
        for i, (before, step) in enumerate(zip([None, *steps], steps, strict=False)):
            if step.opname in _LOOKS:
                if _loads(before) == first and step.opname in _LOOKS[:2]:
                    own.add(step.argval)
                    called = step.opname == "LOAD_METHOD" or "NULL" in step.argrepr
                    held.update(() if called or _is_asked_for(steps[i + 1 : i + 3]) else (step.argval,))
                    read.update((step.argval,) if _reads_weight(steps[i + 1 : i + 3]) else ())
                    used.update(() if _looks(steps[i + 1 : i + 2], _HELD) else (step.argval,))
                elif not isinstance(_global(function, before), types.ModuleType):
                    others.add(step.argval)
            elif step.opname == "LOAD_GLOBAL":
                value = _global(function, step)
                others.update(() if _names_one(steps[i : i + 3]) else {step.argval} & _WAYS)
                others.update(("__dict__",) if isinstance(value, nn.Module) else ())
                if isinstance(value, types.FunctionType) and not _is_library(value.__module__):
                    functions.append(value)

    return _Look(frozenset(others), frozenset(held), frozenset(own), frozenset(read), frozenset(used), tuple(functions))


def _reads_weight(behind: list[dis.Instruction]) -> bool:
    """Whether these steps take the weight of what was looked up, and more than what is known about it."""
    return _looks(behind[:1], {"weight"}) and not _looks(behind[1:], _ABOUT)


def _looks(steps: list[dis.Instruction], names: set[str]) -> bool:
    return any(step.opname in _LOOKS[:2] and step.argval in names for step in steps)


def _is_asked_for(behind: list[dis.Instruction]) -> bool:
    """Whether these steps only ask if what was looked up is None."""
    compared = len(behind) == 2 and behind[1].opname == "IS_OP" and behind[0].opname == "LOAD_CONST"
    return compared or (bool(behind) and behind[0].opname.startswith("POP_JUMP") and "NONE" in behind[0].opname)


def _names_one(steps: list[dis.Instruction]) -> bool:
    """Whether this is getattr with a name that stands in the code, as any other constant."""
    is_constant = len(steps) == 3 and steps[2].opname == "LOAD_CONST" and type(steps[2].argval) is str
    return is_constant and steps[0].argval == "getattr" and "LOAD_FAST" in steps[1].opname


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of functions within."""
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield each
            yield from _inner(each)


def _loads(step: dis.Instruction | None) -> tuple[str, ...] | None:
    """The local that a step puts on the stack last: a step of some versions of Python does two things."""
    if step is None or not ("LOAD_FAST" in step.opname or step.opname == "LOAD_DEREF"):
        return None
    return (step.argval[-1] if isinstance(step.argval, tuple) else step.argval,)


def _global(function: types.FunctionType, step: dis.Instruction | None) -> Any:
    return function.__globals__.get(step.argval) if step is not None and step.opname == "LOAD_GLOBAL" else None
