"""Does something once a module of another package is there, without importing it.

So `import zqfp_convert` costs next to nothing, and it does not matter which package comes first.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def watch(module: str, ours: str) -> None:
    """Call `register()` of our module `ours` as soon as `module` is imported, or now if it is.

    What goes wrong there is a warning: it must not take the other package away from those who do
    not need ours in it.
    """
    if module in sys.modules:
        _register(module, ours)
        return
    finder = next((one for one in sys.meta_path if isinstance(one, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.awaited[module] = ours


class _Finder:
    """Finds the awaited modules as Python does, and has ours called after they have run.

    What `sys.meta_path` holds; no `MetaPathFinder` by class, as importing that takes longest here.
    """

    def __init__(self) -> None:
        self.awaited: dict[str, str] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.awaited:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run: Callable[[ModuleType], None] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                ours = self.awaited.pop(fullname, None)
                if ours is not None:
                    _register(fullname, ours)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(module: str, ours: str) -> None:
    try:
        import_module(ours).register()
    except Exception as error:
        warnings.warn(
            f"zqfp_convert does not fit this {module.partition('.')[0]} ({error}): packed "
            "checkpoints will not be known there; zqfp_convert.load does without it",
            stacklevel=2,
        )
