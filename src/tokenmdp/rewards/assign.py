"""Credit assignment by name: which of a response's tokens earned its score. The equations are in `functional.credit`.

A scheme turns one outcome a row into a reward a token. The recipes `ppo`, `grpo`, `reinforce`, `soft_q` and
`dapg` take one as their `credit` setting, and nothing else in a recipe changes with it:

    last                  all on the last token: when the outcome is known
    uniform               the same on every token: what every other scheme must beat
    attention[@0.5]       where the reward model looked when it judged; @: only this part of the score
    shaped                the rise of the reward model's own score from prefix to prefix, besides the outcome
    implicit:DIR[@0.1]    the reward implied by the policy in DIR, which was trained on preferences; @: its β
    process               what the reward says of each step, besides the outcome; process:DIR, what the model in DIR says
    branch:K              what each token did to the value: K futures from every visited state; branch:K/step, from
                          the ends of steps only

`attention:DIR` and `shaped:DIR` ask the reward model in DIR, whatever the recipe's reward is. A recipe asks twice:

    paid = scheme.paid(batch, score)            what a row is paid in all; a baseline is taken of this
    r    = scheme(batch, paid, outcome, ...)    Σ_t r_t = outcome = paid.value − what the recipe takes off

Rows are paid their score, and under `implicit` and `process` a second reward besides. `shaped` and `branch` take the
value of the start off, whatever the policy does: they are baselines already, and no second one is taken off (`advantage`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tokenmdp.functional import credit, returns
from tokenmdp.models import catalog, tree
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards import steps
from tokenmdp.rewards.attention import attention_of
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.rewards.step_model import StepRewardModel
from tokenmdp.types import Batch, Reward, Score


class Scheme(Protocol):
    """A way to assign credit.

    Attributes:
        name: what tables call it.
        drawn: tokens its last call sampled besides the batch; 0 for most.
        baseline: whether it takes off what was to be expected; nothing else is to be compared with then.
    """

    name: str
    drawn: int
    baseline: bool = False

    def paid(self, batch: Batch, score: Score) -> Score:
        """What rows are paid in all, and by whom it is known which token earned it.

        Here the score itself; schemes that add a second reward join it to the value and to the token rewards.

        Args:
            batch: responses, of the policy or of whoever is compared with it.
            score: what the reward said of them.
        """
        return score

    def __call__(
        self, batch: Batch, paid: Score, outcome: Float[Tensor, "B"], policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        """Token rewards of a batch; their sum is the outcome, less the value of the start where the scheme is a baseline.

        Args:
            batch: responses that `policy` sampled.
            paid: what `paid` made of their score.
            outcome: what there is to share out a row: the value of `paid`, less a truncation's penalty or a baseline; 0
                for a row without a verdict.
            policy: the current policy, for schemes that ask what it would have done from a prefix.
            rng: for schemes that sample.
        """
        ...


def advantage(
    scheme: Scheme,
    batch: Batch,
    paid: Score,
    total: Float[Tensor, "B"],
    compare: Callable[[Tensor], Tensor],
    policy: Policy,
    rng: torch.Generator,
) -> Float[Tensor, "B L"]:
    """What each token is credited with: what it and those after it earn, less what was to be expected.

        A_t = Σ_{u ≥ t} r_u of the outcome `compare(total)`      where only the whole response is paid
        A_t = compare(Σ_{u ≥ t} r_u at the t-th action)          where the reward says which token earned what
        A_t = Σ_{u ≥ t} r_u of `total`                           where the scheme is a baseline itself

    In the second case a baseline of whole responses would be taken off again at every later token, though most of it is earned
    by then. A response that is over is compared as it was at its last token: what it is paid at its end it still stands for.

    Args:
        total: what rows earned in all.
        compare: takes a baseline off numbers of rows, [B] to [B], and gives 0 for a row without a verdict.
    """
    if scheme.baseline or paid.token is not None:
        held = torch.where(paid.verdict, total, torch.zeros_like(total))
        ahead = returns.discounted(scheme(batch, paid, held, policy, rng), batch.action)
        if scheme.baseline:
            return ahead
        laid, last = returns.at_steps(ahead, batch.action), (batch.action.sum(1) - 1).clamp(min=0)
        step = torch.arange(laid.shape[1], device=laid.device).minimum(last[:, None])
        return returns.at_tokens(torch.stack([compare(x) for x in laid.gather(1, step).T], dim=1), batch.action)
    return returns.discounted(scheme(batch, paid, compare(total), policy, rng), batch.action)


def _beside(paid: Score, outcome: Tensor, equation: Callable[[Tensor], Tensor]) -> Tensor:
    """Rewards a token come as they are; only what the outcome adds to their sum is shared out."""
    return equation(outcome) if paid.token is None else paid.token + equation(outcome - paid.value)


def _joined(score: Score, equation: Callable[[Tensor], Tensor]) -> Score:
    """The score with a second reward in it: the equation gives the token rewards of both."""
    both = _beside(score, score.value, equation)
    token = torch.where(score.verdict[:, None], both, torch.zeros_like(both))
    return replace(score, value=token.sum(-1), token=token)


class Plain(Scheme):
    """A scheme that needs the action mask and nothing else."""

    drawn = 0

    def __init__(self, name: str, equation: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.name, self.equation = name, equation

    def __call__(
        self, batch: Batch, paid: Score, outcome: Tensor, policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        return _beside(paid, outcome, lambda rest: self.equation(rest, batch.action))


class Attention(Scheme):
    """Shares the score out as the reward model attended to the response."""

    drawn = 0

    def __init__(self, name: str, reward: RewardModel, beta: float) -> None:
        self.name, self.reward, self.beta = name, reward, beta

    def __call__(
        self, batch: Batch, paid: Score, outcome: Tensor, policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        seen = attention_of(self.reward, batch)
        return _beside(paid, outcome, lambda rest: credit.attention(rest, batch.action, seen, self.beta))


class Shaped(Scheme):
    """The reward model's score of every prefix as a potential."""

    drawn = 0
    baseline = True

    def __init__(self, name: str, reward: RewardModel, gamma: float) -> None:
        self.name, self.critic, self.gamma = name, reward.critic("none"), gamma

    def __call__(
        self, batch: Batch, paid: Score, outcome: Tensor, policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        potential = in_parts(lambda part: {"v": self.critic.value(self.critic.states(part), part)}, batch)["v"]
        return _beside(paid, outcome, lambda rest: credit.shaped(rest, batch.action, potential, self.gamma))


class Implicit(Scheme):
    """The reward that a policy trained on preferences implies, besides the score."""

    drawn = 0

    def __init__(self, name: str, preferred: Policy, reference: Policy, beta: float) -> None:
        self.name, self.preferred, self.reference, self.beta = name, preferred, reference, beta

    def paid(self, batch: Batch, score: Score) -> Score:
        ours = in_parts(lambda part: self.preferred.evaluate(part), batch)["logp"]
        theirs = in_parts(lambda part: self.reference.evaluate(part), batch)["logp"]
        return _joined(score, lambda rest: credit.implicit(rest, batch.action, ours, theirs, self.beta))

    def __call__(
        self, batch: Batch, paid: Score, outcome: Tensor, policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        return _beside(paid, outcome, lambda rest: credit.last(rest, batch.action))


class Process(Scheme):
    """A process reward on the steps, besides the score: what the recipe's own reward says of them, or another model.

    The tokens of a reward that scores tokens are its score, not a second reward: they come as they are, once.
    """

    drawn = 0

    def __init__(self, name: str, model: StepRewardModel | None) -> None:
        self.name, self.model = name, model

    def paid(self, batch: Batch, score: Score) -> Score:
        said = score.steps if self.model is None else self.model(batch).steps
        if said is not None:
            # What is said between the ends of steps is 0.
            return _joined(score, lambda rest: credit.process(rest, batch.action, said, said != 0))
        if score.token is None:
            raise ValueError(
                "credit=process pays what the reward says of each step, but this reward says nothing of steps or tokens: "
                "take a process reward model as the reward, or credit=process:FOLDER"
            )
        return score

    def __call__(
        self, batch: Batch, paid: Score, outcome: Tensor, policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        return _beside(paid, outcome, lambda rest: credit.last(rest, batch.action))


class Branch(Scheme):
    """Monte-Carlo values: futures drawn from visited states and judged by the recipe's own reward.

    Args:
        k: futures a state.
        delimiter: what closes a step, to branch between steps only; None branches at every token.
        sampling: as the recipe draws its responses.
        gamma: the discount of the recipe's returns.
    """

    baseline = True

    def __init__(
        self, name: str, reward: Reward, k: int, delimiter: str | None, sampling: Sampling, gamma: float = 1.0
    ) -> None:
        self.name, self.reward, self.k, self.delimiter = name, reward, k, delimiter
        self.sampling, self.gamma, self.drawn = sampling, gamma, 0

    def __call__(
        self, batch: Batch, paid: Score, outcome: Tensor, policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        # Token rewards are shared out anew: what a future is worth counts all of them.
        value = self.values(batch, paid.verdict, policy, rng).to(outcome.dtype)
        return credit.branch(outcome, batch.action, value, self.gamma)

    def values(self, batch: Batch, rows: Tensor, policy: Policy, rng: torch.Generator) -> Float[Tensor, "B L"]:
        """V of the states before each token of the rows that count; see `returns.branch` for those not reset to."""
        begins = batch.action
        if self.delimiter is not None:
            closed = steps.ends(batch, policy.tokenizer, self.delimiter)
            begins = batch.action & _new_step(batch.action, (closed & ~steps.last_of(closed)).long())
        at = [begins[b].nonzero()[:, 0].tolist() if bool(rows[b]) else [] for b in range(len(batch))]
        self.drawn = 0
        if not any(at):
            return torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        found = tree.branch(policy, batch, at, self.k, self.sampling, rng)
        self.drawn = found.drawn
        said = self.reward(found.batch)
        return returns.branch(said.value, found.parent, found.at, batch.action, said.verdict)


def _new_step(action: Tensor, closed: Tensor) -> Tensor:
    """True where an action is the first of its row, or the first after a step was closed."""
    number = closed.cumsum(dim=1) - closed  # steps closed before each token
    before = torch.full_like(number[:, 0], -1)
    columns = []
    for t in range(action.shape[1]):
        columns.append(number[:, t] > before)
        before = torch.where(action[:, t], number[:, t], before)
    return torch.stack(columns, dim=1)


PLAIN = {"last": credit.last, "uniform": credit.uniform}
NAMES = (*PLAIN, "attention", "shaped", "implicit:FOLDER", "process", "branch:K")
_PART = re.compile(r"(attention.*|implicit.*)@(\d*\.?\d+)")
_BRANCH = re.compile(r"(\d+)(/step)?")


def load(spec: str, reward: Reward, reference: Policy, sampling: Sampling | None = None, gamma: float = 1.0) -> Scheme:
    """The scheme called `spec`.

    Args:
        reward: the recipe's reward, for schemes that read it at prefixes or ask it of other futures.
        reference: the frozen start of the policy, for schemes that compare with it.
        sampling: how the recipe draws its responses, for schemes that draw more of them.
        gamma: the discount of the recipe's returns, for schemes that pay what a potential rises by.

    Raises:
        ValueError: there is no such scheme, with a suggestion; or it needs what is not there, with the remedy.
    """
    part = _PART.fullmatch(spec)
    name, _, argument = (part[1] if part else spec).partition(":")
    if spec in PLAIN:
        return Plain(spec, PLAIN[spec])
    if name == "attention":
        beta = float(part[2]) if part else 1.0
        if not 0 <= beta <= 1:
            raise ValueError(f"credit={spec}: attention spreads a part of the score, from 0 to 1")
        return Attention(spec, _reward_model(spec, argument, reward, reference), beta)
    if name == "shaped":
        return Shaped(spec, _reward_model(spec, argument, reward, reference), gamma)
    if name == "implicit" and argument:
        return Implicit(spec, _preferred(argument, reference), reference, float(part[2]) if part else 0.1)
    if name == "process":
        return Process(spec, StepRewardModel.load(argument, reference) if argument else None)
    if name == "branch":
        return _branch(spec, argument, reward, sampling, gamma)
    near = difflib.get_close_matches(name, [n.partition(":")[0] for n in NAMES], n=1)
    guess = f"did you mean {near[0]}? " if near and near[0] != name else ""
    raise ValueError(f"there is no credit scheme {spec!r}: {guess}a scheme is one of {', '.join(NAMES)}")


def _reward_model(spec: str, folder: str, reward: Reward, reference: Policy) -> RewardModel:
    if folder:
        return RewardModel.load(folder, reference)
    if isinstance(reward, RewardModel):
        return reward
    name = spec.partition("@")[0]
    raise ValueError(
        f"credit={spec} reads a reward model, and {reward.name} is a {type(reward).__name__}: give a reward model's folder as "
        f"the reward, or name one here, {name}:FOLDER (`tokenmdp reward-model` trains one)"
    )


def _preferred(folder: str, reference: Policy) -> Policy:
    found = catalog.load(folder, device=str(reference.device)).freeze()
    if found.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError(
            f"the policy in {folder} and the reference {reference.name} have different tokenizers: credit=implicit compares "
            "them token by token, so train it from this reference"
        )
    return found


def _branch(spec: str, argument: str, reward: Reward, sampling: Sampling | None, gamma: float) -> Branch:
    match = _BRANCH.fullmatch(argument)
    if match is None or int(match[1]) < 1:
        raise ValueError(f"credit={spec}: write branch:K or branch:K/step, K futures from each state, at least 1")
    if sampling is None:
        raise ValueError(
            f"credit={spec} draws more responses, but this recipe does not say how it draws them: it must give its sampling "
            "to assign.load"
        )
    return Branch(spec, reward, int(match[1]), steps.DELIMITER if match[2] else None, sampling, gamma)
