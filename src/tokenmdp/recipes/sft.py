"""Supervised fine-tuning: behaviour cloning on the token MDP.

    min_θ  − E_{(s, a) ~ demonstrations} log π_θ(a | s)

Behaviour cloning needs demonstrations only: no reward, and no step of the dynamics. It is also the policy gradient
with reward 1 on the demonstrator's actions. Its errors compound where the learner's own prefixes leave the
demonstrated ones.

Source: Pomerleau 1989 (ALVINN); for language models Ouyang et al. 2022, section 3.5 (SFT).
Differs: every token weighs the same by default (`per_token`), over the whole batch, not the average of each
    micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import tasks
from tokenmdp.functional import imitation, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch

SETTING = "offline_imitation"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    data: str = "demonstrations.jsonl"  # text | messages | prompt, completion: a file or a hub id
    task: str = ""  # a task's name, as in `arithmetic`: its own demonstrations are cloned, as they are, and not `data`
    steps: int = 100  # optimiser steps
    rows: int = 16  # demonstrations a step
    learning_rate: float = 5e-5  # highest; decays linearly to 0
    warmup: int = 5  # steps over which the rate rises
    max_tokens: int = 256  # longer demonstrations are cut there, and then do not end
    train: str = "all"  # all | top-N blocks | lora-R rank
    weight: str = "per_token"  # per_token | per_sequence
    held_out: float = 0.05  # share of the demonstrations never trained on
    evaluate_every: int = 20  # steps between measurements of the held-out loss
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.evaluate_every) < 1:
            raise ValueError(
                f"steps={self.steps}, rows={self.rows}, evaluate_every={self.evaluate_every}: each is a count, at least 1"
            )
        if self.weight not in ("per_token", "per_sequence"):
            raise ValueError(f"weight is {self.weight!r}; it must be per_token or per_sequence")


def train(
    cfg: Config, start: Policy, demonstrations: Batch, held_out: Batch, run: Run
) -> tuple[Policy, dict[str, float]]:
    """Clone the demonstrations; returns the trained policy and its figures. `start` is frozen."""
    policy = start.twin(cfg.train, name="sft")
    learner = Learner(
        policy, cfg.learning_rate, steps=cfg.steps, warmup=cfg.warmup, schedule="linear", tokens=cfg.micro_tokens
    )
    weigh = {"per_token": weights.per_token, "per_sequence": weights.per_sequence}[cfg.weight]

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return imitation.nll(policy.evaluate(part)["logp"]), {}

    before = held_out_nll(policy, held_out)
    after = before
    for step in run.steps(cfg.steps, learner, title="behaviour cloning", setting=SETTING):
        b = demonstrations.select(torch.randperm(len(demonstrations), generator=run.rng)[: cfg.rows])
        metrics = learner.step(loss, b, weigh(b.action))
        if (step + 1) % cfg.evaluate_every == 0 or step + 1 == cfg.steps:
            after = held_out_nll(policy, held_out)
            metrics["held_out/nll"] = after
        run.log(step, {**metrics, "num_tokens": float(b.action.sum())}, headline=("loss",))
    return policy, {
        "held_out_nll_before": before,
        "held_out_nll": held_out_nll(policy, held_out) if cfg.steps else after,
    }


def held_out_nll(policy: Policy, batch: Batch) -> float:
    """Mean negative log-likelihood of the held-out tokens, nats a token."""
    logp = in_parts(policy.evaluate, batch)["logp"]
    return float(-(logp * weights.per_token(batch.action)).sum())


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the model and the demonstrations, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model)
    everything = tasks.load(cfg.task, start).demonstrations if cfg.task else None
    if cfg.task and everything is None:
        raise ValueError(f"the task {cfg.task} has no demonstrations to clone: give a file with some by --data")
    everything = everything or data.demonstrations(files.rows(cfg.data), start, cfg.max_tokens)
    data.tell_cut(everything, cfg.max_tokens, run.note)
    learned, kept = data.split(everything, cfg.held_out, run.rng)
    run.note(f"{len(learned)} demonstrations, {len(kept)} held out; start {start.name} {start.fingerprint()}")
    policy, figures = train(cfg, start, learned, kept, run)
    return {**figures, **policy.publish(run.folder / "model")}
