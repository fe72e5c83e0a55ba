"""Advantage-weighted regression: clone what was logged, the better it was the more.

    min_θ  − Σ_i ω_i Σ_t log π_θ(a_t | s_t),     ω_i = min( exp(A_i / β), ω_max ),     A_i = score_i − baseline_i

Offline: nothing is sampled, the reward is only what the log says. Supervised fine-tuning on weighted rows can leave the
data's policy no further than its best rows reach; β says how near to those. With `weighting=top` a row counts fully or
not at all: behaviour cloning of the best share (the variant `filtered-bc`).

Source: Peng et al. 2019 (AWR), algorithm 1; filtered cloning: Chen et al. 2021 (decision transformer),
section 5.1, "percentile behaviour cloning".
Differs: the baseline is the mean score of the prompt where it was answered more than once, else of all rows, in place
    of a learned value; the log is fixed, so there is one policy iteration; the weights are divided by their mean over
    the log, so that β does not change the learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp.functional import imitation, returns, value_loss, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Score

SETTING = "offline_rl"
VARIANTS = {"filtered-bc": {"weighting": "top"}}


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    data: str = "logged.jsonl"  # prompt, completion, reward: a file or a hub id
    steps: int = 100  # optimiser steps
    rows: int = 16  # logged responses a step
    learning_rate: float = 5e-5  # highest; decays linearly to 0
    warmup: int = 5  # steps over which the rate rises
    weighting: str = "exponential"  # exponential | top
    beta: float = 0.5  # β of `exponential`, in standard deviations of the advantage
    clip: float = 20.0  # ω_max of `exponential`
    keep: float = 0.2  # share of the rows that `top` clones
    baseline: str = "prompt"  # what a score is compared with: prompt | mean (of all rows)
    max_tokens: int = 256  # longer responses are cut there, and then do not end
    train: str = "all"  # all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient


def advantages(score: Tensor, logged: Batch, rows: Tensor, baseline: str) -> Tensor:
    """[B] how much better each response was than others to its prompt (or than all); 0 without a verdict.

    Raises:
        ValueError: an unknown baseline; or no two rows differ, so that there is nothing to prefer.
    """
    if baseline not in ("prompt", "mean"):
        raise ValueError(f"baseline is {baseline!r}; it must be prompt or mean")
    everyone = torch.zeros_like(logged.group)
    names = {ids: i for i, ids in enumerate(dict.fromkeys(p.ids for p in logged.prompts))}
    prompt = torch.tensor([names[p.ids] for p in logged.prompts], device=score.device)
    answered = torch.bincount(prompt[rows], minlength=len(names))[prompt]
    own = (answered > 1) & (baseline == "prompt")
    expected = torch.where(own, returns.group_mean(score, prompt, rows), returns.group_mean(score, everyone, rows))
    advantage = torch.where(rows, score - expected, torch.zeros_like(score))
    if not bool((returns.whiten(advantage, rows.to(score.dtype)) != 0).any()):
        raise ValueError(
            f"the {int(rows.sum())} rows with a score do not differ from their baseline: there is nothing to prefer; "
            "log several responses of different scores, or clone them all with `sft`"
        )
    return advantage


def exponential(advantage: Tensor, rows: Tensor, beta: float, clip: float) -> tuple[Tensor, Tensor]:
    """[B] exp(A / β) with mean 1 over the rows with a verdict, and which were clipped; β in standard deviations."""
    spread = float(advantage[rows].square().mean().sqrt())
    omega, clipped = value_loss.advantage_weight(advantage, beta * spread, clip)
    omega = torch.where(rows, omega, torch.zeros_like(omega))
    return omega * rows.sum() / omega.sum(), clipped & rows


def top(advantage: Tensor, rows: Tensor, keep: float) -> Tensor:
    """[B] equal weights, of mean 1, on the best `keep` of the rows with a verdict.

    Rows as good as the last one kept are kept too, unless that one is among the worst: ties do not bring those in.

    Raises:
        ValueError: a share outside (0, 1).
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}; it is the share of the rows to clone, between 0 and 1")
    ordered = advantage[rows].sort(descending=True).values
    last = ordered[max(1, math.ceil(keep * len(ordered))) - 1]
    kept = rows & (advantage >= last) & (advantage > ordered[-1])
    return kept.to(advantage.dtype) * rows.sum() / kept.sum()


def train(cfg: Config, start: Policy, logged: Batch, score: Tensor, run: Run) -> tuple[Policy, dict[str, float]]:
    """Clone the log by its advantages; returns the policy, and what share of the log did the teaching.

    Args:
        start: where the policy starts; frozen.
        logged: responses that anyone may have drawn.
        score: [B] what was logged of each; not finite means no verdict, and weight 0.

    Raises:
        ValueError: scores of another number than rows, or what `advantages` and the weights raise.
    """
    if tuple(score.shape) != (len(logged),):
        raise ValueError(f"{tuple(score.shape)} scores for {len(logged)} logged responses: one of each a row")
    judged = Score.of(score)
    rows = judged.verdict
    advantage = advantages(judged.value, logged, rows, cfg.baseline)
    if cfg.weighting == "exponential":
        omega, clipped = exponential(advantage, rows, cfg.beta, cfg.clip)
    elif cfg.weighting == "top":
        omega, clipped = top(advantage, rows, cfg.keep), torch.zeros_like(rows)
    else:
        raise ValueError(f"weighting is {cfg.weighting!r}; it must be exponential or top")
    effective = float(omega.sum() ** 2 / omega.square().sum() / rows.sum())
    run.note(f"{len(logged)} logged responses, {int((~rows).sum())} without a score; effectively {effective:.0%} teach")

    policy = start.twin(cfg.train, name="awr")
    learner = Learner(
        policy, cfg.learning_rate, steps=cfg.steps, warmup=cfg.warmup, schedule="linear", tokens=cfg.micro_tokens
    )

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return imitation.nll(policy.evaluate(part)["logp"]), {}

    for step in run.steps(cfg.steps, learner, title=f"{cfg.weighting} regression", setting=SETTING):
        part = torch.randperm(len(logged), generator=run.rng)[: cfg.rows]
        b, judged_rows = logged.select(part), rows[part]
        w = weights.per_token(b.action, judged_rows) * omega[part][:, None]
        idle = not bool((w > 0).any())  # nothing of the draw is cloned: a step would only carry Adam's momentum on
        metrics = {"loss": 0.0, "grad_norm": 0.0} if idle else learner.step(loss, b, w)
        metrics["skipped_updates"] = float(idle)
        metrics["objective/scores"] = float(judged.value[part][judged_rows].mean()) if bool(judged_rows.any()) else 0.0
        metrics["num_tokens"] = float(b.action.sum())
        metrics["no_verdict"] = float((~judged_rows).sum())
        run.log(step, metrics, headline=("loss",))
    return policy, {
        "effective_share": effective,
        "clipped_share": float(clipped.sum() / rows.sum()),
        "score_logged": float(judged.value[rows].mean()),
        "score_weighted": float((omega * judged.value).sum() / omega.sum()),
    }


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the model and the log, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model)
    logged, score = data.logged(files.rows(cfg.data), start, cfg.max_tokens)
    data.tell_cut(logged, cfg.max_tokens, run.note)
    run.note(f"start {start.name} {start.fingerprint()}")
    policy, figures = train(cfg, start, logged, score, run)
    return {**figures, **policy.publish(run.folder / "model")}
