"""Ranking within and across prompts, by hand and by law."""

from __future__ import annotations

import numpy as np
import pytest

from tokenmdp.lab import concordance


def test_pairs_are_counted_by_hand() -> None:
    # Prompt 0 has gold 1, 2 and scores 5, 6: right. Prompt 1 has gold 3, 4 and scores 2, 1: wrong. Across, gold says every
    # response of prompt 1 is better (4 pairs) and the score says the opposite of all.
    found = concordance.by_pairs([[5, 6], [2, 1]], [[1, 2], [3, 4]])
    assert (found["same_pairs"], found["cross_pairs"]) == (2, 4)
    assert found["same_prompt"]["mean"] == 0.5
    assert found["cross_prompt"]["mean"] == 0.0
    assert "absent" in found["difference"], "across takes both prompts, so no resample of two says anything new"
    # Ties of the score count one half, ties of gold not at all.
    tied = concordance.by_pairs([[5, 5, 7]], [[1, 2, 2]])
    assert (tied["same_pairs"], tied["same_prompt"]["mean"]) == (2, 0.75)
    assert "different prompts" in tied["cross_prompt"]["absent"]


def test_a_constant_a_prompt_leaves_the_order_within_prompts_and_spoils_the_rest() -> None:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(40, 6))
    shifted = gold + 50 * rng.normal(size=(40, 1))
    found = concordance.by_pairs(shifted, gold)
    assert found["same_prompt"]["mean"] == 1.0
    assert found["same_prompt"]["low"] < 1.0, "all right in forty prompts is no certainty"
    assert found["cross_prompt"]["mean"] == pytest.approx(0.5, abs=0.1)
    assert found["difference"]["low"] > 0
    ranks = concordance.by_ranks(shifted, gold)
    assert "absent" in ranks["within"], "1 in every prompt has no spread to resample"
    assert abs(ranks["pooled"]["mean"]) < 0.4
    assert concordance.spread(shifted)["between_share"] > 0.95
    assert concordance.by_pairs(gold, gold)["cross_prompt"]["mean"] == 1.0


def test_the_interval_covers_what_a_new_draw_of_prompts_gives() -> None:
    """Two hundred prompts of which some are judged well and some badly: resampling prompts must cover the truth."""
    rng = np.random.default_rng(1)
    truth = 0.5 + np.arctan(1 / np.sqrt(3)) / np.pi  # concordance of normals with correlation ½ is ½ + asin(ρ)/π
    covered = 0
    for seed in range(40):
        gold = rng.normal(size=(30, 4))
        score = 0.5 * gold + np.sqrt(0.75) * rng.normal(size=(30, 4))
        found = concordance.by_pairs(score, gold, resamples=400, seed=seed)["cross_prompt"]
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 34


def test_the_interval_of_few_prompts_covers() -> None:
    """Scores of five prompts that know nothing of gold: one half; the percentile interval holds it at 82 %."""
    covered = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        score, gold = (rng.normal(size=(5, 4)) + rng.normal(size=(5, 1)) for _ in range(2))
        found = concordance.by_pairs(score, gold, resamples=400)["same_prompt"]
        covered.append(found["low"] <= 0.5 <= found["high"])
    assert np.mean(covered) > 0.88


def test_missing_scores_leave_their_pairs_out() -> None:
    nan = float("nan")
    whole = concordance.by_pairs([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    assert whole["cross_pairs"] == 4
    some = concordance.by_pairs([[1, nan], [3, 4]], [[1, 2], [3, nan]])
    assert (some["same_pairs"], some["cross_pairs"]) == (0, 1)
    assert "absent" in some["same_prompt"]
    ranks = concordance.by_ranks([[nan, nan, nan]], [[1, 2, 3]])
    assert "absent" in ranks["within"]
    assert "absent" in ranks["pooled"]
    assert "absent" in ranks["of_means"]
    with pytest.raises(ValueError, match=r"\[prompts, samples\]"):
        concordance.by_pairs([1, 2], [1, 2])


def test_spread_by_hand() -> None:
    # 0, 2 | 4, 6: mean 3, squares 9 + 1 + 1 + 9 = 20, within 4 x 1 = 4. MSB = 16 / 1, MSW = 4 / 2, σ²_between = (16 − 2) / 2.
    found = concordance.spread([[0, 2], [4, 6]])
    assert found == pytest.approx({"mean": 3.0, "total": np.sqrt(5), "within": 1.0, "between_share": 7 / 9})
    # 0, 2 | 4, 6 | 5: mean 17 / 5, MSW = 4 / (5 − 3), k = (5 − 9 / 5) / 2 = 1.6.
    rows = np.array([[0, 2], [4, 6], [5, np.nan]])
    msb = (2 * (1 - 3.4) ** 2 + 2 * (5 - 3.4) ** 2 + (5 - 3.4) ** 2) / 2
    between = (msb - 2) / 1.6
    assert concordance.spread(rows)["between_share"] == pytest.approx(between / (between + 2))
    assert concordance.spread([[1, 1], [1, 1]])["between_share"] == 0.0
    assert concordance.spread([[0, 2], [2, 0]])["between_share"] == 0.0
    assert concordance.spread([[0, 2]])["between_share"] is None
    assert concordance.spread([[0], [2]])["between_share"] is None


@pytest.mark.parametrize("k", [2, 4, 8])
def test_noise_has_no_share_between_prompts(k: int) -> None:
    rng = np.random.default_rng(1)
    noise, own = rng.normal(size=(400, k)), rng.normal(size=(400, 1))
    assert concordance.spread(noise)["between_share"] < 0.1, "the sums of squares alone would say 1/k"
    assert concordance.spread(noise + own)["between_share"] == pytest.approx(0.5, abs=0.08)


def test_ranks_within_prompts_are_averaged_over_them() -> None:
    # Orders 1 2 3 against 1 2 3 (1), 3 2 1 (-1) and 2 1 3 (½): the mean is 1/6.
    found = concordance.by_ranks([[1, 2, 3], [3, 2, 1], [2, 1, 3]], [[1, 2, 3]] * 3)
    assert found["within"]["mean"] == pytest.approx(1 / 6)
    assert found["prompts_within"] == 3
