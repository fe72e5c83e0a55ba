"""Trees copied out as numbers say what the library's own say, also on rows and at values it never saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from tokenmdp.models import trees

SETTINGS = {"max_iter": 30, "max_leaf_nodes": 7, "min_samples_leaf": 5, "random_state": 0}


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    return x, ((x[:, 0] * x[:, 1] > 0) | (x[:, 2] > 1)).astype(np.int64)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_copy_says_the_same(data: tuple[np.ndarray, np.ndarray], weighted: bool) -> None:
    x, y = data
    weight = np.linspace(0.1, 2.0, len(x)) if weighted else None
    own = HistGradientBoostingClassifier(early_stopping=False, **SETTINGS).fit(x, y, sample_weight=weight)
    copy = trees.grow(x, y, weight, **SETTINGS)
    new = np.random.default_rng(1).normal(size=(5000, 5), scale=3).astype(np.float32)
    said = copy.score(torch.from_numpy(new)).double().numpy()
    np.testing.assert_allclose(said, own.decision_function(new), atol=1e-5)
    again = trees.Trees(**copy.arrays())
    assert torch.equal(again.score(torch.from_numpy(new)), copy.score(torch.from_numpy(new)))


def test_no_rows_no_scores(data: tuple[np.ndarray, np.ndarray]) -> None:
    assert trees.grow(*data, **SETTINGS).score(torch.zeros(0, 5)).shape == (0,)
