"""Put off importing torch until somebody uses it, so that ``rdd-bench list`` answers at once.

Plugins say ``import torch`` like anybody. While the registry reads them only to show what they
offer, that import yields a stand-in which becomes the real module on first use. A plugin that
needs torch to define its classes simply pays for it. (The standard library's ``LazyLoader`` does
not do: before Python 3.12 the second import of a module loads it.)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """Passes every attribute on to the real module, which it imports on the first one."""

    def __getattr__(self, attribute: str) -> Any:
        # Python asks each module for these when it looks around; no answer is the right one.
        if attribute in ("__file__", "__warningregistry__"):
            raise AttributeError(attribute)
        name = self.__name__
        if sys.modules.get(name) is self:
            del sys.modules[name]
        real = importlib.import_module(name)
        # From now on attributes are found here without this detour.
        self.__dict__.update(real.__dict__)
        return getattr(real, attribute)


@contextmanager
def imported_on_use(name: str) -> Iterator[None]:
    """Within this context, ``import name`` costs nothing until the module is used."""
    if name in sys.modules:
        yield
        return
    stand_in = _StandIn(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
