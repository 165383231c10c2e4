"""Architectures whose networks count their passes, for code that builds networks itself."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from rdd_bench.components import Architecture
from rdd_bench.measure import PassCounter
from rdd_bench.types import DatasetSpec


def counted(architecture: Architecture[Any], passes: PassCounter) -> Architecture[Any]:
    """Return the architecture with every network that it builds counting its passes."""
    cls = type(architecture)

    def build(self: Architecture[Any], spec: DatasetSpec) -> nn.Module:
        network = cls.build(self, spec)
        passes.attach(network)
        return network

    # A subclass, because a method may build the architecture with other options.
    copied = copy.copy(architecture)
    copied.__class__ = type(cls.__name__, (cls,), {"build": build, "__module__": cls.__module__})
    return copied
