"""Kahneman-Tversky optimisation: learn from single responses that were found good or bad, without any pairs.

    min_θ  E λ_D ( 1 − σ( r̂ − β z ) )  over good responses  +  E λ_U ( 1 − σ( β z − r̂ ) )  over bad ones
    r̂ = β log( π_θ(y | x) / ref(y | x) ),      z = max( 0, mean_i log( π_θ(y_j | x_i) / ref(y_j | x_i) ) ),  j ≠ i

The reference point z says how far the policy has moved anyway: a response counts as a gain only beyond it. It is
estimated from the step's own rows, each prompt with the response to the next one, over the whole batch and before the
learner's step, so that micro-batches cannot change it.

Source: Ethayarajh et al. 2024 (KTO), arXiv version 1, eq. 7 and section 4.1; the balance of λ_D and λ_U: eq. 8 (in the
last version eq. 9, with 3/2 in the place of 4/3).
Differs: responses are mismatched anew in every step, and never with another response to the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from tokenmdp.types import Batch

SETTING = "preference_rl"
ROUNDING = 1e-3  # nats by which log-probabilities of one response may differ between two batches


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start and its reference: best the SFT model
    data: str = "labelled.jsonl"  # prompt, completion, label: a file or a hub id
    beta: float = 0.1  # β, reward units a nat
    desirable: float = 1.0  # λ_D, what a good response is worth
    undesirable: float = 1.0  # λ_U, what a bad one is; λ_D n_D / (λ_U n_U) is best between 1 and 4/3
    steps: int = 100  # optimiser steps
    rows: int = 16  # responses a step
    learning_rate: float = 5e-6  # highest; decays linearly to 0
    warmup: int = 5  # steps over which the rate rises
    max_tokens: int = 256  # longer responses are cut there, and then do not end
    train: str = "all"  # all | top-N blocks | lora-R rank
    held_out: float = 0.1  # share of the prompts whose responses are never trained on
    evaluate_every: int = 20  # steps between measurements on the held-out responses
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.evaluate_every) < 1:
            raise ValueError(
                f"steps={self.steps}, rows={self.rows}, evaluate_every={self.evaluate_every}: each is a count, at least 1"
            )
        if not self.beta > 0 or min(self.desirable, self.undesirable) < 0:
            raise ValueError(
                f"beta={self.beta}, desirable={self.desirable}, undesirable={self.undesirable}: "
                "beta must be positive, the weights at least 0"
            )
        if self.rows < 2:
            raise ValueError(
                f"rows is {self.rows}; a reference point needs at least 2, a prompt and another's response"
            )


def train(cfg: Config, start: Policy, batch: Batch, label: Tensor, run: Run) -> tuple[Policy, dict[str, object]]:
    """Learn from the labels; returns the trained policy and its figures on the held-out responses.

    Args:
        start: where the policy starts, and the reference; frozen.
        batch: responses, split into what is learned from and what is held out.
        label: [B] True for good.

    Raises:
        ValueError: labels of another kind or number than rows, or all of one kind.
    """
    check(batch, label)
    numbered = replace(batch, group=torch.arange(len(batch), device=batch.tokens.device))
    learned, kept = data.split(numbered, cfg.held_out, run.rng, by_prompt=True)
    good, good_kept = label[learned.group], label[kept.group]
    policy = start.twin(cfg.train, name="kto")
    learner = Learner(
        policy, cfg.learning_rate, steps=cfg.steps, warmup=cfg.warmup, schedule="linear", tokens=cfg.micro_tokens
    )
    fingerprint = start.fingerprint()
    run.note(f"reference {start.name} {fingerprint}; policy starts as {policy.fingerprint()}")
    run.note(f"{len(learned)} responses, {int(good.sum())} of them good; {len(kept)} held out")
    balance = cfg.desirable * int(good.sum()) / max(cfg.undesirable * int((~good).sum()), 1e-9)
    if cfg.desirable and cfg.undesirable and not 1 <= round(balance, 2) <= 1.34:  # a weight of 0 is a choice
        run.note(
            f"good responses weigh {balance:.2f} times as much as bad ones; 1 to 1.33 is advised: "
            f"set desirable={cfg.desirable / balance:.3g}"
        )
    reference = totals(start, learned)
    before = totals(start, kept)
    others = mismatched(kept, start.context)
    others_before = totals(start, others)

    def loss(part: Batch, logp_ref: Tensor, good: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = policy.evaluate(part)["logp"].sum(-1)
        reward = preference.implicit_reward(logp, logp_ref, cfg.beta)
        value = preference.kto(logp, logp_ref, good, z, cfg.beta, cfg.desirable, cfg.undesirable)
        zero = torch.zeros_like(reward)
        return value, {
            "rewards/chosen": torch.where(good, reward, zero),
            "rewards/rejected": torch.where(good, zero, reward),
            "logps/chosen": torch.where(good, logp, zero),
            "logps/rejected": torch.where(good, zero, logp),
        }

    def point(part: Batch) -> Tensor:
        wrong = mismatched(part, start.context)
        return preference.kto_reference(totals(policy, wrong), totals(start, wrong))

    for step in run.steps(cfg.steps, learner, title="KTO", setting=SETTING):
        rows = torch.randperm(len(learned), generator=run.rng)[: cfg.rows]
        b, z = learned.select(rows), point(learned.select(rows))
        columns = {"logp_ref": reference[rows], "good": good[rows], "z": z.expand(len(b))}
        metrics = learner.step(loss, b, weights.per_row(len(b)), **columns)
        # The learner gives shares of the whole batch; a dashboard wants means over the rows of one label.
        share = float(good[rows].float().mean())
        for name, part in (("chosen", share), ("rejected", 1 - share)):
            for kind in ("rewards", "logps"):
                whole = metrics.pop(f"{kind}/{name}")
                metrics |= {f"{kind}/{name}": whole / part} if part else {}
        if 0 < share < 1:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics |= {"kl": float(z), "desirable_share": share, "num_tokens": float(b.action.sum())}
        if (step + 1) % cfg.evaluate_every == 0 or step + 1 == cfg.steps:
            seen = judge(cfg, kept, before, totals(policy, kept), good_kept, totals(policy, others) - others_before)
            told = (name for name in ("chosen", "rejected") if f"logp_{name}" in seen)
            metrics |= {f"held_out/logps/{name}": seen[f"logp_{name}"] for name in told}
            metrics["held_out/accuracies"] = seen["accuracy"]
        run.log(step, metrics, headline=("loss", "rewards/margins"))

    figures = judge(cfg, kept, before, totals(policy, kept), good_kept, totals(policy, others) - others_before)
    return policy, {**figures, "balance": balance, "reference": fingerprint}


def check(batch: Batch, label: Tensor) -> None:
    """Labels are True or False, one a row, and of both kinds.

    Raises:
        ValueError: saying what is wrong.
    """
    if label.dtype != torch.bool or tuple(label.shape) != (len(batch),):
        raise ValueError(
            f"labels of type {label.dtype} and shape {tuple(label.shape)} for {len(batch)} responses: give True (good) or "
            "False (bad), one a row"
        )
    if bool(label.all()) or not bool(label.any()):
        raise ValueError(
            f"all {len(batch)} responses are labelled {'good' if bool(label.all()) else 'bad'}: there is nothing to tell "
            "apart; clone good responses with `sft`"
        )


def mismatched(batch: Batch, context: int) -> Batch:
    """Each prompt with a response that was given to another: that of the next row whose prompt differs.

    Where all prompts are one, it is simply the next row's response. What exceeds the context is cut off.
    """
    B = len(batch)
    if B < 2:
        raise ValueError(
            "one response alone cannot be given to another prompt, and KTO measures how far the policy has moved by that: give "
            "more labelled responses, or a larger held_out and rows of at least 2"
        )
    asked = [p.ids for p in batch.prompts]
    answers = [tokens[chosen].tolist() for tokens, chosen in zip(batch.tokens, batch.action, strict=True)]
    after = [[(i + k) % B for k in range(1, B)] for i in range(B)]
    partner = [next((j for j in after[i] if asked[j] != asked[i]), (i + 1) % B) for i in range(B)]
    return Batch.build(
        batch.prompts,
        [answers[j][: context - len(asked[i])] for i, j in enumerate(partner)],
        texts=[batch.texts[j] for j in partner],
        ended=[bool(batch.ended[j]) for j in partner],
    ).to(batch.tokens.device)


def totals(policy: Policy, batch: Batch) -> Tensor:
    """[B] log-probabilities (nats) of the whole responses, without gradient."""
    return in_parts(lambda part: {"logp": policy.evaluate(part)["logp"].sum(-1)}, batch)["logp"]


def judge(cfg: Config, batch: Batch, before: Tensor, now: Tensor, good: Tensor, moved: Tensor) -> dict[str, float]:
    """How often a held-out response lies on its label's side of the reference point, with its 95 % interval (Wilson's,
    responses to one prompt being a cluster), and where the log-probabilities of both kinds went.

    Args:
        batch: the responses.
        before, now: [B] log-probabilities (nats) under the reference and the policy.
        good: [B] labels.
        moved: [B] log-ratios of mismatched responses.
    """
    z = float(moved.mean().clamp(min=0))
    gain = preference.implicit_reward(now, before, cfg.beta) - cfg.beta * z
    right = preference.ranked_right(torch.where(good, gain, -gain), torch.zeros_like(gain), cfg.beta * ROUNDING)
    accuracy, low, high = stats.clustered_wilson(right.double().cpu().numpy(), [p.ids for p in batch.prompts])
    figures = {"accuracy": accuracy, "low": low, "high": high, "n_rows": len(good), "kl": z}
    for name, rows in (("chosen", good), ("rejected", ~good)):
        if bool(rows.any()):  # a small held-out part may hold one kind only
            figures[f"logp_{name}"] = float(now[rows].mean())
            figures[f"logp_{name}_before"] = float(before[rows].mean())
    return figures


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the model and the labelled responses, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    batch, label = data.labelled(files.rows(cfg.data), start, cfg.max_tokens)
    data.tell_cut(batch, cfg.max_tokens, run.note)
    policy, figures = train(cfg, start, batch, label, run)
    return {**figures, **policy.publish(run.folder / "model")}
