"""Prefixes as trees: what several of them begin with is read once.

A state of the token MDP is a prefix, and what a model keeps of a prefix (its keys and values) holds for all that begins with it.
So prefixes are read as a forest: a node is a state, its token the last of that state, and it sees the states on its own way from
the root and no other.

    "2+2=", "2+3="      2 ─ + ┬ 2 ─ =        six nodes for eight tokens; positions 0 1 2 3 2 3
                              └ 3 ─ =

Prefixes that share less than a quarter of their tokens with a neighbour are trees of their own, and where trees would leave more
padding than they save, every prefix is read by itself; one that another begins with is part of that other's line either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SHARED = 0.25  # of a prefix's tokens that a neighbour must have in common with it to be in its tree
NODES = 512  # of a tree: attention looks at the square of them, and rows of like length need little padding


@dataclass(frozen=True)
class Forest:
    """States to read.

    Attributes:
        tokens: [R, N] the last token of each state, tree r in row r, padded on the right.
        position: [R, N] where that token stands in its prefixes.
        sees: [R, 1, N, N] whether a state begins with another one, or is it; None where every tree is one line, so that each
            sees all before it.
        length: [P] tokens of each prefix.
        tree: [P] the row of each prefix.
        node: [P, L] the columns of its states, in order; zeros past its end.
    """

    tokens: Int[Tensor, "R N"]
    position: Int[Tensor, "R N"]
    sees: Bool[Tensor, "R 1 N N"] | None
    length: Int[Tensor, "P"]
    tree: Int[Tensor, "P"]
    node: Int[Tensor, "P L"]

    def to(self, device: torch.device) -> Forest:
        """The same on a device."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in own.items()}
        return Forest(**moved)


def families(prefixes: Sequence[Sequence[int]], shared: float = SHARED) -> list[list[int]]:
    """The prefixes of each tree, by number, in the order in which they branch off: that of a dictionary.

    Args:
        shared: the share of a prefix's tokens that it must have in common with the one before it. 1: only what another begins
            with is in that one's tree.
    """
    found: list[list[int]] = []
    nodes = 0
    before: Sequence[int] = ()
    for i in sorted(range(len(prefixes)), key=lambda i: list(prefixes[i])):
        now = prefixes[i]
        common = in_common(before, now)
        extends = common == len(before)
        if found and (extends or (common >= shared * len(now) and nodes + len(now) - common <= NODES)):
            found[-1].append(i)
            nodes += len(now) - common
        else:
            found.append([i])
            nodes = len(now)
        before = now
    return found


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prefixes begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def plant(prefixes: Sequence[Sequence[int]]) -> Forest:
    """The forest with the fewest cells to compute, padding included: of lines, of close or of wide families."""
    return _planted(
        prefixes, min((families(prefixes, s) for s in (1.0, 0.5, SHARED)), key=lambda f: _cells(prefixes, f))
    )


def by_length(prefixes: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Each tree's longest prefix, in tokens, and its prefixes by number; the shortest trees first."""
    return sorted((max(len(prefixes[i]) for i in family), family) for family in families(prefixes))


def _cells(prefixes: Sequence[Sequence[int]], families: Sequence[Sequence[int]]) -> int:
    """Trees times the nodes of the largest."""

    def nodes(family: Sequence[int]) -> int:
        shared = sum(in_common(prefixes[a], prefixes[b]) for a, b in pairwise(family))
        return sum(len(prefixes[i]) for i in family) - shared

    return len(families) * max(map(nodes, families))


def _planted(prefixes: Sequence[Sequence[int]], families: Sequence[Sequence[int]]) -> Forest:
    P, L = len(prefixes), max(map(len, prefixes))
    node, tree = torch.zeros((P, L), dtype=torch.long), torch.zeros(P, dtype=torch.long)
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    branches: list[tuple[int, int, list[int]]] = []  # row, first node of the branch, the way to it
    for row, family in enumerate(families):
        tokens: list[int] = []
        position: list[int] = []
        way: list[int] = []  # the nodes of the prefix before
        before: Sequence[int] = ()
        for i in family:
            now = prefixes[i]
            common = in_common(before, now)
            first = len(tokens)
            tokens += now[common:]
            position += range(common, len(now))
            if first and common < len(before) and len(tokens) > first:
                branches.append((row, first, way[:common]))
            way = [*way[:common], *range(first, len(tokens))]
            node[i, : len(way)], tree[i] = torch.tensor(way, dtype=torch.long), row
            before = now
        rows.append(tokens)
        positions.append(position)
    R, N = len(rows), max(map(len, rows))
    sees = None
    if branches:
        sees = torch.ones((N, N), dtype=torch.bool).tril().repeat(R, 1, 1)
        for row, first, way in branches:
            # Nodes after a branching see the way to it and themselves; those that extend them further come next and see the
            # same, up to the next branching, which writes over it.
            sees[row, first:, :first] = False
            sees[row, first:, way] = True
        sees = sees[:, None]
    return Forest(
        tokens=_padded(rows, N),
        position=_padded(positions, N),
        sees=sees,
        length=torch.tensor([len(p) for p in prefixes]),
        tree=tree,
        node=node,
    )


def _padded(rows: Sequence[Sequence[int]], columns: int) -> Int[Tensor, "R N"]:
    out = torch.zeros((len(rows), columns), dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out
