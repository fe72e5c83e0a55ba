"""Heads on embeddings: solved where they can be, honest about what they are, plain numbers on disk."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tokenmdp.functional import preference
from tokenmdp.rewards import embedding_head
from tokenmdp.rewards.embedding_head import HEADS, OBJECTIVES, Linear, Trees, fit, from_arrays


def sides(count: int, width: int = 5, seed: int = 0, sharp: float = 2.0, square: bool = False) -> tuple[Tensor, Tensor]:
    """Pairs labelled by σ(sharp · difference) of the first feature, or of the product of the first two."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn((2, count, width), generator=rng)
    worth = [z[:, 0] * z[:, 1] if square else z[:, 0] for z in (x, y)]
    first = torch.rand(count, generator=rng) < torch.sigmoid(sharp * (worth[0] - worth[1]))
    return torch.where(first[:, None], x, y), torch.where(first[:, None], y, x)


def accuracy(head: embedding_head.Head, pairs: tuple[Tensor, Tensor]) -> float:
    return float(preference.ranked_right(head.score(pairs[0]), head.score(pairs[1])).mean())


def test_one_pair_by_hand():
    """Sides +1 and −1: already mean 0 and spread 1, difference 2, λ = 1 · 2² = 4. The gradient of softplus(−2w) + 2w² is
    −2 σ(−2w) + 4w, so w = σ(−2w) / 2: 0.2005."""
    head = fit(torch.tensor([[1.0]]), torch.tensor([[-1.0]]))
    assert isinstance(head, Linear)
    w = float(head.weight)
    assert w == pytest.approx(0.2005, abs=1e-4)
    assert w == pytest.approx(0.5 / (1 + math.exp(2 * w)), abs=1e-6)
    assert float(head.bias) == pytest.approx(0, abs=1e-7)


def test_bradley_terry_is_logistic_regression_on_differences():
    chosen, rejected = sides(300)
    both = torch.cat([chosen, rejected]).double()
    d = (chosen - rejected).double() / both.std(0, unbiased=False)
    ridge = 2.5 * float(d.square().sum(1).mean())
    peer = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-10, max_iter=1000)
    peer.fit(torch.cat([d, -d]).numpy(), [1] * 300 + [0] * 300, sample_weight=[0.5] * 600)
    head = fit(chosen, rejected, penalty=2.5)
    wanted = torch.from_numpy(peer.coef_[0]) / both.std(0, unbiased=False)
    torch.testing.assert_close(head.arrays()["weight"].double(), wanted, atol=1e-5, rtol=1e-4)


def test_the_classifier_is_logistic_regression_on_sides():
    chosen, rejected = sides(300)
    both = torch.cat([chosen, rejected]).double()
    spread = both.std(0, unbiased=False)
    x = (both - both.mean(0)) / spread
    ridge = float((x[:300] - x[300:]).square().sum(1).mean())
    peer = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=1000)
    peer.fit(x.numpy(), [1] * 300 + [0] * 300, sample_weight=[0.5] * 600)
    head = fit(chosen, rejected, objective="classifier")
    wanted = torch.from_numpy(peer.decision_function(x.numpy()))
    torch.testing.assert_close(head.score(both), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_head_learns_what_it_can(head: str, objective: str):
    learned = fit(*sides(1500), head, objective)
    found = accuracy(learned, sides(1000, seed=1, sharp=50.0))
    assert found > 0.85
    curved = accuracy(fit(*sides(1500, square=True, sharp=5.0), head, objective), sides(500, seed=1, square=True))
    assert curved > 0.6 if head != "linear" else 0.4 < curved < 0.6, "a product is no sum"


def test_the_margin_is_a_probability_under_bradley_terry_and_cautious_under_the_classifier():
    """Labels drawn from σ(2 difference) of normal features. The classifier sees a side against an average opponent:
    E σ(2(x − y)) ≈ σ(2x / √(1 + 4π/8)) = σ(1.25 x), so its differences are 1.25/2 = 0.62 of what they are."""
    pairs, held = sides(4000), sides(4000, seed=1)
    sure, careful = (fit(*pairs, objective=objective, penalty=0.01) for objective in OBJECTIVES)
    margin = sure.score(held[0]) - sure.score(held[1])
    assert float(torch.sigmoid(margin.abs()).mean()) == pytest.approx(accuracy(sure, held), abs=0.02)
    ratio = careful.arrays()["weight"][0] / sure.arrays()["weight"][0]
    assert float(ratio) == pytest.approx(0.62, abs=0.06)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_scale_and_place_of_the_features_do_not_matter(head: str):
    chosen, rejected = sides(200)
    scale = torch.tensor([1.0, 1e3, 1e-2, 1.0, 10.0])
    moved = fit(chosen * scale + 7, rejected * scale + 7, head)
    plain = fit(chosen, rejected, head)
    torch.testing.assert_close(moved.score(chosen * scale + 7), plain.score(chosen), atol=2e-3, rtol=2e-3)


def test_labels_the_other_way_round_give_the_opposite_reward():
    chosen, rejected = sides(200)
    one, other = (fit(*pair).arrays()["weight"] for pair in ((chosen, rejected), (rejected, chosen)))
    torch.testing.assert_close(one, -other, atol=1e-6, rtol=1e-6)


def test_a_feature_that_never_changes_earns_nothing():
    chosen, rejected = sides(100)
    chosen[:, 3] = rejected[:, 3] = 0.1
    assert float(fit(chosen, rejected).arrays()["weight"][3]) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("head", HEADS)
def test_on_disk_it_is_numbers_and_the_same(head: str):
    before = torch.get_rng_state()
    learned = fit(*sides(200), head, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the global stream is not touched"
    x, _ = sides(50, seed=2)
    again = from_arrays(head, {name: array.clone() for name, array in learned.arrays().items()})
    assert torch.equal(again.score(x), learned.score(x))
    assert torch.equal(fit(*sides(200), head, seed=3).score(x), learned.score(x)), "it follows from its seed"
    torch.testing.assert_close(learned.score(x), torch.cat([learned.score(x[i : i + 1]) for i in range(50)]))


def test_a_head_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="of kind 'forest'; there are linear, mlp, boosted"):
        from_arrays("forest", {})
    with pytest.raises(ValueError, match="weight of the linear head holds a number that is not finite"):
        from_arrays("linear", {"weight": torch.tensor([math.nan]), "bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="are not the arrays of a linear head"):
        from_arrays("linear", {"weight": torch.zeros(2)})
    trees = fit(*sides(100), "boosted")
    assert isinstance(trees, Trees)
    with pytest.raises(ValueError, match="may end in no leaf"):
        from_arrays("boosted", {**trees.arrays(), "keeps": trees.keeps * 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "deep"}, "head is 'deep'; it must be one of linear, mlp, boosted"),
        ({"objective": "hinge"}, "objective is 'hinge'; it must be one of bradley_terry, classifier"),
        ({"penalty": 0.0}, "penalty is 0.0; it must be positive and finite"),
        ({"rejected": torch.zeros(3, 2)}, "both must be"),
        ({"chosen": torch.zeros(0, 2), "rejected": torch.zeros(0, 2)}, "with some of each"),
        ({"chosen": torch.tensor([[1.0, math.nan]])}, r"the embedding of chosen is not finite in rows \[0\]"),
        ({"rejected": torch.ones(1, 2)}, "in all 1 pairs both sides have the same embedding"),
    ],
)
def test_what_cannot_be_fitted(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        fit(**{"chosen": torch.ones(1, 2), "rejected": torch.zeros(1, 2), **changes})
