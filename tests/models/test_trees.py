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


def test_crossing_is_putting_side_by_side(data: tuple[np.ndarray, np.ndarray]) -> None:
    copy = trees.grow(*data, **SETTINGS)
    x = torch.from_numpy(data[0])
    one, other = x[:70, :2], x[:6, 2:]
    beside = torch.cat([one[:, None].expand(-1, 6, -1), other[None].expand(70, -1, -1)], dim=-1)
    assert torch.allclose(copy.crossed(one, other).reshape(-1), copy.score(beside.reshape(-1, 5)).double(), atol=1e-5)


def test_a_tree_has_no_more_leaves_than_an_integer_has_bits(data: tuple[np.ndarray, np.ndarray]) -> None:
    largest = {**SETTINGS, "max_leaf_nodes": trees.MOST, "min_samples_leaf": 1}
    own = HistGradientBoostingClassifier(early_stopping=False, **largest).fit(*data)
    said = trees.grow(*data, **largest).score(torch.from_numpy(data[0])).double().numpy()
    np.testing.assert_allclose(said, own.decision_function(data[0]), atol=1e-5)
    with pytest.raises(ValueError, match="max_leaf_nodes is 63; it must be 2 to 62"):
        trees.grow(*data, **{**SETTINGS, "max_leaf_nodes": 63})


def test_no_rows_no_scores(data: tuple[np.ndarray, np.ndarray]) -> None:
    assert trees.grow(*data, **SETTINGS).score(torch.zeros(0, 5)).shape == (0,)
