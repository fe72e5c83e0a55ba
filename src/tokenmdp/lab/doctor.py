"""A minute or two on your model, prompts, reward and data before money is spent: what would silently go wrong, measured.

A few responses are sampled and looked at in the ways in which such runs are known to fail without a sign: an end that is
never learned, a template gone past, sampler and learner of two minds, padding or micro-batches that change the numbers,
a reward that depends on its neighbours, groups without anything to compare, data cut at a default. Each check has a figure;
the checks are in `lab.checks`. It ends with an error where one fails, so that a script stops there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmdp import rewards, tasks
from tokenmdp.lab import checks
from tokenmdp.lab.checks import Finding, Patient
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Pairs, Reward, Score

SCRATCH = True  # a tool: it leaves no run folder behind unless one is asked for


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # what would be trained: a name, a folder or a hub id
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    reward: str = ""  # what would be optimised; empty for the task's own, where it has one
    data: str = ""  # demonstrations or preferences that would be learned from; empty for none
    prompts: int = 8  # prompts asked
    samples: int = 4  # responses to each
    max_new_tokens: int = 24  # the horizon H, in tokens
    max_tokens: int = 256  # where responses of the data would be cut
    train: str = "all"  # what would train: all | top-N blocks | lora-R rank


class Unwell(ValueError):
    """A check failed."""


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Sample, look, print what was found.

    Raises:
        Unwell: a check failed; the table says which and what to do.
        ValueError: `train` leaves nothing of the policy to train.
    """
    if cfg.train in ("none", "head"):
        raise ValueError(
            f"train is {cfg.train!r}, which trains nothing of a policy: give all, top-N (blocks) or lora-R (rank)"
        )
    policy = catalog.load(cfg.model).freeze()
    task = tasks.load(cfg.task, policy)
    prompts = task.draw(min(cfg.prompts, len(task.train)), run.rng)
    sampling = Sampling(cfg.max_new_tokens)
    begun = time.monotonic()
    sampled = policy.sample(prompts, cfg.samples, sampling, run.rng)
    seconds = time.monotonic() - begun
    reward = rewards.load(cfg.reward, policy) if cfg.reward else task.reward
    score, fault = judged(reward, sampled)
    patient = Patient(
        policy=policy,
        prompts=prompts,
        sampled=sampled,
        seconds=seconds,
        train=cfg.train,
        sampling=sampling,
        reward=reward,
        score=score,
        fault=fault,
        data=read(cfg.data, policy, cfg.max_tokens) if cfg.data else None,
        max_tokens=cfg.max_tokens,
    )
    with run.progress(len(checks.CHECKS), "looking", "checks") as bar:
        found = checks.look(patient, bar.advance)
    Console(width=None if Console().is_terminal else 140).print(table(found, policy.name))
    count = Counter(one.status for one in found)
    if count["fail"]:
        named = "; ".join(f"{one.check}: {one.figure}" for one in found if one.status == "fail")
        raise Unwell(
            f"{count['fail']} of {len(found)} checks failed ({named}): what they mean stands in the table above"
        )
    return {"passed": count["pass"], "warnings": count["warn"], "checks": [asdict(one) for one in found]}


def judged(reward: Reward | None, b: Batch) -> tuple[Score | None, str]:
    """What a reward says of a batch, or why it says nothing."""
    if reward is None:
        return None, ""
    try:
        return reward(b), ""
    except Exception as fault:  # whatever breaks the user's reward is what the doctor is asked to find
        return None, f"{type(fault).__name__}: {fault}"


def read(source: str, policy: Policy, max_tokens: int) -> Batch | Pairs:
    """Preferences where the rows have two sides, else demonstrations."""
    rows = files.rows(source)
    if rows and {"chosen", "rejected"} <= rows[0].keys():
        return data.pairs(rows, policy, max_tokens)
    return data.demonstrations(rows, policy, max_tokens)


def table(found: Sequence[Finding], name: str) -> Table:
    """A line a check, the worst first among those that are not passed."""
    order = {"fail": 0, "warn": 1, "pass": 2}
    colours = {"fail": "bold red", "warn": "yellow", "pass": "green"}
    shown = Table(title=f"{name}: {len(found)} checks", title_justify="left")
    for head in ("", "check", "measured", "what it means"):
        shown.add_column(head, overflow="fold")
    for one in sorted(found, key=lambda one: order[one.status]):
        shown.add_row(Text(one.status, colours[one.status]), Text(one.check), Text(one.figure), Text(one.says))
    return shown
