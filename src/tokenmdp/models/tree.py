"""Tree rollouts: reset to states inside given responses and draw futures from each.

    s_t = tokens[:t],     continuation_k ~ π(· | s_t),  k = 1 … K

A response is one path through the tree of all responses; because the dynamics are known, any node of it can be gone
back to. What is drawn there is worth a value without a critic (`functional.returns.branch`), a label of a step, or a
fair second try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tokenmdp import mdp
from tokenmdp.models import decode
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.types import Batch


@dataclass(frozen=True)
class Branches:
    """Futures drawn from states inside the responses of a batch.

    Attributes:
        batch: N whole responses, what was kept and what was drawn, so that any reward can judge them. `group` numbers
            the states; rows of one state are side by side.
        parent: [N] the row of the original batch that each goes on from.
        at: [N] the first position that was drawn anew; what comes before it is the parent's.
    """

    batch: Batch
    parent: Int[Tensor, "N"]
    at: Int[Tensor, "N"]

    @property
    def drawn(self) -> int:
        """Tokens that were sampled: what the futures cost."""
        return int((self.batch.length - self.at).sum())


class Fork(NamedTuple):
    """A state to draw from: the first tokens of a row.

    Attributes:
        parent: which row.
        length: how many of its tokens are kept, at least 1.
        horizon: the most tokens that may follow.
    """

    parent: int
    length: int
    horizon: int


def branch(
    policy: Policy,
    batch: Batch,
    at: Sequence[Sequence[int]],
    k: int,
    sampling: Sampling,
    rng: torch.Generator,
    advance: Callable[[int], None] | None = None,
) -> Branches:
    """Draw `k` futures from each of the given states; a parent row is read once for all the states along it.

    Equal to `Policy.sample` from each prefix, with the same uniform numbers and the horizon that is left.

    Args:
        at: for each row of the batch, positions of its actions: the state before `tokens[b, t]`, whose futures start
            with another choice of that token.
        sampling: as the responses were drawn; its `max_new_tokens` is the horizon of a whole response.
        advance: called with a number of finished rows, for a progress bar.

    Raises:
        ValueError: k below 1, not one list of positions a row, no position at all, a position that is no action, or a
            state that has used up the horizon.
        OutOfSetting: inside a setting without dynamics.
    """
    mdp.touch("dynamics")
    if k < 1 or len(at) != len(batch):
        raise ValueError(
            f"k is {k}, with positions for {len(at)} rows of {len(batch)}: ask for at least one future, and give a list "
            "for every row"
        )
    forks = [_fork(policy, batch, b, t, sampling) for b, positions in enumerate(at) for t in positions]
    if not forks:
        raise ValueError("there is no position to branch from: every list in `at` is empty")
    tokens = batch.tokens.tolist()
    states = [tokens[f.parent][: f.length] for f in forks]
    longest = max(f.horizon for f in forks)
    uniform = torch.rand((len(forks) * k, longest), generator=rng, dtype=torch.float64).to(policy.device)
    with torch.inference_mode(), policy.backbone.autocast(), policy.backbone.converted(longest):
        if policy.engine() is decode.fast:
            drawn = decode.fork(policy, states, [f.horizon for f in forks], k, uniform, sampling, advance)
        else:
            drawn = []
            for i, f in enumerate(forks):
                left = replace(sampling, max_new_tokens=f.horizon)
                own = uniform[i * k : (i + 1) * k]
                drawn += decode.slow(policy, [states[i]], k, own, left, advance)
    return _joined(policy, batch, [f for f in forks for _ in range(k)], drawn, k)


def overruled(
    policy: Policy,
    batch: Batch,
    rows: Sequence[int],
    at: Sequence[int],
    token: Sequence[int],
    sampling: Sampling,
    rng: torch.Generator,
) -> Batch:
    """Put another token in place of one in some rows, and let the policy go on from there.

    Args:
        rows, at, token: in row `rows[i]` the action at position `at[i]` becomes `token[i]`; what followed is dropped.
        sampling: as the responses were drawn; its `max_new_tokens` is the horizon of a whole response.

    Returns:
        All rows, in order. Nobody's policy drew them as they stand, so `logp_mu` is None.
    """
    mdp.touch("dynamics")
    whole = [t[:n] for t, n in zip(batch.tokens.tolist(), batch.length.tolist(), strict=True)]
    response = [row[len(p.ids) :] for row, p in zip(whole, batch.prompts, strict=True)]
    ended = batch.ended.tolist()
    going: list[int] = []
    for row, t, a in zip(rows, at, token, strict=True):
        kept = t - len(batch.prompts[row].ids)
        response[row], ended[row] = [*response[row][:kept], a], a in policy.eos_ids
        if not ended[row] and kept + 1 < sampling.max_new_tokens:
            going.append(row)

    def built(which: Sequence[int], tail: list[int]) -> Batch:
        prompts, said = [batch.prompts[i] for i in which], [[*response[i], *tail] for i in which]
        return Batch.build(
            prompts,
            said,
            texts=[policy.response_text(p.ids, r) for p, r in zip(prompts, said, strict=True)],
            ended=[ended[i] for i in which],
            group=[int(batch.group[i]) for i in which],
            pad=policy.eos_ids[0],
        ).to(batch.tokens.device)

    if going:
        # What stands after the state to go on from does not matter: it is the token to be drawn anew.
        states = built(going, [policy.eos_ids[0]])
        found = branch(policy, states, [[n - 1] for n in states.length.tolist()], 1, sampling, rng).batch
        for i, row in enumerate(going):
            response[row] = found.tokens[i, len(found.prompts[i].ids) : int(found.length[i])].tolist()
            ended[row] = bool(found.ended[i])
    return built(range(len(batch)), [])


def _fork(policy: Policy, batch: Batch, row: int, t: int, sampling: Sampling) -> Fork:
    if not 0 <= t < batch.tokens.shape[1] or not bool(batch.action[row, t]):
        raise ValueError(f"position {t} of row {row} is no action: a future starts where a token was chosen")
    taken = int(batch.action[row, :t].sum())
    left = sampling.max_new_tokens - taken
    if left < 1 or t + left > policy.context:
        raise ValueError(
            f"the state at position {t} of row {row} follows {taken} chosen tokens, and max_new_tokens="
            f"{sampling.max_new_tokens} leaves it {left} in a context of {policy.context}: give the horizon the responses "
            "were drawn with"
        )
    return Fork(row, t, left)


def _joined(policy: Policy, batch: Batch, forks: Sequence[Fork], drawn: Sequence[decode.Drawn], k: int) -> Branches:
    """What was kept and what was drawn as whole responses; row i comes from `forks[i]`, k rows from one state."""
    length = [f.length + len(d.tokens) for f, d in zip(forks, drawn, strict=True)]
    N, L = len(forks), max(length)
    tokens = torch.full((N, L), policy.eos_ids[0], dtype=torch.long)
    action = torch.zeros((N, L), dtype=torch.bool)
    logp = torch.zeros((N, L))
    parents = batch.to("cpu")
    for i, (f, d) in enumerate(zip(forks, drawn, strict=True)):
        tokens[i, : f.length] = parents.tokens[f.parent, : f.length]
        action[i, : f.length] = parents.action[f.parent, : f.length]
        tokens[i, f.length : length[i]] = torch.tensor(d.tokens)
        action[i, f.length : length[i]] = True
        if parents.logp_mu is not None:
            logp[i, : f.length] = parents.logp_mu[f.parent, : f.length]
            logp[i, f.length : length[i]] = torch.tensor(d.logp)
    prompts = tuple(batch.prompts[f.parent] for f in forks)
    responses = [tokens[i, len(p.ids) : length[i]].tolist() for i, p in enumerate(prompts)]
    joined = Batch(
        tokens=tokens,
        action=action,
        length=torch.tensor(length),
        ended=torch.tensor([d.ended for d in drawn]),
        prompts=prompts,
        texts=tuple(policy.response_text(p.ids, r) for p, r in zip(prompts, responses, strict=True)),
        group=torch.arange(N) // k,
        logp_mu=None if parents.logp_mu is None else logp,
    )
    parent = torch.tensor([f.parent for f in forks])
    at = torch.tensor([f.length for f in forks])
    device = batch.tokens.device
    return Branches(joined.to(device), parent.to(device), at.to(device))
