"""What each solver is given, so that all of them start, learn and are judged alike: one row of a table each.

Everybody gets the same start policy, prompts, reward and number of response tokens, and turns them into what it needs:

    online        samples as it learns; the run ends when the tokens are spent
    preferences   spends them on the start policy's responses, which the reward ranks into pairs; then learns from those
    offline       spends them on the start policy's responses, which the reward scores; then learns from those
    baseline      the start as it is; the start cloning as many tokens of demonstrations
    decoding      trains nothing: takes the best of several responses by the reward, which it needs at every use

A learning rate is for the tiny model, to the nearest half power of ten; `compare --rate` scales all of them for a
larger one, and `compare --tune` tries a third, one and three times that for every solver alike. What else a solver needs
is its recipe's own default, or stands in its row.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenmdp import recipes
from tokenmdp.models.heads import Critic
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import best_of_n
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Pairs, Prompt, Reward, Score

PASSES = 2  # over what was sampled once, of the solvers that learn from a fixed log
CHUNK = 64  # prompts answered at a time when a log is made


class Answers(Protocol):
    """What is judged: a policy, or a way to decode one."""

    def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, rng: torch.Generator) -> Batch: ...


@dataclass(frozen=True)
class Given:
    """What every solver is given.

    Attributes:
        start: the policy that all start from; frozen.
        reward: what is optimised.
        tokens: response tokens to spend: sampled, or of demonstrations cloned.
        length: mean tokens of the start policy's responses, to plan how many those are.
        prompts, samples: prompts a phase and responses a prompt; where a method fixes one, the other follows.
        kl: β, reward units a nat, of the methods that have one and do not say it is 0.
        rate: times the learning rate of the solver's row.
    """

    start: Policy
    task: Task
    reward: Reward
    tokens: int
    length: float
    prompts: int
    samples: int
    max_new_tokens: int
    kl: float
    train: str
    micro_tokens: int
    rate: float = 1.0

    @property
    def rows(self) -> int:
        """Responses a phase, or rows an optimiser step of those who do not sample."""
        return self.prompts * self.samples


@dataclass(frozen=True)
class Trained:
    """What a solver made of it.

    Attributes:
        answers: what is judged.
        tokens: response tokens it sampled for training, or cloned.
    """

    answers: Answers
    tokens: int


Solve = Callable[["Solver", Given, Run], Trained]


@dataclass(frozen=True)
class Solver:
    """One row of the table.

    Attributes:
        name: the verb that is this solver.
        family: online, preferences, offline, baseline or decoding.
        recipe: its file in recipes/; empty for the start, which needs none.
        learning_rate: on the tiny model.
        solve: which of the functions below.
        settings: of the recipe, where its defaults are for another model.
    """

    name: str
    family: str
    recipe: str
    learning_rate: float
    solve: Solve
    settings: Callable[[Given], Mapping[str, Any]] = lambda given: {}

    def config(self, given: Given, module: Any, **shared: Any) -> Any:
        """The recipe's Config: of `shared` what it has a field for, then its variant's settings, then this row's."""
        known = {field.name for field in fields(module.Config)}
        shared |= {"learning_rate": self.learning_rate * given.rate, "train": given.train}
        shared |= {"micro_tokens": given.micro_tokens, "max_new_tokens": given.max_new_tokens}
        variant = dict(getattr(module, "VARIANTS", {}).get(self.name, {}))
        variant.pop("learning_rate", None)  # it is for the recipe's default model
        chosen = {k: v for k, v in shared.items() if k in known} | variant | dict(self.settings(given))
        return module.Config(**chosen)

    def module(self) -> Any:
        """Its recipe."""
        return importlib.import_module(f"tokenmdp.recipes.{self.recipe}")


# ------------------------------------------------------------ how each family is served


