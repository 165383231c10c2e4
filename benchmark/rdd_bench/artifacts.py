"""Distilled sets and networks as safetensors: bytes in, values out, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save

from rdd_bench.data import tensors_hash
from rdd_bench.errors import RddBenchError
from rdd_bench.hashing import digest
from rdd_bench.networks import Classifier, Whiten
from rdd_bench.types import DistilledSet, Recipe, Views, Whitening

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

FORMAT = "rdd-bench-set-1"


def set_hash(distilled: DistilledSet) -> str:
    """Return the hash that identifies a set: images, labels, extras and its own recipe."""
    names = sorted(distilled.tensors)
    tensors = tensors_hash(*(distilled.tensors[name] for name in names))
    return digest([names, tensors, _recipe_text(distilled)])


def on_cpu(distilled: DistilledSet) -> DistilledSet:
    """Return the set with every tensor on the CPU and without a graph."""
    return _assemble(
        {name: tensor.detach().cpu() for name, tensor in distilled.tensors.items()},
        distilled.recipe,
        distilled.notes,
    )


def _assemble(
    tensors: Mapping[str, Tensor], recipe: Recipe | None, notes: Mapping[str, Any]
) -> DistilledSet:
    """Put together what ``DistilledSet.tensors`` took apart."""
    return DistilledSet(
        images=tensors["images"],
        labels=tensors["labels"],
        recipe=recipe,
        notes=notes,
        whitening=_extra(Whitening, "whitening", tensors),
        weights=tensors.get("weights"),
        views=_extra(Views, "views", tensors),
    )


def _extra(kind: type[T], name: str, tensors: Mapping[str, Tensor]) -> T | None:
    parts = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
    return kind(**parts) if parts else None


def _recipe_text(distilled: DistilledSet) -> str:
    return distilled.recipe.model_dump_json(exclude_none=True) if distilled.recipe else ""


def set_to_bytes(distilled: DistilledSet, card: dict[str, Any]) -> bytes:
    """Return a set as a safetensors file whose header holds recipe, notes and the card."""
    header = {
        "format": FORMAT,
        "recipe": _recipe_text(distilled),
        "notes": json.dumps(dict(distilled.notes)),
        "card": json.dumps(card),
    }
    # Cloned, because safetensors refuses tensors that share their storage.
    tensors = {name: t.contiguous().clone() for name, t in on_cpu(distilled).tensors.items()}
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
    try:
        recipe = Recipe.model_validate_json(header["recipe"]) if header["recipe"] else None
        return _assemble(tensors, recipe, json.loads(header["notes"]))
    except (TypeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RddBenchError(
            f"{origin} is not whole, or from a newer rdd-bench ({reason})"
        ) from None


def networks_to_bytes(models: Sequence[Classifier]) -> bytes:
    """Return the states of several networks with one preprocessing as one safetensors file."""
    tensors = {f"preprocess/{k}": v for k, v in models[0].preprocess.state_dict().items()}
    for position, model in enumerate(models):
        tensors |= {f"{position}/{k}": v for k, v in model.network.state_dict().items()}
    return save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def networks_from_bytes(data: bytes, fresh: Sequence[Classifier], origin: str) -> list[Classifier]:
    """Load the stored states into freshly built networks; return them in eval mode, frozen.

    The preprocessing comes from the file: a network stays with what it was trained on.
    """
    tensors = _load(data, origin)
    whitens = "preprocess/matrix" in tensors
    whitening = _extra(Whitening, "preprocess", tensors) if whitens else None
    for position, model in enumerate(fresh):
        if whitening is not None:
            model.preprocess = Whiten(whitening)
        else:
            model.preprocess.load_state_dict(_parts(tensors, "preprocess/"))
        prefix = f"{position}/"
        state = _parts(tensors, prefix)
        try:
            model.network.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RddBenchError(f"{origin} does not fit the architecture: {reason}") from None
        model.eval().requires_grad_(requires_grad=False)
    return list(fresh)


def _parts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _load(data: bytes, origin: str) -> dict[str, Tensor]:
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
