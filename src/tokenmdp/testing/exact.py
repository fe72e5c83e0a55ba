"""The oracle: on a toy token MDP every response can be written down, so every expectation is a finite sum.

An estimator is right if its expectation equals the truth. Usually one samples and squints; here one enumerates:

    world = Exact(start=(0,), vocabulary=3, horizon=3, eos=2)       # 15 responses, as one Batch
    policy = TabularPolicy(3, 3, torch.Generator().manual_seed(0))  # a logit for every action of every state
    logp = policy.evaluate(world.batch)["logp"]                     # any policy's, or world.logp(a causal model)
    p = world.probability(logp)                                     # p(τ), sums to 1, differentiable
    J = expectation(p, world.score(sum))                            # autograd gives the policy gradient

and for an estimator g(τ), with one row of `world.batch` a response:

    expectation(p, g), variance(p, g)                               # no sampling noise at all

Everything is derived from one array, `logp[n, t]`, the log-probability of token t of response n: because all actions
of all states occur among the responses, it holds the whole policy. Nothing here calls the functions it is used to
check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenmdp.mdp import State, TokenMDP
from tokenmdp.types import Batch, Prompt

MOST_RESPONSES = 200_000

CausalModel = Callable[[Tensor], Tensor]
"""tokens [N, T] -> logits [N, T, V], at each position those of the *next* token: `lambda t: model(t).logits`."""


@dataclass(frozen=True)
class Values:
    """What every state and action is worth under a policy, exactly.

    Attributes:
        value: [N, L] V of the state before each token; zero outside the responses.
        q: [N, L] Q of that state and that token.
        advantage: [N, L] Q − V.
        by_state: V by the response so far: `by_state[()]` is the start.
        by_action: Q by the response up to and including the action: `by_action[(4, 7)]` is Q of action 7 in state (4,).
    """

    value: Float[Tensor, "N L"]
    q: Float[Tensor, "N L"]
    advantage: Float[Tensor, "N L"]
    by_state: dict[tuple[int, ...], Tensor]
    by_action: dict[tuple[int, ...], Tensor]


class Exact:
    """All responses of a token MDP from one prefix, and the exact expectations over them.

    Attributes:
        responses: the N responses, each a tuple of token ids; EOS included where one ended by itself.
        batch: the same as a `Batch` of N rows, all of one group.
        states: every response-so-far in which an action is chosen.
        state: [N, L] which of `states` precedes each token; −1 outside the responses. `x[world.state]` spreads any
            function x of the state over the batch.
        actions: every (state, action), written as the response up to and including the action.
        action: [N, L] which of `actions` each token is; −1 outside the responses.

    Raises:
        ValueError: when there are more responses than anyone wants to enumerate.
    """

    def __init__(self, start: Sequence[int], vocabulary: int, horizon: int, eos: int | None = None) -> None:
        self.mdp = TokenMDP(horizon, () if eos is None else (eos,), vocabulary, start)
        number = _count(vocabulary, horizon, eos is not None)
        if number > MOST_RESPONSES:
            raise ValueError(
                f"{number} responses of up to {horizon} of {vocabulary} tokens; "
                f"at most {MOST_RESPONSES} are enumerated: shorten the horizon or shrink the vocabulary"
            )
        leaves = _leaves(self.mdp, self.mdp.reset())
        self.responses = tuple(leaf.response for leaf in leaves)
        prompt = Prompt(ids=self.mdp.start, text=" ".join(map(str, self.mdp.start)))
        self.batch = Batch.build(
            [prompt] * len(leaves),
            self.responses,
            texts=[" ".join(map(str, r)) for r in self.responses],
            ended=[leaf.ended for leaf in leaves],
            group=[0] * len(leaves),
        )
        self.states, self.state = self._number(including=False)
        self.actions, self.action = self._number(including=True)
        place = {state: i for i, state in enumerate(self.states)}
        self._state_of_action = torch.tensor([place[a[:-1]] for a in self.actions])

    def __len__(self) -> int:
        return len(self.responses)

    def score(self, function: Callable[[tuple[int, ...]], float]) -> Float[Tensor, "N"]:
        """A score of whole responses, in float64: `function` gets each response's token ids."""
        return torch.tensor([float(function(r)) for r in self.responses], dtype=torch.float64)

    def logp(self, model: CausalModel) -> Float[Tensor, "N L"]:
        """Log-probabilities (nats) of every token under a causal model; differentiable, zero outside the responses."""
        tokens = self.batch.tokens
        chosen = model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
        return self._inside(nn.functional.pad(chosen, (1, 0)))

    def probability(self, logp: Float[Tensor, "N L"]) -> Float[Tensor, "N"]:
        """p(τ) = exp Σ_t log π(a_t | s_t). Sums to 1."""
        return logp.sum(1).exp()

    def values(self, logp: Float[Tensor, "N L"], reward: Float[Tensor, "N L"], gamma: float = 1.0) -> Values:
        """V, Q and A of every state and action, as conditional expectations of the return that follows.

            V(s) = E[ Σ_{k≥0} γ^k r_{t+k} | s_t = s ],   Q(s, a) = E[ the same | s_t = s, a_t = a ],   A = Q − V

        Args:
            logp: the policy's.
            reward: per-token rewards; for a score of whole responses, the score on each response's last token.
            gamma: discount a token.

        Returns:
            Also for states the policy itself never reaches; differentiable.
        """
        L = logp.shape[1]
        later = (torch.arange(L) - torch.arange(L)[:, None]).to(reward.dtype)  # [t, u]: u − t
        discount = torch.where(later >= 0, gamma ** later.clamp(min=0), torch.zeros_like(later))
        future = self._inside(reward) @ discount.T
        after = logp.flip(1).cumsum(1).flip(1)[:, 1:]
        v = self._collect(self.state, logp.flip(1).cumsum(1).flip(1).exp() * future, len(self.states))
        q = self._collect(self.action, nn.functional.pad(after, (0, 1)).exp() * future, len(self.actions))
        value, spread_q = self._inside(v[self.state]), self._inside(q[self.action])
        return Values(
            value=value,
            q=spread_q,
            advantage=spread_q - value,
            by_state=dict(zip(self.states, v, strict=True)),
            by_action=dict(zip(self.actions, q, strict=True)),
        )

    def kl(self, logp: Float[Tensor, "N L"], logp_ref: Float[Tensor, "N L"]) -> Float[Tensor, ""]:
        """KL(π ‖ ref) of whole responses, in nats: Σ_τ p(τ) (log p(τ) − log ref(τ))."""
        p = self.probability(logp)
        gap = (logp - logp_ref).sum(1)
        return (p * torch.where(p > 0, gap, torch.zeros_like(gap))).sum()

    def kl_at(self, logp: Float[Tensor, "N L"], logp_ref: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
        """KL(π(·|s) ‖ ref(·|s)) at the state before each token, in nats; zero outside."""
        chosen, chosen_ref = self._policy(logp), self._policy(logp_ref)
        pi = chosen.exp()
        term = pi * torch.where(pi > 0, chosen - chosen_ref, torch.zeros_like(pi))
        per_state = torch.zeros(len(self.states), dtype=term.dtype).index_add(0, self._state_of_action, term)
        return self._inside(per_state[self.state])

    def kl_by_step(self, logp: Float[Tensor, "N L"], logp_ref: Float[Tensor, "N L"]) -> Float[Tensor, "H"]:
        """The expected divergence at each step: E_π[ KL at s_t ], t = 1..H, a response that is over counting 0.

        Their sum is `kl`: the chain rule for relative entropy (Cover & Thomas 2006, theorem 2.5.3).
        """
        expected = self.probability(logp)[:, None] * self.kl_at(logp, logp_ref)
        return expected.sum(0)[len(self.mdp.start) :]

    def optimum(
        self, logp_ref: Float[Tensor, "N L"], score: Float[Tensor, "N"], beta: float
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, ""]]:
        """The best policy there is for E[score] − β KL(π ‖ ref), and how good it is.

            π*(τ) = ref(τ) exp(score(τ)/β) / Z,        max_π { E[score] − β KL } = β log Z

        Returns:
            π*(τ) for each response, and log Z.

        Raises:
            ValueError: when beta is not positive.

        Source: Rafailov et al. 2023, eq. 4.
        """
        if beta <= 0:
            raise ValueError(f"beta={beta}: without a positive KL weight the optimum is not a formula but a maximum")
        tilted = logp_ref.sum(1) + score / beta
        log_z = tilted.logsumexp(0)
        return (tilted - log_z).exp(), log_z

    def conditional(self, probability: Float[Tensor, "N"]) -> Float[Tensor, "N L"]:
        """The token policy with this distribution of responses: log p(a_t | s_t), for example of `optimum`.

        p(a | s) = Σ_{τ through s·a} p(τ) / Σ_{τ through s} p(τ)
        """
        mass = probability[:, None].expand(self.batch.tokens.shape)
        through_state = self._collect(self.state, mass, len(self.states))[self.state]
        through_action = self._collect(self.action, mass, len(self.actions))[self.action]
        return self._inside(through_action.log() - through_state.log())

    def draws(self, probability: Float[Tensor, "N"], k: int) -> tuple[Int[Tensor, "M k"], Float[Tensor, "M"]]:
        """All ways to draw k responses independently: the row numbers of each, and its probability. M = N^k.

        For estimators that compare the samples of a group with each other.
        """
        if len(self) ** k > MOST_RESPONSES:
            raise ValueError(f"{len(self)} responses drawn {k} times: {len(self) ** k} ways, at most {MOST_RESPONSES}")
        rows = torch.cartesian_prod(*[torch.arange(len(self))] * k).reshape(-1, k)
        return rows, probability[rows].prod(1)

    def _inside(self, x: Tensor) -> Tensor:
        return torch.where(self.batch.action, x, torch.zeros_like(x))

    def _collect(self, index: Tensor, x: Tensor, number: int) -> Tensor:
        inside = index >= 0
        return torch.zeros(number, dtype=x.dtype).index_add(0, index[inside], x[inside])

    def _policy(self, logp: Tensor) -> Tensor:
        """log π(a | s) once for every (state, action), taken from the first response that passes there."""
        inside = self.action >= 0
        index = self.action[inside]
        position = torch.arange(len(index))
        first = torch.full((len(self.actions),), len(index)).scatter_reduce(0, index, position, "amin")
        return logp[inside][first]

    def _number(self, including: bool) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
        seen: dict[tuple[int, ...], int] = {}
        index = torch.full(self.batch.tokens.shape, -1)
        offset = len(self.mdp.start)
        for n, response in enumerate(self.responses):
            for t in range(len(response)):
                index[n, offset + t] = seen.setdefault(response[: t + including], len(seen))
        return tuple(seen), index


