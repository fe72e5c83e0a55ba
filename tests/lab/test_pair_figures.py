"""Figures of scored pairs, by hand, and on the degenerate sets that people have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokenmdp.lab import pair_figures, reward_words
from tokenmdp.lab.pair_figures import Scored, calibrated, cross_prompt, figures, temperature

NAN = float("nan")


def scored(chosen: list[float], rejected: list[float], **changes: Any) -> Scored:
    n = len(chosen)
    given: dict[str, Any] = {
        "lengths": np.stack([np.arange(n) % 3 + 1.0, np.arange(n) % 2 + 1.0], axis=1),
        "prompt": np.arange(n),
        "row": np.arange(n),
        "margin": np.full(n, np.nan),
    } | changes
    return Scored(np.array(chosen, dtype=float), np.array(rejected, dtype=float), **given)


def test_accuracy_ties_and_missing_verdicts_by_hand() -> None:
    # Right, wrong, a tie, and two pairs without a verdict: (1 + 0 + ½) / 3.
    found = figures(scored([2, 1, 1, NAN, 3], [1, 2, 1, 0, NAN]), 1.0)
    assert found["accuracy"]["mean"] == 0.5
    assert found["accuracy"]["n"] == 3
    assert (found["ties"], found["no_verdict"]) == (1, 2)
    assert found["accuracy"]["low"] > 0.05
    assert found["accuracy"]["high"] < 0.95


def test_a_reward_without_any_verdict_cannot_be_evaluated() -> None:
    with pytest.raises(ValueError, match="no verdict on both sides of any of 2 pairs"):
        figures(scored([NAN, 1], [0, NAN]), None)


def test_one_pair_and_all_ties_have_figures_and_say_what_they_lack() -> None:
    one = figures(scored([1], [0]), None)
    assert one["accuracy"]["mean"] == 1
    assert one["accuracy"]["low"] < 0.3
    assert "absent" in one["cross_prompt"]
    assert "absent" in one["gain_over_longer"]
    assert "ece" not in one["calibration"]
    assert "ece_tempered" not in one["calibration"]
    ties = figures(scored([1] * 9, [1] * 9), 1.0)
    assert ties["accuracy"]["mean"] == 0.5
    assert ties["ties"] == 9
    assert "constant" in ties["length"]["score_length_spearman"]["absent"]
    assert ties["cross_prompt"]["mean"] == 0.5
    assert ties["cross_prompt"]["low"] < 0.5


def test_pairs_of_one_prompt_are_one_trial() -> None:
    # Eight prompts, five right and three wrong: four copies of each pair are as much evidence, for every rate.
    chosen, rejected = [1] * 5 + [0] * 3, [0] * 5 + [1] * 3
    lengths = np.array([[1.0, 2], [2, 1]] * 4)

    def told(times: int) -> list[dict[str, Any]]:
        subset = [name for name in ["chat", "hard"] * 4 for _ in range(times)]
        changes = {"lengths": np.repeat(lengths, times, 0), "subset": subset}
        sides = (list(np.repeat(x, times)) for x in (chosen, rejected))
        index = np.repeat(np.arange(8), times)
        found = figures(scored(*sides, prompt=index, row=np.arange(8 * times), **changes), None)
        length = found["length"]
        rates = [found["accuracy"], found["longer_is_better"], *found["subsets"].values()]
        return [*rates, length["accuracy_chosen_shorter"], length["accuracy_chosen_longer"]]

    for once, often in zip(told(1), told(4), strict=True):
        assert often["n"] == 4 * once["n"]
        assert often["low"] <= once["low"] + 1e-12
        assert often["high"] >= once["high"] - 1e-12


@pytest.mark.parametrize(("better", "words"), [(1, ": better than a coin."), (-1, ": worse than a coin.")])
def test_a_reward_that_is_always_right_or_always_wrong_is_told_from_a_coin(better: int, words: str) -> None:
    # Forty prompts of two pairs each: Wilson's interval of 40 of 40 begins at 40 / (40 + 1.96²) = 0.912.
    found = figures(scored([better] * 80, [0] * 80, prompt=np.repeat(np.arange(40), 2)), None)
    ends = (found["accuracy"]["low"], found["accuracy"]["high"])
    assert ends == pytest.approx((0.912, 1) if better > 0 else (0, 0.088), abs=1e-3)
    said = reward_words.verdict({"pairs": {**found, "data": {"cut": 0, "duplicates": 0, "contradicted": 0}}})[0]
    assert said.endswith(f"of 80 pairs of 40 prompts{words}")


def test_a_row_of_several_answers_is_right_if_all_its_pairs_are() -> None:
    row = np.array([0, 0, 0, 1, 1, 1])
    found = figures(scored([3, 3, 3, 3, 3, 3], [1, 2, 2.5, 1, 3, 2], row=row, prompt=row), None)
    assert found["rows_all_right"]["mean"] == 0.5
    assert found["rows_all_right"]["n"] == 2


def test_subsets_are_averaged_each_as_one() -> None:
    # chat: 3 of 3; hard: 0 of 1. The mean over pairs is ¾, over subsets ½.
    found = figures(scored([1, 1, 1, 0], [0, 0, 0, 1], subset=["chat", "chat", "chat", "hard"]), None)
    assert found["accuracy"]["mean"] == 0.75
    assert found["mean_of_subsets"] == 0.5
    assert found["subsets"]["hard"]["n"] == 1


def test_margins_are_compared_where_the_data_has_some() -> None:
    chosen = [0.1, 0.2, 0.4, 0.9]
    found = figures(scored(chosen, [0, 0, 0, 0], margin=np.array([1.0, 2, 3, 4])), None)
    assert found["margin_spearman"]["mean"] == 1
    assert "margin_spearman" not in figures(scored(chosen, [0, 0, 0, 0]), None)
    some = figures(scored([*chosen, 5.0], [0] * 5, margin=np.array([1.0, 2, 3, 4, NAN])), None)
    assert (some["margin_spearman"]["mean"], some["margins"]) == (1, 4)


def test_correlations_resample_prompts_and_not_sides_or_pairs() -> None:
    """Fifteen prompts with one pair or four copies of it each: the same figures, and intervals as wide."""
    rng = np.random.default_rng(4)
    chosen, rejected = rng.normal(size=(2, 15))
    lengths, margin = rng.integers(1, 30, size=(15, 2)).astype(float), rng.normal(size=15)

    def told(times: int) -> list[dict[str, Any]]:
        sides = [list(np.repeat(x, times)) for x in (chosen, rejected)]
        changes = {"lengths": np.repeat(lengths, times, 0), "margin": np.repeat(margin, times)}
        found = figures(scored(*sides, prompt=np.repeat(np.arange(15), times), **changes), None)
        return [
            found["margin_spearman"],
            *(found["length"][k] for k in ("score_length_spearman", "difference_spearman")),
        ]

    for once, often in zip(told(1), told(4), strict=True):
        assert often == pytest.approx(once)


def test_a_reward_that_counts_words_is_found_out() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, size=(200, 2)).astype(float)
    found = figures(scored(list(lengths[:, 0]), list(lengths[:, 1]), lengths=lengths), None)
    bias = found["length"]
    assert bias["score_length_spearman"]["mean"] == pytest.approx(1)
    assert bias["accuracy_chosen_shorter"]["mean"] == 0
    assert bias["accuracy_chosen_longer"]["mean"] == 1
    assert "absent" in found["gain_over_longer"], "it is the rule itself, pair by pair"
    assert found["accuracy"]["mean"] == found["longer_is_better"]["mean"]


def test_chosen_against_rejected_of_other_prompts_by_hand() -> None:
    # Chosen 3, 1 and rejected 2, 0: the first beats 0, the second loses to 2; their own pairs do not count.
    found = cross_prompt(scored([3, 1], [2, 0]))
    assert found["mean"] == 0.5
    assert found["pairs"] == 2
    # Pairs of one prompt are not compared with each other: 3 against 5 and 1 against 4 of the same prompt are left out.
    same = cross_prompt(scored([3, 1, 9], [4, 5, 0], prompt=np.array([0, 0, 1])))
    assert (same["pairs"], same["mean"]) == (4, 1.0)


def test_the_cross_prompt_interval_covers() -> None:
    """Prompts shift both answers: chosen − rejected of other prompts is normal with mean 1 and variance 2 + 2."""
    rng = np.random.default_rng(0)
    truth, covered = 0.691462, 0  # Φ(1 / √4)
    for _ in range(60):
        shift = rng.normal(size=80)
        chosen, rejected = shift + rng.normal(size=80) + 1, shift + rng.normal(size=80)
        found = cross_prompt(scored(list(chosen), list(rejected)))
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 52


def test_the_cross_prompt_interval_of_few_prompts_covers() -> None:
    """Three prompts of three pairs; the normal interval holds the truth at 72 %."""
    truth, covered = 0.562816, []  # Φ(½ / √10): chosen − rejected of other prompts has the variance 2 + 2 · 2²
    for seed in range(300):
        rng = np.random.default_rng(seed)
        base = np.repeat(2 * rng.normal(size=3), 3)
        chosen, rejected = base + rng.normal(size=9) + 0.5, base + rng.normal(size=9)
        found = cross_prompt(scored(list(chosen), list(rejected), prompt=np.repeat(np.arange(3), 3)))
        covered.append(found["low"] <= truth <= found["high"])
    assert np.mean(covered) > 0.88


def test_the_temperature_is_the_likeliest_and_mends_a_scale() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=4000)
    sign = np.where(rng.random(4000) < 1 / (1 + np.exp(-logit)), 1.0, -1.0)
    difference = 5 * np.abs(logit) * np.where(sign * logit > 0, 1, -1)  # chosen less rejected, five times too large
    assert temperature(difference) == pytest.approx(5, rel=0.1)
    found = calibrated(difference, np.arange(4000), 1.0)
    assert found["ece"] > 0.1
    assert found["ece_tempered"] < 0.03
    assert calibrated(difference, np.arange(4000), 0.2)["ece"] < 0.03
    assert "ece" not in calibrated(difference, np.arange(4000), None)
    assert np.isfinite(temperature(np.ones(5)))
    assert np.isfinite(temperature(-np.ones(5)))


def test_rates_of_nothing_say_so() -> None:
    assert pair_figures.rate(np.zeros(0), np.zeros(0, dtype=int)) == {"absent": "no such pairs", "n": 0}
