"""Whether a module's code is nothing but arithmetic on one tensor, so that it may be run without anybody noticing."""

import dis
import functools
import inspect
import math
import types
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARIES = (torch, torch.nn, torch.nn.functional, torch.special, math)
ARITHMETIC = {
    *("abs", "add", "clamp", "clip", "div", "erf", "erfc", "exp", "expit", "maximum", "minimum", "mul", "neg", "pow"),
    *("reciprocal", "rsqrt", "sigmoid", "sqrt", "square", "sub", "tanh", "where"),
    *("gelu", "hardsigmoid", "hardswish", "hardtanh", "relu", "relu6", "silu"),
    *("pi", "nn", "functional", "special", "float", "to", "dtype", "type_as", "float16", "float32", "bfloat16"),
}
"""What such code may look up in torch and math, and on tensors: no random numbers, no writing, nothing in place."""

PRODUCTS = {
    *("linear", "addmm", "matmul", "mm", "t", "T", "mT", "transpose", "permute"),
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "size", "shape", "dim", "ndim"),
    *("jit", "is_scripting"),
}
"""What code that multiplies by a matrix may look up beside."""

_STEPS = (
    *("LOAD_", "BINARY_", "UNARY_", "INPLACE_", "COMPARE_OP", "CALL", "KW_NAMES", "PRECALL", "PUSH_NULL", "RETURN_"),
    *("STORE_FAST", "POP_", "COPY", "SWAP", "DUP_TOP", "ROT_", "NOP", "CACHE", "EXTENDED_ARG", "JUMP_FORWARD"),
    *("RESUME", "TO_BOOL", "BUILD_TUPLE", "BUILD_CONST_KEY_MAP", "NOT_TAKEN"),
    *("IS_OP", "CONTAINS_OP", "BUILD_SLICE", "BUILD_LIST", "LIST_", "RAISE_VARARGS", "FORMAT_", "BUILD_STRING"),
)
"""How the bytecode instructions begin that may occur. Loops, imports and stores to anything but locals do not."""


def forward_of(kind: type[nn.Module]) -> Any:
    """The forward that a class of modules has; None for one of torch.jit, where only an instance has it.

    >>> forward_of(nn.ReLU) is nn.ReLU.forward, forward_of(torch.jit.RecursiveScriptModule)
    (True, None)
    """
    return getattr(kind, "forward", None)


@functools.lru_cache(maxsize=1024)
def runs_straight(code: types.CodeType) -> bool:
    """Whether code has no loops, no imports, and stores to locals only: so it ends, if what it calls does.

    Nor does it ask whether two objects are one, of which stand-ins know nothing; only whether one is a constant.

    >>> runs_straight((lambda x: x + 1 if x else 2).__code__), runs_straight((lambda x: [x for x in x]).__code__)
    (True, False)
    >>> runs_straight((lambda x: x is not None).__code__), runs_straight((lambda x, y: x is y).__code__)
    (True, False)
    """
    steps = list(dis.get_instructions(code))
    return all(map(_runs_on, steps)) and all(_of_constant(*each) for each in pairwise(steps))


_MORE_STEPS = ("UNPACK_SEQUENCE", "JUMP_IF_", "BUILD_MAP", "DICT_MERGE")
_JUMPS = {*dis.hasjabs, *dis.hasjrel}


def _runs_on(step: dis.Instruction) -> bool:
    ahead = step.opcode not in _JUMPS or step.argval > step.offset
    return ahead and (_is_straight(step) or step.opname.startswith(_MORE_STEPS))


def _of_constant(before: dis.Instruction, step: dis.Instruction) -> bool:
    return step.opname != "IS_OP" or (before.opname.startswith("LOAD_CONST") and not step.is_jump_target)


def _is_straight(step: dis.Instruction) -> bool:
    return step.opname.startswith(_STEPS) and "BACKWARD" not in step.opname and "SUPER" not in step.opname


def is_plain(module: nn.Module) -> bool:
    """Whether `module.forward` takes one argument, and its code is arithmetic only.

    The code is read, not run. It may call `ARITHMETIC` on torch, math and tensors, and functions and methods of which
    the same holds. Of the module it may read numbers, strings and such functions. All else makes it False: globals,
    closures, properties, hooks, other modules.

    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> class Loud(nn.Module):
    ...     def forward(self, x):
    ...         print("called")
    ...         return 2 * x
    >>> is_plain(Twice()), is_plain(Loud())
    (True, False)
    """
    forward = forward_of(type(module))
    if "forward" in vars(module) or not isinstance(forward, types.FunctionType):
        return False
    return len(inspect.signature(forward).parameters) == 2 and odd_step(forward, module) is None


def odd_step(function: types.FunctionType, module: nn.Module, words: Collection[str] = ARITHMETIC) -> str | None:
    """What a function that is a method of the module does beside arithmetic, in a word of its code; None if nothing.

    Args:
        function: to be read. It is not run.
        module: its `self`.
        words: what it may look up in torch and math, and on tensors and the module.
    """
    return _Reader(module, words).odd_step(function, ())


class _Reader:
    """Reads code that may be a part of the forward of `module`."""

    def __init__(self, module: nn.Module, words: Collection[str]) -> None:
        self.module, self.words = module, words

    def odd_step(self, function: types.FunctionType, callers: tuple[Any, ...]) -> str | None:
        code = function.__code__
        if "__class__" in code.co_freevars:
            return "super"
        if code in callers or code.co_freevars or code.co_cellvars or not is_plain_value(function.__defaults__ or ()):
            return function.__name__  # recursion could be endless
        within = (*callers, code)
        for step in dis.get_instructions(code):
            if not self._is_plain_step(step, function.__globals__, within):
                return step.argval if isinstance(step.argval, str) else step.opname
        return None

    def _is_plain_step(self, step: dis.Instruction, scope: dict[str, Any], callers: tuple[Any, ...]) -> bool:
        if not _is_straight(step):
            return False
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = scope.get(step.argval)
            return value in _LIBRARIES if isinstance(value, types.ModuleType) else self._may_use(value, callers)
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            held, kind = vars(self.module), type(self.module)
            if step.argval in held:
                value = held[step.argval]
                is_operand = step.argval in self.words and (value is None or isinstance(value, Tensor))
                return is_operand or self._may_use(value, callers)
            if step.argval in self.words and not hasattr(self.module, step.argval):
                return True
            return self._may_use(inspect.getattr_static(kind, step.argval, None), callers)
        return step.opname != "LOAD_CONST" or is_plain_value(step.argval)

    def _may_use(self, value: Any, callers: tuple[Any, ...]) -> bool:
        if isinstance(value, functools.partial):
            plain = is_plain_value(value.args) and is_plain_value(tuple(value.keywords.values()))
            return plain and self._may_use(value.func, callers)
        if isinstance(value, types.MethodType):
            return value.__self__ is self.module and self._may_use(value.__func__, callers)
        if _is_of_torch(value):
            return value.__name__ in self.words
        if isinstance(value, types.FunctionType):
            return self.odd_step(value, callers) is None
        return value is not None and is_plain_value(value)


def _is_of_torch(value: Callable[..., Any]) -> bool:
    if not isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return False
    return (getattr(value, "__module__", None) or "").split(".")[0] in ("torch", "math")


def is_plain_value(value: Any) -> bool:
    """Whether a value is a number, a string, a dtype, None, an ellipsis, or a tuple of such."""
    if type(value) is tuple:
        return all(map(is_plain_value, value))
    return value is None or value is ... or type(value) in (bool, int, float, str, torch.dtype)
