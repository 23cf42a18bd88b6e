"""Python files of users, as modules: those of each folder by themselves.

Layer 3. Two folders may each have a `helper.py`, so what stands beside an operator's file is no
module of the whole program: a folder is a package of its own, `flowlang_1`, and an import in one of
its files looks there first. That is decided where the import stands, so it holds for one inside a
function as well, which runs later and in another thread. Once a folder has changed it is another
package for who comes then; the one before goes with the last of those who keep it.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import itertools
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_numbers = itertools.count(1)
# By name. Code of a folder holds its folder, so one is here for as long as there is any to run.
_packages: weakref.WeakValueDictionary[str, Folder] = weakref.WeakValueDictionary()


class Keeper:
    """What those who use a folder have: when it goes, the modules leave `sys.modules`.

    It is not the folder itself, which its modules hold, and `sys.modules` them.
    """

    def __init__(self, path: str) -> None:
        self.folder = Folder(path)
        weakref.finalize(self, self.folder.leave).atexit = False


class Folder:
    """The Python files of one folder in one state, each run once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = f"flowlang_{next(_numbers)}"
        # What is found through `__builtins__` by the code of a module, and so by its functions.
        self.builtins = {**vars(builtins), "__import__": self._import}
        self._times: dict[str, int] = {}
        self._is_own: dict[str, bool] = {}
        self._left: dict[str, ModuleType] = {}
        _packages[self.name] = self
        importlib.invalidate_caches()  # or files made a moment ago are not found

    def is_current(self) -> bool:
        """Whether no file that was run has changed."""
        try:
            return all(os.stat(p).st_mtime_ns == at for p, at in self._times.items())
        except OSError:
            return False

    def module(self, path: str) -> ModuleType:
        """The module of a file of the folder. Raises what running it raises."""
        name = f"{self.name}.{Path(path).stem}"
        if name in sys.modules:
            return sys.modules[name]
        before = set(sys.modules)
        spec = self.spec(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            self._is_own.clear()
            for each in self._modules():
                if each not in before:
                    del sys.modules[each]
            raise
        return module

    def leave(self) -> None:
        """Take the modules out of `sys.modules`: they go once nothing refers to their code.

        It may be the garbage collector that calls, so this waits for nothing.
        """
        self._left.update((name, sys.modules.pop(name)) for name in self._modules())
        sys.modules.pop(self.name, None)

    def package(self) -> ModuleSpec:
        """The folder as a package, which Python looks for before it imports a module from it.

        What outlives all keepers, a thread that an operator began, makes it look once more, and has
        the modules that left. They stay then: nobody would say when they may go.
        """
        sys.modules.update(self._left)
        self._left.clear()
        spec = ModuleSpec(self.name, None, is_package=True)
        spec.submodule_search_locations = [self.path]
        return spec

    def _modules(self) -> list[str]:
        """The names of those that are imported; of a copy, for others may import meanwhile."""
        return [name for name in list(sys.modules) if name.startswith(f"{self.name}.")]

    def spec(self, name: str, path: str, inside: list[str] | None = None) -> ModuleSpec:
        """How a file is made a module; `inside` is where a package's own modules are."""
        loader = _Loader(name, path, self)
        spec = importlib.util.spec_from_file_location(
            name, path, loader=loader, submodule_search_locations=inside
        )
        assert spec is not None  # with a loader there is one
        return spec

    def note(self, path: str) -> None:
        """A file is about to be read."""
        self._times[path] = os.stat(path).st_mtime_ns

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """`__import__` for code of the folder.

        Code in C that imports, as pickle's does, gives a list of no names, and then looks for the
        module where those of the whole program are.
        """
        top = name.partition(".")[0]
        if level or fromlist == [] or not self._has(top):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        found = importlib.import_module(f"{self.name}.{name}")
        if not fromlist:
            return sys.modules[f"{self.name}.{top}"]
        # Again, for the names of a package that are modules.
        return builtins.__import__(found.__name__, globals, locals, fromlist, 0)

    def _has(self, top: str) -> bool:
        if top not in self._is_own:
            self._is_own[top] = self._finds(top)
        return self._is_own[top]

    def _finds(self, top: str) -> bool:
        """Whether a name is that of a module of the folder, rather than of the whole program."""
        if top == "flowlang" or top in sys.stdlib_module_names:
            return False
        spec = PathFinder.find_spec(top, [self.path])
        if spec is None:
            return False
        if spec.origin is None:  # a folder without `__init__.py` gives way to any real package
            with contextlib.suppress(ValueError, ImportError):
                elsewhere = importlib.util.find_spec(top)
                return elsewhere is None or elsewhere.origin is None
            return False
        # What the program itself has imported from there is one thing for both.
        loaded = getattr(sys.modules.get(top), "__file__", None)
        return loaded is None or os.path.realpath(loaded) != os.path.realpath(spec.origin)


class _Loader(SourceFileLoader):
    """Runs a file as one of its folder."""

    def __init__(self, name: str, path: str, folder: Folder) -> None:
        super().__init__(name, path)
        self._folder = folder

    def get_code(self, fullname: str) -> CodeType:
        """The code of the file as it is now: Python's cache of it counts time in whole seconds."""
        self._folder.note(self.path)
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self._folder.builtins
        super().exec_module(module)


class _Finder:
    """Finds the modules of folders for Python's own import."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = _packages.get(name.partition(".")[0])
        if folder is not None and name == folder.name:
            return folder.package()
        spec = PathFinder.find_spec(name, path) if folder is not None else None
        if folder is None or spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        return folder.spec(name, spec.loader.path, spec.submodule_search_locations)


sys.meta_path.insert(0, _Finder)
