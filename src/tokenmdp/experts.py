"""Experts who can be asked: what would you do in this state? Interactive imitation learns from them on its own states.

    a* = π*(s)    for the state s before every action position of a batch, one query a position

A demonstration says what an expert did in states of the expert's own choosing; an expert who can be asked answers in the
states the learner gets to, which is where its errors compound. What is asked about is what the batch marks as actions: with fewer
marked, fewer are asked about and paid for.

    Teacher     another model: the token it finds most likely
    Worked      worked answers: their next token, as long as the response has followed one so far
    Answering   the right answer, a token at a time, whatever was said in place of its beginning
    Queried     any of these, paid from a ledger, held to a time limit, and allowed to fail now and then
    Aggregate   what was gathered: rows, and what the expert would have done along them
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenmdp import mdp
from tokenmdp.functional.imitation import Measure
from tokenmdp.ledger import Ledger, Overdrawn
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Prompt, stacked


@dataclass(frozen=True)
class Advice:
    """What an expert would have done in the states of a batch.

    Attributes:
        token: [B, L] the expert's action in the state before each position; 0 where it is not known.
        known: [B, L] True where the expert answers, which is at actions only.

    Raises:
        ValueError: the two differ in shape.
    """

    token: Int[Tensor, "B L"]
    known: Bool[Tensor, "B L"]

    def __post_init__(self) -> None:
        if self.token.shape != self.known.shape:
            raise ValueError(
                f"advice of shape {tuple(self.token.shape)}, known on {tuple(self.known.shape)}: one of each a position"
            )

    @staticmethod
    def none(batch: Batch) -> Advice:
        """No answer anywhere."""
        return Advice(torch.zeros_like(batch.tokens), torch.zeros_like(batch.action))


@runtime_checkable
class Expert(Protocol):
    """Whatever knows what to do: asked at every action position of a batch, it answers where it can."""

    name: str

    def __call__(self, batch: Batch) -> Advice: ...


class Teacher:
    """A model as an expert: in each state the token that it finds most likely.

    Attributes:
        policy: the teacher; frozen.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name = policy.freeze(), f"teacher {policy.name}"

    def __call__(self, batch: Batch) -> Advice:
        """The most likely token at every action.

        Raises:
            ValueError: the batch holds a token that the teacher has not.
        """
        mdp.touch("expert")
        V = self.policy.model.get_output_embeddings().weight.shape[0]
        if int(batch.tokens.max()) >= V:
            raise ValueError(
                f"the batch holds token {int(batch.tokens.max())}, but {self.policy.name} has {V}: teacher and student "
                "need one tokenizer"
            )
        return Advice(in_parts(lambda part: {"best": self.policy.best(part)}, batch)["best"], batch.action)

    def divergence(self, student: Policy, batch: Batch, measure: Measure, temperature: float = 1.0) -> Tensor:
        """[B, L] how far the student is from the whole distribution of the teacher at every action; the gradient is the
        student's (see `Policy.divergence`).
        """
        mdp.touch("expert")
        return student.divergence(self.policy, batch, measure, temperature)


def check_vocabularies(student: Policy, teacher: Policy) -> None:
    """A student's tokens mean the same to its teacher, or a policy's to its reference.

    Raises:
        ValueError: the vocabularies differ, saying by how much and what to do.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    sizes = [p.model.get_output_embeddings().weight.shape[0] for p in (student, teacher)]
    if ours == theirs and sizes[0] == sizes[1]:
        return
    moved = sum(ours[token] != number for token, number in theirs.items() if token in ours)
    raise ValueError(
        f"{student.name} ({len(ours)} tokens, {sizes[0]} logits) and {teacher.name} ({len(theirs)} tokens, {sizes[1]} logits) "
        f"have different vocabularies: {len(ours.keys() ^ theirs.keys())} tokens are in one only, {moved} have another number. "
        "Token for token they cannot be compared: take two with one tokenizer; a teacher may also write demonstrations as "
        "text, to be cloned with `sft`"
    )


def reference(name: str, start: Policy, longest: int) -> Policy:
    """The frozen model called `name` that a policy's KL is measured to; the start itself where no name is given.

    Args:
        longest: tokens of the longest row it is to read.

    Raises:
        ValueError: there is no such model, its tokens are not the start's, or such a row exceeds its context.
    """
    if not name:
        return start
    other = catalog.load(name).freeze()
    check_vocabularies(start, other)
    if other.context < longest:
        raise ValueError(
            f"the context of the reference {other.name} is {other.context} tokens, and the longest prompt with max_new_tokens "
            f"makes {longest}: take a reference that reads as far, shorter prompts, or fewer new tokens"
        )
    return other


class Worked:
    """Worked answers as an expert: it knows what comes next as long as a response has followed one of them exactly.

    It is the least an expert can be: off the demonstrated path it says nothing, so what interaction adds is only to find
    out where on that path the learner goes wrong.
    """

    name = "worked answers"

    def __init__(self, demonstrations: Batch) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        marked = demonstrations.action.tolist()
        for tokens, action in zip(demonstrations.tokens.tolist(), marked, strict=True):
            for t in (t for t, chosen in enumerate(action) if chosen):
                self._next.setdefault(tuple(tokens[:t]), tokens[t])

    def __call__(self, batch: Batch) -> Advice:
        """The worked answer's next token where the row is the beginning of one; of several the first given."""
        mdp.touch("expert")
        return _one_by_one(batch, lambda before, _: self._next.get(tuple(before)))


