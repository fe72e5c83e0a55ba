"""Gradient-boosted trees as plain numbers: grown by scikit-learn, copied out, kept and asked without it.

    f(x) = b + Σ_t value_t[leaf_t(x)],    the log-odds of class 1

The library keeps its trees in objects that only its own serialisation can store, and reading that runs code. Arrays go into
safetensors and say the same.

A row is not walked from root to leaf. Each question a tree asks strikes out, where the answer is no, the leaves on its left; of
those that no answer struck out the leftmost is where the row ends. Sets of leaves are the bits of one integer, so answers
are combined by `and`, in any order: those that hang on a query once a query, those that hang on a prompt once a prompt.

Source: Friedman 2001, algorithm 5, as in scikit-learn's histogram gradient boosting; Lucchese et al. 2015 (QuickScorer),
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

ROWS = 1024  # asked at a time
PROBE = 256  # rows on which a copy is held against the library
MOST = 62  # leaves of a tree: bits of an integer that are not its sign


@dataclass(frozen=True)
class Trees:
    """T trees of at most I questions and L leaves each.

    Attributes:
        feature, threshold: [T, I] a question: is the feature at most the threshold?
        keeps: [T, I] the leaves that are left where the answer is no, as bits, the leftmost lowest.
        value: [T, L] what a leaf adds.
        bias: [1] b.
    """

    feature: Int[Tensor, "T I"]
    threshold: Float[Tensor, "T I"]
    keeps: Int[Tensor, "T I"]
    value: Float[Tensor, "T L"]
    bias: Float[Tensor, "1"]
    kind: ClassVar[str] = "boosted"

    def score(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """[N] f(x)."""
        x = features.detach().cpu()
        parts = [self.ends(self.left(part, 0)) for part in x.split(ROWS)]
        return torch.cat(parts).to(features) if parts else features.new_zeros(0)

    def crossed(self, one: Float[Tensor, "Q D1"], other: Float[Tensor, "P D2"]) -> Float[Tensor, "Q P"]:
        """[Q, P] f of each row of the one beside each row of the other, without ever putting them side by side."""
        columns = self.left(other, one.shape[1])
        out = torch.empty((len(one), len(other)), dtype=torch.float64)
        for start in range(0, len(one), ROWS):
            rows = self.left(one[start : start + ROWS], 0)
            for p in range(len(other)):
                out[start : start + ROWS, p] = self.ends(rows & columns[:, p : p + 1])
        return out

    def left(self, x: Float[Tensor, "N D"], begin: int) -> Int[Tensor, "T N"]:
        """[T, N] the leaves that no answer strikes out, of questions on features begin … begin + D − 1, which are x."""
        columns = x.T.double()
        out = torch.full((len(self.value), len(x)), -1)
        for feature, threshold, keeps in zip(self.feature.T, self.threshold.T, self.keeps.T, strict=True):
            asked = ((feature >= begin) & (feature < begin + len(columns))).nonzero()[:, 0]
            no = columns[feature[asked] - begin] > threshold[asked, None]
            out[asked] &= torch.where(no, keeps[asked, None], -1)
        return out

    def ends(self, left: Int[Tensor, "T N"]) -> Float[Tensor, "N"]:
        """[N] f, from the leaves that are left: the lowest bit of each is where the row ends."""
        leaf = torch.frexp((left & -left).double()).exponent.long() - 1
        return self.value.gather(1, leaf).sum(0) + self.bias.double()

    def arrays(self) -> dict[str, Tensor]:
        """The numbers that make it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def grow(x: NDArray[Any], y: NDArray[np.int64], weight: NDArray[np.float64] | None = None, **settings: Any) -> Trees:
    """Trees that tell class 1 from class 0.

    Args:
        x, y, weight: [N, D] features, [N] classes and [N] how much a row counts; None where all count alike. (Not ones:
            the library then sorts every feature by weight for every bin, which takes longer than all the trees.)
        settings: of `HistGradientBoostingClassifier`.

    Raises:
        ValueError: trees of more leaves than an integer has bits.
        RuntimeError: the copy says something else than the library's own: a version whose trees are laid out otherwise.
    """
    if not 2 <= (settings.get("max_leaf_nodes") or MOST + 1) <= MOST:
        raise ValueError(f"max_leaf_nodes is {settings.get('max_leaf_nodes')}; it must be 2 to {MOST}")
    from sklearn.ensemble import HistGradientBoostingClassifier

    grown = HistGradientBoostingClassifier(early_stopping=False, **settings).fit(x, y, sample_weight=weight)
    trees = _copied(grown)
    said = trees.score(torch.from_numpy(x[:PROBE])).double()
    if not torch.allclose(said, torch.from_numpy(grown.decision_function(x[:PROBE])), atol=1e-4):
        raise RuntimeError(
            "this version of scikit-learn lays its trees out otherwise: install the one in constraints.txt"
        )
    return trees


def _copied(grown: Any) -> Trees:
    """The library's trees as arrays, padded with questions whose answer strikes nothing out."""
    told = [_told(stage[0].nodes) for stage in grown._predictors]
    trees, leaves = len(told), max(len(t[3]) for t in told)
    questions = max(1, *(len(t[0]) for t in told))
    feature, keeps = np.zeros((trees, questions), dtype=np.int64), np.full((trees, questions), -1, dtype=np.int64)
    threshold, value = np.zeros((trees, questions)), np.zeros((trees, leaves))
    for t, (asks, at, kept, worth) in enumerate(told):
        feature[t, : len(asks)], threshold[t, : len(asks)], keeps[t, : len(asks)] = asks, at, kept
        value[t, : len(worth)] = worth
    arrays = {"feature": feature, "threshold": threshold, "keeps": keeps, "value": value}
    bias = np.asarray(grown._baseline_prediction, dtype=np.float64).reshape(1)
    return Trees(**{name: torch.from_numpy(array) for name, array in arrays.items()}, bias=torch.from_numpy(bias))


def _told(nodes: NDArray[Any]) -> tuple[list[int], list[float], list[int], list[float]]:
    """One tree's questions (feature, threshold, what is left after a no) and its leaves' values from left to right."""
    asks: list[int] = []
    at: list[float] = []
    kept: list[int] = []
    worth: list[float] = []

    def below(number: int) -> int:
        """The leaves under a node, as bits."""
        node = nodes[number]
        if node["is_leaf"]:
            worth.append(float(node["value"]))
            return 1 << (len(worth) - 1)
        left = below(int(node["left"]))
        asks.append(int(node["feature_idx"]))
        at.append(float(node["num_threshold"]))
        kept.append(~left)
        return left | below(int(node["right"]))

    below(0)
    return asks, at, kept, worth
