"""Start-up of the `weld` process: torch and numpy load when they are first used.

A plan is made from headers and needs neither, and a merge needs torch but not all of it. So the
command's process, and no other, has a finder on `sys.meta_path` that gives `import` a module whose
code runs when the module is first used. What is used is loaded, and completely.

importlib.util.LazyLoader does not do here: a second `import` of a module already loads it (Python 3.10 to
3.13), and with older Pythons a thread that comes while another one is loading sees half a module.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

WHOLE = frozenset({"torch", "numpy"})

PARTS = frozenset(
    {
        "torch._meta_registrations",
        "torch.distributed._meta_registrations",
        "torch.distributions",
        "torch.masked",
        "torch.quantization",
        "torch.utils.data",
    }
)
"""Parts of torch that may wait while a merge runs on the CPU.

The first two, with all that they load, take a third of the time of `import torch`. They register kernels for
tensors without data (device "meta"), rules for its compilers and, in some versions, what
`torch.Generator()` needs, none of which a merge uses; and as registering is not using, those who do
need that must load torch whole. The others are libraries of their own, and load when they are used.
"""

TRIED = ((2, 4), (2, 15))
"""The first and the last torch with which that was tried (2.4, 2.6, 2.9, 2.13, 2.15); in others no part waits."""

# What `import` itself, inspect and threads that look at all modules ask for; known before the code has run.
_KNOWN = frozenset({"__class__", "__spec__", "__name__", "__file__", "__loader__", "__package__"})

_LOCK = threading.RLock()


def postpone(*, parts: bool = False) -> None:
    """Let torch and numpy, unless they are loaded already, wait until they are used.

    Args:
        parts: let `PARTS` wait for a use of their own when torch loads.
    """
    sys.meta_path.insert(0, _Finder(WHOLE | PARTS if parts else WHOLE))


class Postponed(ModuleType):
    """A module whose code has not run; it runs when anything but `_KNOWN` is read, set or deleted."""

    def __getattribute__(self, name: str) -> Any:
        if name not in _KNOWN:
            _load(self)
        return ModuleType.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _load(self)
        ModuleType.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        _load(self)
        ModuleType.__delattr__(self, name)


def _load(module: Postponed) -> None:
    """Run the module's code, once; other threads wait until it has run.

    Raises:
        what the code raises; the next use of the module tries again, as the next `import` would.
    """
    spec = ModuleType.__getattribute__(module, "__spec__")
    with _LOCK:
        if type(module) is not Postponed or spec.loader_state:  # loaded meanwhile, or its own code asks
            return
        spec.loader_state = True
        # Loading makes many objects and hardly any garbage, so collections would be in vain; those
        # that come later need not look at what stays till the end.
        collecting = gc.isenabled()
        gc.disable()
        try:
            spec.loader.exec_module(module)
            object.__setattr__(module, "__class__", ModuleType)
            gc.freeze()
        finally:
            spec.loader_state = None
            if collecting:
                gc.enable()


class _Later(Loader):
    """Makes a module `Postponed` instead of running its code."""

    def __init__(self, loader: SourceFileLoader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        module.__class__ = Postponed


class _Finder(MetaPathFinder):
    """Finds what may wait; leaves everything else, and what is not plain Python source, to the other finders."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names or target is not None or (fullname in PARTS and not _tried()):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = _Later(spec.loader)
        return spec


def _tried() -> bool:
    """Whether torch, which is loading now, is of a version that was tried."""
    version = str(getattr(sys.modules.get("torch"), "__version__", ""))
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return major.isdecimal() and minor.isdecimal() and TRIED[0] <= (int(major), int(minor)) <= TRIED[1]
