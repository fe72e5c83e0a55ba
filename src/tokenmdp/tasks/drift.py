"""Two tasks with the same demonstrations: in one a mistake is never made good by imitation, in the other it costs once.

A response begins with `#`, then come the prompt's letter and the letters after it: `d>` asks for `#defghij...`, as long as
the horizon allows; after the last letter the first follows. That is all that demonstrations ever show. What is right
after a mistake, only the expert knows:

    narrow        nothing but `#`, to the end. No demonstration shows it anywhere but at the start: who clones them goes
                  on with letters, and pays at every step that is left.
    recoverable   the next letter after the last one, whichever it was: what the demonstrations show for each letter.

So on the expert's own states the two are one task, and no number of demonstrations tells them apart; an expert who is
asked on the learner's states does at once. With a chance ε of a mistake in every state the demonstrations show, the
expected number of mistakes in T steps is

    narrow         Σ_{t=1..T} 1 − (1 − ε)^t  ≈  ε T² / 2      the worst case for behaviour cloning, up to a factor
    recoverable    ε T

Demonstrations may be noisy: at each step the demonstrator's hand slips with probability `noise` and writes some other
letter, and there the demonstration breaks off. The learner's ε can then be set, and nothing is shown of what comes
after a slip.

Source: Ross et al. 2011, theorems 2.1 (behaviour cloning, due to Ross and Bagnell 2010) and 3.2 (DAgger).
Differs: both tasks are ours.
"""

from __future__ import annotations

import string

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenmdp import mdp
from tokenmdp.experts import Advice
from tokenmdp.models.policy import Policy
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Prompt, Score

KINDS = ("narrow", "recoverable")
BEGIN = "#"


class DriftExpert:
    """The exact expert: it has an answer in every state, also in those it would never get into itself.

    Args:
        begin: the token `#`.
        letters: [A] the tokens of the letters, in order.
        kind: `narrow` or `recoverable`.
    """

    def __init__(self, begin: int, letters: Int[Tensor, "A"], kind: str) -> None:
        self.name = f"drift {kind}"
        self.begin, self.letters, self.kind = begin, letters, kind
        # What comes after each token; -1 where that is the prompt's letter, and `begin` after anything unheard of.
        self._next = torch.full((int(max(begin, int(letters.max()))) + 1,), begin)
        self._next[letters] = letters.roll(-1)
        self._next[begin] = -1

    def __call__(self, batch: Batch) -> Advice:
        """The right token at every action position of the batch.

        Raises:
            ValueError: a prompt that is not of this task.
        """
        mdp.touch("expert")
        return Advice(self.right(batch), batch.action)

    def right(self, batch: Batch) -> Int[Tensor, "B L"]:
        """The right token in the state before each action; 0 elsewhere."""
        first = self.letters[self._first(batch)].to(batch.tokens.device)
        start = torch.tensor([len(p.ids) for p in batch.prompts], device=batch.tokens.device)
        table = self._next.to(batch.tokens.device)
        expected = torch.full_like(first, self.begin)
        out = torch.zeros_like(batch.tokens)
        lost = torch.zeros_like(first, dtype=torch.bool)
        for t in range(int(start.min()), batch.tokens.shape[1]):
            said, out[:, t] = batch.tokens[:, t], expected
            lost = lost | ((start <= t) & (said != expected))
            after = torch.where(said < len(table), table[said.clamp(max=len(table) - 1)], self.begin)
            after = torch.where(after < 0, first, after)
            if self.kind == "narrow":
                after = torch.where(lost, self.begin, after)
            expected = torch.where(start <= t, after, expected)
        return torch.where(batch.action, out, 0)

    @staticmethod
    def _first(batch: Batch) -> Int[Tensor, "B"]:
        """Which letter each row starts from."""
        found = [p.columns.get("first") for p in batch.prompts]
        if None in found:
            row = found.index(None)
            raise ValueError(
                f"the prompt {batch.prompts[row].text[:40]!r} has no column `first`: the drift expert knows its own "
                "task's prompts only"
            )
        return torch.tensor(found, dtype=torch.long)


