"""The reward that demonstrations have in closed form: how much likelier they made a response.

    r(x, y) = log π_sft(y | x) − log π_init(y | x) = Σ_t r_t,   r_t = log π_sft(a_t | s_t) − log π_init(a_t | s_t)

π_sft was cloned from the demonstrations, starting from π_init. It is what the best classifier of π_sft's responses
against π_init's says (its logit), and the reward for which π_sft is the best policy at a KL weight of 1 to π_init.

Source: Sun & van der Schaar 2024, "Inverse-RLignment: large language model alignment from demonstrations through
    inverse reinforcement learning" (samples of the SFT model against initial samples); the reward a policy is optimal
    for: Rafailov et al. 2023, eq. 5; the best classifier: Goodfellow et al. 2014, proposition 1.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tokenmdp import mdp
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Score


class LogRatio:
    """Two policies as a reward.

    Args:
        cloned: π_sft.
        start: π_init.

    Raises:
        ValueError: the two read text as different tokens.
    """

    def __init__(self, cloned: Policy, start: Policy, name: str = "log_ratio") -> None:
        if cloned.tokenizer.get_vocab() != start.tokenizer.get_vocab():
            raise ValueError(
                f"{cloned.name} and {start.name} have different tokenizers: a difference of log-probabilities needs both of "
                "the same tokens. Give a model and the one it was fine-tuned from"
            )
        self.cloned, self.start, self.name = cloned, start, name

    @staticmethod
    def load(spec: str, policy: Policy) -> LogRatio:
        """`MODEL`, a model cloned from demonstrations, over the policy to be judged; or `MODEL,MODEL`, the second being
        the one it was cloned from.

        Raises:
            ValueError: no such model, more than two, or tokenizers that differ from the policy's.
        """
        names = [part.strip() for part in spec.split(",")]
        if len(names) > 2 or not all(names):
            raise ValueError(
                f"log_ratio:{spec} names {len(names)} models; it is log_ratio:CLONED or log_ratio:CLONED,START"
            )
        cloned = catalog.load(names[0]).freeze()
        cloned.name = Path(names[0]).name
        start = catalog.load(names[1]).freeze() if len(names) == 2 else policy
        LogRatio(cloned, policy)  # what is judged comes as the policy's tokens
        return LogRatio(cloned, start, f"log_ratio:{cloned.name}")

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Score:
        """[B] nats; per token in `token`. A response that either model holds impossible has no verdict."""
        mdp.touch("learned_reward")
        ours, theirs = (in_parts(p.evaluate, batch)["logp"] for p in (self.cloned, self.start))
        token = ours.double() - theirs.double()
        verdict = torch.isfinite(token).all(-1)
        token = torch.where(verdict[:, None], token, torch.zeros_like(token)).to(ours.dtype)
        return Score(token.double().sum(-1).to(ours.dtype), verdict, token)
