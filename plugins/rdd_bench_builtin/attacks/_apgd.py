"""APGD: Croce and Hein 2020, 'Reliable evaluation of adversarial robustness ...', Algorithm 1.

arXiv:2003.01690, sections 3 and 4: ascent with momentum, whose step is halved, with a return to
the best point so far, at checkpoints where the loss did not rise often enough.

AutoAttack runs it in **rounds**: one for each target class and restart, each from a new random
start and on the images that the rounds before left unbroken. This one gives the verdicts of the
authors' code and does less for them:

- An image leaves as soon as it is broken. The others do not notice, because a network in eval
  mode looks at each image by itself.
- Rounds run side by side where few images are left. Where a round starts depends on how many are
  left by then, so this supposes that the rounds before it break none. As soon as one does, all
  later rounds stop, and they are run again from their true starts. What breaks mostly breaks in
  the first iterations, so little work is lost.

Arithmetic is that of the authors' code, operation by operation, because the sign of a gradient
turns a rounding into another path. Two departures from the paper are theirs too, marked below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rdd_bench.api import Norm

Loss = Literal["ce", "dlr", "dlr-targeted"]

ALPHA = 0.75
"""Share of the new direction in a step; the rest is momentum (paper, section 3.1)."""
RHO = 0.75
"""Share of steps that must raise the loss for the step size to stay (condition 1)."""
TINY = 1e-12
FEW = 8
"""So few rows cost what one does, and libraries round batches of one to three differently."""
CACHED = 24_000
"""So many pixels at once are enough for a CPU; with more, small networks outgrow its cache."""
SHARE = 1 / 8
"""Of the rows, how many must be done with before they are taken out, which copies the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class APGD:
    """APGD as AutoAttack runs it."""

    model: nn.Module
    norm: Norm
    eps: float
    loss: Loss
    iterations: int
    restarts: int
    targets: int
    """How many classes 'dlr-targeted' tries, the most probable first."""
    seed: int
    """Of the random starts, which are drawn on the CPU whatever the device."""
    max_rows: int
    """At most so many images go through the network at once, unless the batch has more."""
    check: Callable[[Tensor], None]
    """Told the lengths (n,) of the gradients at the start of each round on a DLR loss."""

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images (n, c, h, w); those that broke replaced by what broke them.

        An image counts as broken when the network gets a point wrong on the way and again in a
        pass of its own, because a batch of another size may round differently.
        """
        with torch.no_grad():
            logits = self.model(images)
        ranked = logits.sort(dim=1).indices
        unbroken = (logits.max(dim=1).indices == labels).nonzero().flatten()
        attacked = images.clone()
        ranks = range(2, self.targets + 2) if self.loss == "dlr-targeted" else (1,)
        rounds = [rank for rank in ranks for _ in range(self.restarts)]
        room = self.max_rows
        if images.device.type == "cpu":
            room = min(room, CACHED // images[0].numel())
        generator = torch.Generator().manual_seed(self.seed)
        while rounds and len(unbroken):
            count = min(len(rounds), max(1, room // len(unbroken)))
            some = images[unbroken]
            starts, states = [], []
            for _ in range(count):
                starts.append(self._start(some, generator))
                states.append(generator.get_state())
            targets = torch.cat([ranked[unbroken, -rank] for rank in rounds[:count]])
            climb = _Climb(self, some, labels[unbroken], torch.cat(starts), targets)
            climb.run()
            broken, points = climb.broken()
            attacked[unbroken[broken]] = points
            unbroken = unbroken[~broken]
            generator.set_state(states[climb.last])
            rounds = rounds[climb.last + 1 :]
        return attacked

    def _start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return points at the distance of the whole budget, then moved into [0, 1]."""
        linf = self.norm == "linf"
        draw = (torch.rand if linf else torch.randn)(images.shape, generator=generator)
        draw = (2 * draw - 1 if linf else draw).to(images.device)
        return (images + self.eps * (draw / (_length(draw, self.norm) + TINY))).clamp(0, 1)

    def _direction(self, gradients: Tensor) -> Tensor:
        linf = self.norm == "linf"
        return gradients.sign() if linf else gradients / (_length(gradients, "l2") + TINY)

    def _project(self, points: Tensor, images: Tensor) -> Tensor:
        if self.norm == "linf":
            return points.clamp(images - self.eps, images + self.eps).clamp(0, 1)
        delta = points - images
        length = _length(delta, "l2")
        return (images + delta / (length + TINY) * length.clamp(max=self.eps)).clamp(0, 1)

    def _losses(self, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image, (n,); the DLR losses are those of section 4."""
        if self.loss == "ce":
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        ordered, classes = logits.sort(dim=1)
        first = ordered[:, -1]
        true = logits.gather(1, labels[:, None])[:, 0]
        if self.loss == "dlr-targeted":
            target = logits.gather(1, targets[:, None])[:, 0]
            return -(true - target) / (first - 0.5 * (ordered[:, -3] + ordered[:, -4]) + TINY)
        right = (classes[:, -1] == labels).to(logits)
        rival = true - ordered[:, -2] * right - first * (1 - right)
        return -rival / (first - ordered[:, -3] + TINY)


@dataclass
class _Rows:
    """What Algorithm 1 remembers. A row is one image in one round; rounds follow one another."""

    number: Tensor
    """Which row it was at the beginning."""
    done: Tensor
    """Whether it is broken or of a void round."""
    images: Tensor
    labels: Tensor
    targets: Tensor
    points: Tensor
    before: Tensor
    """The points before the last step."""
    gradients: Tensor
    losses: Tensor
    step: Tensor
    best_points: Tensor
    best_gradients: Tensor
    best_losses: Tensor
    rises: Tensor
    """How often the loss rose since the last checkpoint."""
    checked_losses: Tensor
    """The best losses at the last checkpoint, and whether the step was halved there."""
    halved: Tensor

    def keep(self, chosen: Tensor) -> None:
        """Drop all other rows."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name)[chosen])


class _Climb:
    """Algorithm 1 on the same images in some rounds at once."""

    def __init__(
        self, apgd: APGD, images: Tensor, labels: Tensor, starts: Tensor, targets: Tensor
    ) -> None:
        rounds = len(starts) // len(images)
        self.apgd = apgd
        self.width = len(images)
        self.last = rounds - 1
        """The last round that counts: the first in which an image breaks, if any does."""
        self.found = starts.clone()
        """Where each row broke."""
        self.confirmed = torch.zeros(len(starts), dtype=torch.bool, device=starts.device)
        labels = labels.repeat(rounds)
        gradients, losses, wrong = self._look(starts, labels, targets)
        self.rows = _Rows(
            number=torch.arange(len(starts), device=starts.device),
            done=torch.zeros_like(wrong),
            images=images.repeat(rounds, 1, 1, 1),
            labels=labels,
            targets=targets,
            points=starts,
            before=starts,
            gradients=gradients,
            # Not the losses at the start: the authors' code compares the first with zero.
            losses=torch.zeros_like(losses),
            step=torch.full_like(losses, 2 * apgd.eps).view(-1, 1, 1, 1),
            best_points=starts,
            best_gradients=gradients,
            best_losses=losses,
            rises=torch.zeros_like(losses),
            checked_losses=losses,
            halved=torch.ones_like(wrong),
        )
        self._note(wrong)

    def run(self) -> None:
        """Climb until nobody is left or the iterations are over."""
        lengths = self.rows.gradients.flatten(1).abs().sum(dim=1).view(-1, self.width)
        checkpoints = _checkpoints(self.apgd.iterations)
        for iteration in range(self.apgd.iterations):
            self._take_out()
            if not len(self.rows.done):
                break
            self._step(ALPHA if iteration else 1.0)
            if iteration + 1 in checkpoints:
                self._adapt(checkpoints[iteration + 1])
        self._confirm()
        if self.apgd.loss != "ce":
            for of_round in lengths[: self.last + 1]:
                self.apgd.check(of_round)

    def broken(self) -> tuple[Tensor, Tensor]:
        """Return which images the last round broke (n,), and where."""
        of_last = slice(self.last * self.width, (self.last + 1) * self.width)
        broken = self.confirmed[of_last]
        return broken, self.found[of_last][broken]

    def _look(self, points: Tensor, labels: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the gradients, the losses and which rows the network gets wrong."""
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            logits = self.apgd.model(leaf)
            losses = self.apgd._losses(logits, labels, targets)
            gradients = torch.autograd.grad(losses.sum(), leaf)[0]
        return [gradients, losses.detach(), logits.detach().max(dim=1).indices != labels]

    def _step(self, alpha: float) -> None:
        rows, project = self.rows, self.apgd._project
        points = rows.points
        ahead = project(points + rows.step * self.apgd._direction(rows.gradients), rows.images)
        moved = points + (ahead - points) * alpha + (points - rows.before) * (1 - alpha)
        rows.before, rows.points = points, project(moved, rows.images)
        rows.gradients, losses, wrong = self._look(rows.points, rows.labels, rows.targets)
        rows.rises += losses > rows.losses
        rows.losses = losses
        better = losses > rows.best_losses
        rows.best_losses = losses.where(better, rows.best_losses)
        better = better.view(-1, 1, 1, 1)
        rows.best_points = rows.points.where(better, rows.best_points)
        rows.best_gradients = rows.gradients.where(better, rows.best_gradients)
        self._note(wrong)

    def _adapt(self, period: int) -> None:
        """Halve the step and go back to the best point where condition 1 or 2 holds."""
        rows = self.rows
        seldom = rows.rises <= RHO * period
        stuck = ~rows.halved & (rows.checked_losses >= rows.best_losses)
        rows.halved = seldom | stuck
        rows.checked_losses = rows.best_losses
        rows.rises = torch.zeros_like(rows.rises)
        back = rows.halved.view(-1, 1, 1, 1)
        rows.step = (rows.step / 2).where(back, rows.step)
        # Only the point goes back. The next momentum is from where the row was two steps ago.
        rows.points = rows.best_points.where(back, rows.points)
        rows.gradients = rows.best_gradients.where(back, rows.gradients)

    def _note(self, wrong: Tensor) -> None:
        """Remember where rows broke, and that the rounds after them are void."""
        rows = self.rows
        new = wrong & ~rows.done
        if new.any():
            number = rows.number[new]
            self.found[number] = rows.points[new]
            self.last = min(self.last, int(number.min()) // self.width)
            rows.done |= wrong | (rows.number >= (self.last + 1) * self.width)

    def _take_out(self) -> None:
        """Go on without the rows that are done, once they are many."""
        rows = self.rows
        count = int(rows.done.sum())
        left = len(rows.done) - count
        if count < max(1, SHARE * len(rows.done)) or (left and len(rows.done) <= FEW):
            return
        self._confirm()
        chosen = rows.done.sort(stable=True).indices
        left = int((~rows.done).sum())
        rows.keep(chosen[: max(left, FEW) if left else 0])

    def _confirm(self) -> None:
        """Ask again about the rows that broke; those that do not stay broken climb on."""
        rows = self.rows
        asked = rows.done & (rows.number < (self.last + 1) * self.width)
        if asked.any():
            number, labels = rows.number[asked], rows.labels[asked]
            with torch.no_grad():
                wrong = self.apgd.model(self.found[number]).max(dim=1).indices != labels
            self.confirmed[number] = wrong
            rows.done[asked] = wrong


def _checkpoints(iterations: int) -> dict[int, int]:
    """Return after how many iterations each checkpoint comes, and how many since the last one.

    Section 3.1 of the paper; rounded down in iterations, as the authors' code does.
    """
    period, shortest, shrink = (max(int(part * iterations), 1) for part in (0.22, 0.06, 0.03))
    found, when = {}, period
    while when <= iterations:
        found[when] = period
        period = max(period - shrink, shortest)
        when += period
    return found


def _length(vectors: Tensor, norm: Norm) -> Tensor:
    """Return the length of each image, (n, 1, 1, 1)."""
    flat = vectors.flatten(1)
    length = flat.abs().amax(dim=1) if norm == "linf" else (flat**2).sum(dim=1).sqrt()
    return length.view(-1, 1, 1, 1)