class TabularPolicy(nn.Module):
    """One logit for every action of every state: the policy class in which nothing is approximated.

    Args:
        vocabulary: V.
        horizon: H.
        generator: draws the logits, standard normal, float64.
        start: how many tokens the prefix has.
    """

    def __init__(self, vocabulary: int, horizon: int, generator: torch.Generator, start: int = 1) -> None:
        super().__init__()
        self.vocabulary, self.horizon, self.start = vocabulary, horizon, start
        states = sum(vocabulary**d for d in range(horizon))
        self.table = nn.Parameter(torch.randn(states, vocabulary, generator=generator, dtype=torch.float64))

    def forward(self, tokens: Int[Tensor, "N T"]) -> Float[Tensor, "N T V"]:
        """Logits of the next token at each position; zero (uniform) before the prefix's end and after the horizon."""
        N, T = tokens.shape
        columns = [torch.zeros(N, self.vocabulary, dtype=self.table.dtype)] * T
        code, level = torch.zeros(N, dtype=torch.long), 0  # the response so far, read as a number in base V
        for depth in range(min(self.horizon, T - self.start + 1)):
            t = self.start - 1 + depth
            if depth > 0:
                code = code * self.vocabulary + tokens[:, t]
            columns[t] = self.table[level + code]
            level += self.vocabulary**depth
        return torch.stack(columns, dim=1)

    def evaluate(
        self, batch: Batch, want: Sequence[str] = ("logp",), temperature: float = 1.0
    ) -> dict[str, Float[Tensor, "B L"]]:
        """`logp` and `entropy` (nats) at the action positions of a batch, zero elsewhere: the face of a real policy.

        Raises:
            ValueError: when something else is wanted.
        """
        distribution = (self(batch.tokens)[:, :-1] / temperature).log_softmax(-1)
        found = {
            "logp": distribution.gather(2, batch.tokens[:, 1:, None]).squeeze(2),
            "entropy": -(distribution.exp() * distribution).sum(-1),
        }
        unknown = [name for name in want if name not in found]
        if unknown:
            raise ValueError(f"a tabular policy has no {unknown}; it has {sorted(found)}")
        padded = {name: nn.functional.pad(found[name], (1, 0)) for name in want}
        return {name: torch.where(batch.action, x, torch.zeros_like(x)) for name, x in padded.items()}


