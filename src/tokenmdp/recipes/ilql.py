"""Token-level implicit Q-learning (ILQL): learn from a log what each token was worth, then clone the tokens worth more.

    V:  min  L_τ( Q̂(s_t, a_t) − V(s_t) ),                    L_τ the expectile loss, Q̂ the lesser of the target heads
    Q:  min  ½ (r_t + γ V(s_{t⁺}) − Q(s_t, a_t))² + α ( log Σ_a exp Q(s_t, a) − Q(s_t, a_t) )
    π:  min  − ω_t log π(a_t | s_t),                         ω_t = min( exp( (Q̂ − V)/β ), ω_max )

Offline, and a dynamic programme: where two logged responses share a state, the better end of one can be joined to the
better start of the other, which cloning whole responses cannot do. V is never asked about actions that the log lacks.

Source: Snell et al. 2022 (ILQL), section 4; Kostrikov et al. 2021 (IQL), eqs. 5-7; the regulariser Kumar et al. 2020.
Differs: the paper perturbs the logits of a cloned policy by β(Q − V) at every token it decodes; here the policy itself
    learns, as in IQL, and then any sampler decodes it. Q reads an action through the language model's own output
    embedding e, Q(s, a) = u·h_s + e_a·W h_s, which needs D² weights a head and not D·V. Target heads share the body.
    Scores are standardised over the log, so that α and β do not depend on their unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenmdp.functional import credit, imitation, measures, returns, value_loss, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.backbone import Backbone
from tokenmdp.models.heads import Critic
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.target import Target
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Score

SETTING = "offline_rl"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    data: str = "logged.jsonl"  # prompt, completion, reward: a file or a hub id
    steps: int = 200  # optimiser steps of the values and of the policy
    rows: int = 16  # logged responses a step
    learning_rate: float = 5e-5  # of the policy
    value_learning_rate: float = 1e-3  # of the heads (and of their body where it trains)
    tau: float = 0.8  # τ: 0.5 values the log's average action, towards 1 its best
    gamma: float = 1.0  # discount a token
    cql: float = 0.01  # α
    beta: float = 0.2  # β, in standard deviations of the score
    clip: float = 20.0  # ω_max
    target_rate: float = 0.1  # share of the way the target heads go after each step
    max_tokens: int = 256  # longer responses are cut there, and then do not end
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    value_train: str = "all"  # what of the values' body trains besides the heads: head (nothing) | all | top-N | lora-R
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient


class Twin(nn.Module):
    """Two Q heads, which start near Q = 0 but not at the same place: the lesser of two equal estimates helps nobody.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.level = nn.Linear(width, 2)
        generator = torch.Generator().manual_seed(0)
        self.action = nn.Parameter(torch.randn((2, width, width), generator=generator) / width)
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All its weights."""
        return self.named_parameters()

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """[2, N, V] of N states (N, D) and V actions (V, D), reward units."""
        return self.level(states).T[:, :, None] + (states @ self.action) @ embedding.T


class Values:
    """A body with a V head and twin Q heads.

    Attributes:
        critic: the body and the V head.
        twin: the Q heads; `target` are those that follow them.
    """

    def __init__(self, body: Backbone) -> None:
        self.critic = Critic(body)
        width = int(body.model.config.hidden_size)
        self.embedding = body.model.get_output_embeddings().weight.detach().float().clone()
        self.twin, self.target = Twin(width).to(body.device), Twin(width).to(body.device)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The body where it trains, and the heads, but not the target heads."""
        yield from self.critic.trained()
        yield from (("q_" + name, p) for name, p in self.twin.trained())

    def read(self, batch: Batch) -> dict[str, Tensor]:
        """`value`, `q1`, `q2` and the regulariser of both `cql1`, `cql2`; `q_target`, the lesser target, no gradient.

        All [B, L], zero outside the mask.
        """
        states = self.critic.states(batch)
        where = batch.action.nonzero(as_tuple=True)
        chosen = batch.tokens[where]
        own = {}
        for i, head in enumerate(self.twin(states[where], self.embedding), 1):
            own[f"q{i}"] = head.gather(1, chosen[:, None])[:, 0]
            own[f"cql{i}"] = value_loss.cql(head, chosen)
        blank = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        return {**self.worth(batch, states), **{k: blank.index_put(where, x) for k, x in own.items()}}

    def worth(self, batch: Batch, states: Tensor | None = None) -> dict[str, Tensor]:
        """`value`, with gradient where it is recorded, and `q_target`, without: what is needed to weigh tokens."""
        states = self.critic.states(batch) if states is None else states
        where = batch.action.nonzero(as_tuple=True)
        with torch.no_grad():
            q = self.target(states[where], self.embedding)
            goal = q.gather(2, batch.tokens[where].expand(2, -1)[..., None])[..., 0].amin(0)
        blank = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        return {"value": self.critic.value(states, batch), "q_target": blank.index_put(where, goal)}


