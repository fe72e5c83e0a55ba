"""The drift tasks small enough to enumerate, and a cloner whose chance of a mistake is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenmdp.models.sampling import Sampling
from tokenmdp.tasks.drift import DriftExpert
from tokenmdp.testing.exact import Exact
from tokenmdp.types import Batch, Prompt

LETTERS, BEGIN = (0, 1, 2), 3  # tokens: three letters and `#`
WORDS = "abc#"
PROMPT = Prompt((0,), "a>", 0, {"first": 0})


def expert(kind: str) -> DriftExpert:
    return DriftExpert(BEGIN, torch.tensor(LETTERS), kind)


def world(horizon: int) -> Exact:
    """All responses of this length to a prompt that asks for `#abcab...`."""
    found = Exact(start=PROMPT.ids, vocabulary=4, horizon=horizon)
    found.batch = replace(found.batch, prompts=(PROMPT,) * len(found))
    return found


class Cloner:
    """Does what the demonstrations show, but for a chance `error` of another letter; `#` it says at the start only.

    In the narrow task it never finds back after its first mistake; in the recoverable one each step is as good as the
    first. It stands where a policy does.
    """

    name, eos_ids, device = "cloner", (4,), torch.device("cpu")

    def __init__(self, error: float) -> None:
        self.table = torch.zeros((4, 5), dtype=torch.float64)  # after a letter or `#`: the chance of each token
        for said in range(4):
            right = 0 if said == BEGIN else (said + 1) % 3
            self.table[said, :3] = error / 2
            self.table[said, right] = 1 - error
        self.opening = torch.tensor([error / 3] * 3 + [1 - error, 0.0], dtype=torch.float64)

    def chances(self, batch: Batch) -> Tensor:
        """[B, L, 5] of each token in the state before each position; meaningless where nothing was chosen."""
        before = torch.nn.functional.pad(batch.tokens[:, :-1], (1, 0)).clamp(max=3)
        first = torch.arange(batch.tokens.shape[1]) == len(PROMPT.ids)
        return torch.where(first[None, :, None], self.opening, self.table[before])

    def evaluate(
        self, batch: Batch, want: Sequence[str] = ("logp",), temperature: float = 1.0, of: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert (tuple(want), temperature) == (("logp",), 1.0)
        token = batch.tokens if of is None else of
        logp = self.chances(batch).gather(2, token[..., None])[..., 0].log()
        return {"logp": torch.where(batch.action, logp, torch.zeros_like(logp))}

    def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, rng: torch.Generator) -> Batch:
        rows = [p for p in prompts for _ in range(n)]
        said = torch.multinomial(self.opening.expand(len(rows), 5), 1, generator=rng)
        while said.shape[1] < sampling.max_new_tokens:
            said = torch.cat([said, torch.multinomial(self.table[said[:, -1]], 1, generator=rng)], 1)
        texts = ["".join(WORDS[i] for i in row) for row in said.tolist()]
        group = [i for i in range(len(prompts)) for _ in range(n)]
        return Batch.build(rows, said.tolist(), texts=texts, ended=[False] * len(rows), group=group)