class Mistakes:
    """Minus the share of the horizon's steps that were wrong; what was left out by ending early is wrong too.

        score = − (1/H) [ Σ_t 1(a_t ≠ a*_t) + (H − length) ]

    Args:
        expert: who knows what is right.
        horizon: H.
    """

    name = "drift"

    def __init__(self, expert: DriftExpert, horizon: int) -> None:
        self.expert, self.horizon = expert, horizon

    def __call__(self, batch: Batch) -> Score:
        """[B] between −1 and 0."""
        mdp.touch("reward")
        wrong: Bool[Tensor, "B L"] = batch.action & (batch.tokens != self.expert.right(batch))
        missing = (self.horizon - batch.action.sum(-1)).clamp(min=0)
        return Score.of(-(wrong.sum(-1) + missing).to(torch.float32) / self.horizon)


def load(
    policy: Policy,
    kind: str = "narrow",
    horizon: int = 64,
    letters: int = 10,
    noise: float = 0.01,
    count: int = 1000,
    seed: int = 0,
) -> Task:
    """One prompt for each letter; they are few, so the same are learned on and judged.

    Args:
        kind: `narrow` or `recoverable`; nothing else in the task depends on it.
        horizon: H, how long a whole demonstration is, in tokens.
        letters: of the alphabet, 3 to 26.
        noise: at each step of a demonstration, the chance of a slip that ends it.
        count: demonstrations.
        seed: of the slips.

    Raises:
        ValueError: an option outside its range, or a tokenizer that does not make one token of each character.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if not 3 <= letters <= 26 or not 0 <= noise < 1 or min(horizon, count) < 1:
        raise ValueError(
            f"letters={letters}, noise={noise}, horizon={horizon}, count={count}: letters are 3 to 26, noise lies in "
            "[0, 1), and the others are at least 1"
        )
    alphabet = string.ascii_lowercase[:letters]
    begin, *rest = _characters(policy, BEGIN + alphabet)
    tokens = torch.tensor(rest)
    expert = DriftExpert(begin, tokens, kind)
    prompts = tuple(policy.prompt(f"{letter}>", row, {"first": row}) for row, letter in enumerate(alphabet))
    shown = demonstrations(policy, prompts, begin, tokens, horizon, noise, count, seed)
    return Task(
        name=f"drift:{kind}",
        train=prompts,
        held_out=prompts,
        demonstrations=shown,
        reward=Mistakes(expert, horizon),
        expert=expert,
        facts={
            "demonstrations": count,
            "broken_off": float((shown.action.sum(-1) < horizon).float().mean()),
            "noise": noise,
        },
    )


def demonstrations(
    policy: Policy,
    prompts: tuple[Prompt, ...],
    begin: int,
    letters: Int[Tensor, "A"],
    horizon: int,
    noise: float,
    count: int,
    seed: int,
) -> Batch:
    """`count` demonstrations, the prompts in turn; those with a slip end there, and none of them ends by itself."""
    generator = torch.Generator().manual_seed(seed)
    slips = torch.rand((count, horizon), generator=generator) < noise
    others = torch.randint(1, len(letters), (count, horizon), generator=generator)  # how far the hand goes astray
    first = torch.arange(count) % len(prompts)
    path = torch.cat(
        [torch.full((count, 1), begin), letters[(first[:, None] + torch.arange(horizon)) % len(letters)]], 1
    )
    wrong = letters[(first[:, None] - 1 + torch.arange(horizon) + others) % len(letters)]
    written = torch.where(slips, wrong, path[:, :horizon])
    length = torch.where(slips.any(1), slips.long().argmax(1) + 1, horizon).tolist()
    rows = [prompts[i] for i in first.tolist()]
    responses = [row[:n] for row, n in zip(written.tolist(), length, strict=True)]
    return Batch.build(
        rows,
        responses,
        texts=[policy.response_text(p.ids, r) for p, r in zip(rows, responses, strict=True)],
        ended=[False] * count,
        pad=policy.eos_ids[0],
    ).to(policy.device)


def _characters(policy: Policy, text: str) -> list[int]:
    """The token of each character.

    Raises:
        ValueError: some are not one token each, wherever they stand.
    """
    alone = [policy.encode(c) for c in text]
    if any(len(ids) != 1 for ids in alone) or policy.encode(text) != [ids[0] for ids in alone]:
        raise ValueError(
            f"the tokenizer of {policy.name} does not make one token of each of the characters {text!r}: the drift tasks "
            "count mistakes a character, so take `--model tiny`"
        )
    if len({ids[0] for ids in alone}) < len(text):
        raise ValueError(
            f"the tokenizer of {policy.name} cannot tell the characters {text!r} apart: take `--model tiny`"
        )
    return [ids[0] for ids in alone]
