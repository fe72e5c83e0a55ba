"""Losses that imitate demonstrations, per token and unreduced: sum them under a weight from `weights`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def nll(logp: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Behaviour cloning, in language models called supervised fine-tuning: minus the log-likelihood of the
    demonstrated tokens.

        ℓ_t = −log π(a_t | s_t)

    It is `policy_loss.reinforce` with advantage 1 on every demonstrated token; summed over a response and averaged
    over demonstrations it is KL(demonstrator ‖ π) up to a constant. Zero where `logp` is (outside the action mask).

    Args:
        logp: log-probability (nats) of the demonstrated tokens under π; carries the gradient.

    Returns:
        Nats per token.

    Source: Pomerleau 1988 (behaviour cloning); Ouyang et al. 2022, section 3.1 (supervised fine-tuning).
    """
    return -logp