class Answering:
    """The right answer as an expert: after n characters of a response it goes on with what follows the answer's first n.

    A mistake is not undone: the expert makes the best of what is left.

    Args:
        policy: whose tokens.
        column: of the prompts, which holds the answer.
    """

    def __init__(self, policy: Policy, column: str = "answer") -> None:
        self.policy, self.column, self.name = policy, column, f"the {column}"

    def __call__(self, batch: Batch) -> Advice:
        """The answer's next token, the end-of-text token after its last; unknown where a prompt has no answer."""
        mdp.touch("expert")
        told: dict[str, int] = {}

        def following(before: list[int], prompt: Prompt) -> int | None:
            if (answer := prompt.columns.get(self.column)) is None:
                return None
            said = self.policy.response_text(prompt.ids, before[len(prompt.ids) :])
            rest = str(answer)[len(said) :]
            if rest not in told:
                told[rest] = self.policy.encode(rest)[0] if rest else self.policy.eos_ids[0]
            return told[rest]

        return _one_by_one(batch, following)


def _one_by_one(batch: Batch, answer: Callable[[list[int], Prompt], int | None]) -> Advice:
    """Ask `answer` for the token after each marked prefix; None is no answer."""
    token, known = torch.zeros_like(batch.tokens), torch.zeros_like(batch.action)
    rows = batch.tokens.tolist()
    for b, t in batch.action.nonzero().tolist():
        if (found := answer(rows[b][:t], batch.prompts[b])) is not None:
            token[b, t], known[b, t] = found, True
    return Advice(token, known)


def affordable(batch: Batch, ledger: Ledger) -> Batch:
    """The batch with as many of its actions marked as there are queries left to pay for, from its first row on."""
    left = ledger.left("queries")
    if left is None or int(batch.action.sum()) <= left:
        return batch
    order = batch.action.flatten().cumsum(0).view_as(batch.action)
    return replace(batch, action=batch.action & (order <= left))


class ExpertFailure(ValueError):
    """An expert failed or kept silent too often."""


class Queried:
    """An expert who costs something and can fail: every answer is paid for, with 1 of "queries" a known position.

    Where asking about a whole batch fails, each row is asked about alone, so that one that the expert cannot stand costs
    only itself. What stays without an answer is unknown, free of charge, and counted.

    Args:
        expert: who is asked.
        ledger: pays; a budget there is never exceeded.
        timeout_seconds: for one call; 0 waits for ever. The call goes on in its thread, whose answer is not waited for.
        max_missing: the share of a batch's rows that may stay without an answer.

    Attributes:
        failed: rows that stayed without an answer because the expert failed, so far.
    """

    def __init__(self, expert: Expert, ledger: Ledger, timeout_seconds: float = 0.0, max_missing: float = 0.2) -> None:
        if timeout_seconds < 0 or not 0 <= max_missing <= 1:
            raise ValueError(
                f"timeout_seconds is {timeout_seconds} and max_missing {max_missing}: at least 0, and a share from 0 to 1"
            )
        self.expert, self.ledger, self.name = expert, ledger, expert.name
        self.timeout_seconds, self.max_missing, self.failed = timeout_seconds, max_missing, 0

    def __call__(self, batch: Batch) -> Advice:
        """The expert's answers, paid for.

        Raises:
            Overdrawn: the batch has more actions than can be paid for (see `affordable`); nothing was asked.
            ExpertFailure: too many rows stayed without an answer.
            ValueError: an answer that is not one a position, or where nothing was asked.
        """
        mdp.touch("expert")
        asked, left = int(batch.action.sum()), self.ledger.left("queries")
        if left is not None and asked > left:
            raise Overdrawn(
                f"{asked} positions to ask about and {left} queries left of {self.ledger.budget['queries']}; nothing was "
                "asked: ask about fewer (`affordable` marks as many as can be paid for), or raise the budget"
            )
        advice = self._ask(batch)
        self.ledger.pay("queries", int(advice.known.sum()))
        return advice

    def _ask(self, batch: Batch) -> Advice:
        whole = self._try(batch)
        if isinstance(whole, Advice):
            return whole
        token, known = torch.zeros_like(batch.tokens), torch.zeros_like(batch.action)
        reasons: list[str] = []
        most = int(self.max_missing * len(batch))
        for row in range(len(batch)):
            found = self._try(batch.select([row])) if len(batch) > 1 else whole
            if isinstance(found, Advice):
                L = found.token.shape[1]
                token[row, :L], known[row, :L] = found.token[0], found.known[0]
                continue
            reasons.append(f"row {row}: {found}")
            if len(reasons) > most:
                raise ExpertFailure(
                    f"the expert {self.name} gave no answer for {len(reasons)} of the first {row + 1} of {len(batch)} rows, "
                    f"and at most {self.max_missing:.0%} may lack one ({'; '.join(reasons[:3])}): mend it, or raise "
                    f"timeout_seconds ({self.timeout_seconds:g}) or max_missing"
                )
        self.failed += len(reasons)
        return Advice(token, known)

    def _try(self, batch: Batch) -> Advice | str:
        """The answer, or why there is none."""
        outcome: list[Advice | Exception] = []

        def work() -> None:
            try:
                with torch.no_grad():
                    outcome.append(self.expert(batch))
            except Exception as error:
                outcome.append(error)

        if self.timeout_seconds:
            # In a copy of this context: the setting that holds here holds there.
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True, name="expert")
            thread.start()
            thread.join(self.timeout_seconds)
        else:
            work()
        if not outcome:
            return f"no answer within {self.timeout_seconds:g} s"
        found = outcome[0]
        if isinstance(found, mdp.OutOfSetting | Overdrawn):
            raise found
        if isinstance(found, Exception):
            return f"{type(found).__name__}: {found}"
        if found.token.shape != batch.tokens.shape or bool((found.known & ~batch.action).any()):
            raise ValueError(
                f"the expert {self.name} gave advice of shape {tuple(found.token.shape)} for tokens of "
                f"{tuple(batch.tokens.shape)}, or where no action is marked: one answer for each action"
            )
        return found

    # -- checkpoints

    def tensors(self) -> Mapping[str, Tensor]:
        """None: the state is counts."""
        return self.ledger.tensors()

    def scalars(self) -> Mapping[str, Any]:
        """What was paid and how often the expert failed."""
        return {**self.ledger.scalars(), "failed": self.failed}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.ledger.restore(tensors, scalars)
        self.failed = int(scalars["failed"])


