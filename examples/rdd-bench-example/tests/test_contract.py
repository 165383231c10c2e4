"""Everything that rdd-bench demands of a plugin, checked on what this distribution offers."""

from __future__ import annotations

from collections.abc import Callable

from rdd_bench.testing import contract


@contract("rdd-bench-example")
def test_contract(check: Callable[[], None]) -> None:
    check()
