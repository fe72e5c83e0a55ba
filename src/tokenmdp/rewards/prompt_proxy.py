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
from tokenmdp.prompting import sentences, stored
from tokenmdp.types import Batch, Score


class PromptProxy:
    """The learned reward of a written prompt.

    Args:
        folder: the run folder of `prompts fit`, or the model in it.
        column: of a prompt's row, which holds the query; the prompt's own text where there is none.
    """

    def __init__(self, folder: Path, column: str = "query", name: str = "upsilon") -> None:
        folder = folder if (folder / stored.FILES[0]).is_file() else folder / "model"
        reads = str(stored.facts_of(folder)["about"].get("sentences", ""))
        self.chooser, _ = stored.load(folder, sentences.embedder(reads) if reads else None)
        self.column, self.name = column, name

    def __call__(self, batch: Batch) -> Score:
        """[B] Υ; a response without a word has no verdict."""
        mdp.touch("learned_reward")
        value = torch.full((len(batch),), float("nan"))
        for i, (prompt, text) in enumerate(zip(batch.prompts, batch.texts, strict=True)):
            if text.strip():
                query = str(prompt.columns.get(self.column) or prompt.text)
                value[i] = float(self.chooser.proxy.predict([query], [text.strip()])[0, 0])
        return Score.of(value.to(batch.tokens.device))
