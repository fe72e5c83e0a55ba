"""Hindsight relabelling: a response that missed its instruction is a demonstration of the instruction it did satisfy.

    y ~ π_θ(· | x),    x' = the instruction that y satisfies,     min_θ  − Σ_t log π_θ(y_t | x', y_{<t})

Goal-conditioned RL by supervised learning. Where the reward is one in hundreds, a failure teaches as much as a success,
since the goal is part of the state and the state can be rewritten. It needs a reward that can name the instruction a
response satisfies: an object with `satisfied(text) -> str | None`, as the task `copying` has. With `relabel` off
only the successes are cloned: the control.

Source: Andrychowicz et al. 2017 (HER), algorithm 1; for instructions Zhang et al. 2023 (HIR), algorithm 1.
Differs: fresh samples in every round and no replay buffer, no contrastive or entropy term. What each instruction is
    cloned from weighs the same in a round, however often it was met, so that what comes easily does not crowd out the rest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tokenmdp import gate, judge, rewards, tasks
from tokenmdp.functional import imitation, measures, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Prompt, Reward

SETTING = "rl"


@runtime_checkable
class Names(Protocol):
    """A reward that can say what a response is a right answer to."""

    def satisfied(self, text: str) -> str | None: ...


@dataclass(frozen=True)
class Config:
    model: str = "tiny"  # the policy's start
    reward: str = "copying"  # a reward that names the instruction a response satisfies
    task: str = "copying"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    steps: int = 40  # rounds of sampling, relabelling and cloning
    prompts: int = 16  # prompts a round
    samples: int = 8  # responses a prompt
    max_new_tokens: int = 2  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling and of the loss
    learning_rate: float = 3e-3  # constant
    epochs: int = 1  # passes over a round's demonstrations
    minibatches: int = 2  # optimiser steps a pass
    relabel: bool = True  # rewrite the instructions of failures; if not, clone the successes only
    train: str = "all"  # all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; a policy that learns from its own draws needs chance: take one above 0"
            )


def relabelled(b: Batch, goals: list[str | None], policy: Policy) -> Batch | None:
    """The responses that satisfy something, each after the instruction that it does satisfy; None if none does.

    Args:
        goals: what each row satisfies.
    """
    kept = [i for i, goal in enumerate(goals) if goal is not None]
    if not kept:
        return None
    prompts: list[Prompt] = [
        p if goals[i] == p.text else policy.prompt(str(goals[i]), p.row, p.columns)
        for i, p in ((i, b.prompts[i]) for i in kept)
    ]
    return Batch.build(
        prompts,
        [b.tokens[i][b.action[i]].tolist() for i in kept],
        texts=[b.texts[i] for i in kept],
        ended=[bool(b.ended[i]) for i in kept],
        pad=policy.eos_ids[0],
    ).to(b.tokens.device)


def balance(demonstrations: Batch) -> Tensor:
    """[B] weights of mean 1 that sum to the same for every instruction."""
    count = Counter(p.ids for p in demonstrations.prompts)
    share = [len(demonstrations) / (len(count) * count[p.ids]) for p in demonstrations.prompts]
    return torch.tensor(share, device=demonstrations.tokens.device)


def train(
    cfg: Config, reference: Policy, reward: Reward, task: Task, run: Run, gold: Reward | None = None
) -> tuple[Policy, dict[str, float]]:
    """Learn to follow instructions from what the policy happened to do.

    Args:
        reference: where the policy starts; frozen.
        gold: a second reward that is only recorded.

    Raises:
        ValueError: the reward cannot name what a response satisfies.
    """
    if not isinstance(reward, Names):
        raise ValueError(
            f"the reward {reward.name} cannot name the instruction that a response satisfies, so nothing can be "
            "relabelled: give it a method satisfied(text) -> str | None, as the task `copying` has"
        )
    policy = reference.twin(cfg.train, name="hindsight")
    learner = Learner(policy, cfg.learning_rate, tokens=cfg.micro_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    run.note(f"start {reference.name} {reference.fingerprint()}")

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return imitation.nll(policy.evaluate(part, temperature=cfg.temperature)["logp"]), {}

    for step in run.steps(cfg.steps, learner, title="hindsight", setting=SETTING):
        # 1. Try, judge, rewrite what was asked.
        b = policy.sample(task.draw(cfg.prompts, run.rng), cfg.samples, sampling, run.rng)
        score = reward(b)
        run.missing(step, b, score)
        if step == 0:
            gate.tell(run, policy, b)
        met = [reward.satisfied(text) for text in b.texts]
        goals = [g if cfg.relabel or g == p.text else None for g, p in zip(met, b.prompts, strict=True)]
        shown = relabelled(b, goals, policy)
        entropy = in_parts(lambda part: policy.evaluate(part, ("entropy",), cfg.temperature), b)["entropy"]

        # 2. Clone.
        learned: list[dict[str, float]] = []
        even = None if shown is None else balance(shown)
        for _ in range(cfg.epochs if shown is not None else 0):
            assert shown is not None
            assert even is not None
            for part in torch.randperm(len(shown), generator=run.rng).chunk(cfg.minibatches):
                mini = shown.select(part)
                learned.append(learner.step(loss, mini, weights.per_token(mini.action) * even[part][:, None]))

        # 3. Say what happened.
        metrics = {
            "objective/scores": float(score.value[score.verdict].mean()) if bool(score.verdict.any()) else 0.0,
            "objective/entropy": float((entropy * weights.per_token(b.action)).sum()),
            "hindsight/kept": sum(g is not None for g in goals) / len(b),
            "hindsight/different": float(len({g for g in goals if g is not None})),
            **measures.responses(b, score),
        }
        if learned:  # a round that satisfied nothing takes no optimiser step
            metrics["loss/policy_avg"] = sum(m["loss"] for m in learned) / len(learned)
            metrics["grad_norm"] = sum(m["grad_norm"] for m in learned) / len(learned)
        if gold is not None:
            truth = gold(b)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        run.log(step, metrics, headline=("objective/scores", "hindsight/kept"))
    return policy, {}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the start, the reward and the prompts, train, save the policy to `model/` in the run folder."""
    reference = catalog.load(cfg.model).freeze()
    reward = rewards.load(cfg.reward, reference)
    task = tasks.load(cfg.task, reference)
    gold = rewards.load(cfg.gold, reference) if cfg.gold else None
    policy, figures = train(cfg, reference, reward, task, run, gold)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    judged = judge.held_out(reference, policy, reward, task, sampling, run, gold)
    return {**figures, **judged, **saved}