def train(cfg: Config, start: Policy, logged: Batch, score: Tensor, run: Run) -> tuple[Policy, dict[str, float]]:
    """Learn the values of the log's tokens and, by them, a policy.

    Args:
        start: where the policy and the values' body start; frozen.
        logged: responses that anyone may have drawn.
        score: [B] what was logged of each; not finite means no verdict, and weight 0.

    Raises:
        ValueError: scores of another number than rows, or all of them equal.
    """
    if tuple(score.shape) != (len(logged),):
        raise ValueError(f"{tuple(score.shape)} scores for {len(logged)} logged responses: one of each a row")
    judged = Score.of(score)
    rows = judged.verdict
    outcome = returns.whiten(judged.value, rows.to(judged.value.dtype))
    if not bool((outcome != 0).any()):
        raise ValueError(
            f"the {int(rows.sum())} rows with a score all have the same: there is nothing to learn a value of"
        )
    policy = start.twin(cfg.train, name="ilql")
    values = Values(start.backbone.twin(cfg.value_train))
    actor = Learner(policy, cfg.learning_rate, tokens=cfg.micro_tokens)
    valuer = Learner(values, cfg.value_learning_rate, tokens=cfg.micro_tokens)
    target = Target(values.target, values.twin)
    run.note(f"{len(logged)} logged responses, {int((~rows).sum())} without a score")

    def value_loss_of(part: Batch, reward: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = values.read(part)
        goal = value_loss.td_target(reward, found["value"], part.action, cfg.gamma)
        v = value_loss.expectile(found["q_target"] - found["value"], cfg.tau)
        q = 0.5 * ((found["q1"] - goal).square() + (found["q2"] - goal).square())
        return v + q + cfg.cql * (found["cql1"] + found["cql2"]), {"val/td_error": (found["q1"] - goal).abs()}

    def policy_loss_of(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return imitation.nll(policy.evaluate(part)["logp"]), {}

    for step in run.steps(cfg.steps, actor, valuer, target, title="implicit Q", setting=SETTING):
        part = torch.randperm(len(logged), generator=run.rng)[: cfg.rows]
        b, L = logged.select(part), int(logged.length[part].max())
        plain = weights.per_token(b.action, rows[part])

        acted = valued = {"loss": 0.0, "grad_norm": 0.0, "val/td_error": 0.0}
        clipped = torch.zeros_like(b.action)
        idle = not bool((plain > 0).any())  # no row has a score: a step would only carry Adam's momentum on
        if not idle:
            # 1. What each logged token was worth.
            valued = valuer.step(value_loss_of, b, plain, reward=credit.last(outcome[part], b.action)[:, :L])
            target.follow(cfg.target_rate)

            # 2. Clone the tokens, the better ones more.
            found = in_parts(values.worth, b, cfg.micro_tokens)
            omega, clipped = value_loss.advantage_weight(found["q_target"] - found["value"], cfg.beta, cfg.clip)
            acted = actor.step(policy_loss_of, b, plain * omega)
        run.log(
            step,
            {
                "loss/policy_avg": acted["loss"],
                "loss/value_avg": valued["loss"],
                "val/td_error": valued["val/td_error"],
                "policy/clipfrac_avg": float((plain * clipped).sum()),
                "objective/scores": measures.mean(judged.value[part], rows[part]),
                "grad_norm": acted["grad_norm"],
                "critic_grad_norm": valued["grad_norm"],
                "skipped_updates": float(idle),
                "num_tokens": float(b.action.sum()),
                "no_verdict": float((~rows[part]).sum()),
            },
            headline=("loss/value_avg", "loss/policy_avg"),
        )
    return policy, {}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the model and the log, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model)
    logged, score = data.logged(files.rows(cfg.data), start, cfg.max_tokens)
    data.tell_cut(logged, cfg.max_tokens, run.note)
    run.note(f"start {start.name} {start.fingerprint()}")
    policy, figures = train(cfg, start, logged, score, run)
    return {**figures, **policy.publish(run.folder / "model")}
