"""when_imported(): acts once somebody imports a module of torch's that takes long, which torchq does not."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]

_waiting: dict[str, list[Action]] = {}


def when_imported(name: str, act: Action) -> None:
    """Calls `act(module)` as soon as the module of this name was run: now, if it is imported.

    >>> when_imported("sys", lambda module: print(module.__name__))
    sys
    """
    if name in sys.modules:
        act(sys.modules[name])
        return
    if name not in _waiting:
        sys.meta_path.insert(0, _Finder(name))
    _waiting.setdefault(name, []).append(act)


class _Finder(MetaPathFinder):
    """Finds one module once, as the other finders do, and lets those who wait act when it was run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                for act in _waiting.pop(fullname):
                    act(module)

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec
