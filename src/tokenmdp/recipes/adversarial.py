"""Adversarial imitation on the token MDP: a discriminator learns what tells the policy from the demonstrator, the policy
learns to leave nothing to tell.

    D = σ(h):   min_h  − ½ Σ ρ_E log D − ½ Σ ρ_π log(1 − D)            on demonstrations and on the policy's own responses
    r_t = f( h(s_t, a_t) ) − β log( π(a_t | s_t) / π_start(a_t | s_t) ) − c log π(a_t | s_t)
    ℓ_t = − min( ρ_t A_t, clip(ρ_t, 1 ± ε) A_t ),                      A_t = Σ_{u ≥ t} r_u − mean of the others' at t

    --reward   f(h)           what falls, of the two visitation frequencies ρ(s, a)
    gail       log(1 + e^h)   2 JS(ρ_E, ρ_π)
    airl       h              KL(ρ_π ‖ ρ_E): mode-seeking
    fairl      −h e^h         published for KL(ρ_E ‖ ρ_π); held fixed, its gradient follows no divergence
    forward    e^h            KL(ρ_E ‖ ρ_π): mode-covering, as behaviour cloning

Demonstrations are all it is given: no reward, no labels, and no demonstrator to ask. It acts, so that it learns in the
states it gets to itself. With one pass and one update a phase (the default) the policy's step is REINFORCE with the
return to go and a baseline; with more it is PPO's.

Source: Ho & Ermon 2016 (GAIL), algorithm 1; Fu et al. 2018 (AIRL); Ghasemipour et al. 2020 (f-MAX, FAIRL); the surrogate:
    Schulman et al. 2017, eq. 7.
Differs: logits are clipped to ± `bound` where they become rewards, so a discriminator that is sure of itself gives finite
    ones (the policy's gradient never goes through D, so none vanishes); the state after an end counts at every step that is
    left (`functional.adversarial.to_go`); D sees several responses for each demonstration, to the same prompt, and both
    sides weigh one half; REINFORCE or PPO in place of TRPO; AIRL without its split of h into reward and potential.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenmdp import gate, tasks
from tokenmdp.functional import adversarial, imitation, kl, measures, policy_loss, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.heads import Critic, pooled
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Score, stacked

SETTING = "inverse_rl"
VARIANTS = {"gail": {"reward": "gail"}, "airl": {"reward": "airl"}, "fairl": {"reward": "fairl"}}


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start: best the SFT model
    data: str = "demonstrations.jsonl"  # text | messages | prompt, completion: a file or a hub id
    task: str = ""  # a task's name, as in `arithmetic`: its own demonstrations, and not `data`
    reward: str = "gail"  # what D's logit becomes: gail | airl | fairl | forward
    steps: int = 100  # phases of sampling, telling apart and learning
    prompts: int = 16  # demonstrations a phase, whose prompts the policy answers
    samples: int = 4  # responses a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens: demonstrations of a file are cut there
    learning_rate: float = 2e-5  # of the policy
    epochs: int = 1  # passes over a phase's responses: 1 with 1 minibatch is REINFORCE
    minibatches: int = 1  # updates of the policy a pass
    clip: float = 0.2  # ε, in units of the ratio
    discriminator_learning_rate: float = 1e-4  # several times the policy's: one that lags sends the policy in circles
    discriminator_updates: int = 2  # of D a phase
    discriminator_train: str = "all"  # what of D's body trains besides its head: all | top-N | lora-R | head (nothing)
    bound: float = 5.0  # largest |h| that becomes a reward, nats
    kl: float = 0.0  # β, reward units a nat: what leaving the start costs
    entropy: float = 0.0  # c, reward units a nat: a bonus for tokens that were unlikely
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    held_out: float = 0.05  # share of the demonstrations never trained on
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if self.reward not in adversarial.REWARDS:
            raise ValueError(f"reward is {self.reward!r}; it must be one of {', '.join(adversarial.REWARDS)}")
        counts = (self.steps, self.prompts, self.epochs, self.minibatches, self.discriminator_updates)
        if min(counts) < 1 or self.samples < 2:
            raise ValueError(
                f"steps, prompts, epochs, minibatches, discriminator_updates are {counts}, samples is {self.samples}: counts, at "
                "least 1, and of samples 2, for each is compared with the others"
            )
        if min(self.kl, self.entropy) < 0 or not self.bound > 0 or not self.clip > 0:
            raise ValueError(
                f"kl={self.kl}, entropy={self.entropy}, bound={self.bound}, clip={self.clip}: the first two are at least 0, the "
                "others positive"
            )


class Discriminator(Critic):
    """A critic that reads the state after each token, not before it: h(s_t, a_t), the log-odds of the demonstrator."""

    def states(self, batch: Batch) -> Float[Tensor, "B L D"]:
        """What the head reads: `states[b, t]` has read `tokens[b, :t + 1]`."""
        return pooled(self.backbone.hidden(batch.tokens, batch.read), self.pool)

    def logit(self, batch: Batch) -> Float[Tensor, "B L"]:
        """h at every action, zero elsewhere; with gradient."""
        return self.value(self.states(batch), batch)


def train(
    cfg: Config, start: Policy, discriminator: Discriminator, demonstrations: Batch, held_out: Batch, run: Run
) -> tuple[Policy, dict[str, float]]:
    """Imitate; returns the trained policy, and the held-out loss before and after.

    Args:
        start: where the policy starts; frozen.
        discriminator: a head on any body that reads the same tokens; it need not be the policy's.

    Raises:
        ValueError: a demonstration is longer than the horizon: its length alone would give it away.
    """
    longest = int(demonstrations.action.sum(-1).max())
    if longest > cfg.max_new_tokens:
        raise ValueError(
            f"a demonstration has {longest} tokens and the policy's responses at most {cfg.max_new_tokens}: length alone would "
            "tell them apart; raise max_new_tokens, or cut the demonstrations there"
        )
    policy = start.twin(cfg.train, name=cfg.reward)
    actor = Learner(policy, cfg.learning_rate, tokens=cfg.micro_tokens)
    judge = Learner(discriminator, cfg.discriminator_learning_rate, tokens=cfg.micro_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens)
    H = cfg.max_new_tokens

    def evaluate(model: Policy, batch: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want), batch)

    def tell(part: Batch, demonstrated: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return adversarial.discriminator(discriminator.logit(part), demonstrated), {}

    def act(part: Batch, advantage: Tensor, logp_old: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = policy.evaluate(part)["logp"]
        value, clipped = policy_loss.ppo_clip(logp, logp_old, advantage, cfg.clip)
        change = logp - logp_old
        return value, {
            "policy/clipfrac_avg": clipped.to(value.dtype),
            "policy/approxkl_avg": change.exp() - 1 - change,
            "val/ratio": change.exp(),
            "slots_used": torch.ones_like(value),
        }

    before = held_out_nll(start, held_out)
    metrics: dict[str, float] = {}
    for step in run.steps(cfg.steps, actor, judge, title="adversarial imitation", setting=SETTING):
        # 1. Demonstrations, and the policy's own responses to their prompts.
        shown = demonstrations.select(torch.randperm(len(demonstrations), generator=run.rng)[: cfg.prompts])
        b = policy.sample(shown.prompts, cfg.samples, sampling, run.rng)
        both = Batch.concat([shown, b])
        theirs = torch.arange(len(both), device=both.tokens.device) < len(shown)

        # 2. Tell them apart: both sides weigh one half, whatever their numbers.
        w = stacked([0.5 * weights.per_slot(side.action, H) for side in (shown, b)])
        for _ in range(cfg.discriminator_updates):
            told = judge.step(tell, both, w, demonstrated=theirs[:, None].expand(both.tokens.shape))

        # 3. Reward, return and advantage of every token.
        logit = in_parts(lambda part: {"logit": discriminator.logit(part)}, both)["logit"]
        bounded = logit[~theirs, : b.tokens.shape[1]].clamp(-cfg.bound, cfg.bound)
        old, logp_start = evaluate(policy, b, "logp", "entropy"), evaluate(start, b, "logp")["logp"]
        price = cfg.kl * kl.reverse_k1(old["logp"], logp_start) + cfg.entropy * old["logp"]
        earned = adversarial.to_go(adversarial.REWARDS[cfg.reward](bounded), b.action, b.ended, H)
        ahead = earned - adversarial.to_go(price, b.action, torch.zeros_like(b.ended), H)
        advantage = adversarial.against_others(ahead, b.action, b.group)

        # 4. Learn to leave nothing to tell.
        learned: list[dict[str, float]] = []
        for _ in range(cfg.epochs):
            for rows in torch.randperm(len(b), generator=run.rng).chunk(cfg.minibatches):
                mini = b.select(rows)
                L = mini.tokens.shape[1]
                columns = {"advantage": advantage[rows, :L], "logp_old": old["logp"][rows, :L]}
                learned.append(actor.step(act, mini, weights.per_slot(mini.action, H), **columns))

        # 5. Say what happened.
        updates = ("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio")
        metrics = {
            "loss": told["loss"],
            "discriminator_grad_norm": told["grad_norm"],
            **told_apart(logit, both, theirs, cfg.bound),
            "objective/scores": float(earned[:, 0].mean()),
            "objective/kl": float(kl.reverse_k1(old["logp"], logp_start).sum(-1).mean()),
            "objective/entropy": float((old["entropy"] * weights.per_token(b.action)).sum()),
            "loss/policy_avg": measures.average(learned, "loss"),
            "grad_norm": measures.average(learned, "grad_norm"),
            **{name: measures.average(learned, name, over="slots_used") for name in updates},
            **measures.responses(b, Score.of(earned[:, 0])),
            **measures.sampler_difference(b, old["logp"]),
        }
        gate.check(step, run, policy, b, old["logp"], logp_start)
        run.log(step, metrics, headline=("discriminator/accuracies", "objective/scores"))
    if metrics and abs(metrics["discriminator/accuracies"] - 0.5) < 0.02:
        run.note(
            "at the end nothing told demonstrations from responses (accuracy "
            f"{metrics['discriminator/accuracies']:.2f} of tokens): the two are alike, or the discriminator cannot see more"
        )
    return policy, {"held_out_nll_before": before, "held_out_nll": held_out_nll(policy, held_out)}


def told_apart(logit: Float[Tensor, "B L"], b: Batch, theirs: Bool[Tensor, "B"], bound: float) -> dict[str, float]:
    """How well the discriminator tells the demonstrator's rows from the others, token by token."""
    shown, own = logit[b.action & theirs[:, None]], logit[b.action & ~theirs[:, None]]
    sure = [((h > 0).double() + 0.5 * (h == 0).double()).mean() for h in (shown, -own)]
    return {
        "discriminator/accuracies": float(sum(sure)) / 2,
        "discriminator/logits_demonstrated": float(shown.mean()),
        "discriminator/logits_sampled": float(own.mean()),
        "discriminator/clipped_ratio": float((own.abs() > bound).double().mean()),
    }


def held_out_nll(policy: Policy, batch: Batch) -> float:
    """Mean negative log-likelihood of the held-out demonstrations, nats a token: forward KL up to a constant."""
    logp = in_parts(policy.evaluate, batch)["logp"]
    return float((imitation.nll(logp) * weights.per_token(batch.action)).sum())


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the start and the demonstrations, imitate, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    known = tasks.load(cfg.task, start).demonstrations if cfg.task else None
    if cfg.task and known is None:
        raise ValueError(f"the task {cfg.task} has no demonstrations to imitate: give a file with some by --data")
    everything = known if known is not None else data.demonstrations(files.rows(cfg.data), start, cfg.max_new_tokens)
    learned, kept = data.split(everything, cfg.held_out, run.rng)
    run.note(f"{len(learned)} demonstrations, {len(kept)} held out; start {start.name} {start.fingerprint()}")
    discriminator = Discriminator(start.backbone.twin(cfg.discriminator_train))
    policy, figures = train(cfg, start, discriminator, learned, kept, run)
    return {**figures, **policy.publish(run.folder / "model")}
