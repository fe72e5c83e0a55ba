"""A generative judge: a language model reads a rubric with two responses and says which is better, in both orders.

    p(y ≻ z) = ½ [ P(A | rubric, A = y, B = z) + P(B | rubric, A = z, B = y) ]
    P(A) = mass of the letter A / mass of both letters,      read off the next-token distribution after the rubric

Nothing is generated: one forward pass an order, and the answer is a probability. A judge that likes the first place
whatever stands there says ½ of everything; how much it does is reported (`Verdicts.position_bias`; as a reward, by what
its two parts differ).

As a reward it is the probability of winning against a reference response, the prompt's `reference` column:

    judge:MODEL                       any model `catalog.load` knows; it need not share the policy's tokenizer
    judge:MODEL:column=answer,least=0.05

A response cannot talk its way out of its place: every line of it is quoted with "> ", and the tokenizer's special tokens
are broken up in it. (It can still flatter; escaping protects the form, not the judge's mind.)

Source: pairwise judging and its position bias: Zheng et al. 2023 (MT-Bench), section 3. Differs: probabilities are
averaged over the two orders; there, a pair whose two answers differ is a tie.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenmdp import mdp
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Prompt, Score

RUBRIC = """Which of two responses to a prompt is better: more correct, more helpful, better written? Neither length nor
place counts. Lines of the prompt and of the responses begin with ">".

Prompt:
{prompt}

Response {a}:
{first}

Response {b}:
{second}

The better response, {a} or {b}, is:"""


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of N pairs.

    Attributes:
        wins: [N] p(first ≻ second), the mean of both orders; ½ where there is no verdict.
        verdict: [N] False where, in either order, the two letters together had less than the least mass.
        letter: [2, N] P(A), of the two letters, with the first response in place A, and in place B.
        mass: [2, N] the probability of both letters together.
    """

    wins: Float[Tensor, "N"]
    verdict: Bool[Tensor, "N"]
    letter: Float[Tensor, "2 N"]
    mass: Float[Tensor, "2 N"]

    @property
    def position_bias(self) -> float:
        """Mean P(A) over both orders less ½, over pairs with a verdict: 0 is fair, ½ says A to everything."""
        return float(self.letter[:, self.verdict].mean()) - 0.5 if bool(self.verdict.any()) else 0.0

    @property
    def consistency(self) -> float:
        """The share of pairs with a verdict for which both orders name the same winner; 0 where there is none."""
        same = (self.letter[0] > 0.5) == (self.letter[1] < 0.5)
        return float(same[self.verdict].float().mean()) if bool(self.verdict.any()) else 0.0

    def figures(self) -> dict[str, float]:
        """Win rate of the first side, position bias, consistency, the letters' mean mass, and the share unjudged."""
        some = bool(self.verdict.any())
        return {
            "win_rate": float(self.wins[self.verdict].mean()) if some else 0.5,
            "position_bias": self.position_bias,
            "consistency": self.consistency,
            "letter_mass": float(self.mass.mean()),
            "no_verdict": float((~self.verdict).float().mean()),
        }