class Aggregate:
    """Rows, and what the expert would have done along them: all that dataset aggregation has gathered so far.

    It is for learning only: of a prompt it keeps the tokens, and as actions the positions that the expert answered for.

    Attributes:
        batch: the rows; None before the first.
        token: [N, L] the expert's actions.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.token = torch.zeros((0, 1), dtype=torch.long)

    def __len__(self) -> int:
        return 0 if self.batch is None else len(self.batch)

    def add(self, batch: Batch, advice: Advice) -> None:
        """Take in the rows that the expert said something about."""
        rows = advice.known.any(1).nonzero()[:, 0]
        if not len(rows):
            return
        L = int(batch.length[rows].max())
        start = torch.tensor([len(p.ids) for p in batch.prompts], device=batch.tokens.device)[rows]
        new = _bare(
            batch.tokens[rows, :L], advice.known[rows, :L], batch.length[rows], batch.ended[rows], start.tolist()
        )
        token = advice.token[rows, :L]
        self.batch, self.token = (
            (new, token) if self.batch is None else (Batch.concat([self.batch, new]), stacked([self.token, token]))
        )

    def clear(self) -> None:
        """Forget all rows."""
        self.batch = None

    def draw(self, k: int, rng: torch.Generator) -> tuple[Batch, Tensor]:
        """`k` different rows at random, or all of them where there are fewer, and the expert's actions along them.

        Raises:
            ValueError: nothing was gathered.
        """
        if self.batch is None:
            raise ValueError("nothing was gathered: the expert has answered nowhere, so there is nothing to learn from")
        rows = torch.randperm(len(self.batch), generator=rng)[:k].to(self.token.device)
        part = self.batch.select(rows)
        return part, self.token[rows, : part.tokens.shape[1]]

    # -- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """The rows, position by position."""
        b = self.batch
        if b is None:
            return {}
        start = torch.tensor([len(p.ids) for p in b.prompts])
        return {
            "tokens": b.tokens, "action": b.action, "length": b.length, "ended": b.ended, "start": start, "token": self.token
        }  # fmt: skip

    def scalars(self) -> dict[str, Any]:
        """Nothing besides."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        if not tensors:
            self.batch, self.token = None, self.token[:0]
            return
        device = self.token.device if self.batch is None else self.batch.tokens.device
        t = {name: x.to(device) for name, x in tensors.items()}
        self.batch = _bare(t["tokens"], t["action"], t["length"], t["ended"], t["start"].tolist())
        self.token = t["token"]


def _bare(tokens: Tensor, action: Tensor, length: Tensor, ended: Tensor, start: list[int]) -> Batch:
    """A batch of these rows whose prompts are tokens alone."""
    prompts = tuple(Prompt(tuple(row[:n]), "") for row, n in zip(tokens.tolist(), start, strict=True))
    group = torch.arange(len(prompts), device=tokens.device)
    return Batch(tokens, action, length, ended, prompts, ("",) * len(prompts), group)
