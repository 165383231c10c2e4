"""Expert trajectories: the weights of networks in training on the real images, epoch by epoch.

The first stage of MTT (Cazenavette et al. 2022) and MAT (Lai et al. 2025). An expert is a random
network trained by plain SGD, without momentum, weight decay or schedule, which makes it easier to
imitate. Its weights, or their exponential moving average (EMA), are kept at the start and after
every epoch, each time as one flat vector.

Experts are costly and do not depend on the number of images per class, so they are kept in a
folder and shared by all calls that ask for the same ones. What they draw must not depend on who
asks first: each is trained with draws of its own, derived from what decides it, and the host's
generators are put back as they were. A set is therefore the same whether its experts were found
or made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open

from rdd_bench.api import Config, DistillTask, RddBenchError, Run, draw_augmentation, seeded
from rdd_bench_builtin.distillers import _kept
from rdd_bench_builtin.distillers._coreset import DSA, Augmentation
from rdd_bench_builtin.distillers._zca import fit_zca

if TYPE_CHECKING:
    from torch import Tensor, nn

Objective = Callable[["nn.Module", "Tensor", "Tensor"], "Tensor"]
"""The loss of an expert: network, normalised and augmented images, labels."""

FORMAT = "rdd-bench-expert-1"


class ExpertConfig(Config):
    """How experts are trained."""

    num_experts: int = Field(default=100, ge=1)
    """Networks trained on the real images."""
    expert_epochs_total: int = Field(default=50, ge=1)
    """Epochs of each expert; max_start_epoch + expert_epochs - 1 of them are used."""
    expert_lr: float = Field(default=0.01, gt=0)
    """Learning rate of the experts, constant; SGD without momentum and weight decay."""
    expert_batch: int = Field(default=256, ge=1)
    """Real images per step of the experts."""
    augment: Augmentation = DSA
    """Operations of DSA, for experts, matching and the author track; '' for none."""
    zca: bool = False
    """Whiten the images instead of normalising them; the set brings its whitening along."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """An exponential moving average of the weights, which is kept in their place."""

    every: Literal["step", "epoch", "none"] = "none"
    """When the weights enter the average; 'none' keeps the weights themselves."""
    decay: float = 0.0
    """Weight of the average against the newest weights; 0 keeps the weights themselves."""


def preprocessed(task: DistillTask, run: Run, options: ExpertConfig) -> DistillTask:
    """Return the task whose ``normalise`` is what the options ask for."""
    if not options.zca:
        return task
    return dataclasses.replace(task, whitening=fit_zca(task.train.images.to(run.device)))


UNSMOOTHED = Smoothing()
NOTHING: Mapping[str, Any] = {}


def find_or_train_experts(
    task: DistillTask,
    run: Run,
    options: ExpertConfig,
    who: str,
    objective: Objective,
    smoothing: Smoothing = UNSMOOTHED,
    decisive: Mapping[str, Any] = NOTHING,
) -> ExpertStore:
    """Return all experts, after training those that the folder does not hold.

    Args:
        task: Whose images, architecture and seed.
        run: Whose folder: ``cache`` where a run offers one, else ``scratch``.
        options: How they are trained.
        who: The method, in messages.
        objective: Their loss.
        smoothing: What of their weights is kept.
        decisive: What decides objective and smoothing; JSON values.

    Raises:
        RddBenchError: If an expert diverges, or a file in the folder is not what it should be.
    """
    folder = run.cache or run.scratch
    store = ExpertStore(folder / "experts", _key(task, options, objective, decisive), who)
    # The same for every objective: methods are compared on the same initial weights.
    draws = _kept.key_of(task, task.architecture, _parts(options))
    with run.phase("experts"):
        for index in run.track(range(options.num_experts), "experts"):
            if store.holds(index):
                continue
            with seeded(_kept.own_seed(f"{draws}/{index}")):
                snapshots = train_expert(task, run, options, objective, smoothing)
            diverged = (~torch.isfinite(snapshots).all(dim=1)).nonzero()
            if len(diverged):
                raise RddBenchError(
                    f"{who}: expert {index + 1} has weights that are no numbers after epoch "
                    f"{int(diverged[0])}; expected finite ones; lower the option expert_lr"
                )
            store.write(index, snapshots)
    return store


def train_expert(
    task: DistillTask, run: Run, options: ExpertConfig, objective: Objective, smoothing: Smoothing
) -> Tensor:
    """Return the weights at the start and after every epoch, (epochs + 1, p) on the CPU."""
    network = task.build_network(run.device).train()
    images = task.normalise(task.train.images.to(run.device))
    labels = task.train.labels.to(run.device)
    size = task.spec.shape[1:]
    optimizer = torch.optim.SGD(network.parameters(), lr=options.expert_lr)
    kept = flat_parameters(network)
    # Assigning to a row copies. A list of references would hold the last weights many times.
    snapshots = torch.empty(options.expert_epochs_total + 1, len(kept))
    snapshots[0] = kept
    for epoch in range(options.expert_epochs_total):
        for batch in torch.split(torch.randperm(len(labels)).to(run.device), options.expert_batch):
            if len(batch) == 1:
                continue  # Batch normalisation cannot be computed from a single vector.
            transform = draw_augmentation(options.augment, len(batch), size)
            optimizer.zero_grad()
            torch.autograd.backward(objective(network, transform(images[batch]), labels[batch]))
            optimizer.step()
            if smoothing.every == "step":
                kept.lerp_(flat_parameters(network), 1 - smoothing.decay)
        if smoothing.every == "epoch":
            kept.lerp_(flat_parameters(network), 1 - smoothing.decay)
        # The expert goes on from its own weights; only what is kept of it is smoothed.
        snapshots[epoch + 1] = flat_parameters(network) if smoothing.every == "none" else kept
    return snapshots


def flat_parameters(network: nn.Module) -> Tensor:
    """Return a copy of all parameters as one vector, (p,), in the order of the network."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