def expectation(probability: Float[Tensor, "N"], x: Float[Tensor, "N *S"]) -> Float[Tensor, "*S"]:
    """E[x] = Σ_n p_n x_n. Differentiable in both: the gradient of E[score] in the policy is the policy gradient."""
    return (probability.reshape(-1, *[1] * (x.ndim - 1)) * x).sum(0)


def variance(probability: Float[Tensor, "N"], x: Float[Tensor, "N *S"]) -> Float[Tensor, "*S"]:
    """Var[x] = Σ_n p_n (x_n − E[x])², entry by entry."""
    return expectation(probability, (x - expectation(probability, x)).square())


def gradient(objective: Float[Tensor, ""], parameters: Sequence[Tensor]) -> Float[Tensor, "P"]:
    """The gradient of a number in all parameters, as one vector; parameters that do not matter have gradient 0."""
    found = torch.autograd.grad(objective, list(parameters), retain_graph=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


def row_gradients(loss: Float[Tensor, "N"], parameters: Sequence[Tensor]) -> Float[Tensor, "N P"]:
    """The gradient of each row's loss, one by one: an estimator's gradient for each response it may meet."""
    return torch.stack([gradient(row, parameters) for row in loss])


def _leaves(mdp: TokenMDP, state: State) -> list[State]:
    if state.done:
        return [state]
    return [leaf for action in range(mdp.vocabulary) for leaf in _leaves(mdp, mdp.step(state, action))]


def _count(vocabulary: int, horizon: int, has_eos: bool) -> int:
    going_on = vocabulary - has_eos  # at each step one of the V actions may end the response
    ended = sum(int(going_on**t) for t in range(horizon)) if has_eos else 0
    return ended + int(going_on**horizon)
