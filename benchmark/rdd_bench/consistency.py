"""What attacks on the same networks under the same threat say of each other. Pure, without torch.

Less access or less search never makes a better attack. Where it seems to, gradients are masked or
the better-informed attack has a bug, and the accuracy that it leaves is not robustness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rdd_bench.components import Access
from rdd_bench.metrics import worst_case
from rdd_bench.outcomes import Outcomes
from rdd_bench.records import AttackRecord, Flag

NON_DETERMINISTIC = "non-deterministic"
"""Two forward passes differ. Attacks are not made for that, so no table ranks such a row."""
WEAKER_THAN = "weaker-than"
BLACK_BOX = "black-box"
NOISE_CONTROL = "noise-control"
STRENGTH_TOLERANCE = 0.01
"""Another seed of AutoAttack moves up to 0.8 % of the images, so a point is no bug,"""
FEW = 2
"""and neither are two images where a point is less."""
NOISE_SHARE = 0.5
"""Of what the gradients of a network break, the share that noise of the same size may break. It
moves a linear score by about the square root of the number of pixels less."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one attack left of some networks."""

    label: str
    """How tables call the attack."""
    name: str
    """Its own name, without the distribution."""
    access: Access
    stronger_than: frozenset[str]
    """Names of attacks that never beat it."""
    outcomes: Sequence[Outcomes]
    """Of each network, which test images stay right, (n,) booleans."""

    @property
    def right(self) -> float:
        return _right(self.outcomes)


def evidence_of(record: AttackRecord) -> Evidence:
    """Return what a record says that the others under its threat can contradict."""
    return Evidence(
        label=record.attack.label,
        name=record.attack.name.split("/")[-1],
        access=record.access,
        stronger_than=frozenset(record.stronger_than),
        outcomes=record.bitmaps(),
    )


def contradictions(
    mine: Evidence, same: Sequence[Evidence], clean: Sequence[Outcomes]
) -> list[Flag]:
    """Return the flags of one attack in view of the others.

    Args:
        mine: The attack whose flags are wanted.
        same: All attacks on the same networks under the same threat; ``mine`` may be among them.
        clean: Which test images each network gets right without an attack.
    """
    return [
        *check_strength(mine, same),
        *check_black_box(mine, same),
        *check_noise(mine, same, clean),
    ]


def check_strength(strong: Evidence, others: Sequence[Evidence]) -> list[Flag]:
    """An attack is not beaten by one that it should never lose to, beyond the noise of draws."""
    flags = []
    for weak in others:
        gap = strong.right - weak.right
        if weak.name in strong.stronger_than and _clearly(gap, strong):
            message = (
                f"{strong.label} leaves {100 * gap:.1f} points more than "
                f"{weak.label}, which it should never lose to: a bug or masked gradients"
            )
            flags.append(Flag(name=WEAKER_THAN, message=message, value=gap))
    return flags


def check_black_box(mine: Evidence, others: Sequence[Evidence]) -> list[Flag]:
    """An attack without gradients does not beat all attacks with gradients taken together."""
    informed = _white_box(others)
    if mine.access != "black" or not informed:
        return []
    gap = _right(worst_case(informed)) - mine.right
    if not _clearly(gap, mine):
        return []
    message = (
        f"{mine.label}, which sees no gradients, leaves {100 * gap:.1f} points less than all "
        "attacks that see them together: these are too weak, or the gradients are masked"
    )
    return [Flag(name=BLACK_BOX, message=message, value=gap)]


def check_noise(
    mine: Evidence, others: Sequence[Evidence], clean: Sequence[Outcomes]
) -> list[Flag]:
    """Noise breaks at most half of what the attacks with gradients break together.

    Nothing is concluded where noise breaks no more than a point, as on a robust network under a
    small budget, or where the attacks leave no more than a point: they have nothing left to break,
    however much noise breaks too.
    """
    informed = _white_box(others)
    if mine.access != "none" or not informed:
        return []
    before, attacked = _right(clean), _right(worst_case(informed))
    by_noise, by_attacks = before - mine.right, before - attacked
    share = by_noise / by_attacks if by_attacks else np.inf
    if not (_clearly(by_noise, mine) and _clearly(attacked, mine) and share > NOISE_SHARE):
        return []
    message = (
        f"{mine.label} breaks {100 * by_noise:.1f} points, where all attacks that see gradients "
        f"together break {100 * by_attacks:.1f}: they find little more than chance does"
    )
    return [Flag(name=NOISE_CONTROL, message=message, value=by_noise)]


def _white_box(attacks: Sequence[Evidence]) -> list[Sequence[Outcomes]]:
    return [attack.outcomes for attack in attacks if attack.access == "white"]


def _right(outcomes: Sequence[Outcomes]) -> float:
    """Return the fraction of right images over all networks."""
    return float(np.mean(outcomes))


def _clearly(points: float, on: Evidence) -> bool:
    return points > max(STRENGTH_TOLERANCE, FEW / len(on.outcomes[0])) + 1e-9
