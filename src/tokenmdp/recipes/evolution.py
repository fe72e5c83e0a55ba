"""Evolution strategies: try the policy with its weights pushed both ways at random, and move to where it scored.

    θ_{i±} = θ ± σ ε_i,   ε_i ~ N(0, 1),        F_{i±} = mean score of the responses of θ_{i±}
    ∇J ≈ 1/(n σ) Σ_i ½ (A_{i+} − A_{i−}) ε_i,   A = rank of F among all 2n, scaled to [−½, ½]

It is REINFORCE on the weights: the search distribution is a Gaussian over them, and its score function takes the place
of log π: no gradient of the policy, no credit to tokens, one number a try. The noise is kept as seeds and drawn again
where it is needed, so memory does not grow with n. All tries answer the same prompts with the same uniform numbers: what
differs is the weights.

Source: Salimans et al. 2017, algorithm 2 (seeds) and section 2.1 (antithetic pairs, rank-shaped fitness).
Differs: Adam with a clipped gradient, no weight decay; equal scores share their mean rank, so that a phase in which all
    tries score the same has no gradient (`evolution/ties` counts the pairs whose sides are equal).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import gate, judge, rewards, tasks
from tokenmdp.functional import measures, policy_loss, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward

SETTING = "rl"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    steps: int = 40  # phases
    pairs: int = 16  # n, directions a phase; each is tried both ways
    prompts: int = 16  # prompts a try; the same for all tries of a phase
    samples: int = 1  # responses a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling
    sigma: float = 0.1  # σ, the noise on every weight that trains, in units of the weight
    learning_rate: float = 3e-2  # constant; with Adam about how far each weight goes in a phase
    train: str = "lora-1"  # what is searched: few weights search better; all | top-N blocks | lora-R rank


@dataclass(frozen=True)
class Directions:
    """What the learner sums over: a seed for each direction.

    Attributes:
        seed: [n] each draws one direction.
        size: how many numbers a direction has.
    """

    seed: Tensor
    size: int

    @property
    def cost(self) -> Tensor:
        """All of them: one direction is in memory at a time."""
        return torch.full_like(self.seed, self.size)

    def __len__(self) -> int:
        return len(self.seed)

    def select(self, rows: Tensor | Sequence[int]) -> Directions:
        """The given directions, in that order."""
        return Directions(self.seed[torch.as_tensor(rows, dtype=torch.long)], self.size)


def noise(seed: int, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """ε, one tensor for each of the weights; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(weight.shape, generator=generator).to(weight) for weight in like)


@contextmanager
def pushed(parameters: Sequence[Tensor], seed: int, by: float) -> Iterator[None]:
    """The weights moved by `by` · ε while this lasts; afterwards they are what they were, to the last bit."""
    with torch.no_grad():
        before = [weight.clone() for weight in parameters]
        try:
            for weight, epsilon in zip(parameters, noise(seed, parameters), strict=True):
                weight.add_(epsilon, alpha=by)
            yield
        finally:
            for weight, was in zip(parameters, before, strict=True):
                weight.copy_(was)


def centred_ranks(fitness: Tensor) -> Tensor:
    """[N] the rank of each among all, scaled to [−½, ½]; equal ones share the mean of their ranks. Their sum is 0.

    Source: Salimans et al. 2017, section 2.1.
    """
    below = (fitness[None] < fitness[:, None]).sum(1)
    level = (fitness[None] == fitness[:, None]).sum(1)
    rank = below + (level - 1) / 2
    return (rank - (len(fitness) - 1) / 2) / max(1, len(fitness) - 1)


