"""Gradient-boosted trees as plain numbers: grown by scikit-learn, copied out, kept and asked without it.

    f(x) = b + Σ_t leaf_t(x),    the log-odds of class 1

The library keeps its trees in objects that only its own serialisation can store, and reading that runs code. Arrays go into
safetensors and say the same.

Source: Friedman 2001, algorithm 5, as in scikit-learn's histogram gradient boosting.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

ROWS = 4096  # asked at a time
PROBE = 256  # rows on which a copy is held against the library


@dataclass(frozen=True)
class Trees:
    """T trees of at most M nodes each.

    A row starts at node 0 of each tree and goes left where its feature is at most the threshold, else right; a leaf leads
    to itself.

    Attributes:
        feature, left, right: [T, M] which feature a node asks, and where it sends a row.
        threshold, value: [T, M] what the feature is compared with, and what a leaf adds.
        bias: [1] b.
        depth: [1] the longest way from a root to a leaf.
    """

    feature: Int[Tensor, "T M"]
    threshold: Float[Tensor, "T M"]
    left: Int[Tensor, "T M"]
    right: Int[Tensor, "T M"]
    value: Float[Tensor, "T M"]
    bias: Float[Tensor, "1"]
    depth: Int[Tensor, "1"]
    kind: ClassVar[str] = "boosted"

    def score(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """[N] f(x)."""
        x = features.detach().cpu()
        parts = [self._score(part) for part in x.split(ROWS)]
        return torch.cat(parts).to(features) if parts else x.new_zeros(0)

    def _score(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        tree = torch.arange(len(self.value))
        node = torch.zeros((len(x), len(tree)), dtype=torch.long)
        for _ in range(int(self.depth)):
            goes_left = x.gather(1, self.feature[tree, node]).double() <= self.threshold[tree, node]
            node = torch.where(goes_left, self.left[tree, node], self.right[tree, node])
        return self.value[tree, node].sum(1) + self.bias.double()

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
        RuntimeError: the copy says something else than the library's own: a version whose trees are laid out otherwise.
    """
    grown = HistGradientBoostingClassifier(early_stopping=False, **settings).fit(x, y, sample_weight=weight)
    trees = _copied(grown)
    said = trees.score(torch.from_numpy(x[:PROBE])).double()
    if not torch.allclose(said, torch.from_numpy(grown.decision_function(x[:PROBE])), atol=1e-4):
        raise RuntimeError(
            "this version of scikit-learn lays its trees out otherwise: install the one in constraints.txt"
        )
    return trees


def _copied(grown: HistGradientBoostingClassifier) -> Trees:
    """The library's trees as arrays, padded to the largest with leaves that nothing leads to."""
    nodes = [stage[0].nodes for stage in grown._predictors]
    T, M = len(nodes), max(len(tree) for tree in nodes)
    whole = {name: np.zeros((T, M), dtype=np.int64) for name in ("feature", "left", "right")}
    real = {name: np.zeros((T, M), dtype=np.float64) for name in ("threshold", "value")}
    own = np.arange(M)
    for t, tree in enumerate(nodes):
        leaf = tree["is_leaf"].astype(bool)
        here = slice(0, len(tree))
        whole["feature"][t, here] = np.where(leaf, 0, tree["feature_idx"])
        real["threshold"][t, here] = np.where(leaf, 0.0, tree["num_threshold"])
        real["value"][t, here] = np.where(leaf, tree["value"], 0.0)
        for name in ("left", "right"):
            whole[name][t] = own
            whole[name][t, here] = np.where(leaf, own[here], tree[name])
    return Trees(
        **{name: torch.from_numpy(array) for name, array in {**whole, **real}.items()},
        bias=torch.from_numpy(np.asarray(grown._baseline_prediction, dtype=np.float64).reshape(1)),
        depth=torch.tensor([max(int(tree["depth"].max()) for tree in nodes)]),
    )
