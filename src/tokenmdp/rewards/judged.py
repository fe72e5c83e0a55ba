"""What a learned reward is worth on pairs it never saw: the figures that every recipe for one ends with."""

from __future__ import annotations

from typing import Protocol

import torch

from tokenmdp import stats
from tokenmdp.functional import preference
from tokenmdp.types import Batch, Pairs, Score


class Scaled(Protocol):
    """A reward that was fitted to preferences and then scaled: score = (raw − shift) / scale."""

    scale: float

    def __call__(self, batch: Batch) -> Score: ...


def judge(reward: Scaled, pairs: Pairs) -> dict[str, object]:
    """Held-out accuracy with its interval, calibration of σ(margin), and the correlation of score and length.

    σ is taken of the margin in the units the reward was fitted in, where under Bradley-Terry it is the probability of the
    preference. A pair is seen from its first or its second side in turns, so that both outcomes occur. A tie counts half a right answer.

    Returns:
        `accuracy` with `low` and `high` (95 %, pairs of one prompt as a cluster), `n_pairs`, `ece` and the table `calibration`, and
        `length_correlation` (Spearman, over all responses) with its interval, which resamples prompts, where scores and
        lengths vary and there are at least three prompts.
    """
    chosen, rejected = reward(pairs.chosen).value, reward(pairs.rejected).value
    prompts = [p.ids for p in pairs.chosen.prompts]
    margin = (chosen - rejected) * reward.scale
    right = preference.ranked_right(chosen, rejected).double().cpu().numpy()
    accuracy, low, high = stats.clustered_wilson(right, prompts)
    sign = torch.where(torch.arange(len(pairs), device=margin.device) % 2 == 0, 1.0, -1.0)
    seen, first = torch.sigmoid(margin * sign).cpu().numpy(), (sign > 0).cpu().numpy()
    ece, table = stats.calibration(seen, first, bins=10)
    length = torch.cat([pairs.chosen.action.sum(-1), pairs.rejected.action.sum(-1)]).double().cpu()
    scores = torch.cat([chosen, rejected]).double().cpu()
    bias: dict[str, object] = {}
    varied = bool((length != length[0]).any()) and bool((scores != scores[0]).any())
    if varied and len(set(prompts)) > 2:  # else there is no bias to length to see, or no telling how sure it is
        found = stats.spearman(scores.numpy(), length.numpy(), cluster=prompts * 2)
        bias = {"length_correlation": found.mean, "length_correlation_ci": [found.low, found.high]}
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "n_pairs": len(pairs),
        "ece": ece,
        "calibration": table,
        **bias,
    }
