"""A policy's logits read as soft Q: what maximum-entropy RL calls a value function, a language model has already.

    Q(s, a) = β (z_θ(s, a) − z_ref(s, a)),   V(s) = β ( log Σ_a exp z_θ(s, a) − log Σ_a exp z_ref(s, a) )
    ⇒   Q − V = β log π_θ(a | s) / π_ref(a | s),     V(s) = β log Σ_a π_ref(a | s) exp( Q(s, a) / β )

z are logits before the softmax. A policy that has not moved has Q = V = 0 everywhere.

Source: Guo et al. 2021, section 3.1 (logits as Q); relative to a reference as in Schulman, Chen & Abbeel 2017, eq. 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch


def logits(policy: Policy, batch: Batch) -> dict[str, Float[Tensor, "B L"]]:
    """`chosen`, the logit of each chosen token, and `log_z`, log Σ exp of all logits there; nats, zero off the mask."""
    where = batch.action.nonzero(as_tuple=True)
    tokens = batch.tokens[where]
    chosen, log_z = [], []
    with policy.backbone.converted():
        for piece, z in policy._action_logits(batch):
            chosen.append(z.gather(1, tokens[piece][:, None])[:, 0])
            log_z.append(z.logsumexp(-1))
    blank = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    return {
        name: blank.to(parts[0].dtype).index_put(where, torch.cat(parts)) if parts else blank
        for name, parts in (("chosen", chosen), ("log_z", log_z))
    }


def values(
    policy: Policy, batch: Batch, chosen_ref: Float[Tensor, "B L"], log_z_ref: Float[Tensor, "B L"], beta: float
) -> dict[str, Float[Tensor, "B L"]]:
    """`q` of the chosen tokens and `value` of the states before them, reward units; carries the policy's gradient.

    Args:
        chosen_ref, log_z_ref: what `logits` says of the reference on the same batch.
        beta: β, reward units a nat.
    """
    z = logits(policy, batch)
    return {"q": beta * (z["chosen"] - chosen_ref), "value": beta * (z["log_z"] - log_z_ref)}
