"""The two forms of over-optimisation by hand, and their fit against curves that are known."""

from __future__ import annotations

import math

import pytest
import torch

from tokenmdp.functional.overoptimisation import FORMS, Form, fit, gain, peak


def test_the_forms_by_hand() -> None:
    d = torch.tensor([0.0, 1.0, 2.0])
    # best of n: d (3 − d/2) = 0, 2.5, 4;   RL: d (3 − ½ log d) = 0, 3, 6 − log 2
    assert torch.allclose(gain(d, 3.0, 0.5, "best_of_n"), torch.tensor([0.0, 2.5, 4.0]))
    assert torch.allclose(gain(d, 3.0, 0.5, "rl"), torch.tensor([0.0, 3.0, 6 - math.log(2)]))


@pytest.mark.parametrize("form", FORMS)
def test_a_curve_of_the_form_is_found_exactly_many_at_a_time(form: Form) -> None:
    d = torch.linspace(0, 3, 12, dtype=torch.float64)
    alpha, beta = torch.tensor([0.5, 2.0, -1.0]).double(), torch.tensor([0.1, 0.7, 0.2]).double()
    curves = gain(d[None], alpha[:, None], beta[:, None], form)
    found = fit(d, curves, form)
    assert torch.allclose(found.alpha, alpha)
    assert torch.allclose(found.beta, beta)
    assert torch.allclose(found.r_squared, torch.ones(3).double())
    one = fit(d, curves[1], form)
    assert one.alpha.shape == ()
    assert float(one.beta) == pytest.approx(0.7)


def test_the_fit_is_the_least_squares_by_hand() -> None:
    # best of n at d = 1, 2 with gains 1, 1 has α − β = 1, 2α − 4β = 1: α = 3/2, β = ½. R² is about the mean, so a third
    # point off the curve (d = 3, curve 0, gain 0.3) is what keeps it below 1.
    d = torch.tensor([1.0, 2.0, 3.0])
    exact = fit(d, torch.tensor([1.0, 1.0, 0.0]), "best_of_n")
    assert float(exact.alpha) == pytest.approx(1.5)
    assert float(exact.beta) == pytest.approx(0.5)
    assert float(exact.peak) == pytest.approx(1.5)
    off = fit(d, torch.tensor([1.0, 1.0, 0.3]), "best_of_n")
    for shift in (-0.01, 0.01):  # any other α or β has more error
        for alpha, beta in ((off.alpha + shift, off.beta), (off.alpha, off.beta + shift)):
            best = (
                (gain(d, float(off.alpha), float(off.beta), "best_of_n") - torch.tensor([1.0, 1.0, 0.3])) ** 2
            ).sum()
            assert ((gain(d, float(alpha), float(beta), "best_of_n") - torch.tensor([1.0, 1.0, 0.3])) ** 2).sum() > best
    assert 0.9 < float(off.r_squared) < 1


def test_r_squared_may_be_negative() -> None:
    # Both forms start at 0; gains that begin high and stay there are told better by a constant.
    found = fit(torch.tensor([0.1, 0.2, 3.0]), torch.tensor([5.0, 5.1, 5.0]), "best_of_n")
    assert float(found.r_squared) < 0


@pytest.mark.parametrize("form", FORMS)
def test_the_peak_is_where_the_form_is_highest(form: Form) -> None:
    alpha, beta = torch.tensor(1.0), torch.tensor(0.6)
    top = float(peak(alpha, beta, form))
    around = gain(torch.tensor([top - 0.05, top, top + 0.05]), 1.0, 0.6, form)
    assert int(around.argmax()) == 1
    assert float(peak(alpha, -beta, form)) == math.inf


def test_a_best_of_n_curve_that_only_falls_peaks_at_the_start() -> None:
    assert float(peak(torch.tensor(-1.0), torch.tensor(0.5), "best_of_n")) == 0
    assert float(peak(torch.tensor(-1.0), torch.tensor(0.0), "best_of_n")) == 0


def test_what_cannot_be_fitted_says_why() -> None:
    d, up = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="two different distances"):
        fit(torch.tensor([0.0, 1.0, 1.0]), up, "rl")
    with pytest.raises(ValueError, match="all gains of a curve are equal"):
        fit(d, torch.ones(3), "rl")
    with pytest.raises(ValueError, match="not finite"):
        fit(d, torch.tensor([0.0, math.nan, 1.0]), "rl")
    with pytest.raises(ValueError, match="is negative"):
        fit(torch.tensor([-1.0, 1.0, 2.0]), up, "rl")
