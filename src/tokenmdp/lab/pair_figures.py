"""What the scores of compared pairs say of a reward: accuracy, calibration, length bias, and what a plain rule would do.

A tie counts half a right answer. A pair in which either side has no verdict is left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from tokenmdp import stats
from tokenmdp.lab.concordance import LEVEL, said
from tokenmdp.stats import Array, Interval

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Scored:
    """N pairs with their scores.

    Attributes:
        chosen, rejected: [N] scores; NaN where there is no verdict.
        lengths: [N, 2] response tokens of both.
        prompt: [N] which prompt; pairs of one prompt are one cluster.
        row: [N] which row of the file; a row may list several answers.
        margin: [N] how much better, where the data says so; NaN where it does not.
        subset: N names of the data's parts; empty without any.
    """

    chosen: Array
    rejected: Array
    lengths: Array
    prompt: Labels
    row: Labels
    margin: Array
    subset: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def known(self) -> NDArray[np.bool_]:
        """[N] where both sides have a verdict."""
        return np.asarray(np.isfinite(self.chosen) & np.isfinite(self.rejected))

    def select(self, where: NDArray[np.bool_]) -> Scored:
        """The pairs where the mask is True."""
        names = [name for name, kept in zip(self.subset, where, strict=True) if kept] if self.subset else ()
        scores = (self.chosen[where], self.rejected[where], self.lengths[where])
        return Scored(*scores, self.prompt[where], self.row[where], self.margin[where], names)


def right(difference: Array) -> Array:
    """[N] 1 for a positive difference, ½ for none, 0 for a negative one."""
    return np.asarray((np.sign(difference) + 1) / 2)


def rate(values: Array, prompt: Labels) -> dict[str, Any]:
    """A rate with Wilson's interval for as many trials as the pairs are worth: those of one prompt share its difficulty."""
    if len(values) == 0:
        return {"absent": "no such pairs", "n": 0}
    return {**stats.clustered_wilson(values, prompt)._asdict(), "n": len(values)}


def by_cluster(values: Array, cluster: Labels) -> Array:
    """The mean of each cluster."""
    _, which = np.unique(cluster, return_inverse=True)
    return np.asarray(np.bincount(which, weights=values) / np.bincount(which))


def figures(scored: Scored, scale: float | None) -> dict[str, Any]:
    """Everything the pairs say of the reward.

    Args:
        scored: the pairs.
        scale: what a difference of scores is multiplied by to be the logarithm of odds, as the reward was trained;
            None where its unit is its own.

    Raises:
        ValueError: no pair has a verdict on both sides.
    """
    kept = scored.select(scored.known)
    if len(kept) == 0:
        raise ValueError(
            f"the reward gave no verdict on both sides of any of {len(scored)} pairs: there is nothing to evaluate; see "
            "no_verdict.jsonl for what it said"
        )
    difference = kept.chosen - kept.rejected
    found = right(difference)
    longer = right(kept.lengths[:, 0] - kept.lengths[:, 1])
    out: dict[str, Any] = {
        "accuracy": rate(found, kept.prompt),
        "ties": int((difference == 0).sum()),
        "no_verdict": len(scored) - len(kept),
        "prompts": len(np.unique(kept.prompt)),
        "cross_prompt": cross_prompt(kept),
        "longer_is_better": rate(longer, kept.prompt),
        "gain_over_longer": said(lambda: stats.bootstrap_mean(by_cluster(found - longer, kept.prompt))),
        "calibration": calibrated(difference, kept.prompt, scale),
        "length": length_bias(kept),
    }
    rows, first = np.unique(kept.row, return_index=True)
    if len(rows) < len(kept):  # rows with several answers: RewardBench's second version
        whole = np.array([found[kept.row == row].min() == 1 for row in rows], dtype=np.float64)
        out["rows_all_right"] = rate(whole, kept.prompt[first])
    given = np.isfinite(kept.margin)
    if given.any():
        out["margins"] = int(given.sum())
        out["margin_spearman"] = said(
            lambda: stats.spearman(difference[given], kept.margin[given], cluster=kept.prompt[given])
        )
    if kept.subset:
        names = np.array(kept.subset)
        parts = {name: names == name for name in sorted(set(kept.subset))}
        out["subsets"] = {name: rate(found[here], kept.prompt[here]) for name, here in parts.items()}
        out["mean_of_subsets"] = float(np.mean([part["mean"] for part in out["subsets"].values()]))
    return out