class Metered(Run):
    """A stage of a run whose loop ends when its tokens are spent, whatever a phase costs.

    It is the stage itself, with a count of what was sampled among the states that a checkpoint holds.

    Args:
        stage: what it is.
        tokens: to spend.
    """

    def __init__(self, stage: Run, tokens: int) -> None:
        self.__dict__ = vars(stage)  # not a copy: what one of the two opens or counts, the other knows
        self.meter = Meter(tokens)

    def steps(self, n: int, *state: Any, **options: Any) -> Iterator[int]:
        for step in super().steps(n, *state, self.meter, **options):
            yield step
            if self.meter.done:
                return

    def log(self, step: int, metrics: Mapping[str, float], headline: Sequence[str] = ()) -> None:
        super().log(step, metrics, headline)
        self.meter.add(int(metrics.get("num_tokens", 0.0) + metrics.get("num_tokens_credit", 0.0)))
        if self._bar is not None:  # what is left is told by the tokens: the steps are more than it will take
            self._bar.total = step + 1 + self.meter.phases


class Meter:
    """Tokens spent, and whether one more phase would end further from the budget than stopping here."""

    def __init__(self, budget: int) -> None:
        self.budget, self.spent, self.last = budget, 0, 0

    def add(self, tokens: int) -> None:
        self.spent, self.last = self.spent + tokens, tokens

    @property
    def done(self) -> bool:
        return self.spent + self.last / 2 >= self.budget

    @property
    def phases(self) -> int:
        """How many more there will be, if they cost as much as the last; at least one, until it is done."""
        return 0 if self.done else max(1, round((self.budget - self.spent) / max(1, self.last)))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def scalars(self) -> dict[str, Any]:
        return {"spent": self.spent, "last": self.last}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.spent, self.last = int(scalars["spent"]), int(scalars["last"])


