"""One draw a row: the right distribution, its exact log-probability, and no token that was excluded."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from tokenmdp.models.sampling import Sampling, draw

NEARLY_ONE = 1 - 2**-53


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_logits(rows: int, vocabulary: int, seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed))


def reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution by its definition, one row, in float64: temper, keep the top k, keep the nucleus, normalise."""
    p = torch.softmax(logits.double() / sampling.temperature, -1)
    order = sorted(range(len(p)), key=lambda v: -float(p[v]))
    kept = order[: sampling.top_k or len(p)]
    total = float(p[kept].sum())
    nucleus, mass = [], 0.0
    for v in kept:
        if mass >= sampling.top_p * total:
            break
        nucleus.append(v)
        mass += float(p[v])
    q = torch.zeros_like(p)
    q[nucleus] = p[nucleus] / mass
    return q


def test_draws_follow_the_softmax_on_a_small_vocabulary() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -0.4, 1.1, -3.0])
    token, _ = draw(logits.expand(20_000, -1), uniforms(20_000), Sampling())
    counts = torch.bincount(token, minlength=7).numpy()
    assert stats.chisquare(counts, 20_000 * torch.softmax(logits.double(), -1).numpy()).pvalue > 1e-3


def test_draws_follow_the_softmax_on_a_large_vocabulary() -> None:
    """5,000 is not a multiple of the block; neighbouring tokens are pooled until each bin expects enough draws."""
    logits = random_logits(1, 5000)[0]
    token, _ = draw(logits.expand(3000, -1), uniforms(3000), Sampling())
    bins = torch.arange(5000) // 125
    expected = torch.zeros(40, dtype=torch.float64).index_add(0, bins, torch.softmax(logits.double(), -1))
    counts = torch.bincount(bins[token], minlength=40).numpy()
    assert stats.chisquare(counts, 3000 * expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("vocabulary", [3, 255, 256, 257, 512, 5000])
def test_the_draw_inverts_the_cumulative_distribution(vocabulary: int) -> None:
    logits, u = random_logits(300, vocabulary), uniforms(300)
    token, _ = draw(logits, u, Sampling())
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    want = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0].clamp(max=vocabulary - 1)
    # Where a uniform number falls within rounding of a boundary, either neighbour is right.
    edge = (cumulative - u[:, None]).abs().min(-1).values < 1e-6
    assert torch.equal(token[~edge], want[~edge])
    assert edge.float().mean() < 0.05


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.5),
        Sampling(temperature=1.7),
        Sampling(top_k=3),
        Sampling(top_k=1),
        Sampling(top_k=1000),
        Sampling(top_p=0.6),
        Sampling(top_p=1e-9),
        Sampling(temperature=0.7, top_k=9, top_p=0.8),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [11, 300])
def test_log_probability_is_that_of_the_truncated_distribution(sampling: Sampling, vocabulary: int) -> None:
    logits = random_logits(1, vocabulary)[0]
    q = reference(logits, sampling)
    token, logp = draw(logits.expand(500, -1), uniforms(500), sampling)
    assert bool((q[token] > 0).all()), "a token outside the kept set was drawn"
    assert torch.allclose(logp.double(), q[token].log(), atol=2e-6)
    seen = torch.bincount(token, minlength=vocabulary) > 0
    assert bool(seen[q > 0.03].all()), "a likely token of the kept set was never drawn"


def test_no_uniform_number_picks_a_token_without_probability() -> None:
    """0 and the largest number below 1, with excluded tokens at both ends and whole excluded blocks."""
    logits = torch.full((4, 1100), -math.inf)
    logits[0, 3] = 0.0
    logits[1, 700:702] = 0.0
    logits[2, 1099] = 0.0
    logits[3, 255:257] = torch.tensor([0.0, -20.0])
    for u, want in ((0.0, [3, 700, 1099, 255]), (NEARLY_ONE, [3, 701, 1099, 256])):
        token, logp = draw(logits, torch.full((4,), u, dtype=torch.float64), Sampling())
        assert token.tolist() == want
        assert bool(torch.isfinite(logp).all())


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=2), Sampling(top_p=0.5), Sampling(temperature=1e-3)], ids=str
)
@pytest.mark.parametrize("u", [0.0, 0.5, NEARLY_ONE])
def test_extreme_uniform_numbers_give_finite_log_probabilities(sampling: Sampling, u: float) -> None:
    logits = 30 * random_logits(200, 777)  # differences of hundreds of nats: most tokens underflow to probability 0
    _, logp = draw(logits, torch.full((200,), u, dtype=torch.float64), sampling)
    assert bool(torch.isfinite(logp).all())
    assert bool((logp <= 1e-6).all())


def test_greedy_takes_the_most_likely_token_with_certainty() -> None:
    logits = random_logits(50, 40)
    token, logp = draw(logits, uniforms(50), Sampling(temperature=0))
    assert torch.equal(token, logits.argmax(-1))
    assert torch.equal(logp, torch.zeros(50))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, u, sampling = random_logits(64, 500), uniforms(64), Sampling(temperature=0.8, top_p=0.9)
    token, logp = draw(logits, u, sampling)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    again, logp_again = draw(logits[order], u[order], sampling)
    assert torch.equal(again, token[order])
    assert torch.equal(logp_again, logp[order])
    alone = [draw(logits[i : i + 1], u[i : i + 1], sampling) for i in range(64)]
    assert torch.equal(torch.cat([a for a, _ in alone]), token)
    assert torch.allclose(torch.cat([b for _, b in alone]), logp, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = random_logits(3, 10)
    logits[1, 4] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(logits, uniforms(3), Sampling())


def test_a_row_without_any_possible_token_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.full((1, 5), -math.inf), uniforms(1), Sampling())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_settings_outside_their_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{field: value})