def cross_prompt(scored: Scored) -> dict[str, Any]:
    """How often a chosen response outscores a rejected one of another prompt.

        AUC = P( s(x, y_chosen) > s(x', y_rejected) ),   x ≠ x'

    Nobody compared these: a preference says nothing of another prompt's answers, and prompts differ in how good both of
    their answers are. But it is what a batch of many prompts asks of the score. The interval is Student's for as many units as
    prompts, its variance that of the influence of each.

    Source: DeLong et al. 1988, eqs. 4 and 5 for the influences; Obuchowski 1997 for clusters.
    """
    c, r, cluster = scored.chosen, scored.rejected, np.unique(scored.prompt, return_inverse=True)[1]
    prompts, n = int(cluster.max()) + 1, len(c)
    if prompts < 2:
        return {"absent": "one prompt has no other to be compared with"}

    def below(x: Array, y: Array) -> Array:
        """[len(x)] how many of y lie below each of x, ties one half."""
        ordered = np.sort(y)
        return np.asarray((np.searchsorted(ordered, x) + np.searchsorted(ordered, x, "right")) / 2)

    wins, losses = (
        below(c, r),
        n - below(r, c),
    )  # [N] of each chosen over all rejected; of all chosen over each rejected
    members = [np.flatnonzero(cluster == p) for p in range(prompts)]
    own = np.array([below(c[i], r[i]).sum() for i in members])
    size = np.array([len(i) for i in members])
    total, pairs = float(wins.sum() - own.sum()), float(n * n - (size**2).sum())
    mean = total / pairs
    # Each prompt is in a pair as the chosen side and as the rejected one: what it adds beyond what its pairs are worth.
    influence = np.bincount(cluster, weights=wins + losses) - 2 * own - mean * 2 * size * (n - size)
    deviation = float(np.sqrt((influence**2).sum() * prompts / (prompts - 1)) / pairs)
    half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, prompts - 1)) * deviation
    if deviation == 0:
        return {**stats.wilson(mean * prompts, prompts)._asdict(), "pairs": int(pairs)}
    return {**Interval(mean, max(0.0, mean - half), min(1.0, mean + half))._asdict(), "pairs": int(pairs)}


def calibrated(difference: Array, prompt: Labels, scale: float | None) -> dict[str, Any]:
    """Expected calibration error of σ(difference), as the scores are and after a temperature.

        τ = argmin Σ log(1 + exp(−difference / τ)),   fitted on one half of the prompts and used on the other, both ways

    Pairs are looked at from either side in turn, so that both outcomes occur.

    Returns:
        `ece` and `table` on the scale the reward was trained on, where it has one; `temperatures`, `ece_tempered` and
        `table_tempered` always, except where the pairs have too few prompts for halves.
    """
    side = np.where(np.arange(len(difference)) % 2 == 0, 1.0, -1.0)
    outcome = (side > 0).astype(np.float64)

    def measured(logit: Array) -> tuple[float, list[dict[str, float]]]:
        return stats.calibration(1 / (1 + np.exp(-np.clip(side * logit, -500, 500))), outcome)

    out: dict[str, Any] = {"scale": "as trained" if scale is not None else "arbitrary: see the tempered figures"}
    if scale is not None:
        out["ece"], out["table"] = measured(difference * scale)
    half = np.unique(prompt, return_inverse=True)[1] % 2 == 0
    if not half.all() and bool((difference != 0).any()):
        tempered, taus = np.zeros(len(difference)), []
        for here in (half, ~half):
            taus.append(temperature(difference[~here]))
            tempered[here] = difference[here] / taus[-1]
        out["temperatures"] = taus
        out["ece_tempered"], out["table_tempered"] = measured(tempered)
    return out


def temperature(difference: Array) -> float:
    """The τ that makes σ(difference / τ) most likely, within a factor of 1,000 of the differences' own size.

    Pairs that are all ranked right have no finite likeliest temperature, and chance has none at all: the bounds stand in.
    """
    size = float(np.abs(difference).mean()) or 1.0
    found = scipy.optimize.minimize_scalar(
        lambda log_tau: float(np.logaddexp(0, -difference / (size * np.exp(log_tau))).mean()),
        bounds=(-np.log(1000), np.log(1000)),
        method="bounded",
    )
    return float(size * np.exp(found.x))


def length_bias(scored: Scored) -> dict[str, Any]:
    """Does the score go with length: over responses, over differences within pairs, and where the shorter one is right.

    The correlations' intervals resample prompts: both sides of a pair, and all pairs of a prompt, are one cluster.
    """
    score = np.concatenate([scored.chosen, scored.rejected])
    length = np.concatenate([scored.lengths[:, 0], scored.lengths[:, 1]])
    difference, longer = scored.chosen - scored.rejected, scored.lengths[:, 0] - scored.lengths[:, 1]
    found, prompt = right(difference), scored.prompt
    return {
        "score_length_spearman": said(lambda: stats.spearman(score, length, cluster=np.tile(prompt, 2))),
        "difference_spearman": said(lambda: stats.spearman(difference, longer, cluster=prompt)),
        "accuracy_chosen_shorter": rate(found[longer < 0], prompt[longer < 0]),
        "accuracy_chosen_longer": rate(found[longer > 0], prompt[longer > 0]),
        "same_length": int((longer == 0).sum()),
    }
