"""A policy's logits read as soft Q: what maximum-entropy RL calls a value function, a language model has already.

    Q(s, a) = β (z_θ(s, a) − z_ref(s, a)),   V(s) = β ( log Σ_a exp z_θ(s, a) − log Σ_a exp z_ref(s, a) )
    ⇒   Q − V = β log π_θ(a | s) / π_ref(a | s),     V(s) = β log Σ_a π_ref(a | s) exp( Q(s, a) / β )

z are logits before the softmax. A policy that has not moved has Q = V = 0 everywhere.

Source: Guo et al. 2021, section 3.1 (logits as Q); relative to a reference as in Schulman, Chen & Abbeel 2017, eq. 4.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch

WANT = ("logit", "log_z")


def values(
    policy: Policy, batch: Batch, logit_ref: Float[Tensor, "B L"], log_z_ref: Float[Tensor, "B L"], beta: float
) -> dict[str, Float[Tensor, "B L"]]:
    """`q` of the chosen tokens and `value` of the states before them, reward units; carries the policy's gradient.

    Args:
        logit_ref, log_z_ref: what the reference's `evaluate` says of the same batch, asked for `WANT`.
        beta: β, reward units a nat.
    """
    z = policy.evaluate(batch, WANT)
    return {"q": beta * (z["logit"] - logit_ref), "value": beta * (z["log_z"] - log_z_ref)}
