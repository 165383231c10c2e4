"""Put off importing torch until somebody uses it, so that ``rdd-bench list`` answers at once.

Plugins say ``import torch`` like anybody. While the registry reads them only to show what they
offer, that import yields a module that loads itself on first use, the recipe of the standard
library's ``importlib.util.LazyLoader``. A plugin that needs torch to define its classes simply
pays for it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType


class _LazyFinder:
    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.names:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = importlib.util.LazyLoader(spec.loader)
                return spec
        return None


@contextmanager
def imported_on_use(*names: str) -> Iterator[None]:
    """Within this context, importing one of the modules costs nothing until it is used."""
    finder = _LazyFinder(frozenset(names))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
