"""How often a model is right at the first attempt, and at least once in k: pass@1 and pass@k with intervals.

Held-out prompts are answered n times each; a response is right if its score reaches `right`. pass@k is the unbiased
estimate from n ≥ k samples, the intervals resample problems. A prompt with a response that got no verdict is left out
and counted.

Source: Chen et al. 2021 (Codex), section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenmdp import rewards, stats, tasks
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.types import Prompt, Reward


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    task: str = "arithmetic"  # a task's name, `name:option`, a file or a hub id; its held-out prompts are answered
    reward: str = ""  # what judges; empty for the task's own (see `rewards.load`)
    prompts: int = 100  # prompts answered, at most
    n: int = 8  # samples a prompt; pass@k is given for k = 1, 2, 4, ... and n
    right: float = 1.0  # a score of at least this is right
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0  # nucleus mass kept
    chunk: int = 16  # prompts answered between checkpoints

    def __post_init__(self) -> None:
        if min(self.prompts, self.n, self.chunk) < 1:
            raise ValueError(f"prompts={self.prompts}, n={self.n}, chunk={self.chunk}: each is at least 1")


class Tally:
    """What each prompt's samples scored so far: its row, and for each sample 1, 0 or (no verdict) nothing."""

    def __init__(self) -> None:
        self.right: list[list[float | None]] = []

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def scalars(self) -> dict[str, Any]:
        return {"right": self.right}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.right = [list(row) for row in scalars["right"]]


def attempts(k: int) -> list[int]:
    """1, 2, 4, ... and k."""
    return sorted({*(2**i for i in range(k.bit_length())), k})


def measure(
    cfg: Config, policy: Policy, prompts: Sequence[Prompt], reward: Reward, run: Run
) -> list[list[float | None]]:
    """Answer the prompts; for each of them 1 for every right sample, 0 for a wrong one, None where there was no verdict.

    Responses go to samples.jsonl.
    """
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    tally = Tally()
    chunks = [list(prompts[i : i + cfg.chunk]) for i in range(0, len(prompts), cfg.chunk)]
    for step in run.steps(len(chunks), tally, title="pass@k"):
        b = policy.sample(chunks[step], cfg.n, sampling, run.rng)
        score = reward(b)
        judged = [
            float(value >= cfg.right) if verdict else None
            for value, verdict in zip(score.value.tolist(), score.verdict.tolist(), strict=True)
        ]
        for row, right in enumerate(judged):
            run.sample(b, row, policy.name, right=right)
        tally.right += [judged[i : i + cfg.n] for i in range(0, len(judged), cfg.n)]
        given = [right for right in judged if right is not None]
        run.log(
            step,
            {
                "pass@1": sum(given) / max(1, len(given)),
                "completions/mean_length": float(b.action.sum(-1).float().mean()),
                "completions/clipped_ratio": float((~b.ended).float().mean()),
                "num_tokens": float(b.action.sum()),
                "no_verdict": float(len(judged) - len(given)),
            },
            headline=("pass@1",),
        )
    return tally.right


def summary(right: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """pass@k for k = 1, 2, 4, ... and n, over the prompts whose samples all have a verdict.

    Raises:
        ValueError: fewer than two prompts are left.
    """
    given = ([one for one in row if one is not None] for row in right)
    whole = [kept for kept, row in zip(given, right, strict=True) if len(kept) == len(row)]
    if len(whole) < 2:
        raise ValueError(
            f"{len(whole)} of {len(right)} prompts have a verdict for each sample: an interval over prompts needs at least "
            "two; see which reward gives none, and why"
        )
    found = {f"pass@{k}": stats.pass_at_k(whole, k)._asdict() for k in attempts(len(whole[0]))}
    return {**found, "prompts": len(whole), "left_out": len(right) - len(whole), "samples": len(whole[0])}


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Load the model, the task and the reward; answer the held-out prompts and count."""
    policy = catalog.load(cfg.model).freeze()
    task = tasks.load(cfg.task, policy)
    reward = rewards.load(cfg.reward, policy) if cfg.reward else task.reward
    if reward is None:
        raise ValueError(f"the task {cfg.task} knows no true reward: name one by --reward")
    prompts = task.held_out or task.train
    order = torch.randperm(len(prompts), generator=run.rng)[: cfg.prompts].tolist()
    asked = [prompts[i] for i in order]
    seen = task.learned(asked)
    which = f"prompts of {task.name}, {seen} of them TRAINING prompts" if seen else f"held-out prompts of {task.name}"
    run.note(f"{len(asked)} of the {len(prompts)} {which}")
    return summary(measure(cfg, policy, asked, reward, run))
