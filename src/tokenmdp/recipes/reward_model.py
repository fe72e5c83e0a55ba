"""Reward modelling: inverse reinforcement learning from comparisons.

    min_φ  − E log σ( r_φ(x, y_chosen) − r_φ(x, y_rejected) − m )  +  c · ( r_φ(x, y_chosen) + r_φ(x, y_rejected) )²

The reward that explains the preferences is a proxy of expensive feedback: it can be asked as often as one likes, and it
is wrong where the policy goes that the comparisons did not. With `objective` classifier each side is an observation of
its own, −½ log σ(r_chosen) − ½ log σ(−r_rejected), in place of the first term.

Source: Bradley & Terry 1952; Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023 (Llama 2), eq. 2; centring:
    Eisenstein et al. 2023; classifier: Sun, Shen & Ton 2024.
Differs: the score is read at the last real token, found by position; scores are normalised once, after training, on
    given samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenmdp.functional import preference, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.rewards import comparisons
from tokenmdp.rewards.judged import judge
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Pairs

SETTING = "preference_rl"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the body the reward head sits on: best the SFT model
    data: str = "preferences.jsonl"  # prompt, chosen, rejected (or hh-rlhf transcripts): a file or a hub id
    epochs: int = 1  # passes over the pairs; more than one overfits soon
    rows: int = 16  # pairs a step
    learning_rate: float = 5e-5  # highest; decays linearly to 0
    head_learning_rate: float = 5e-3  # of the head, which starts at zero: at 1e-3 a few hundred labels hardly move it
    warmup: int = 3  # steps over which the rates rise
    train: str = "all"  # what of the body trains: all | top-N blocks | lora-R rank | head (nothing but the head)
    pool: str = "last"  # what the head reads: last (what other tools expect) | mean (better with few labels)
    objective: str = "bradley_terry"  # bradley_terry, of pairs | classifier, of single sides
    centring: float = 0.01  # c, weight of the squared sum of a pair's scores
    margin: bool = False  # demand the data's margin between chosen and rejected
    held_out: float = 0.1  # share of the pairs never trained on
    max_tokens: int = 512  # longer responses are cut there
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient


def train(
    cfg: Config, policy: Policy, pairs: Pairs, held_out: Pairs, run: Run
) -> tuple[RewardModel, dict[str, object]]:
    """Fit the reward to the pairs; returns it, normalised on the held-out responses, with its held-out figures.

    Raises:
        ValueError: an unknown objective, or a margin for one that has none.
    """
    if cfg.objective not in ("bradley_terry", "classifier"):
        raise ValueError(f"objective is {cfg.objective!r}; it must be bradley_terry or classifier")
    if cfg.margin and cfg.objective == "classifier":
        raise ValueError("a classifier sees one side at a time and knows no margin: use --objective bradley_terry")
    reward = RewardModel.from_policy(policy, cfg.train, cfg.pool)
    per_epoch = -(-len(pairs) // cfg.rows)
    steps = cfg.epochs * per_epoch
    learner = Learner(
        reward,
        cfg.learning_rate,
        rates={f"{reward.head_name}.": cfg.head_learning_rate},
        steps=steps,
        warmup=min(cfg.warmup, steps),
        schedule="linear",
        tokens=cfg.micro_tokens,
    )

    def loss(part: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        # One pass over both sides: a pair's sides share a micro-batch.
        score = reward.last(Batch.concat([part.chosen, part.rejected]))
        chosen, rejected = score.split(len(part))
        if cfg.objective == "classifier":
            value = preference.both_sides(chosen, rejected)
        else:
            value = preference.bradley_terry(chosen, rejected, part.margin if cfg.margin else torch.zeros_like(chosen))
        value = value + cfg.centring * preference.centring(chosen, rejected)
        return value, {
            "rewards/accuracies": preference.ranked_right(chosen, rejected),
            "rewards/margins": chosen - rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
        }

    for step in run.steps(steps, learner, title="reward model", setting=SETTING):
        epoch, at = divmod(step, per_epoch)
        # An epoch's order depends on the seed and the epoch alone, so a resumed run draws the same one.
        shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(run.seed * 1_000_003 + epoch))
        part = pairs.select(shuffled[at * cfg.rows : (at + 1) * cfg.rows])
        metrics = learner.step(loss, part, weights.per_row(len(part)))
        run.log(step, metrics, headline=("loss", "rewards/accuracies"))
    reward.backbone.freeze()
    reward.normalise(Batch.concat([held_out.chosen, held_out.rejected]))
    return reward, judge(reward, held_out)


def check_margins(rows: Sequence[Mapping[str, Any]], pairs: Pairs, run: Run) -> None:
    """See that margins are there to be demanded.

    Raises:
        ValueError: no row has one, or one is negative: the rejected side would be the better one.
    """
    given = [row.get("margin") is not None for row in rows]
    if not any(given):
        raise ValueError(f"margin is demanded (--margin), and none of the {len(rows)} rows has a column `margin`")
    if bool((pairs.margin < 0).any()):
        at = int((pairs.margin < 0).nonzero()[0])
        raise ValueError(
            f"row {pairs.chosen.prompts[at].row}: margin is {float(pairs.margin[at]):g}; it says how much better the chosen "
            "side is, so it is at least 0"
        )
    run.note(f"{sum(given)} of {len(rows)} rows have a margin; the others are taken as 0")


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the body and the pairs, train, save the reward model to `model/` in the run folder."""
    policy = catalog.load(cfg.model)
    rows = files.rows(cfg.data)
    everything = data.pairs(rows, policy, cfg.max_tokens)
    if cfg.margin:
        check_margins(rows, everything, run)
    data.tell_cut(everything, cfg.max_tokens, run.note)
    learned, kept, found = comparisons.divided(everything, cfg.held_out, run.rng)
    run.note(
        f"{len(learned)} pairs, {len(kept)} held out by prompt; body {policy.name} {policy.fingerprint()}; found: {found}"
    )
    reward, figures = train(cfg, policy, learned, kept, run)
    reward.save(run.folder / "model")
    return {**figures, **found, "model": str(run.folder / "model")}