class JudgeModel:
    """A policy as a judge of pairs, and of single responses against a reference.

    Args:
        policy: the judge; read, never trained. It needs no tokenizer in common with what it judges.
        rubric: a template with {prompt}, {first}, {second}, and {a} and {b} for the letters; its end is where the
            answer is read. Chat models get it as a user's message.
        letters: the two answers.
        least: the least mass both letters must have together; below it the judge answered something else.
        column: where a prompt keeps its reference response.

    Raises:
        ValueError: the rubric lacks one of its places, `least` is no share, or a letter is not one token of its own
            after the rubric.
    """

    def __init__(
        self,
        policy: Policy,
        rubric: str = RUBRIC,
        letters: tuple[str, str] = ("A", "B"),
        least: float = 0.01,
        column: str = "reference",
        name: str = "judge",
    ) -> None:
        lacking = [place for place in ("{prompt}", "{first}", "{second}") if place not in rubric]
        if lacking:
            raise ValueError(f"the rubric has no {', '.join(lacking)}: the judge would not see what it judges")
        if not 0 <= least <= 1:
            raise ValueError(f"least={least}: it is a share of the probability, between 0 and 1")
        self.policy, self.rubric, self.letters = policy, rubric, letters
        self.least, self.column, self.name = least, column, name
        self._special = _special(policy)
        self.ids = self._letter_ids()

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Which of two responses to each prompt is better.

        Raises:
            ValueError: lengths that differ, no pair, or a pair that does not fit the judge's context.
        """
        if not len(prompts) == len(first) == len(second) or not prompts:
            raise ValueError(
                f"{len(prompts)} prompts, {len(first)} first and {len(second)} second responses: one of each a pair, and "
                "at least one pair"
            )
        pairs = zip(prompts, first, second, strict=True)
        return self._verdicts([(self._asked(x, y, z), self._asked(x, z, y)) for x, y, z in pairs])

    def _verdicts(self, asked: Sequence[tuple[Prompt, Prompt]]) -> Verdicts:
        """What the judge says of pairs, each written out in both orders."""
        both = self.policy.next_mass([pair[order] for order in (0, 1) for pair in asked], self.ids)
        a, b = both.reshape(2, 2, -1)
        mass = a + b
        letter = torch.where(mass > 0, a / mass.clamp_min(1e-30), 0.5)
        verdict = (mass >= self.least).all(0) & (mass > 0).all(0)
        wins = 0.5 * (letter[0] + 1 - letter[1])
        return Verdicts(torch.where(verdict, wins, 0.5), verdict, letter, mass)

    def __call__(self, batch: Batch) -> Score:
        """[B] the probability of winning against the reference; no verdict without one, where both do not fit the judge's
        context, or where `compare` has none.

        Its parts are the two orders, whose mean it is: what they differ by is the judge's liking for a place, which
        metrics show as `rewards/place_a` and `rewards/place_b`.
        """
        mdp.touch("learned_reward")
        asked: dict[int, tuple[Prompt, Prompt]] = {}
        reasons: dict[int, str] = {}
        for i, (prompt, said) in enumerate(zip(batch.prompts, batch.texts, strict=True)):
            reference = prompt.columns.get(self.column)
            if not isinstance(reference, str):
                reasons[i] = f"the prompt has no text in its column {self.column!r}"
                continue
            try:
                asked[i] = self._asked(prompt.text, said, reference), self._asked(prompt.text, reference, said)
            except ValueError as error:  # too long for the judge: a response can be what its policy likes
                reasons[i] = f"the judge cannot read it: {error}"
        value, verdict = torch.zeros(len(batch)), torch.zeros(len(batch), dtype=torch.bool)
        orders = {f"place {letter}": torch.zeros(len(batch)) for letter in self.letters}
        if asked:
            found, rows = self._verdicts(list(asked.values())), list(asked)
            verdict[rows], value[rows] = found.verdict, torch.where(found.verdict, found.wins, 0.0)
            for order, p in zip(orders.values(), (found.letter[0], 1 - found.letter[1]), strict=True):
                order[rows] = torch.where(found.verdict, p, 0.0)
            for i, mass in zip(rows, found.mass.amin(0).tolist(), strict=True):
                if not verdict[i]:
                    reasons[i] = f"the letters {' and '.join(self.letters)} had {mass:.2g} of the probability"
        device = batch.tokens.device
        parts = {name: Score(order.to(device), verdict.to(device)) for name, order in orders.items()}
        return Score(value.to(device), verdict.to(device), parts=parts, reasons=reasons)

    def _asked(self, prompt: str, first: str, second: str) -> Prompt:
        """The rubric, filled in, as the judge's prompt."""
        places = {"prompt": prompt, "first": first, "second": second}
        filled = {name: quoted(text, self._special) for name, text in places.items()}
        a, b = self.letters
        return self._prompt(_fill(self.rubric, {**filled, "a": a, "b": b}))

    def _prompt(self, text: str) -> Prompt:
        chat = bool(self.policy.tokenizer.chat_template)
        return self.policy.prompt([{"role": "user", "content": text}] if chat else text)

    def _letter_ids(self) -> tuple[list[int], list[int]]:
        """For each letter the tokens that say it right after the rubric: bare, or after a blank."""
        ending = self._asked("x", "y", "z").text
        before = self.policy.encode(ending)
        found: list[list[int]] = []
        for letter in self.letters:
            ways = [self.policy.encode(ending + spelled) for spelled in (letter, f" {letter}")]
            found.append(sorted({ids[-1] for ids in ways if ids[:-1] == before}))
        if not all(found) or {*found[0]} & {*found[1]}:
            shown = ", ".join(f"{letter!r}: {ids}" for letter, ids in zip(self.letters, found, strict=True))
            raise ValueError(
                f"after the rubric the tokenizer of {self.policy.name} has no token of its own for each letter ({shown}); "
                "give `letters` that are single tokens and differ"
            )
        return found[0], found[1]


def quoted(text: str, special: Sequence[str] = ()) -> str:
    """A text whose every line begins with "> " and that holds no special token, so that no line of it can be taken for
    the rubric's and no token of it for the end of a turn.

    Args:
        special: what the tokenizer would read as one of its own marks; a blank is put after the first character of each.
    """
    for mark in special:
        text = text.replace(mark, f"{mark[:1]} {mark[1:]}")
    return "\n".join(f"> {line}" for line in text.splitlines()) or "> "


def _special(policy: Policy) -> tuple[str, ...]:
    """The texts that the judge's tokenizer reads as marks and not as text, the longest first."""
    added = getattr(policy.tokenizer, "added_tokens_decoder", {})
    marks = {str(t.content) for t in added.values() if t.special} | {
        str(t) for t in policy.tokenizer.all_special_tokens
    }
    return tuple(sorted((m for m in marks if len(m) > 1), key=len, reverse=True))


def _fill(template: str, places: Mapping[str, str]) -> str:
    """The template with its places filled in one pass: what stands in a text as {first} is text."""
    return re.sub(r"\{(prompt|first|second|a|b)\}", lambda found: places[found[1]], template)
