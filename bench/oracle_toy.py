"""The toy of bench/oracle.py: a policy small enough to enumerate, and moments of gradients without sampling.

An estimator is a coefficient for each of the S actions (a token in a state) on the gradient of its log-probability. The
Gram matrix of these S gradients turns coefficients into lengths and angles, so that no gradient is ever laid out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tokenmdp.testing.exact import Exact, row_gradients

V, H, EOS = 4, 3, 0
PROMPTS = ((1, 2), (2, 1))
NEVER = 1e9  # the noise of what points away from the truth
CHUNK = 20_000

Moments = tuple[Tensor, float]  # the mean of the coefficients [S], and of the squared length of the gradient
TokenLoss = Callable[[Tensor, Tensor], Tensor]  # logp, advantage -> loss, all [N, L]


def model_of(seed: int) -> GPT2LMHeadModel:
    """A GPT-2 of two small blocks with random weights, in float64."""
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=16, eos_token_id=EOS, bos_token_id=EOS
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0.0, 0.3)
    return model.double().eval()


def moved(model: GPT2LMHeadModel, seed: int, size: float = 0.1) -> GPT2LMHeadModel:
    """A copy with noise on every weight."""
    draw = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=draw, dtype=torch.float64))
    return other


def judge(response: tuple[int, ...]) -> float:
    """The score of a response: 3s are liked, ending is not, a 2 at the start a little."""
    return response.count(3) - 0.5 * (response[-1] == EOS) + 0.3 * (response[0] == 2)


def logp_of(world: Exact, model: GPT2LMHeadModel) -> Tensor:
    return world.logp(lambda tokens: model(input_ids=tokens, use_cache=False).logits)


@dataclass(frozen=True)
class Toy:
    """The responses to some prompts under one policy: N rows, S actions (a token in a state).

    Attributes:
        worlds: the responses to each prompt.
        logp: [N, L] log-probabilities, with their graph.
        score: [N].
        p: [N] probability of each row among the responses to its prompt.
        action: [N, L] which of the S actions each token is, −1 outside.
        jacobian: [S, P] the gradient of each action's log-probability.
        gram: [S, S] their inner products.
        truth: [S] coefficients of ∇E[score], the mean over prompts.
    """

    worlds: tuple[Exact, ...]
    parameters: list[Tensor]
    logp: Tensor
    score: Tensor
    p: Tensor
    action: Tensor
    jacobian: Tensor
    gram: Tensor
    truth: Tensor

    @property
    def mask(self) -> Tensor:
        return self.action >= 0

    @property
    def length(self) -> Tensor:
        return self.mask.sum(1).double()

    def spread(self, tokens: Tensor) -> Tensor:
        """Coefficients of tokens [N, L] as coefficients of actions [N, S]."""
        wide = torch.zeros(len(tokens), len(self.gram) + 1, dtype=torch.float64)
        return wide.scatter_add(1, self.action.where(self.mask, len(self.gram)), tokens * self.mask)[:, :-1]

    def slopes(self, loss: TokenLoss, signs: Sequence[float] = (1.0, -1.0)) -> Tensor:
        """[2N, S] minus the derivative of a token loss in log π at advantage +1, then −1: what a row adds to a gradient."""
        found = []
        for sign in signs:
            logp = self.logp.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(logp, sign * self.mask.double()).sum(), logp)
            found.append(self.spread(-slope))
        return torch.cat(found)


def toy_of(model: GPT2LMHeadModel, prompts: Sequence[tuple[int, ...]]) -> Toy:
    worlds = tuple(Exact(prompt, V, H, eos=EOS) for prompt in prompts)
    parameters = list(model.parameters())
    logps = [logp_of(world, model) for world in worlds]
    # The second prompt is easier: all its responses score 1 more.
    scores = [world.score(judge) + i for i, world in enumerate(worlds)]
    p = torch.cat([w.probability(x) for w, x in zip(worlds, logps, strict=True)])
    sizes = [0, *(len(world.actions) for world in worlds)]
    action = torch.cat([torch.where(w.action >= 0, w.action + sum(sizes[: i + 1]), -1) for i, w in enumerate(worlds)])
    logp = torch.cat(logps)
    where = [(action == s).nonzero()[0] for s in range(sum(sizes))]
    jacobian = row_gradients(torch.stack([logp[n, t] for n, t in where]), parameters)
    bare = Toy(worlds, parameters, logp, torch.cat(scores), p.detach(), action, jacobian, jacobian @ jacobian.T, p)
    share = (p.detach() * bare.score / len(worlds))[:, None]
    truth = bare.spread(share * bare.mask).sum(0)
    return Toy(**{**vars(bare), "truth": truth})


def groups(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[M, k] every multiset of k rows, and its probability as the outcome of k independent draws."""
    rows = torch.combinations(torch.arange(len(p)), k, with_replacement=True)
    run, orders = torch.ones(len(rows)), torch.full((len(rows),), float(math.factorial(k)), dtype=torch.float64)
    for j in range(1, k):  # rows are sorted: equal neighbours are a run of m, and k! / Π m! orders give this multiset
        run = torch.where(rows[:, j] == rows[:, j - 1], run + 1, torch.ones_like(run))
        orders = orders / run
    return rows, orders * p[rows].prod(1)


def alone(toy: Toy, c: Tensor) -> Moments:
    """Moments of an estimator of single responses with coefficients [N, S]."""
    return toy.p @ c, float(toy.p @ ((c @ toy.gram) * c).sum(1))


def grouped(
    toy: Toy,
    rows: Tensor,
    probability: Tensor,
    advantage: Tensor,
    slopes: Tensor,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Moments:
    """Moments of an estimator that sums over a group.

    Args:
        rows, advantage: [M, k] of every group.
        slopes: [2N, S] what each row adds at advantage +1, then at −1 (a clip asks for the sign); or [N, S], linear.
        weight: how much the rows of a group count, [m, k] from [m, k]; equally by default, and 1 in all.
    """
    N = len(toy.score)
    signed = len(slopes) == 2 * N
    inner = slopes @ toy.gram @ slopes.T
    mean, square = torch.zeros(len(slopes), dtype=torch.float64), 0.0
    for at in range(0, len(rows), CHUNK):
        n, a, p = rows[at : at + CHUNK], advantage[at : at + CHUNK], probability[at : at + CHUNK]
        share = a / n.shape[1] if weight is None else a * weight(n)
        place, size = (n + N * (share < 0), share.abs()) if signed else (n, share)
        used = torch.zeros(len(n), len(slopes), dtype=torch.float64).scatter_add(1, place, size)
        mean += p @ used
        square += float(p @ ((used @ inner) * used).sum(1))
    return mean @ slopes, square


def figures(toy: Toy, found: Moments, responses: int, truth: Tensor | None = None) -> dict[str, float]:
    """What the head of this file explains, of an estimator that takes so many responses."""
    mean, square = found
    truth = toy.truth if truth is None else truth
    size, own = float(truth @ toy.gram @ truth) ** 0.5, float(mean @ toy.gram @ mean) ** 0.5
    along = float(mean @ toy.gram @ truth) / size
    gap = mean - truth
    cosine = along / own
    return {
        "bias": max(0.0, float(gap @ toy.gram @ gap)) ** 0.5 / size,
        "off": max(0.0, 1 - cosine**2) ** 0.5 if cosine > 0 else 1.0,
        "cosine": cosine,
        "noise": responses * (square - own**2) / along**2 if cosine > 0 else NEVER,
    }
