"""The ledger: exact counts, budgets that hold, nothing half-paid, and exact resume."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp.ledger import Ledger, Overdrawn
from tokenmdp.run import Run


def test_payments_add_up_and_the_rest_is_left():
    ledger = Ledger(labels=10)
    ledger.pay("labels", 3)
    ledger.pay("labels")
    ledger.pay("queries", 5)  # no budget: counted, never refused
    assert ledger.paid == {"labels": 4, "queries": 5}
    assert ledger.left("labels") == 6
    assert (ledger.left("queries"), ledger.left("smiles")) == (None, None)


def test_a_payment_beyond_the_budget_changes_nothing_and_says_what_is_left():
    ledger = Ledger(labels=10)
    ledger.pay("labels", 8)
    with pytest.raises(Overdrawn, match=r"3 labels asked for, but 8 of 10 are paid and 2 left.*at most 2"):
        ledger.pay("labels", 3)
    assert ledger.paid == {"labels": 8}
    ledger.pay("labels", 2)
    assert ledger.left("labels") == 0
    with pytest.raises(Overdrawn):
        ledger.pay("labels")


@given(st.lists(st.integers(0, 7)), st.integers(0, 20))
def test_never_more_is_paid_than_the_budget_and_paid_and_left_sum_to_it(counts: list[int], budget: int):
    ledger, total = Ledger(labels=budget), 0
    for count in counts:
        try:
            ledger.pay("labels", count)
            total += count
        except Overdrawn:
            assert total + count > budget
        assert ledger.paid["labels"] == total <= budget
        assert ledger.left("labels") == budget - total


@pytest.mark.parametrize("count", [-1, 1.0, True, None])
def test_what_does_not_count_is_refused(count: object):
    with pytest.raises(ValueError, match="whole number"):
        Ledger().pay("labels", count)
    with pytest.raises(ValueError, match="budget of labels"):
        Ledger(labels=count)


def test_a_resumed_run_has_paid_what_it_had_paid(tmp_path):
    def go(resume: bool, until: int) -> dict[str, int]:
        run, ledger = Run.open(tmp_path / "run", {}, 0, resume=resume), Ledger(labels=12)
        with run:
            for step in run.steps(6, ledger, title="labels", every_seconds=0.0):
                ledger.pay("labels", 2)
                if step == until:
                    raise KeyboardInterrupt
        return ledger.paid

    with pytest.raises(KeyboardInterrupt):
        go(False, 3)
    assert go(True, 99) == {"labels": 12}  # not 6 + 4 payments more: those before the checkpoint are not paid again


def test_a_smaller_budget_than_was_paid_is_refused_at_resume():
    then = Ledger(labels=10)
    then.pay("labels", 9)
    empty: dict[str, torch.Tensor] = {}
    now = Ledger(labels=5)
    with pytest.raises(Overdrawn, match="9 labels of 5"):
        now.restore(empty, then.scalars())
    assert now.paid == {"labels": 0}
    unlimited = Ledger()
    unlimited.restore(empty, then.scalars())
    assert unlimited.paid == {"labels": 9}
