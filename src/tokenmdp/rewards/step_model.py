"""The process reward: a reward model's head read at the end of every step, as the probability that the step is good.

    p_k = σ( w · h̄_{end of step k} ),     r(x, y) = min_k p_k   (or the last one, or their product)

One number a step is what `credit` calls a process reward (`Score.steps`), and the weakest step is what a whole response
is worth (`Score.value`). A step is what a delimiter closes (`rewards.steps.ends`).

Source: Lightman et al. 2023, section 2; the minimum over steps: Wang et al. 2023 (Math-Shepherd),
    where a solution is ranked by its lowest step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenmdp import mdp
from tokenmdp.models.heads import pooled
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.rewards import steps
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.types import Batch, Score

FILE = "tokenmdp_steps.json"  # beside a reward model's own files: its head is read at steps
AGGREGATES = ("min", "last", "product")


class StepRewardModel:
    """Scores every step of a response; the policy that produced it must share its tokenizer.

    Attributes:
        model: the body and the head; its own shift and scale stay 0 and 1.
        delimiter: what closes a step; the empty one makes every token a step.
        aggregate: how the steps' probabilities become one score: `min`, `last` or `product`.

    Raises:
        ValueError: another aggregate.
    """

    def __init__(
        self,
        model: RewardModel,
        delimiter: str = steps.DELIMITER,
        aggregate: str = "min",
        name: str = "step_reward_model",
    ) -> None:
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is {aggregate!r}; it must be one of {', '.join(AGGREGATES)}")
        self.model, self.delimiter, self.aggregate, self.name = model, delimiter, aggregate, name

    @staticmethod
    def load(folder: Path | str, policy: Policy, compute: str = "auto") -> StepRewardModel:
        """Read a process reward model's directory.

        Raises:
            ValueError: it is an ordinary reward model, or what `RewardModel.load` raises.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise ValueError(
                f"{folder} has no {FILE}, so it is no process reward model: train one with `tokenmdp process-reward`, or "
                "use it as an ordinary reward"
            )
        saved = json.loads((folder / FILE).read_text())
        model = RewardModel.load(folder, policy, compute)
        return StepRewardModel(model, str(saved["delimiter"]), str(saved["aggregate"]), folder.name)

    def save(self, folder: Path | str) -> None:
        """Write the reward model's directory, and what its steps are."""
        self.model.save(folder)
        (Path(folder) / FILE).write_text(json.dumps({"delimiter": self.delimiter, "aggregate": self.aggregate}) + "\n")

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that train; the head always does."""
        yield from self.model.trained()

    def ends(self, batch: Batch) -> Bool[Tensor, "B L"]:
        """True at the last token of each step."""
        return steps.ends(batch, self.model.tokenizer, self.delimiter)

    def logits(self, batch: Batch) -> Float[Tensor, "B L"]:
        """Log-odds, after each token, that the step it ends is good; with gradient."""
        states = pooled(self.model.backbone.hidden(batch.tokens, batch.read), self.model.pool)
        return self.model.head(states)[..., 0]

    def probabilities(self, batch: Batch) -> Float[Tensor, "B L"]:
        """After each token, the probability that the step it ends is good; without gradient, in parts."""
        return in_parts(lambda part: {"p": torch.sigmoid(self.logits(part))}, batch)["p"]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Score:
        """Probabilities of the steps, and the score they make; a response without any step has no verdict."""
        mdp.touch("learned_reward")
        found = self.probabilities(batch)
        closing = self.ends(batch)
        verdict = closing.any(dim=1)
        p = torch.where(closing, found, torch.ones_like(found))
        if self.aggregate == "min":
            value = p.amin(dim=1)
        elif self.aggregate == "product":
            value = p.prod(dim=1)
        else:
            value = p.gather(1, (closing.long().cumsum(1).argmax(1))[:, None])[:, 0]
        said = torch.where(closing, found, torch.zeros_like(found))
        return Score(torch.where(verdict, value, torch.zeros_like(value)), verdict, steps=said)
