"""Υ as a reward: the response is the prompt that a policy writes for a query, and is worth what it would earn there.

    r(query, prompt) = Υ(query, prompt)

So a prompt policy is trained by any on-policy recipe, on a one-step MDP whose reward was learned from logged trials, without a call
to the model that the prompts are for: `tokenmdp grpo --reward runs/prompts-fit --task queries.jsonl`.

Source: Sun, Hüyük & van der Schaar 2023 (Prompt-OIRL), section 3.3, with a policy in the place of the best of n.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tokenmdp import mdp
from tokenmdp.prompting import stored
from tokenmdp.types import Batch, Score


class PromptProxy:
    """The learned reward of a written prompt.

    Args:
        folder: the run folder of `prompts fit`, or the model in it.
        column: of a prompt's row, which holds the query; the prompt's own text where there is none.
    """

    def __init__(self, folder: Path, column: str = "query", name: str = "upsilon") -> None:
        self.chooser, _ = stored.load(folder)
        self.column, self.name = column, name

    def __call__(self, batch: Batch) -> Score:
        """[B] Υ; a response without a word has no verdict."""
        mdp.touch("learned_reward")
        value = torch.full((len(batch),), float("nan"))
        rows: dict[str, list[int]] = {}  # of each query: its samples are asked about together
        for i, (prompt, text) in enumerate(zip(batch.prompts, batch.texts, strict=True)):
            if text.strip():
                rows.setdefault(str(prompt.columns.get(self.column) or prompt.text), []).append(i)
        for query, at in rows.items():
            said = self.chooser.proxy.predict([query], [batch.texts[i].strip() for i in at])[0]
            value[at] = torch.from_numpy(said).float()
        return Score.of(value.to(batch.tokens.device))
