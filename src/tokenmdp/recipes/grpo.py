"""Group-relative policy optimisation on the token MDP, and its family: several updates a phase, and no critic.

    Â_t = ( score_b − mean of the prompt's scores ) / σ,       σ by `scale`; shared out over the tokens by `credit`
    ℓ_t = L( ρ_t, Â_t ) + β · KL estimate_t,                   ρ_t = π(a_t | s_t) / μ(a_t | s_t),  μ the sampler
    minimised: Σ w_t ℓ_t,                                      w by `weight`, over all responses of an update

Members differ in three choices and little else, and each is one function:

               loss L                       scale σ     weight w         besides
    grpo       clip: min(ρÂ, clip(ρ)Â)      group       per_sequence     KL in the loss, k3
    dr-grpo    clip                         none        per_slot         no KL
    dapo       clip, ε above > ε below      group       per_token        no KL; dynamic sampling; overlong punishment
    gspo       the same of a row's mean ρ   group       per_sequence     no KL
    cispo      −sg[clip(ρ)] Â log π         group       per_token        no KL, only an upper bound

`sync` is how stale data may become: the sampler's weights are the policy's of up to `sync` − 1 phases ago, and the
ratio is against the sampler, so the clip bounds the distance to what was sampled from.

Source: Shao et al. 2024 (GRPO), eq. 3, its KL eq. 4; Liu et al. 2025 (Dr. GRPO), section 3.2; Yu et al. 2025 (DAPO),
eqs. 8 to 13; Zheng et al. 2025 (GSPO), eq. 5, ranges of section 5.1; MiniMax 2025 (MiniMax-M1: CISPO), eqs. 4 and 5.
Differs: σ has no ε added, and groups that do not vary have advantage 0 exactly (`returns.scaled`); the KL in the loss
may be k2, which has the right gradient where the published k3 has that of the other direction (`functional.kl`);
truncated rows that are masked leave the group's mean as well as the loss; an update in which no row stands out, with
no KL to follow, is skipped and counted. MiniMax-M1 does not say its upper bound: 5 is that of later reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenmdp import experts, gate, judge, rewards, tasks
from tokenmdp.functional import kl, measures, policy_loss, returns, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.models.target import Target
from tokenmdp.rewards import assign
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward, Score

SETTING = "rl"
VARIANTS = {
    "dr-grpo": {"scale": "none", "weight": "per_slot", "kl": 0.0},
    "dapo": {"clip_high": 0.28, "weight": "per_token", "kl": 0.0, "dynamic_sampling": 3, "overlong": 5},
    "gspo": {"loss": "gspo", "clip": 3e-4, "clip_high": 4e-4, "kl": 0.0},
    "cispo": {"loss": "cispo", "clip": 0.0, "clip_high": 4.0, "weight": "per_token", "kl": 0.0},
}
LOSSES = ("clip", "gspo", "cispo")
SCALES = ("group", "batch", "none")
WEIGHTS = ("per_sequence", "per_token", "per_slot")
ESTIMATORS = {"k2": kl.reverse_k2, "k3": kl.reverse_k3}


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # what the policy starts as: best the SFT model
    reference: str = (
        ""  # what the KL is measured to, such as the SFT model of a second round; empty for the start itself
    )
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    loss: str = "clip"  # clip | gspo | cispo
    scale: str = "group"  # what advantages are divided by: the spread of the group | of the batch | none
    weight: str = "per_sequence"  # what counts alike: per_sequence | per_token | per_slot
    steps: int = 40  # phases of sampling and learning
    prompts: int = 16  # prompts a phase
    samples: int = 8  # responses a prompt: the group
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling and of the ratio
    learning_rate: float = 2e-5
    warmup: int = 0  # optimiser steps over which the rate rises; Adam's first are as large as any, and mostly noise
    epochs: int = 1  # passes over a phase's responses
    minibatches: int = 2  # updates a pass
    clip: float = 0.2  # ε below, in units of the ratio; 0 for no clip (in cispo: no lower bound)
    clip_high: float = 0.0  # ε above where it differs; 0 for the same
    kl: float = 0.04  # β in the loss, in units of the advantage a nat: reward units only with scale=none
    kl_estimator: str = "k3"  # k3, as published | k2, whose gradient is that of KL(π ‖ ref)
    dynamic_sampling: int = 0  # most times that groups whose scores are all equal are drawn anew, by other prompts
    overlong: int = 0  # tokens before the horizon in which length costs, up to 1 reward unit; 0 for none
    mask_truncated: bool = False  # leave out responses that did not end by themselves
    sync: int = 1  # phases between refreshes of the sampler's weights: 1 is never stale
    credit: str = "last"  # which tokens earn the score (see `rewards.assign`)
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        choices = {"loss": LOSSES, "scale": SCALES, "weight": WEIGHTS, "kl_estimator": tuple(ESTIMATORS)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if self.samples < 2:
            raise ValueError(
                f"samples={self.samples}: a group of one has nothing to be compared with; ask for at least 2, or take "
                "`reinforce` with baseline=batch or greedy"
            )
        if min(self.kl, self.clip, self.clip_high, self.dynamic_sampling) < 0 or not self.temperature > 0:
            raise ValueError(
                f"kl={self.kl}, clip={self.clip}, clip_high={self.clip_high}, dynamic_sampling={self.dynamic_sampling}, "
                f"temperature={self.temperature}: the first four are at least 0, the last is positive"
            )
        if self.clip == 0 < self.clip_high and self.loss != "cispo":
            raise ValueError(f"clip=0 does not clip, but clip_high={self.clip_high}: give both, or neither")
        if min(self.sync, self.epochs, self.minibatches) < 1 or not 0 <= self.overlong <= self.max_new_tokens:
            raise ValueError(
                f"sync={self.sync}, epochs={self.epochs}, minibatches={self.minibatches}, overlong={self.overlong}: the first "
                f"three are at least 1, the last lies between 0 and max_new_tokens={self.max_new_tokens}"
            )


def train(
    cfg: Config,
    reference: Policy,
    reward: Reward,
    task: Task,
    run: Run,
    gold: Reward | None = None,
    start: Policy | None = None,
) -> tuple[Policy, dict[str, float]]:
    """Optimise the reward online; returns the trained policy.

    Args:
        reference: what the KL is measured to, and where the policy starts unless `start` is given; frozen.
        gold: a second reward that is only recorded, to see proxy and truth drift apart.
        start: where the policy starts, of the reference's vocabulary; None for the reference.
    """
    policy = (start or reference).twin(cfg.train, name="grpo")
    actor = Learner(policy, cfg.learning_rate, warmup=cfg.warmup, tokens=cfg.micro_tokens)
    # Where it is refreshed before every phase, the sampler is the policy itself and needs no copy.
    sampler = policy if cfg.sync == 1 else (start or reference).twin(cfg.train, name="sampler")
    stale = [] if sampler is policy else [Target(sampler, policy)]
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    scheme = assign.load(cfg.credit, reward, reference, sampling)
    below, above = cfg.clip or None, cfg.clip_high or cfg.clip or None
    run.note(f"reference {reference.name} {reference.fingerprint()}; policy starts as {policy.fingerprint()}")

    def evaluate(model: Policy, batch: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want, cfg.temperature), batch)

    def weigh(action: Tensor, rows: Tensor) -> Tensor:
        if cfg.weight == "per_slot":
            return weights.per_slot(action, cfg.max_new_tokens, rows)
        return (weights.per_token if cfg.weight == "per_token" else weights.per_sequence)(action, rows)

    def loss(part: Batch, advantage: Tensor, logp_old: Tensor, logp_ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = policy.evaluate(part, temperature=cfg.temperature)["logp"]
        if cfg.loss == "gspo":
            value, clipped = policy_loss.gspo(logp, logp_old, advantage, part.action, below, above)
        elif cfg.loss == "cispo":
            value, clipped = policy_loss.cispo(logp, logp_old, advantage, below, above)
        else:
            value, clipped = policy_loss.ppo_clip(logp, logp_old, advantage, below, above)
        penalty = ESTIMATORS[cfg.kl_estimator](logp, logp_ref)
        change = logp - logp_old
        return value + cfg.kl * penalty, {
            "loss/policy_avg": value,
            "loss/kl_avg": penalty,
            "policy/clipfrac_avg": clipped.to(value.dtype),
            "policy/approxkl_avg": change.exp() - 1 - change,
            "val/ratio": change.exp(),
        }

    for step in run.steps(cfg.steps, actor, *stale, title="GRPO", setting=SETTING):
        # 1. Roll out on the known dynamics; where asked, until enough groups vary.
        for copy in stale if step % cfg.sync == 0 else ():
            copy.follow(1.0)
        drawn, said, redrawn = rollout(cfg, sampler, sampling, reward, task, run)
        run.missing(step, drawn, said)
        varied = returns.spread(said.value, drawn.group, said.verdict) > 0
        kept = varied.nonzero()[:, 0] if cfg.dynamic_sampling and bool(varied.any()) else torch.arange(len(drawn))
        b, score = policy.read(drawn.select(kept)), said.select(kept)
        rows = score.verdict & b.ended if cfg.mask_truncated else score.verdict

        # 2. Look: the policy that sampled, the reference.
        old = evaluate(sampler, b, "logp", "entropy")
        logp_old, logp_ref = old["logp"], evaluate(reference, b, "logp")["logp"]
        refreshed = step // cfg.sync if step % cfg.sync == 0 else None  # how often: now sampler and learner are one
        measured = stale and refreshed is not None and gate.due(refreshed)
        logp_own = evaluate(policy, b, "logp")["logp"] if measured else logp_old

        # 3. Better or worse than the other samples of the prompt, on the tokens that made it so.
        paid = scheme.paid(b, score)
        outcome = paid.value + returns.overlong(b.action.sum(-1), cfg.max_new_tokens, cfg.overlong)
        less = partial(returns.centred, group=b.group, rows=rows)
        advantage = assign.advantage(scheme, b, paid, outcome, less, sampler, run.rng)
        if cfg.scale != "none":
            among = b.group if cfg.scale == "group" else torch.zeros_like(b.group)
            advantage = returns.scaled(advantage, returns.spread(outcome, among, rows))

        # 4. Learn: several updates from one phase, each over its part of the responses.
        learned: list[dict[str, float]] = []
        skipped = 0
        for _ in range(cfg.epochs):
            for part in torch.randperm(len(b), generator=run.rng).chunk(cfg.minibatches):
                mini = b.select(part)
                L = mini.tokens.shape[1]
                w = weigh(mini.action, rows[part])
                columns = {"advantage": advantage[part, :L], "logp_old": logp_old[part, :L]}
                used = w > 0
                if not bool((used & ((columns["advantage"] != 0) | (cfg.kl > 0))).any()):
                    skipped += 1
                    continue
                learned.append(
                    {**actor.step(loss, mini, w, logp_ref=logp_ref[part, :L], **columns), "w": float(w.sum())}
                )

        # 5. Say what happened.
        divergence = kl.reverse_k1(logp_old, logp_ref).sum(-1)
        deviation = returns.spread(said.value, drawn.group, said.verdict)
        metrics = {
            "objective/scores": measures.mean(said.value, said.verdict),
            "objective/kl": measures.mean(divergence, rows),
            "objective/rlhf_reward": measures.mean(outcome - cfg.kl * divergence, rows),
            "objective/entropy": float((old["entropy"] * weights.per_token(b.action, rows)).sum()),
            **{name: measures.average(learned, name) for name in ("loss/policy_avg", "loss/kl_avg", "grad_norm")},
            # These are means under the weights, whose sum is not 1 where slots are empty.
            "policy/clipfrac_avg": measures.average(learned, "policy/clipfrac_avg", "w"),
            "policy/approxkl_avg": measures.average(learned, "policy/approxkl_avg", "w"),
            "val/ratio": measures.average(learned, "val/ratio", "w"),
            "skipped_updates": float(skipped),
            "reward": measures.mean(said.value, said.verdict),
            "reward_std": measures.mean(deviation, said.verdict),
            "frac_reward_zero_std": measures.mean((deviation == 0).float(), said.verdict),
            "groups_redrawn": float(redrawn),
            **measures.responses(drawn, said),
            "num_tokens_credit": float(scheme.drawn),
            **measures.sampler_difference(b, logp_old),
        }
        if gold is not None:
            truth = gold(drawn)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        if refreshed is not None:
            ratio = learned[0]["val/ratio"] / learned[0]["w"] if learned else None
            gate.check(refreshed, run, policy, b, logp_own, logp_ref if start is None else None, ratio)
        run.log(step, metrics, headline=("objective/scores", "objective/kl"))
    return policy, {}


def rollout(
    cfg: Config, policy: Policy, sampling: Sampling, reward: Reward, task: Task, run: Run
) -> tuple[Batch, Score, int]:
    """Groups of responses and their scores; groups that do not vary are followed by as many others, up to
    `dynamic_sampling` times (Yu et al. 2025, eq. 11). How many were drawn for that is counted.
    """
    batches: list[Batch] = []
    scores: list[Score] = []
    missing, redrawn = cfg.prompts, 0
    for attempt in range(cfg.dynamic_sampling + 1):
        b = policy.sample(task.draw(missing, run.rng), cfg.samples, sampling, run.rng)
        score = reward(b)
        batches.append(b)
        scores.append(score)
        redrawn += missing if attempt else 0
        missing -= len(torch.unique(b.group[returns.spread(score.value, b.group, score.verdict) > 0]))
        if not missing:
            break
    return Batch.concat(batches), Score.concat(scores), redrawn


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the reference, the reward and the prompts, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    task = tasks.load(cfg.task, start)
    reference = experts.reference(cfg.reference, start, task.longest + cfg.max_new_tokens)
    reward = rewards.load(cfg.reward, start)
    gold = rewards.load(cfg.gold, start) if cfg.gold else None
    policy, figures = train(cfg, reference, reward, task, run, gold, start if cfg.reference else None)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    judged = judge.held_out(start, policy, reward, task, sampling, run, gold)
    return {**figures, **judged, **saved}
