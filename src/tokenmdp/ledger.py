"""What feedback was paid for: labels of people, queries of an expert.

A reward model is a cheap proxy of expensive feedback, so every comparison of methods is at equal feedback, and the
feedback is counted where it is bought: pay first, then ask. Nothing is half-paid: a payment beyond the budget changes
no count and raises. Give the ledger to `Run.steps` beside what trains, and a resumed run has paid what it had paid.

    ledger = Ledger(labels=800)
    ledger.pay("labels", len(pairs))
    ledger.left("labels")              # 800 − len(pairs)

The words used here are "labels" (a verdict on a pair or a response) and "queries" (what an expert would do in a state).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Overdrawn(ValueError):
    """A payment would have gone beyond the budget; it was not made."""


class Ledger:
    """Counts what was paid for, by its word, and refuses to go beyond a budget.

    Args:
        budget: the most that may be paid for a word, such as `labels=800`; a word without one is only counted.

    Attributes:
        budget: those limits.
        paid: how much was paid for each word so far; 0 for a word with a budget and no payment yet.

    Raises:
        ValueError: a budget is no whole number of at least 0.
    """

    def __init__(self, **budget: int) -> None:
        for what, most in budget.items():
            _counts(f"budget of {what}", most)
        self.budget = dict(budget)
        self.paid: dict[str, int] = dict.fromkeys(budget, 0)

    def pay(self, what: str, count: int = 1) -> None:
        """Pay for `count` of `what`, all of it or nothing.

        Raises:
            Overdrawn: less than that is left.
            ValueError: the count is no whole number of at least 0.
        """
        _counts(f"payment for {what}", count)
        paid, left = self.paid.get(what, 0), self.left(what)
        if left is not None and count > left:
            raise Overdrawn(
                f"{count} {what} asked for, but {paid} of {self.budget[what]} are paid and {left} left; nothing was paid: "
                f"ask for at most {left}, or give the ledger a larger budget"
            )
        self.paid[what] = paid + count

    def left(self, what: str) -> int | None:
        """How much of `what` can still be paid for; None where there is no limit."""
        return self.budget[what] - self.paid[what] if what in self.budget else None

    def tensors(self) -> Mapping[str, Tensor]:
        """None: the state is counts."""
        return {}

    def scalars(self) -> Mapping[str, Any]:
        """What was paid, for a checkpoint."""
        return {"paid": dict(self.paid)}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. The budget is today's: it is a setting, not a state.

        Raises:
            Overdrawn: more had been paid by then than the budget now allows.
        """
        paid = {str(what): int(count) for what, count in scalars["paid"].items()}
        over = [f"{paid[w]} {w} of {most}" for w, most in self.budget.items() if paid.get(w, 0) > most]
        if over:
            raise Overdrawn(
                f"the checkpoint had paid {', '.join(over)}: the budget was larger then; give it again, or begin anew"
            )
        self.paid = {**dict.fromkeys(self.budget, 0), **paid}


def _counts(what: str, value: object) -> None:
    """Raises where the value is no whole number of at least 0; True and 2.0 are none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"the {what} is {value!r}: it counts, so give a whole number of at least 0")
