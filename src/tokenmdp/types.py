"""The few things that walk through the house: a prompt, a batch of responses, a set of pairs, a score.

All are frozen and validated where they are built, so every function downstream may trust them. One convention holds
everywhere: **token-aligned arrays with one mask**. `x[b, t]` describes `tokens[b, t]`; `action[b, t]` is True exactly
where the policy chose that token; arrays are finite everywhere and zero outside the mask. Rows are padded on the right,
and what is padding is known from `length`, never from the identity of a token (pad = eos is common and harmless here).

Sizes: B rows, L positions, V vocabulary, D hidden width, H horizon (the most tokens a response may have).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows on rows, each [B, L] part padded with zeros to the widest."""
    L = max(x.shape[1] for x in parts)
    return torch.cat([torch.nn.functional.pad(x, (0, L - x.shape[1])) for x in parts])


@dataclass(frozen=True)
class Prompt:
    """A state to start from: the tokens of a prefix, and what its data row says besides.

    Attributes:
        ids: the prefix's token ids, at least one.
        text: the prefix as text, for people and for rewards that read text.
        row: the index of the row in its data set; carried along so that a reward can never meet another row's answer.
        columns: everything else the data row holds (an answer, a label, ...).
    """

    ids: tuple[int, ...]
    text: str
    row: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(
                f"prompt of row {self.row} ({self.text[:40]!r}) has no tokens; a state needs at least one: "
                "start it with the tokenizer's beginning-of-text token or drop the row"
            )


@dataclass(frozen=True)
class Read:
    """What the first blocks of a body made of a batch, for every model that shares those blocks (see `Backbone.read`).

    Attributes:
        states: [B, L, D] what leaves the last of these blocks; a constant.
        tokens: [B, L] what was read. Other tokens must be read anew.
        blocks: how many blocks.
        weights: the weights it went through, each with how often it had been changed. A model with other weights, or
            with these changed since, must read the tokens itself.
    """

    states: Float[Tensor, "B L D"]
    tokens: Int[Tensor, "B L"]
    blocks: int
    weights: tuple[tuple[Tensor, int], ...]

    def select(self, index: Tensor, length: int) -> Read:
        """The given rows, cut to a length."""
        return Read(self.states[index, :length], self.tokens[index, :length], self.blocks, self.weights)


