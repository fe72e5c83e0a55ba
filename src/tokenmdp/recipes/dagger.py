"""DAgger, dataset aggregation: imitation that asks the expert in the states where the learner itself ends up.

    π_i = β_i π* + (1 − β_i) π                at every step, who acts is drawn anew
    D ← D ∪ { (s, π*(s)) : s visited by π_i }
    π ← argmin_θ  − E_{(s, a*) ~ D} log π_θ(a* | s),          β_i = β · decay^i

Behaviour cloning learns in the expert's states alone, so one mistake leads where nothing was learned. Here the expert
answers in the learner's states, and what is learned is to go on rightly from there. It takes an expert who can be asked:
the task's own, a teacher model, or worked answers, which know only what follows on their own path. Every answer costs a
query; where no more can be paid for, what was gathered is still learned from.

Source: Ross et al. 2011, algorithm 3.1; the mixture at every step as in section 3, with β_i = 1(i = 1) or p^(i−1).
Differs: the policy goes on from its last weights by a few updates, where Ross et al. train anew on all of D; the last
    policy is returned, not the best on validation. To act as a mixture costs no full expert rollout: the policy samples
    ahead, and is reset to where the expert, whose turn it was, does otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenmdp import judge, tasks
from tokenmdp.experts import Advice, Aggregate, Expert, Queried, Teacher, Worked, affordable, check_vocabularies
from tokenmdp.functional import imitation, measures, weights
from tokenmdp.learner import Learner
from tokenmdp.ledger import Ledger
from tokenmdp.models import catalog, tree
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Prompt

SETTING = "imitation"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # where the policy starts: best the SFT model
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    teacher: str = ""  # a model to ask; else the task's own expert, else its demonstrations as worked answers
    steps: int = 10  # iterations of gathering and learning
    prompts: int = 16  # prompts an iteration
    samples: int = 1  # responses a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling
    mixture: float = 1.0  # β of the first iteration: the chance that the expert acts, at each step
    decay: float = 0.0  # times β from one iteration to the next; 0: the learner alone from the second on
    demonstrations: int = 0  # of the task's, in place of the first iteration's rollouts; each token costs a query too
    queries: int = 0  # answers of the expert that can be paid for; 0 for no limit
    timeout: float = 0.0  # seconds that the expert may take for an answer; 0 for no limit
    updates: int = 20  # optimiser steps an iteration
    rows: int = 32  # gathered rows an update
    learning_rate: float = 5e-5
    train: str = "all"  # all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if not (0 <= self.mixture <= 1 and 0 <= self.decay <= 1 and self.temperature > 0):
            raise ValueError(
                f"mixture={self.mixture}, decay={self.decay}, temperature={self.temperature}: the first two are shares from 0 to "
                "1, the last is positive"
            )
        if min(self.steps, self.prompts, self.samples, self.updates, self.rows) < 1 or self.queries < 0:
            raise ValueError(
                f"steps={self.steps}, prompts={self.prompts}, samples={self.samples}, updates={self.updates}, rows="
                f"{self.rows}, queries={self.queries}: counts of at least 1, but queries may be 0 for no limit"
            )


def train(cfg: Config, start: Policy, expert: Expert, task: Task, run: Run) -> tuple[Policy, dict[str, float]]:
    """Learn from the expert's answers in the learner's own states; returns the policy, and what was paid.

    Args:
        start: where the policy starts; frozen.
        expert: who is asked. It is paid here: give it bare.

    Raises:
        ValueError: demonstrations are asked for and the task has too few; or the expert has answered nowhere.
        ExpertFailure: it fails too often.
    """
    policy = start.twin(cfg.train, name="dagger")
    learner = Learner(policy, cfg.learning_rate, tokens=cfg.micro_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    ledger = Ledger(queries=cfg.queries) if cfg.queries else Ledger()
    asked = Queried(expert, ledger, cfg.timeout)
    gathered = Aggregate()
    if cfg.demonstrations:
        shown = demonstrated(task, cfg.demonstrations, run.rng)
        ledger.pay("queries", int(shown.action.sum()))
        gathered.add(shown, Advice(shown.tokens * shown.action, shown.action))
    run.note(f"start {start.name} {start.fingerprint()}; asked is {expert.name}; {len(gathered)} demonstrations")

    def loss(part: Batch, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return imitation.nll(policy.evaluate(part, of=action)["logp"]), {}

    for step in run.steps(cfg.steps, learner, gathered, asked, title="DAgger", setting=SETTING):
        metrics = {"expert/beta": cfg.mixture * cfg.decay**step}
        # 1. Act, at times by the expert's hand; ask what the expert would have done all along the way.
        if ledger.left("queries") != 0 and not (step == 0 and cfg.demonstrations):
            prompts = task.draw(cfg.prompts, run.rng)
            b, advice = mixed(policy, asked, prompts, cfg.samples, metrics["expert/beta"], sampling, run.rng)
            rest = asked(affordable(replace(b, action=b.action & ~advice.known), ledger))
            advice = Advice(advice.token + rest.token, advice.known | rest.known)
            gathered.add(b, advice)
            known = int(advice.known.sum())
            metrics |= {
                "expert/known": known / max(1, int(b.action.sum())),
                "expert/mistakes": float((advice.known & (b.tokens != advice.token)).sum()) / max(1, known),
                "completions/mean_length": float(b.action.sum(-1).float().mean()),
                "completions/clipped_ratio": float((~b.ended).float().mean()),
                "num_tokens": float(b.action.sum()),
            }

        # 2. Clone the expert on everything gathered so far.
        learned: list[dict[str, float]] = []
        for _ in range(cfg.updates):
            part, action = gathered.draw(cfg.rows, run.rng)
            learned.append(learner.step(loss, part, weights.per_token(part.action), action=action))

        # 3. Say what happened.
        metrics |= {name: measures.average(learned, name) for name in ("loss", "grad_norm")}
        metrics |= {"expert/queries": float(ledger.paid.get("queries", 0)), "expert/failed": float(asked.failed)}
        run.log(step, {**metrics, "gathered": float(len(gathered))}, headline=("loss", "expert/mistakes"))
    return policy, {"queries": float(ledger.paid.get("queries", 0)), "gathered": float(len(gathered))}


def mixed(
    policy: Policy,
    expert: Queried,
    prompts: list[Prompt],
    n: int,
    beta: float,
    sampling: Sampling,
    rng: torch.Generator,
) -> tuple[Batch, Advice]:
    """Responses in which at every step the expert acts with probability β, else the policy; and what the expert said.

    Where the expert has no answer, or cannot be paid, the policy acts.
    """
    b = replace(policy.sample(prompts, n, sampling, rng), logp_mu=None)
    # By step of the response. Whose turn it is depends on the step alone, so it can be drawn beforehand.
    turn = torch.rand((len(b), sampling.max_new_tokens), generator=rng).to(b.tokens.device) < beta
    told, known = torch.zeros_like(turn, dtype=torch.long), torch.zeros_like(turn)
    settled = torch.zeros(len(b), dtype=torch.long, device=b.tokens.device)  # steps of each row that stand
    while True:
        # The next turn of the expert in each row. No more than one: states further on may never be visited.
        at_step = (b.action.cumsum(-1) - 1).clamp(min=0)
        turns = b.action & turn.gather(1, at_step) & (at_step >= settled[:, None])
        asking = affordable(replace(b, action=turns & (turns.cumsum(-1) == 1)), expert.ledger)
        rows = asking.action.any(-1).nonzero()[:, 0]
        if not len(rows):
            sure = b.action & known.gather(1, at_step)
            return b, Advice(torch.where(sure, told.gather(1, at_step), 0), sure)
        at = asking.action[rows].long().argmax(-1)
        said = expert(asking.select(rows))
        answer, sure = (x.gather(1, at[:, None])[:, 0] for x in (said.token, said.known))
        steps = at_step[rows, at]
        told[rows, steps], known[rows, steps], settled[rows] = answer, sure, steps + 1
        other = sure & (answer != b.tokens[rows, at])
        if bool(other.any()):
            b = tree.overruled(
                policy, b, rows[other].tolist(), at[other].tolist(), answer[other].tolist(), sampling, rng
            )


def demonstrated(task: Task, count: int, rng: torch.Generator) -> Batch:
    """Some of the task's demonstrations.

    Raises:
        ValueError: it has not so many.
    """
    there = 0 if task.demonstrations is None else len(task.demonstrations)
    if task.demonstrations is None or there < count:
        raise ValueError(f"{count} demonstrations asked for, and the task {task.name} has {there}: ask for no more")
    return task.demonstrations.select(torch.randperm(there, generator=rng)[:count])


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the start, the task and whom to ask, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    task = tasks.load(cfg.task, start)
    expert = task.expert
    if cfg.teacher:
        teacher = catalog.load(cfg.teacher)
        check_vocabularies(start, teacher)
        expert = Teacher(teacher)
    elif expert is None and task.demonstrations is not None:
        expert = Worked(task.demonstrations)
    if expert is None:
        raise ValueError(f"the task {task.name} has no expert and no worked answers: give a model to ask by --teacher")
    policy, figures = train(cfg, start, expert, task, run)
    saved = policy.publish(run.folder / "model")
    if task.reward is None:
        return {**figures, **saved}
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    return {**figures, **judge.held_out(start, policy, task.reward, task, sampling, run), **saved}