def online(solver: Solver, given: Given, run: Run) -> Trained:
    """Learn while sampling, until the tokens are spent."""
    module = solver.module()
    variant = dict(getattr(module, "VARIANTS", {}).get(solver.name, {})) | dict(solver.settings(given))
    samples = int(variant.get("samples", given.samples))
    tries = 2 * int(variant.get("pairs", 0)) or 1  # of evolution, each of which answers all prompts of a phase
    prompts = max(1, given.rows // (samples * tries))
    # As many steps as responses of one token would take: they may become that short, and it is the meter that ends the run.
    steps = math.ceil(given.tokens / (prompts * samples * tries)) + 1
    cfg = solver.config(given, module, steps=steps, samples=samples, kl=given.kl)
    cfg = replace(cfg, prompts=prompts)
    metered = Metered(run, given.tokens)
    pieces: list[Any] = [given.start, given.reward, given.task, metered]
    if solver.recipe == "ppo":  # its critic is a value head on a body of its own
        pieces.insert(1, Critic(given.start.backbone.twin(cfg.critic_train)))
    policy, _ = module.train(cfg, *pieces)
    if (spent := metered.meter.spent) < 0.95 * given.tokens:
        run.note(
            f"warning: {solver.name} spent {spent} of {given.tokens} tokens: one more phase of about {metered.meter.last} would "
            "end further from that; lower prompts or samples, or raise budget_tokens"
        )
    return Trained(policy, spent)


def preferences(solver: Solver, given: Given, run: Run) -> Trained:
    """Learn from pairs of the start policy's responses, ranked by the reward."""
    module = solver.module()
    batch, score = log(given, run)
    pairs = ranked(batch, score)
    steps = max(1, PASSES * len(batch) // (2 * given.rows))  # as many responses a step and in all as the others
    policy, _ = module.train(solver.config(given, module, steps=steps, rows=given.rows), given.start, pairs, run)
    return Trained(policy, int(batch.action.sum()))


def labels(solver: Solver, given: Given, run: Run) -> Trained:
    """Learn from the start policy's responses, labelled good where the reward is above its mean."""
    module = solver.module()
    batch, score = log(given, run)
    kept = score.verdict.nonzero()[:, 0]
    value, judged = score.value[kept], batch.select(kept)
    steps = max(1, PASSES * len(batch) // given.rows)
    cfg = solver.config(given, module, steps=steps, rows=given.rows)
    policy, _ = module.train(cfg, given.start, judged, value > value.mean(), run)
    return Trained(policy, int(batch.action.sum()))


def offline(solver: Solver, given: Given, run: Run) -> Trained:
    """Learn from the start policy's responses and their scores."""
    module = solver.module()
    batch, score = log(given, run)
    value = torch.where(score.verdict, score.value, torch.full_like(score.value, torch.nan))
    steps = max(1, PASSES * len(batch) // given.rows)
    cfg = solver.config(given, module, steps=steps, rows=given.rows)
    policy, _ = module.train(cfg, given.start, batch, value, run)
    return Trained(policy, int(batch.action.sum()))


def cloning(solver: Solver, given: Given, run: Run) -> Trained:
    """Clone as many tokens of demonstrations as the others may sample."""
    module = solver.module()
    known = given.task.demonstrations
    if known is None:
        raise ValueError(f"the task {given.task.name} has no demonstrations to clone: leave {solver.name} out")
    mean = float(known.action.sum()) / len(known)
    rows = min(given.rows, len(known))
    steps = max(1, round(given.tokens / (rows * mean)))
    cfg = solver.config(given, module, steps=steps, rows=rows, evaluate_every=steps + 1)
    policy, _ = module.train(cfg, given.start, known, known.select(range(min(8, len(known)))), run)
    return Trained(policy, round(steps * rows * mean))


def nothing(solver: Solver, given: Given, run: Run) -> Trained:
    """The start as it is."""
    return Trained(given.start, 0)


def decoding(solver: Solver, given: Given, run: Run) -> Trained:
    """The start, decoded with the reward's help."""
    module = solver.module()
    settings = dict(solver.settings(given))
    if solver.recipe == "best_of_n":
        return Trained(BestOfN(given.start, given.reward, int(settings["n"])), 0)
    cfg = module.Config(max_new_tokens=given.max_new_tokens, **settings)
    return Trained(Guided(module.Guide, cfg, given.start, given.reward), 0)


class BestOfN:
    """The best of n responses by the reward."""

    def __init__(self, policy: Policy, reward: Reward, n: int) -> None:
        self.policy, self.reward, self.n = policy, reward, n

    def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, rng: torch.Generator) -> Batch:
        """`n` such responses a prompt."""
        b = self.policy.sample(prompts, n * self.n, sampling, rng)
        score = self.reward(b)
        return b.select(best_of_n.best(score.value, score.verdict, self.n))


class Guided:
    """Responses built block by block, each block the one that promises most by the reward."""

    def __init__(self, guide: Any, cfg: Any, policy: Policy, reward: Reward) -> None:
        self.guide, self.cfg, self.policy, self.reward = guide, cfg, policy, reward

    def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, rng: torch.Generator) -> Batch:
        """`n` such responses a prompt; temperature and length are the guide's own."""
        answered: Batch = self.guide(self.cfg, self.policy, self.reward, rng).answer(
            [p for p in prompts for _ in range(n)]
        )
        return answered


# ------------------------------------------------------------ a log of the start's responses


def log(given: Given, run: Run) -> tuple[Batch, Score]:
    """Responses of the start policy until the tokens are spent, `samples` a prompt, and what the reward says of them.

    Prompts are drawn without replacement until all were asked, then anew.
    """
    sampling = Sampling(max_new_tokens=given.max_new_tokens)
    parts: list[Batch] = []
    spent = 0
    waiting: list[Prompt] = []
    while True:
        left = math.ceil((given.tokens - spent) / (given.length * given.samples))
        if left < 1:
            break
        while len(waiting) < min(CHUNK, left):
            waiting += given.task.draw(len(given.task.train), run.rng)
        asked, waiting = waiting[: min(CHUNK, left)], waiting[min(CHUNK, left) :]
        parts.append(given.start.sample(asked, given.samples, sampling, run.rng))
        spent += int(parts[-1].action.sum())
    batch = Batch.concat(parts)
    return batch, given.reward(batch)


def ranked(batch: Batch, score: Score) -> Pairs:
    """Pairs of responses to one prompt: the best with the worst, the second best with the second worst, and so on, as
    long as one is better.

    Raises:
        ValueError: no prompt has two responses of different scores.
    """
    chosen: list[int] = []
    rejected: list[int] = []
    for group in batch.group.unique().tolist():
        rows = ((batch.group == group) & score.verdict).nonzero()[:, 0]
        rows = rows[score.value[rows].argsort(descending=True, stable=True)]
        for good, bad in zip(rows[: len(rows) // 2].tolist(), rows.flip(0).tolist(), strict=False):
            if float(score.value[good]) > float(score.value[bad]):
                chosen.append(good)
                rejected.append(bad)
    if not chosen:
        raise ValueError(
            f"none of the {len(batch)} responses scores above another to the same prompt, so there is no pair to learn "
            "from: draw more `samples` a prompt, or start from a policy that sometimes succeeds"
        )
    return Pairs(batch.select(chosen), batch.select(rejected), torch.zeros(len(chosen)))


# ------------------------------------------------------------ the table


def _ppo(given: Given) -> dict[str, Any]:
    # Where the whole policy trains there is room for a critic with a body of its own.
    whole = given.train == "all"
    return {"critic_train": "all" if whole else "head", "critic_learning_rate": 3e-3 * (given.rate if whole else 1.0)}


def _soft_q(given: Given) -> dict[str, Any]:
    return {"kl": given.kl or 0.02}  # its β is the temperature of its optimum and cannot be 0


def _dapo(given: Given) -> dict[str, Any]:
    return {"overlong": given.max_new_tokens // 4}  # its default is a quarter of the default horizon


def _evolution(given: Given) -> dict[str, Any]:
    # Few weights to search. At three times this σ the tries of the tiny model are right half as often as their centre is.
    return {
        "pairs": 16,
        "samples": 1,
        "sigma": 0.05,
        "train": given.train if given.train.startswith("lora") else "lora-1",
    }


def _best_of_n(given: Given) -> dict[str, Any]:
    return {"n": given.samples}


def _guided(given: Given) -> dict[str, Any]:
    return {"k": min(4, given.samples), "block": max(1, given.max_new_tokens // 4), "rollouts": 1}


TABLE = [
    Solver("start", "baseline", "", 0.0, nothing),
    Solver("sft-more", "baseline", "sft", 3e-3, cloning),
    Solver("reinforce", "online", "reinforce", 1e-3, online),
    Solver("rloo", "online", "reinforce", 1e-3, online),
    Solver("remax", "online", "reinforce", 1e-3, online),
    Solver("dapg", "online", "dapg", 1e-3, online),
    Solver("grpo", "online", "grpo", 3e-4, online),
    Solver("dr-grpo", "online", "grpo", 3e-4, online),
    Solver("dapo", "online", "grpo", 3e-4, online, _dapo),
    Solver("gspo", "online", "grpo", 3e-4, online),
    Solver("cispo", "online", "grpo", 3e-4, online),
    Solver("ppo", "online", "ppo", 3e-4, online, _ppo),
    Solver("raft", "online", "raft", 3e-4, online),
    Solver("bon-distill", "online", "raft", 3e-4, online),
    Solver("online-dpo", "online", "online_dpo", 3e-4, online),
    Solver("soft-q", "online", "soft_q", 3e-4, online, _soft_q),
    Solver("evolution", "online", "evolution", 1e-2, online, _evolution),
    Solver("dpo", "preferences", "dpo", 1e-4, preferences),
    Solver("ipo", "preferences", "dpo", 1e-4, preferences),
    Solver("cdpo", "preferences", "dpo", 1e-4, preferences),
    Solver("simpo", "preferences", "dpo", 1e-4, preferences),
    Solver("orpo", "preferences", "dpo", 3e-4, preferences),
    Solver("kto", "preferences", "kto", 3e-5, labels),
    Solver("awr", "offline", "awr", 1e-3, offline),
    Solver("filtered-bc", "offline", "awr", 1e-3, offline),
    Solver("ilql", "offline", "ilql", 1e-3, offline),
    Solver("best-of-n", "decoding", "best_of_n", 0.0, decoding, _best_of_n),
    Solver("guided", "decoding", "guided", 0.0, decoding, _guided),
]
BASELINES = ("start", "sft-more")


def available() -> dict[str, Solver]:
    """The solvers whose recipe there is, by name, in the table's order."""
    home = Path(recipes.__file__).parent
    return {s.name: s for s in TABLE if not s.recipe or (home / f"{s.recipe}.py").is_file()}
