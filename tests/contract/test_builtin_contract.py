"""The built-in plugins keep the contract, like anybody's."""

from __future__ import annotations

import torch

from rdd_bench.testing import contract

torch.set_num_threads(1)


@contract("rdd-bench")
def test_contract(check):
    check()
