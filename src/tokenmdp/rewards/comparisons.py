"""Comparisons made, spoiled and looked over: pairs from scored responses, labels flipped, pairs that stand on both sides
of a split.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenmdp.tasks import data
from tokenmdp.types import Batch, Pairs


def flipped(pairs: Pairs, share: float, rng: torch.Generator) -> tuple[Pairs, Bool[Tensor, "B"]]:
    """The pairs with a share of their labels the wrong way round: symmetric noise, as of a labeller who slips.

    Exactly round(share · B) pairs are flipped, the first of a random order, so that from one state of `rng` the flips of a
    smaller share are among those of a larger one. A flipped pair's margin changes sign.

    Args:
        share: of the pairs, 0 to 1; one half leaves nothing to learn.

    Returns:
        The pairs in their order, and [B] which were flipped.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of flipped labels is {share}; it must lie between 0 and 1, such as 0.2")
    B = len(pairs)
    wrong = torch.zeros(B, dtype=torch.bool)
    wrong[torch.randperm(B, generator=rng)[: round(share * B)]] = True
    side = torch.arange(B) + B * wrong
    both, other = Batch.concat([pairs.chosen, pairs.rejected]), Batch.concat([pairs.rejected, pairs.chosen])
    return Pairs(both.select(side), other.select(side), torch.where(wrong, -pairs.margin, pairs.margin)), wrong


def compared(
    batch: Batch,
    score: Float[Tensor, "B"],
    rng: torch.Generator,
    across: bool = False,
    sharpness: float | None = None,
) -> tuple[Pairs, int]:
    """Pairs from scored responses, each used once at most, and how many pairs were dropped because their scores tie.

    Two responses of one prompt can be told apart by what they say; responses of two prompts differ in their prompts too,
    which a reward must learn to see past, or can learn to cheat by. To hold pairs out, divide the prompts first: a prompt
    of a pair across prompts may stand in another pair as well.

    Args:
        batch: responses, some to each prompt; prompts of equal tokens are one prompt.
        score: what says which is better, in reward units.
        rng: which responses meet, and with `sharpness` what is said of them.
        across: pair responses of two prompts instead of one.
        sharpness: β of a labeller who says "first" with probability σ(β (s_first − s_second)), in inverse reward units;
            None for one who is always right.

    Returns:
        The pairs, with the difference of the scores as margin (zero with `sharpness`, where that would give away the
        answer); and the number of ties.

    Raises:
        ValueError: a score a row is not what was given, or no pair can be made: nothing varies, or each prompt has one
            response (or, across prompts, there is one prompt).
    """
    if score.shape != (len(batch),):
        raise ValueError(f"{tuple(score.shape)} scores for {len(batch)} rows: one of each")
    score = score.detach().cpu()
    rows = _across(batch, rng) if across else _within(batch, rng)
    differ = [(i, j) for i, j in rows if float(score[i]) != float(score[j])]
    if not differ:
        what = "of two different prompts" if across else "of one prompt"
        raise ValueError(
            f"of {len(batch)} scored responses no two {what} with different scores could be paired ({len(rows)} pairs, all "
            "of them ties): give more responses, or a score that tells them apart"
        )
    first, second = (torch.tensor(side) for side in zip(*differ, strict=True))
    gap = score[first] - score[second]
    if sharpness is None:
        prefers, margin = gap > 0, gap.abs()
    else:
        prefers = torch.rand(len(gap), generator=rng) < torch.sigmoid(sharpness * gap)
        margin = torch.zeros_like(gap)
    chosen, rejected = torch.where(prefers, first, second), torch.where(prefers, second, first)
    return Pairs(batch.select(chosen), batch.select(rejected), margin.float()), len(rows) - len(differ)


def _by_prompt(batch: Batch, rng: torch.Generator) -> list[list[int]]:
    """The rows of each prompt, prompts and rows in random order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in torch.randperm(len(batch), generator=rng).tolist():
        groups.setdefault(batch.prompts[row].ids, []).append(row)
    return list(groups.values())


def _within(batch: Batch, rng: torch.Generator) -> list[tuple[int, int]]:
    return [(rows[i], rows[i + 1]) for rows in _by_prompt(batch, rng) for i in range(0, len(rows) - 1, 2)]


def _across(batch: Batch, rng: torch.Generator) -> list[tuple[int, int]]:
    """With rows in the order of their prompts, half the rows further on there is another prompt, unless one has half."""
    order = [row for rows in _by_prompt(batch, rng) for row in rows]
    half = len(order) // 2
    met = [(order[i], order[i + half]) for i in range(half)]
    return [(i, j) for i, j in met if batch.prompts[i].ids != batch.prompts[j].ids]


def repeated(learned: Pairs, held_out: Pairs) -> Bool[Tensor, "B"]:
    """[B] which held-out pairs stand among the learned ones as well, either way round: they measure memory.

    Texts are compared without regard to case and white space, so that a copy that was tidied counts as one.
    """
    known = set(_texts(learned))
    return torch.tensor([pair in known for pair in _texts(held_out)])


def divided(pairs: Pairs, share: float, rng: torch.Generator) -> tuple[Pairs, Pairs, dict[str, int]]:
    """The pairs to learn from and those held out, divided by prompt, and what was found on the way.

    Pairs with two equal sides are left out, and held-out pairs that stand among the learned ones under a prompt in other
    tokens.

    Returns:
        Learned, held out, and how many: `equal_sides` and `repeated_across_split`, both left out, and `duplicates`, which
        stay.

    Raises:
        ValueError: no pair has different sides, there are too few prompts to divide, or every held-out pair is learned
            from as well.
    """
    different, same = data.distinct(pairs)
    learned, kept = data.split(different, share, rng)
    seen = repeated(learned, kept)
    if bool(seen.all()):
        raise ValueError(f"all {len(kept)} held-out pairs are learned from as well: the data repeats itself")
    found = {
        "equal_sides": same,
        "duplicates": duplicates(different),
        "repeated_across_split": int(seen.sum()),
    }
    return learned, kept.select((~seen).nonzero()[:, 0]), found


def duplicates(pairs: Pairs) -> int:
    """How many pairs say again, either way round, what an earlier one says."""
    return len(pairs) - len(set(_texts(pairs)))


def _texts(pairs: Pairs) -> list[tuple[str, ...]]:
    def whole(batch: Batch) -> list[str]:
        return [
            " ".join((p.text + text).casefold().split()) for p, text in zip(batch.prompts, batch.texts, strict=True)
        ]

    return [tuple(sorted(sides)) for sides in zip(whole(pairs.chosen), whole(pairs.rejected), strict=True)]
