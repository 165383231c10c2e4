"""Distilled sets and networks as safetensors: bytes in, values out, never pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from rdd_bench.data import tensors_hash
from rdd_bench.errors import RddBenchError
from rdd_bench.networks import Classifier
from rdd_bench.types import DistilledSet, Recipe

FORMAT = "rdd-bench-set-1"


def set_hash(distilled: DistilledSet) -> str:
    """Return the hash that identifies a set: images, labels and its own recipe."""
    tensors = tensors_hash(distilled.images, distilled.labels)
    recipe = distilled.recipe.model_dump_json() if distilled.recipe else ""
    return tensors_hash(torch.frombuffer(bytearray((tensors + recipe).encode()), dtype=torch.uint8))


def set_to_bytes(distilled: DistilledSet, card: dict[str, Any]) -> bytes:
    """Return a set as a safetensors file whose header holds recipe, notes and the card."""
    header = {
        "format": FORMAT,
        "recipe": distilled.recipe.model_dump_json() if distilled.recipe else "",
        "notes": json.dumps(dict(distilled.notes)),
        "card": json.dumps(card),
    }
    tensors = {
        "images": distilled.images.detach().cpu().contiguous(),
        "labels": distilled.labels.detach().cpu().contiguous(),
    }
    return save(tensors, metadata=header)


def set_from_bytes(data: bytes, origin: str) -> DistilledSet:
    """Read a set.

    Raises:
        RddBenchError: If the file is truncated or is no distilled set.
    """
    tensors = _load(data, origin)
    header = _header(data)
    if header.get("format") != FORMAT or not {"images", "labels"} <= set(tensors):
        raise RddBenchError(f"{origin} is not a distilled set of rdd-bench (format {FORMAT})")
    recipe = Recipe.model_validate_json(header["recipe"]) if header["recipe"] else None
    return DistilledSet(tensors["images"], tensors["labels"], recipe, json.loads(header["notes"]))


def networks_to_bytes(models: Sequence[nn.Module]) -> bytes:
    """Return the states of several networks as one safetensors file."""
    tensors = {}
    for position, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            tensors[f"{position}/{name}"] = tensor.detach().cpu().contiguous().clone()
    return save(tensors)


def networks_from_bytes(data: bytes, fresh: Sequence[Classifier], origin: str) -> list[Classifier]:
    """Load the stored states into freshly built networks; return them in eval mode, frozen."""
    tensors = _load(data, origin)
    for position, model in enumerate(fresh):
        prefix = f"{position}/"
        state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RddBenchError(f"{origin} does not fit the architecture: {reason}") from None
        model.eval().requires_grad_(requires_grad=False)
    return list(fresh)


def _load(data: bytes, origin: str) -> dict[str, torch.Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise RddBenchError(
            f"{origin} is truncated or no safetensors file ({error}); delete it and run again"
        ) from None


def _header(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata
