"""On-policy distillation: the whole distribution of a teacher, learned on prefixes that the student wrote itself.

    min_θ  E_{s ~ λ · student + (1 − λ) · data}  D( teacher(· | s), π_θ(· | s) ),    exact over the vocabulary

D is the reverse KL(π ‖ teacher), the forward KL(teacher ‖ π), a blend js:β, or the total variation (see
`functional.imitation`). Where prefixes are the data's alone (λ = 0) this is knowledge distillation, behaviour cloning
with soft labels, and its errors compound as those of cloning do; where they are the student's, it is DAgger with a
teacher that tells all it knows of each state. Every state that the teacher is asked about costs a query.

States are taken as given: how θ moves the student's own prefixes is left out of the gradient.

Source: Agarwal et al. 2024 (GKD), algorithm 1 and section 3; of a teacher's samples Kim and Rush 2016 (λ = 0).
Differs: λ is the share of the student's responses in every phase, where GKD tosses a coin for the whole batch; several
    updates may be taken on a phase's states, or on those of all phases so far, as in dataset aggregation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenmdp import judge, tasks
from tokenmdp.experts import Advice, Aggregate, Teacher, affordable, check_vocabularies
from tokenmdp.functional import imitation, measures, weights
from tokenmdp.learner import Learner
from tokenmdp.ledger import Ledger
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch

SETTING = "imitation"
VARIANTS = {"gkd": {"divergence": "js:0.5", "on_policy": 0.5}, "kd": {"divergence": "forward", "on_policy": 0.0}}
DATA = ("demonstrations", "teacher")


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the student's start
    teacher: str = "smollm2-135m-instruct"  # a model with the same tokenizer: best one that is better at the task
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    divergence: str = "reverse"  # reverse | forward | js:β | tv
    on_policy: float = 1.0  # λ, the share of responses that the student writes itself
    data: str = "demonstrations"  # who wrote the others: the task's demonstrations | samples of the teacher
    steps: int = 40  # phases of sampling and learning
    prompts: int = 32  # prompts a phase
    samples: int = 1  # responses a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling, and of both distributions
    queries: int = 0  # states that the teacher can be asked about; 0 for no limit
    updates: int = 1  # optimiser steps a phase
    rows: int = 32  # responses an update
    aggregate: bool = False  # learn from the states of all phases so far, not of the last alone
    learning_rate: float = 2e-5
    weight: str = "per_token"  # per_token | per_sequence
    train: str = "all"  # all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        imitation.divergence(self.divergence)  # raises where there is none of that name
        if not (0 <= self.on_policy <= 1 and self.temperature > 0):
            raise ValueError(
                f"on_policy={self.on_policy}, temperature={self.temperature}: a share from 0 to 1, and a positive number"
            )
        if self.data not in DATA or self.weight not in ("per_token", "per_sequence"):
            raise ValueError(
                f"data is {self.data!r} and weight {self.weight!r}; they must be one of {', '.join(DATA)}, and per_token or "
                "per_sequence"
            )
        if min(self.steps, self.prompts, self.samples, self.updates, self.rows) < 1 or self.queries < 0:
            raise ValueError(
                f"steps={self.steps}, prompts={self.prompts}, samples={self.samples}, updates={self.updates}, rows="
                f"{self.rows}, queries={self.queries}: counts of at least 1, but queries may be 0 for no limit"
            )


def train(cfg: Config, start: Policy, teacher: Teacher, task: Task, run: Run) -> tuple[Policy, dict[str, float]]:
    """Bring the student's distributions to the teacher's; returns the student, and what was paid.

    Args:
        start: where the student starts; frozen.
        teacher: with the student's vocabulary.

    Raises:
        ValueError: the vocabularies differ, both are the same model, or data are wanted of the task's demonstrations and it has none.
    """
    check_vocabularies(start, teacher.policy)
    if start.fingerprint() == teacher.policy.fingerprint():
        raise ValueError(
            f"student {start.name} and teacher {teacher.policy.name} are the same model ({start.fingerprint()}): there is "
            "nothing to learn; name a better one by --teacher"
        )
    count = cfg.prompts * cfg.samples
    own = round(cfg.on_policy * count)
    if own < count and cfg.data == "demonstrations" and task.demonstrations is None:
        raise ValueError(
            f"on_policy={cfg.on_policy} takes other prefixes from demonstrations, and the task {task.name} has none: give "
            "--data teacher, or --on-policy 1"
        )
    policy = start.twin(cfg.train, name="distill")
    learner = Learner(policy, cfg.learning_rate, tokens=cfg.micro_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    ledger = Ledger(queries=cfg.queries) if cfg.queries else Ledger()
    gathered = Aggregate()
    measure = imitation.divergence(cfg.divergence)
    weigh = {"per_token": weights.per_token, "per_sequence": weights.per_sequence}[cfg.weight]
    run.note(f"student {start.name} {start.fingerprint()}; {teacher.name} {teacher.policy.fingerprint()}")

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return teacher.divergence(policy, part, measure, cfg.temperature), {}

    def written(writer: Policy, count: int) -> Batch:
        drawn = task.draw(-(-count // cfg.samples), run.rng)
        return writer.sample(drawn, cfg.samples, sampling, run.rng).select(range(count))

    def others(step: int, count: int) -> Batch:
        if cfg.data == "teacher":
            return written(teacher.policy, count)
        assert task.demonstrations is not None
        # All are gone through before any comes again, in an order that the seed alone decides.
        n = len(task.demonstrations)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(run.seed))
        return task.demonstrations.select(order[(step * count + torch.arange(count)) % n])

    for step in run.steps(cfg.steps, learner, gathered, ledger, title="distillation", setting=SETTING):
        metrics: dict[str, float] = {}
        # 1. Prefixes, of the student's own and of others, as many as the teacher can be asked about.
        if ledger.left("queries") != 0:
            mine = [written(policy, own)] if own else []
            theirs = [others(step, count - own)] if own < count else []
            b = affordable(Batch.concat([replace(part, logp_mu=None) for part in (*mine, *theirs)]), ledger)
            ledger.pay("queries", int(b.action.sum()))
            if not cfg.aggregate:
                gathered.clear()
            gathered.add(b, Advice(b.tokens * b.action, b.action))
            metrics["num_tokens"] = float(b.action.sum())
            for part in mine:
                metrics["completions/mean_length"] = float(part.action.sum(-1).float().mean())
                metrics["completions/clipped_ratio"] = float((~part.ended).float().mean())

        # 2. Come closer to the teacher there.
        learned: list[dict[str, float]] = []
        for _ in range(cfg.updates):
            rows, _ = gathered.draw(cfg.rows, run.rng)
            learned.append(learner.step(loss, rows, weigh(rows.action)))

        # 3. Say what happened.
        metrics |= {name: measures.average(learned, name) for name in ("loss", "grad_norm")}
        metrics["expert/queries"] = float(ledger.paid.get("queries", 0))
        run.log(step, {**metrics, "gathered": float(len(gathered))}, headline=("loss",))
    return policy, {"queries": float(ledger.paid.get("queries", 0))}


def distances(student: Policy, teacher: Teacher, batch: Batch, temperature: float = 1.0) -> dict[str, float]:
    """How far apart they are in the states of a batch, a token: the KL of both directions, nats, and the total variation.

    Both logits are divided by the temperature first: that of training, whose objective this is.
    """

    def look(part: Batch) -> dict[str, Tensor]:
        names = ("forward", "reverse", "tv")
        return {name: teacher.divergence(student, part, imitation.divergence(name), temperature) for name in names}

    w = weights.per_token(batch.action)
    return {name: float((value * w).sum()) for name, value in in_parts(look, batch).items()}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load student, teacher and prompts, train, save the student to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    teacher = Teacher(catalog.load(cfg.teacher))
    task = tasks.load(cfg.task, start)
    policy, figures = train(cfg, start, teacher, task, run)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    prompts = list(task.held_out or task.train)[: judge.PROMPTS]
    own = {
        arm: distances(model, teacher, model.sample(prompts, 1, sampling, run.rng), cfg.temperature)
        for arm, model in (("start", start), ("trained", policy))
    }
    result: dict[str, object] = {**figures, "on_own_samples": own, **saved}
    if task.reward is None:
        return result
    return {**result, **judge.held_out(start, policy, task.reward, task, sampling, run)}
