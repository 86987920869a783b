"""Whether a module's code is nothing but arithmetic on one tensor, so that it may be run without anybody noticing."""

import dis
import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_LIBRARIES = (torch, torch.nn, torch.nn.functional, torch.special, math)
_ARITHMETIC = {
    *("abs", "add", "clamp", "clip", "div", "erf", "erfc", "exp", "expit", "maximum", "minimum", "mul", "neg", "pow"),
    *("reciprocal", "rsqrt", "sigmoid", "sqrt", "square", "sub", "tanh", "where"),
    *("gelu", "hardsigmoid", "hardswish", "hardtanh", "relu", "relu6", "silu"),
    *("pi", "nn", "functional", "special", "float", "to", "dtype", "type_as", "float16", "float32", "bfloat16"),
}
"""What such code may look up in torch and math, and on tensors: no random numbers, no writing, nothing in place."""

_STEPS = (
    *("LOAD_", "BINARY_", "UNARY_", "INPLACE_", "COMPARE_OP", "CALL", "KW_NAMES", "PRECALL", "PUSH_NULL", "RETURN_"),
    *("STORE_FAST", "POP_", "COPY", "SWAP", "DUP_TOP", "ROT_", "NOP", "CACHE", "EXTENDED_ARG", "JUMP_FORWARD"),
    *("RESUME", "TO_BOOL", "BUILD_TUPLE", "BUILD_CONST_KEY_MAP", "NOT_TAKEN"),
)
"""How the bytecode instructions begin that may occur. Loops, imports and stores to anything but locals do not."""


def is_plain(module: nn.Module) -> bool:
    """Whether `module.forward` takes one argument, and its code is arithmetic only.

    The code is read, not run. It may call `_ARITHMETIC` on torch, math and tensors, and functions and methods of which
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
    forward = type(module).forward
    if "forward" in vars(module) or not isinstance(forward, types.FunctionType):
        return False
    return len(inspect.signature(forward).parameters) == 2 and _is_plain_function(forward, module, ())


def _is_plain_function(function: types.FunctionType, module: nn.Module, callers: tuple[Any, ...]) -> bool:
    code = function.__code__
    if code in callers or code.co_freevars or code.co_cellvars or not _is_plain_value(function.__defaults__ or ()):
        return False  # recursion could be endless
    within = (*callers, code)
    return all(_is_plain_step(step, function.__globals__, module, within) for step in dis.get_instructions(code))


def _is_plain_step(step: dis.Instruction, scope: dict[str, Any], module: nn.Module, callers: tuple[Any, ...]) -> bool:
    if not step.opname.startswith(_STEPS) or "BACKWARD" in step.opname or "SUPER" in step.opname:
        return False
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
        value = scope.get(step.argval)
        return value in _LIBRARIES if isinstance(value, types.ModuleType) else _may_use(value, module, callers)
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        if step.argval in vars(module):
            return _may_use(vars(module)[step.argval], module, callers)
        if step.argval in _ARITHMETIC and not hasattr(module, step.argval):
            return True
        return _may_use(inspect.getattr_static(type(module), step.argval, None), module, callers)
    return step.opname != "LOAD_CONST" or _is_plain_value(step.argval)


def _may_use(value: Any, module: nn.Module, callers: tuple[Any, ...]) -> bool:
    if isinstance(value, functools.partial):
        plain = _is_plain_value(value.args) and _is_plain_value(tuple(value.keywords.values()))
        return plain and _may_use(value.func, module, callers)
    if isinstance(value, types.MethodType):
        return value.__self__ is module and _may_use(value.__func__, module, callers)
    if _is_of_torch(value):
        return value.__name__ in _ARITHMETIC
    if isinstance(value, types.FunctionType):
        return _is_plain_function(value, module, callers)
    return value is not None and _is_plain_value(value)


def _is_of_torch(value: Callable[..., Any]) -> bool:
    if not isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return False
    return (getattr(value, "__module__", None) or "").split(".")[0] in ("torch", "math")


def _is_plain_value(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain_value, value))
    return value is None or type(value) in (bool, int, float, str, torch.dtype)
