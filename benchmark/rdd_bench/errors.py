"""What can go wrong, and whose fault it is.

Everything here is a sentence to a person: who, what was found, what was expected, what to do.
The command line prints it on one line and exits with 2. Any other exception is our bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdd_bench.types import DistilledSet


class RddBenchError(Exception):
    """Something the user can mend; the message is one sentence."""


class UnknownNameError(RddBenchError):
    """A name that nothing answers to, with the nearest one that exists."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        did_you_mean = f"; did you mean '{near[0]}'?" if near else "."
        available = f" Available: {', '.join(known)}." if known else ""
        article = "an" if kind[0] in "aeiou" else "a"
        super().__init__(
            f"'{name}' is not the name of {article} {kind}{did_you_mean}{available}{hint}"
        )


class ContractError(RddBenchError):
    """A plugin returned something that the host cannot accept."""

    def __init__(self, who: str, found: str, expected: str) -> None:
        super().__init__(f"{who}: {found}; expected {expected}")


class Diverged(RddBenchError):  # noqa: N818 - what happened, in one word
    """Raised by a distiller whose numbers run away, with the last set that was good.

    The step fails, and the host keeps that set in a file beside the sets of the run.
    """

    def __init__(self, sentence: str, last_good: DistilledSet) -> None:
        super().__init__(sentence)
        self.last_good = last_good


class NotApplicable(RddBenchError):  # noqa: N818 - a reason, not a fault
    """Raised by a plugin that cannot serve a combination; the cell is skipped with this reason.

    For example a distiller that matches features, given an architecture without any.
    """
