"""Calling code of others without a trace in the caller's process or model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Freeze the model in eval mode for the block, and put everything back after it.

    Put back are the mode of every module, ``requires_grad`` of every parameter, torch's random
    generators and the trace function that coverage and debuggers set. Inside, ``inference_mode``
    is off.
    """
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if initialised else []
    trace = sys.gettrace()
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False):
            yield
    finally:
        sys.settrace(trace)
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)