@dataclass(frozen=True)
class Batch:
    """B responses: a prefix each, followed by the tokens the policy (or a demonstrator) chose.

    Attributes:
        tokens: [B, L] token ids, padded on the right.
        action: [B, L] True exactly where `tokens[b, t]` was chosen by the policy. Never at position 0, never in
            padding.
        length: [B] real tokens of each row; positions at or after it are padding.
        ended: [B] True if the response ended by itself (EOS); False if it was truncated at the horizon.
        logp_mu: [B, L] log-probability (nats) of each chosen token under the distribution that was really sampled
            (temperature, top-p and top-k included), or None for data nobody here sampled.
        prompts: the B prompts the rows came from, one a row.
        texts: the B responses as text (without the prefix), one a row.
        group: [B] rows with one number are samples of one prompt of one draw.
        read: what frozen first blocks made of the tokens, where somebody has asked (`Policy.read`); it saves time and
            changes no result.
    """

    tokens: Int[Tensor, "B L"]
    action: Bool[Tensor, "B L"]
    length: Int[Tensor, "B"]
    ended: Bool[Tensor, "B"]
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    group: Int[Tensor, "B"]
    logp_mu: Float[Tensor, "B L"] | None = None
    read: Read | None = None

    def __post_init__(self) -> None:
        B, L = self.tokens.shape
        if B == 0:
            raise ValueError("a batch needs at least one row, got none: the data set or the selection is empty")
        for name, value, want in (
            ("action", self.action, (B, L)),
            ("length", self.length, (B,)),
            ("ended", self.ended, (B,)),
            ("group", self.group, (B,)),
            ("logp_mu", self.logp_mu, (B, L)),
        ):
            if value is not None and tuple(value.shape) != want:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, tokens {tuple(self.tokens.shape)} asks for {want}"
                )
        if len(self.prompts) != B or len(self.texts) != B:
            raise ValueError(
                f"{B} rows came with {len(self.prompts)} prompts and {len(self.texts)} texts; each row needs one"
            )
        if bool(self.action[:, 0].any()):
            raise ValueError("position 0 is marked as an action, but no state comes before it: give every row a prefix")
        if bool((self.action & ~self.real).any()):
            raise ValueError("an action lies in the padding: `length` must count every chosen token")
        if self.logp_mu is not None and not bool(torch.isfinite(self.logp_mu).all()):
            raise ValueError(
                "logp_mu has a value that is not finite: a chosen token must have had a positive probability"
            )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def real(self) -> Bool[Tensor, "B L"]:
        """True where a position holds a token of the row, False in its padding; made from positions alone."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.length[:, None]

    @property
    def cost(self) -> Int[Tensor, "B"]:
        """Positions a forward pass spends on each row: what a micro-batch's token budget counts."""
        return self.length

    def select(self, rows: Tensor | Sequence[int]) -> Batch:
        """The given rows, in that order, cut to the longest of them."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.tokens.device)
        L = int(self.length[index].max())
        picked = index.tolist()
        return Batch(
            tokens=self.tokens[index, :L],
            action=self.action[index, :L],
            length=self.length[index],
            ended=self.ended[index],
            prompts=tuple(self.prompts[i] for i in picked),
            texts=tuple(self.texts[i] for i in picked),
            group=self.group[index],
            logp_mu=None if self.logp_mu is None else self.logp_mu[index, :L],
            read=None if self.read is None else self.read.select(index, L),
        )

    @staticmethod
    def build(
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        *,
        texts: Sequence[str],
        ended: Sequence[bool],
        group: Sequence[int] | None = None,
        logp_mu: Sequence[Sequence[float]] | None = None,
        pad: int = 0,
    ) -> Batch:
        """Lay prefixes and responses into one right-padded batch.

        Raises:
            ValueError: when there is no row, or the sequences differ in number.
        """
        B = len(prompts)
        if not (len(responses) == len(texts) == len(ended) == B):
            raise ValueError(
                f"{B} prompts, {len(responses)} responses, {len(texts)} texts and {len(ended)} `ended` flags: one of each a row"
            )
        length = [len(p.ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        L = max(length, default=0)
        tokens = torch.full((B, L), pad, dtype=torch.long)
        action = torch.zeros((B, L), dtype=torch.bool)
        logp = None if logp_mu is None else torch.zeros((B, L))
        for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start = len(prompt.ids)
            tokens[b, :start] = torch.tensor(prompt.ids)
            tokens[b, start : length[b]] = torch.tensor(list(response), dtype=torch.long)
            action[b, start : length[b]] = True
            if logp is not None and logp_mu is not None:
                logp[b, start : length[b]] = torch.tensor(list(logp_mu[b]))
        return Batch(
            tokens=tokens,
            action=action,
            length=torch.tensor(length, dtype=torch.long),
            ended=torch.tensor(list(ended), dtype=torch.bool),
            prompts=tuple(prompts),
            texts=tuple(texts),
            group=torch.arange(B) if group is None else torch.tensor(list(group), dtype=torch.long),
            logp_mu=logp,
        )

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Stack batches row on row, padded to the longest; groups of different batches stay apart, and what was read
        of them is dropped.
        """
        if not batches:
            raise ValueError("no batches to stack: the selection is empty")
        shift, groups = 0, []
        for b in batches:
            groups.append(b.group + shift)
            shift = int(groups[-1].max()) + 1
        logps = [b.logp_mu for b in batches]
        return Batch(
            tokens=stacked([b.tokens for b in batches]),
            action=stacked([b.action for b in batches]),
            length=torch.cat([b.length for b in batches]),
            ended=torch.cat([b.ended for b in batches]),
            prompts=tuple(p for b in batches for p in b.prompts),
            texts=tuple(t for b in batches for t in b.texts),
            group=torch.cat(groups),
            logp_mu=None if any(x is None for x in logps) else stacked([x for x in logps if x is not None]),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; what was read of it stays behind."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, read=None)


@dataclass(frozen=True)
class Pairs:
    """Preferences: row i of `chosen` was preferred to row i of `rejected`.

    Attributes:
        chosen, rejected: two batches of B rows, aligned.
        margin: [B] how much better, in reward units, where the data says so; zero where it does not.
    """

    chosen: Batch
    rejected: Batch
    margin: Float[Tensor, "B"]

    def __post_init__(self) -> None:
        B = len(self.chosen)
        if len(self.rejected) != B or tuple(self.margin.shape) != (B,):
            raise ValueError(
                f"{B} chosen rows, {len(self.rejected)} rejected rows and {tuple(self.margin.shape)} margins: one of each a pair"
            )
        object.__setattr__(self, "margin", self.margin.to(self.chosen.tokens.device))

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def cost(self) -> Int[Tensor, "B"]:
        """Positions a forward pass spends on each pair."""
        return self.chosen.length + self.rejected.length

    def select(self, rows: Tensor | Sequence[int]) -> Pairs:
        """The given pairs, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.margin.device)
        return Pairs(self.chosen.select(index), self.rejected.select(index), self.margin[index])


@dataclass(frozen=True)
class Score:
    """What a reward says of a batch.

    Attributes:
        value: [B] the outcome of each response, in reward units; 0 where there is no verdict.
        verdict: [B] False where the reward gave no verdict (None, NaN, an exception, a time-out). A missing score is
            never taken for 0: rows without a verdict get weight 0 and are counted.
        token: [B, L] which token earned what of `value`, where the reward says so; their sum is `value`. Else None.
        parts: where several rewards were mixed, what each of them said, by its name; of a judge, what it said in either
            order.
        reasons: why a row has no verdict, by the row's number, where the reward knows.
        steps: [B, L] what a process reward says of each step, at the step's last token, else None: a second signal, which
            need not add up to `value` and is paid only where that is asked for (`credit=process`).
    """

    value: Float[Tensor, "B"]
    verdict: Bool[Tensor, "B"]
    token: Float[Tensor, "B L"] | None = None
    parts: Mapping[str, Score] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)
    steps: Float[Tensor, "B L"] | None = None

    def __post_init__(self) -> None:
        if self.value.shape != self.verdict.shape:
            raise ValueError(
                f"{tuple(self.value.shape)} values and {tuple(self.verdict.shape)} verdicts: one of each a row"
            )
        if not bool(torch.isfinite(self.value).all()):
            raise ValueError("a score is not finite: mark its row as without a verdict and give it the value 0")
        if self.token is not None:
            self._adds_up(self.token)

    def _adds_up(self, token: Tensor) -> None:
        """Refuse token rewards that are no parts of the value: a row would be paid another sum than its score."""
        total = token.double().sum(-1)
        # Rounding is in proportion to the parts, which may be far larger than what they add up to.
        wrong = (total - self.value.double()).abs() > 1e-3 * (1 + token.double().abs().sum(-1))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"the token rewards of row {row} add up to {float(total[row]):g} and its value is {float(self.value[row]):g}: "
                "token rewards share the value out; what is said of steps besides belongs in `steps`"
            )

    def at(self, row: int) -> float | None:
        """The score of a row; None where there is no verdict, which is no 0."""
        return float(self.value[row]) if bool(self.verdict[row]) else None

    @staticmethod
    def of(value: Tensor) -> Score:
        """Scores that all have a verdict; a value that is not finite becomes "no verdict"."""
        verdict = torch.isfinite(value)
        return Score(torch.where(verdict, value, torch.zeros_like(value)), verdict)

    def select(self, rows: Tensor | Sequence[int]) -> Score:
        """What was said of the given rows, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.value.device)
        where = {row: i for i, row in enumerate(index.tolist())}
        return Score(
            self.value[index],
            self.verdict[index],
            None if self.token is None else self.token[index],
            {name: part.select(index) for name, part in self.parts.items()},
            {where[row]: reason for row, reason in self.reasons.items() if row in where},
            None if self.steps is None else self.steps[index],
        )

    @staticmethod
    def concat(scores: Sequence[Score]) -> Score:
        """What one reward said of several batches, as of `Batch.concat` of them."""
        tokens = [s.token for s in scores if s.token is not None]
        steps = [s.steps for s in scores if s.steps is not None]
        reasons: dict[int, str] = {}
        before = 0
        for s in scores:
            reasons |= {before + row: reason for row, reason in s.reasons.items()}
            before += len(s.value)
        return Score(
            torch.cat([s.value for s in scores]),
            torch.cat([s.verdict for s in scores]),
            stacked(tokens) if len(tokens) == len(scores) else None,
            {name: Score.concat([s.parts[name] for s in scores]) for name in scores[0].parts},
            reasons,
            stacked(steps) if len(steps) == len(scores) else None,
        )


@runtime_checkable
class Reward(Protocol):
    """Whatever can judge a batch: a learned model, a classifier, a verifier, a user's function, a mixture."""

    name: str

    def __call__(self, batch: Batch) -> Score: ...


@runtime_checkable
class Data(Protocol):
    """What the learner can cut into micro-batches: `Batch` and `Pairs`."""

    @property
    def cost(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def select(self, rows: Any) -> Any: ...


Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