class ExpertStore:
    """Experts of one kind in a folder, one safetensors file each.

    A file appears under its name only when it is whole, so an interrupted call goes on with the
    first expert that is missing.
    """

    def __init__(self, folder: Path, key: str, who: str) -> None:
        self.folder = folder / key[:32]
        self.key = key
        self.who = who

    def path(self, index: int) -> Path:
        """Return where the expert is or will be."""
        return self.folder / f"{index:04}.safetensors"

    def holds(self, index: int) -> bool:
        """Return whether the expert is there, after a look at every byte of it.

        Raises:
            RddBenchError: If there is a file under its name that is not this expert, whole.
        """
        expected = f"expert {index + 1} of a trajectory cache"
        return _kept.read(self.path(index), self._header(index), self.who, expected) is not None

    def write(self, index: int, snapshots: Tensor) -> None:
        """Keep an expert, (epochs + 1, p)."""
        _kept.write(self.path(index), self._header(index), {"snapshots": snapshots})

    def snapshot(self, index: int, epoch: int) -> Tensor:
        """Read the weights of an expert after an epoch, (p,) on the CPU."""
        with safe_open(self.path(index), framework="pt") as file:
            row: Tensor = file.get_slice("snapshots")[epoch]
        return row

    def _header(self, index: int) -> dict[str, str]:
        return {"format": FORMAT, "key": self.key, "index": str(index)}


def _key(
    task: DistillTask, options: ExpertConfig, objective: Objective, decisive: Mapping[str, Any]
) -> str:
    """Return the hash of all that decides the experts, however many of them there are."""
    parts = {**_parts(options), "decisive": dict(decisive)}
    return _kept.key_of(task, task.architecture, parts, [_key, fit_zca, objective])


def _parts(options: ExpertConfig) -> dict[str, Any]:
    names = set(ExpertConfig.model_fields) - {"num_experts"}
    return {"format": FORMAT, "options": options.model_dump(mode="json", include=names)}
