"""Tensors kept in the folder of a run, for what is costly and shared by several calls.

What is kept must not depend on who asks first: whoever makes it draws under ``own_seed``, derived
from what decides it, so that a result is the same whether it was found or made. The source of the
code that makes it is in its name, so that an edited method makes it anew, and not in its seed, so
that an edit which changes nothing gives the same bits again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rdd_bench.api import Architecture, DistillTask, RddBenchError

if TYPE_CHECKING:
    from torch import Tensor


def read(
    path: Path, header: Mapping[str, str], who: str, expected: str
) -> dict[str, Tensor] | None:
    """Return the tensors of a file after a look at every byte, or None if it is not there.

    Args:
        path: Where it is.
        header: What was given when it was written.
        who: The method, in messages.
        expected: What the file is, in messages.

    Raises:
        RddBenchError: If there is a file under this name that is not this one, whole.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        problem = f"is truncated or no safetensors file ({error})"
    else:
        if found == {**header, "sha256": found.get("sha256", "")}:
            if found["sha256"] == _digest_of_all(tensors):
                return tensors
            problem = "does not have the content that was written"
        else:
            problem = "is another file"
    raise RddBenchError(f"{who}: {path} {problem}; expected {expected}; delete it and run again")


def write(path: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors. The file appears under its name only when it is whole."""
    from safetensors.torch import save

    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    data = save(content, {**header, "sha256": _digest_of_all(content)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)  # noqa: PTH105 - one call, and atomic


def key_of(
    task: DistillTask,
    architecture: Architecture[Any],
    parts: Mapping[str, Any],
    code: Sequence[Any] = (),
) -> str:
    """Return the hash of a network, the data and the seed it is trained on, and other parts.

    With ``code``, classes and functions, also that of the files which define these and the network.
    """
    everything = {
        **parts,
        "architecture": [architecture.name, architecture.config.model_dump(mode="json")],
        "code": [source_of(thing) for thing in (*code, type(architecture))] if code else [],
        "train": task.spec.train_sha256 or digest(task.train.images, task.train.labels),
        "spec": [task.spec.shape, task.spec.mean, task.spec.std, task.spec.num_classes],
        "seed": task.seed,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def own_seed(text: str) -> int:
    """Return a seed that follows from ``text``."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def source_of(thing: Any) -> str:
    """Return the hash of the file that defines a class or function, and of the private ones beside.

    '' if there is none. An edited method must not find what the version before has kept.
    """
    path = getattr(sys.modules.get(thing.__module__), "__file__", None)
    if not path:
        return ""
    result = hashlib.sha256(Path(path).read_bytes())
    for private in sorted(Path(path).parent.glob("_[!_]*.py")):
        result.update(private.read_bytes())
    return result.hexdigest()


def digest(*tensors: Tensor) -> str:
    """Return the hash of types, shapes and content."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        result.update(tensor.cpu().contiguous().numpy().data)
    return result.hexdigest()


def _digest_of_all(tensors: Mapping[str, Tensor]) -> str:
    return digest(*(tensors[name] for name in sorted(tensors)))
