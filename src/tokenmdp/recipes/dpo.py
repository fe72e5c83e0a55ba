"""Direct preference optimisation: the policy is its own reward model, so fitting the reward solves the MDP.

    min_θ  − E log σ( r̂(x, y_chosen) − r̂(x, y_rejected) ),     r̂(x, y) = β log( π_θ(y | x) / ref(y | x) )

Nothing is sampled: the log-probabilities of the reference, which is the policy's own start, are computed once. What
takes the place of −log σ is `loss`:

    sigmoid   with label_smoothing > 0 conservative DPO, which expects flipped labels: the verb `cdpo`
    robust    corrects for labels flipped at the rate `label_smoothing`
    ipo       a squared error, for which a preference that never varies asks for a finite difference
    simpo     r̂ = β log π_θ(y | x) / |y|, less a margin; no reference
    orpo      clones the chosen response and weighs the two sides' odds; no reference

Only differences of r̂ count, so the chosen response may become less likely as long as the rejected one does so faster.
That is reported: both sides' log-probabilities are logged apart, and where the held-out chosen ones fell while the
margin grew, the run says so and why.

Source: Rafailov et al. 2023, eq. 7; the others as in `functional.preference`. The falling chosen responses: Pal et al.
2024, "Smaug", section 3; Razin et al. 2024, "Unintentional unalignment".
Differs: `ipo` takes log-probabilities summed over tokens, as its equation does, where some libraries take their means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import stats
from tokenmdp.functional import preference, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Pairs

SETTING = "preference_rl"
VARIANTS = {
    "ipo": {"loss": "ipo"},
    "cdpo": {"label_smoothing": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0},
    "orpo": {"loss": "orpo", "learning_rate": 2e-5},
}
LOSSES = ("sigmoid", "robust", "ipo", "simpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "orpo")
ROUNDING = 1e-3  # nats by which log-probabilities of one response may differ between two batches

Sides = tuple[Tensor, Tensor]
"""A number a pair for the chosen response and one for the rejected."""


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start and its reference: best the SFT model
    data: str = "preferences.jsonl"  # prompt, chosen, rejected (or hh-rlhf transcripts): a file or a hub id
    loss: str = "sigmoid"  # sigmoid | robust | ipo | simpo | orpo
    beta: float = 0.1  # β, reward units a nat; of orpo the weight of the odds beside the cloning
    label_smoothing: float = 0.0  # share of labels believed to be flipped, for sigmoid and robust
    margin: float = 1.0  # γ of simpo, reward units
    steps: int = 100  # optimiser steps
    rows: int = 16  # pairs a step
    learning_rate: float = 5e-6  # highest; decays linearly to 0
    warmup: int = 5  # steps over which the rate rises
    max_tokens: int = 256  # longer responses are cut there, and then do not end
    train: str = "all"  # all | top-N blocks | lora-R rank
    held_out: float = 0.1  # share of the prompts whose pairs are never trained on
    evaluate_every: int = 20  # steps between measurements on the held-out pairs
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.evaluate_every) < 1:
            raise ValueError(
                f"steps={self.steps}, rows={self.rows}, evaluate_every={self.evaluate_every}: each is a count, at least 1"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}")
        if not self.beta > 0 or self.margin < 0:
            raise ValueError(f"beta={self.beta}, margin={self.margin}: beta must be positive, margin at least 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; a share of flips is at least 0 and below 0.5")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"loss={self.loss} does not smooth labels: set label_smoothing=0, or loss=sigmoid or robust"
            )


def compare(cfg: Config, now: Sides, reference: Sides, pairs: Pairs) -> tuple[Tensor, Sides]:
    """[B] the loss of each pair, and the implicit rewards of its sides."""
    if cfg.loss in WITHOUT_REFERENCE:
        lengths = pairs.chosen.action.sum(-1), pairs.rejected.action.sum(-1)
        rewards = cfg.beta * now[0] / lengths[0], cfg.beta * now[1] / lengths[1]
        if cfg.loss == "orpo":
            return preference.orpo(*now, *lengths, cfg.beta), rewards
        return preference.simpo(*now, *lengths, cfg.beta, cfg.margin), rewards
    rewards = (
        preference.implicit_reward(now[0], reference[0], cfg.beta),
        preference.implicit_reward(now[1], reference[1], cfg.beta),
    )
    if cfg.loss == "ipo":
        return preference.ipo(*now, *reference, cfg.beta), rewards
    loss = preference.dpo if cfg.loss == "sigmoid" else preference.robust_dpo
    return loss(*now, *reference, cfg.beta, cfg.label_smoothing), rewards


def train(cfg: Config, start: Policy, pairs: Pairs, run: Run) -> tuple[Policy, dict[str, object]]:
    """Learn the preferences; returns the trained policy and its figures on the held-out pairs.

    Args:
        start: where the policy starts, and the reference; frozen.
        pairs: split into what is learned from and what is held out; pairs with equal sides are skipped and counted.

    Raises:
        ValueError: no pair has sides that differ, or all have one prompt, so that nothing can be held out.
    """
    pairs, equal = data.distinct(pairs)
    learned, kept = data.split(pairs, cfg.held_out, run.rng)
    policy = start.twin(cfg.train, name=cfg.loss)
    learner = Learner(
        policy, cfg.learning_rate, steps=cfg.steps, warmup=cfg.warmup, schedule="linear", tokens=cfg.micro_tokens
    )
    fingerprint = start.fingerprint()
    run.note(f"reference {start.name} {fingerprint}; policy starts as {policy.fingerprint()}")
    run.note(f"{len(learned)} pairs, {len(kept)} held out, {equal} skipped: their two sides are the same response")
    before = sides(start, kept)
    reference = sides(start, learned) if cfg.loss not in WITHOUT_REFERENCE else (torch.zeros(len(learned)),) * 2

    def loss(part: Pairs, chosen_ref: Tensor, rejected_ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # One pass over both sides: a pair's sides share a micro-batch.
        logp = policy.evaluate(Batch.concat([part.chosen, part.rejected]))["logp"].sum(-1)
        chosen, rejected = logp.split(len(part))
        value, rewards = compare(cfg, (chosen, rejected), (chosen_ref, rejected_ref), part)
        return value, {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": preference.ranked_right(*rewards, cfg.beta * ROUNDING),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }

    for step in run.steps(cfg.steps, learner, title=f"preferences, {cfg.loss}", setting=SETTING):
        rows = torch.randperm(len(learned), generator=run.rng)[: cfg.rows]
        part = learned.select(rows)
        columns = {"chosen_ref": reference[0][rows], "rejected_ref": reference[1][rows]}
        metrics = learner.step(loss, part, weights.per_row(len(part)), **columns)
        metrics["num_tokens"] = float(part.chosen.action.sum() + part.rejected.action.sum())
        if (step + 1) % cfg.evaluate_every == 0 or step + 1 == cfg.steps:
            seen = judge(cfg, before, sides(policy, kept), kept)
            metrics |= {
                "held_out/accuracies": seen["accuracy"],
                "held_out/margins": seen["margin"],
                "held_out/logps/chosen": seen["logp_chosen"],
                "held_out/logps/rejected": seen["logp_rejected"],
            }
        run.log(step, metrics, headline=("loss", "rewards/accuracies"))

    figures = judge(cfg, before, sides(policy, kept), kept)
    said = explain(figures)
    if said:
        run.note(said)
    return policy, {
        **figures,
        "falling_chosen": bool(said),
        "falling_chosen_why": said,
        "equal_pairs": equal,
        "reference": fingerprint,
    }


def sides(policy: Policy, pairs: Pairs) -> Sides:
    """Log-probabilities (nats) of the whole responses, without gradient."""

    def summed(part: Batch) -> dict[str, Tensor]:
        return {"logp": policy.evaluate(part)["logp"].sum(-1)}

    return in_parts(summed, pairs.chosen)["logp"], in_parts(summed, pairs.rejected)["logp"]


def judge(cfg: Config, before: Sides, now: Sides, pairs: Pairs) -> dict[str, float]:
    """How often the implicit reward puts the chosen response first, and where both sides' log-probabilities went.

    Proportions come with their 95 % interval (Wilson's, pairs of one prompt being a cluster); a tie counts one half.
    """
    _, (chosen, rejected) = compare(cfg, now, before, pairs)
    _, (chosen_was, rejected_was) = compare(cfg, before, before, pairs)
    right = preference.ranked_right(chosen, rejected, cfg.beta * ROUNDING).double()
    prompts = [p.ids for p in pairs.chosen.prompts]
    accuracy, low, high = stats.clustered_wilson(right.cpu().numpy(), prompts)
    fell, fell_low, fell_high = stats.clustered_wilson((now[0] < before[0]).double().cpu().numpy(), prompts)
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "n_pairs": len(pairs),
        "margin": float((chosen - rejected).mean()),
        "margin_before": float((chosen_was - rejected_was).mean()),
        "logp_chosen": float(now[0].mean()),
        "logp_chosen_before": float(before[0].mean()),
        "logp_rejected": float(now[1].mean()),
        "logp_rejected_before": float(before[1].mean()),
        "chosen_fell": fell,
        "chosen_fell_low": fell_low,
        "chosen_fell_high": fell_high,
    }


def explain(figures: dict[str, float]) -> str:
    """What to know where the chosen responses became less likely while the margin grew; empty where they did not."""
    fallen = figures["logp_chosen_before"] - figures["logp_chosen"]
    grown = figures["margin"] - figures["margin_before"]
    if fallen <= ROUNDING or grown <= 0:
        return ""
    return (
        f"the held-out chosen responses became less likely, by {fallen:.3g} nats on average and in "
        f"{figures['chosen_fell']:.0%} of the pairs ({figures['chosen_fell_low']:.0%} to "
        f"{figures['chosen_fell_high']:.0%}), while the margin grew by {grown:.3g}: the loss sees only the difference of "
        "the two sides, which share much of their text, so pushing down the rejected one drags the chosen one along, and "
        "the probability goes to responses that are in no pair; loss=orpo, a larger beta, a smaller learning_rate or "
        "fewer steps hold against it"
    )


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the model and the pairs, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    pairs = data.pairs(files.rows(cfg.data), start, cfg.max_tokens)
    data.tell_cut(pairs, cfg.max_tokens, run.note)
    policy, figures = train(cfg, start, pairs, run)
    return {**figures, **policy.publish(run.folder / "model")}
