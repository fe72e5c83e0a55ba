"""Steps of a response, and what each is worth: labels made by resetting to the end of a step and rolling out.

    share:  y_k = 1/K Σ_j 1[future j from the end of step k ends right]
    any:    y_k = 1[some future from the end of step k ends right]

A step after which the policy still gets there is a good one. The last step has no future: its label is whether the
response is right. A right response whose steps would nearly always have failed was lucky: `wrong_steps` counts these.

Source: Wang et al. 2023 (Math-Shepherd), eqs. 3 (hard: any) and 4 (soft: share).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor

from tokenmdp.functional import returns
from tokenmdp.models import tree
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.types import Batch, Reward

DELIMITER = "\n"
KINDS = ("share", "any")
RIGHT = 0.5  # a score above this is a right response: verifiers say 0 or 1


def ends(
    batch: Batch, tokenizer: transformers.PreTrainedTokenizerBase, delimiter: str = DELIMITER
) -> Bool[Tensor, "B L"]:
    """True at the last token of each step: where a delimiter is complete, and where the text ends after the last one.

    The end-of-text token says nothing and is part of no step, unless a response has nothing else.

    Args:
        delimiter: what closes a step, as text; the empty one closes a step at every token, the end of the text too.
    """
    if not delimiter:
        return batch.action.clone()
    out = torch.zeros_like(batch.action)
    pieces: dict[int, str] = {}
    for row in range(len(batch)):
        at = batch.action[row].nonzero()[:, 0].tolist()
        text, closed, said = "", 0, -1
        for t in at:
            token = int(batch.tokens[row, t])
            if token not in pieces:
                pieces[token] = str(
                    tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                )
            text += pieces[token]
            said = t if pieces[token] else said
            if text.find(delimiter, closed) >= 0:
                out[row, t] = True
                closed = text.rfind(delimiter) + len(delimiter)
        if at and (text[closed:].strip() or not bool(out[row].any())):
            out[row, said if said >= 0 else at[-1]] = True
    return out


def last_of(mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """True at the last position of each row that is True."""
    return mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)


@dataclass(frozen=True)
class StepLabels:
    """What the steps of a batch are worth.

    Attributes:
        label: [B, L] in [0, 1] at the last token of each step; zero elsewhere.
        mask: [B, L] True at the last token of each step that has a label.
        right: [B] whether the response is right.
        verdict: [B] False where the reward gave none: such a row has no labels.
        drawn: tokens sampled for the labels.
    """

    label: Float[Tensor, "B L"]
    mask: Bool[Tensor, "B L"]
    right: Bool[Tensor, "B"]
    verdict: Bool[Tensor, "B"]
    drawn: int

    def wrong_steps(self, below: float = 0.5) -> Bool[Tensor, "B"]:
        """Right responses with a step from which fewer than the share `below` of the futures end right."""
        return self.right & (self.mask & (self.label < below)).any(dim=1)


def label(
    batch: Batch,
    policy: Policy,
    reward: Reward,
    k: int,
    sampling: Sampling,
    rng: torch.Generator,
    delimiter: str = DELIMITER,
    kind: str = "share",
) -> StepLabels:
    """Label the steps of responses by `k` futures from the end of each.

    Args:
        reward: judges whole responses; a score above one half is right.
        sampling: as the responses were drawn; its `max_new_tokens` is their horizon.
        kind: `share` or `any`.

    Raises:
        ValueError: another kind, or what `tree.branch` raises.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; a step's label is one of {', '.join(KINDS)}")
    said = reward(batch)
    right = said.verdict & (said.value > RIGHT)
    closing = ends(batch, policy.tokenizer, delimiter) & said.verdict[:, None]
    final = last_of(closing)
    value = torch.where(final, right[:, None].float(), torch.zeros(batch.tokens.shape, device=right.device))
    mask, inner = final.clone(), closing & ~final
    # The state after a step is the state before the next action.
    at = [[_next(batch.action[b], t) for t in inner[b].nonzero()[:, 0].tolist()] for b in range(len(batch))]
    drawn = 0
    if any(at):
        found = tree.branch(policy, batch, at, k, sampling, rng)
        judged, drawn = reward(found.batch), found.drawn
        hit = (judged.value > RIGHT).float()
        share = returns.branch(hit, found.parent, found.at, batch.action, judged.verdict)
        known = torch.zeros_like(batch.action)
        known[found.parent[judged.verdict], found.at[judged.verdict]] = True
        for b, positions in enumerate(at):
            for t, following in zip(inner[b].nonzero()[:, 0].tolist(), positions, strict=True):
                worth = share[b, following]
                value[b, t] = (worth > 0).float() if kind == "any" else worth
                mask[b, t] = known[b, following]
    return StepLabels(torch.where(mask, value, torch.zeros_like(value)), mask, right, said.verdict, drawn)


def _next(action: Tensor, t: int) -> int:
    return t + 1 + int(action[t + 1 :].nonzero()[0])