def train(
    cfg: Config, reference: Policy, reward: Reward, task: Task, run: Run, gold: Reward | None = None
) -> tuple[Policy, dict[str, float]]:
    """Search for weights that score; returns the policy at the centre of the search.

    Args:
        reference: where the search starts; frozen.
        gold: a second reward that is only recorded.

    Raises:
        ValueError: no pair, or σ is not positive.
    """
    if cfg.pairs < 1 or not cfg.sigma > 0:
        raise ValueError(f"pairs={cfg.pairs}, sigma={cfg.sigma}: both must be positive")
    policy = reference.twin(cfg.train, name="evolution")
    parameters = [weight for _, weight in policy.trained()]
    size = sum(weight.numel() for weight in parameters)
    learner = Learner(policy, cfg.learning_rate, tokens=1)  # one direction is drawn, used and forgotten at a time
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    run.note(f"start {reference.name} {reference.fingerprint()}; {size} weights are searched")

    def loss(part: Directions, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # ∇ log N(θ ± σε; θ, σ²) is ±ε/σ: that of the linear function below.
        score = [
            sum(((e * w).sum() for e, w in zip(noise(int(s), parameters), parameters, strict=True)), torch.zeros(()))
            for s in part.seed
        ]
        return policy_loss.reinforce(torch.stack(score) / cfg.sigma, advantage), {}

    for step in run.steps(cfg.steps, learner, title="evolution", setting=SETTING):
        # 1. Try every direction both ways, on the same prompts with the same chance.
        prompts = task.draw(cfg.prompts, run.rng)
        seeds = torch.randint(1 << 62, (cfg.pairs,), generator=run.rng)
        chance = run.rng.get_state()
        tries: list[Batch] = []
        for seed in seeds.tolist():
            for sign in (1.0, -1.0):
                run.rng.set_state(chance)
                with pushed(parameters, seed, sign * cfg.sigma):
                    tries.append(policy.sample(prompts, cfg.samples, sampling, run.rng))

        # 2. Judge them. A pair of which one side has no verdict at all is left out.
        b = Batch.concat(tries)
        score = reward(b)
        run.missing(step, b, score)
        if step == 0:
            gate.tell(run, policy, b)
        judged, value = (x.view(2 * cfg.pairs, -1) for x in (score.verdict, score.value))
        fitness = value.sum(1) / judged.sum(1).clamp(min=1)
        whole = judged.any(1).view(-1, 2).all(1)
        counted = whole.repeat_interleave(2)
        shaped = torch.zeros_like(fitness)
        shaped[counted] = centred_ranks(fitness[counted])
        advantage = 0.5 * (shaped[0::2] - shaped[1::2])

        # 3. One step along what scored, say what happened. Where no try was better than its opposite there is none to take.
        w = weights.per_row(whole)
        idle = not bool(((w > 0) & (advantage != 0)).any())
        learned = {"grad_norm": 0.0} if idle else learner.step(loss, Directions(seeds, size), w, advantage=advantage)
        metrics = {
            "objective/scores": float(score.value[score.verdict].mean()) if bool(score.verdict.any()) else 0.0,
            "objective/scores_best": float(fitness[counted].max()) if bool(counted.any()) else 0.0,
            "evolution/fitness_std": float(fitness[counted].std(correction=0)) if bool(counted.any()) else 0.0,
            "evolution/ties": float((fitness[0::2] == fitness[1::2]).float().mean()),
            **measures.responses(b, score),
            "grad_norm": learned["grad_norm"],
            "skipped_updates": float(idle),
        }
        if gold is not None:
            truth = gold(b)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        run.log(step, metrics, headline=("objective/scores", "evolution/fitness_std"))
    return policy, {}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the start, the reward and the prompts, search, save the policy to `model/` in the run folder."""
    reference = catalog.load(cfg.model).freeze()
    reward = rewards.load(cfg.reward, reference)
    task = tasks.load(cfg.task, reference)
    gold = rewards.load(cfg.gold, reference) if cfg.gold else None
    policy, figures = train(cfg, reference, reward, task, run, gold)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    judged = judge.held_out(reference, policy, reward, task, sampling, run, gold)
    return {**figures, **judged, **saved}
