"""The toy of `labels.py`: the tiny model, a hidden worth of digits, and policies that are really trained.

A prompt is three digits, a response six characters. Gold is the mean over its characters of a digit's hidden worth, and 1
more for a digit of the prompt; anything but a digit is worth −2. The start has been cloned from random digits. The reward
model is linear in the shares of the ten digits: it can learn their worth and cannot see the prompt. The settings of all arms
were chosen on a seed that is not reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from labels_choice import Pool, buy, interval, versus
from tokenmdp import mdp
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import dpo, grpo, sft
from tokenmdp.rewards.embedding_head import Head
from tokenmdp.run import Run
from tokenmdp.tasks import Task, data
from tokenmdp.types import Batch, Pairs, Prompt, Reward, Score

LENGTH, OTHER, BONUS = 6, -2.0, 1.0
SAMPLING = Sampling(max_new_tokens=LENGTH)
ARMS = ("reward, random", "reward, d_optimal", "cloned winners", "dpo")


@dataclass(frozen=True)
class Size:
    """How much is done."""

    budgets: tuple[int, ...] = (10, 50, 250)
    seeds: int = 5
    prompts: int = 300  # in the pool, four responses each
    clone_steps: int = 150
    phases: int = 30  # of GRPO
    judged: int = 100  # held-out prompts, four responses each


QUICK = Size(budgets=(8, 16), seeds=2, prompts=12, clone_steps=4, phases=2, judged=6)


def shares(batch: Batch) -> Float[Tensor, "B 11"]:
    """The share of each digit in a response, and of anything else."""
    counts = [[*(text.count(str(d)) for d in range(10)), sum(not c.isdigit() for c in text)] for text in batch.texts]
    return torch.tensor(counts).double() / LENGTH


class Learned:
    """A head on the shares as a reward, normalised on samples of the start."""

    name = "learned"

    def __init__(self, head: Head, samples: Batch) -> None:
        self.head = head
        raw = head.score(shares(samples))
        self.shift, self.scale = float(raw.mean()), max(float(raw.std()), 1e-6)

    def __call__(self, batch: Batch) -> Score:
        """[B] the head's score, in standard deviations of the start's samples."""
        mdp.touch("learned_reward")
        return Score.of(((self.head.score(shares(batch)) - self.shift) / self.scale).float())


class Worth:
    """Gold: the mean worth of the characters of a response."""

    name = "gold"

    def __init__(self, seed: int) -> None:
        drawn = torch.randn(10, generator=torch.Generator().manual_seed(seed))
        self.worth = {str(d): float(w) for d, w in enumerate(drawn)}

    def __call__(self, batch: Batch) -> Score:
        """[B] gold, in reward units a character; an empty response has no verdict."""
        mdp.touch("reward")
        found = [self.of(p.text, text) for p, text in zip(batch.prompts, batch.texts, strict=True)]
        return Score.of(torch.tensor(found))

    def of(self, prompt: str, text: str) -> float:
        """Of one response."""
        worth = [self.worth.get(c, OTHER) + BONUS * (c in self.worth and c in prompt) for c in text]
        return sum(worth) / len(worth) if worth else float("nan")


def world(folder: Path, size: Size) -> tuple[Policy, Task]:
    """The start, cloned once from random digits, and the prompts."""
    blank = catalog.load("tiny")
    rng = torch.Generator().manual_seed(0)
    names = [f"{n:03d}:" for n in torch.randperm(1000, generator=rng).tolist()]
    prompts = [blank.prompt(text, row) for row, text in enumerate(names)]
    responses = ["".join(map(str, row)) for row in torch.randint(10, (1000, LENGTH), generator=rng).tolist()]
    shown = Batch.build(
        prompts, [blank.encode(r) for r in responses], texts=responses, ended=[False] * 1000, pad=blank.eos_ids[0]
    )
    task = Task("worth", tuple(prompts[size.judged :]), tuple(prompts[: size.judged]), shown)
    if not (folder / "start" / "config.json").is_file():
        learned, kept = data.split(shown, 0.05, rng)
        cfg = sft.Config(steps=size.clone_steps, rows=32, learning_rate=3e-3, evaluate_every=10**6)
        with Run.open(folder / "clone", {}, 0, resume=(folder / "clone").exists()) as run:
            start, _ = sft.train(cfg, blank, learned, kept, run)
        start.freeze().save(folder / "start")
    return catalog.load(folder / "start").freeze(), task


def trained(arm: str, folder: Path, size: Size, start: Policy, task: Task, bought: Mapping[str, Any]) -> Policy:
    """The policy an arm makes of what it bought."""
    with Run.open(folder, {"arm": arm}, bought["seed"], resume=folder.exists()) as run:
        if arm.startswith("reward"):
            policy, _ = grpo.train(settings(size), start, bought["reward"], task, run)
        elif arm == "dpo":
            steps = max(
                10, 5 * bought["pairs"] // 16
            )  # as with winners, about five times; DPO holds a tenth of them out
            cfg = dpo.Config(steps=steps, rows=16, learning_rate=3e-4, evaluate_every=10**6, micro_tokens=4096)
            policy, _ = dpo.train(cfg, start, bought["both"], run)
        else:
            steps = max(5, 5 * bought["pairs"] // 32)  # each winner is seen about five times
            cfg_sft = sft.Config(steps=steps, rows=32, learning_rate=1e-3, evaluate_every=10**6, micro_tokens=4096)
            winners: Batch = bought["both"].chosen
            policy, _ = sft.train(cfg_sft, start, winners, winners.select(range(min(8, len(winners)))), run)
    return policy.freeze()


def settings(size: Size) -> grpo.Config:
    """GRPO as every arm with a reward uses it."""
    return grpo.Config(
        steps=size.phases,
        prompts=16,
        samples=4,
        max_new_tokens=LENGTH,
        learning_rate=1e-3,
        kl=0.05,
        minibatches=1,
        micro_tokens=8192,
    )


def judged(policy: Policy, gold: Reward, prompts: tuple[Prompt, ...], seed: int) -> list[float]:
    """[P] mean gold of four responses to each held-out prompt; every policy gets the same uniform numbers."""
    b = policy.sample(prompts, 4, SAMPLING, torch.Generator().manual_seed(1000 + seed))
    value = gold(b).value
    return value.reshape(len(prompts), 4).mean(1).tolist()


def trial(seed: int, folder: Path, size: Size, start: Policy, task: Task) -> dict[str, Any]:
    """One seed: its own worth of the digits, responses and labels; [P] held-out gold of each arm at each budget."""
    gold, rng = Worth(seed), torch.Generator().manual_seed(seed)
    answers = start.sample(task.draw(size.prompts, rng), 4, SAMPLING, rng)
    pool = Pool.of(shares(answers), gold(answers).value, 4, rng)
    found: dict[str, Any] = {"start": judged(start, gold, task.held_out, seed), "paid": {}}
    best = max(gold.worth, key=lambda d: gold.worth[d])
    found["best constant"] = [gold.of(p.text, best * LENGTH) for p in task.held_out]
    found["gold itself"] = _arm("reward, gold", seed, folder, size, start, task, {"reward": gold})
    for choice in ("random", "d_optimal"):
        for ledger, head, rows in buy(pool, choice, size.budgets, torch.Generator().manual_seed(seed)):
            paid = ledger.paid["labels"]
            both = Pairs(answers.select(rows[:, 0]), answers.select(rows[:, 1]), torch.zeros(len(rows)))
            bought = {"reward": Learned(head, answers), "both": both, "pairs": paid}
            for arm in ARMS if choice == "random" else ("reward, d_optimal",):
                if arm == "reward, d_optimal" and choice == "random":
                    continue
                found[f"{arm}@{paid}"] = _arm(f"{arm}@{paid}", seed, folder, size, start, task, bought)
                found["paid"][f"{arm}@{paid}"] = paid
    return found


def _arm(
    name: str, seed: int, folder: Path, size: Size, start: Policy, task: Task, bought: Mapping[str, Any]
) -> list[float]:
    place = folder / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-")
    arm = name.partition("@")[0]
    return judged(trained(arm, place, size, start, task, {**bought, "seed": seed}), Worth(seed), task.held_out, seed)


def run(folder: Path, size: Size, note: Any) -> dict[str, Any]:
    """All seeds; gold of each arm at each budget, and the comparisons that were stated before the run."""
    start, task = world(folder, size)
    seeds = []
    trials = folder / "trials"
    with Run.open(trials, {"size": str(size)}, 0, resume=trials.exists()) as stages:
        for seed in range(size.seeds):
            stage = stages.stage(f"seed-{seed}")
            done = stage.result()
            if done is None:
                done = stage.finish(trial(seed, folder, size, start, task))
            seeds.append(done)
            note(f"toy, seed {seed}: done")
    rows = {name: [s[name] for s in seeds] for name in seeds[0] if name != "paid"}
    last = size.budgets[-1]
    compared = {
        "pays": (f"reward, random@{last}", "start"),
        "grows": (f"reward, random@{last}", f"reward, random@{size.budgets[0]}"),
        "beats cloned winners": (f"reward, random@{last}", f"cloned winners@{last}"),
        "beats dpo": (f"reward, random@{last}", f"dpo@{last}"),
        **{f"d_optimal beats random at {b}": (f"reward, d_optimal@{b}", f"reward, random@{b}") for b in size.budgets},
    }
    return {
        "gold": {name: interval([sum(x) / len(x) for x in per_seed]) for name, per_seed in rows.items()},
        "seeds": {name: [round(sum(x) / len(x), 4) for x in per_seed] for name, per_seed in rows.items()},
        "compared": {name: versus(rows[a], rows[b]) for name, (a, b) in compared.items()},
        "labels": seeds[0]["paid"],
    }
