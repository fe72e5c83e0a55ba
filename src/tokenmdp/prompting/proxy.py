"""Υ(query, prompt): the reward a prompt would earn on a query, learned from a log; asked as often as one likes.

    Υ = argmin Σ_i  − r_i log Υ(q_i, a_i) − (1 − r_i) log(1 − Υ(q_i, a_i)),   a classification loss: rewards are in [0, 1]

Every proxy has `fit(log)` and `predict(queries, prompts) -> [Q, P]`, for queries and prompts it has not seen, too. The
baselines are among them: the mean of each prompt, the nearest queries, a factorisation. Several together, and probabilities put
right: stacked.py.

Source: Sun, Hüyük & van der Schaar 2023 (Prompt-OIRL), section 3.2 (Υ as a classifier on embeddings of query and prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.special import expit

from tokenmdp.models import trees
from tokenmdp.prompting.features import Features, Learn, plain
from tokenmdp.prompting.log import Log


class Proxy(Protocol):
    """A learned Υ."""

    def fit(self, log: Log) -> Proxy: ...
    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]: ...


class Constant:
    """Each prompt's mean reward, whatever the query; of an unseen prompt the mean of all."""

    def fit(self, log: Log) -> Constant:
        """Count."""
        self.overall = float(log.reward.mean())
        total = np.bincount(log.prompt, log.reward, len(log.prompts))
        count = np.bincount(log.prompt, minlength=len(log.prompts))
        # One trial's worth of the overall mean: a prompt tried once is not believed outright.
        self.means = dict(zip(log.prompts, (total + self.overall) / (count + 1), strict=True))
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P]."""
        return np.tile([self.means.get(p, self.overall) for p in prompts], (len(queries), 1))


class Neighbours:
    """A prompt's mean reward on the k nearest queries it was tried on, shrunk to its mean over all.

    Args:
        k: neighbours; of a small log at most a fifth of its queries.
        prior: trials' worth of the prompt's own mean that is mixed in.
    """

    def __init__(self, features: Learn = plain, k: int = 50, prior: float = 10.0) -> None:
        self.features, self.k, self.prior = features, k, prior

    def fit(self, log: Log) -> Neighbours:
        """Remember."""
        tried = log.tried()
        self.texts = self.features([log.queries[i] for i in tried])
        from sklearn.neighbors import NearestNeighbors

        self.index = NearestNeighbors().fit(self.texts.transform([log.queries[i] for i in tried]))
        self.table = log.matrix()[tried]
        self.names = {p: i for i, p in enumerate(log.prompts)}
        self.constant = Constant().fit(log)
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P]."""
        base = self.constant.predict(queries, prompts)
        near = self.index.kneighbors(
            self.texts.transform(queries), min(self.k, max(1, len(self.table) // 5)), return_distance=False
        )
        out = base.copy()
        for column, prompt in enumerate(prompts):
            if prompt in self.names:
                seen = self.table[near, self.names[prompt]]
                count = (~np.isnan(seen)).sum(1)
                out[:, column] = (np.nansum(seen, 1) + self.prior * base[:, column]) / (count + self.prior)
        return out


class Crossed:
    """What the learned proxies share: features of queries and of prompts, side by side, trial by trial.

    A trial is described by the query's features, the prompt's, and which of the known prompts it is.

    Args:
        features: of the queries, learned from their texts.
        prompt_features: of the prompts.
    """

    def __init__(self, features: Learn = plain, prompt_features: Learn | None = None) -> None:
        self.features = features
        self.prompt_features = prompt_features or (lambda texts: Features(components=8).fit(texts))

    def learn_texts(self, log: Log) -> None:
        """Fit both sides' features on the texts of the log's trials."""
        self.names = {log.prompts[i]: n for n, i in enumerate(np.unique(log.prompt))}
        self.query_side = self.features([log.queries[i] for i in log.tried()])
        self.prompt_side = self.prompt_features(list(self.names))

    def prompt_rows(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """[P, D'] features of prompts and, of the known ones, a 1 in their own column."""
        known = np.zeros((len(prompts), len(self.names)), dtype=np.float32)
        for row, prompt in enumerate(prompts):
            if prompt in self.names:
                known[row, self.names[prompt]] = 1.0
        return np.concatenate([self.prompt_side.transform(prompts), known], axis=1)

    def trials(self, log: Log) -> NDArray[np.float32]:
        """[N, D + D'] of the log's trials."""
        tried, place = np.unique(log.query, return_inverse=True)
        used, which = np.unique(log.prompt, return_inverse=True)
        left = self.query_side.transform([log.queries[i] for i in tried])
        right = self.prompt_rows([log.prompts[i] for i in used])
        return np.concatenate([left[place], right[which]], axis=1)


def as_classes(
    x: NDArray[np.float32], reward: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64] | None]:
    """Rewards between 0 and 1 as classes and, if any lies between, weights: a trial of .3 is 0.3 of a success and 0.7 of a failure."""
    if ((reward == 0) | (reward == 1)).all():
        return x, reward.astype(np.int64), None
    twice = np.concatenate([x, x])
    return twice, np.repeat([1, 0], len(x)), np.concatenate([reward, 1 - reward])


class Boosted(Crossed):
    """Gradient-boosted trees.

    Args:
        trees, rate, leaves: how many, how much each adds, and how large one is.
        smallest: trials a leaf has at least.
    """

    def __init__(
        self,
        features: Learn = plain,
        prompt_features: Learn | None = None,
        trees: int = 150,
        rate: float = 0.05,
        leaves: int = 15,
        smallest: int = 40,
        seed: int = 0,
    ) -> None:
        super().__init__(features, prompt_features)
        self.trees, self.rate, self.leaves, self.smallest, self.seed = trees, rate, leaves, smallest, seed

    def fit(self, log: Log) -> Boosted:
        """Learn."""
        self.learn_texts(log)
        x, y, weight = as_classes(self.trials(log), log.reward)
        self.model = trees.grow(
            x,
            y,
            weight,
            max_iter=self.trees,
            learning_rate=self.rate,
            max_leaf_nodes=self.leaves,
            min_samples_leaf=min(self.smallest, max(1, len(log) // 20)),
            random_state=self.seed,
        )
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P]."""
        left, right = self.query_side.transform(queries), self.prompt_rows(prompts)
        return expit(self.model.crossed(torch.from_numpy(left), torch.from_numpy(right)).numpy())


class Logistic(Crossed):
    """A logistic regression with every known prompt's own weights on the query's features, beside shared ones.

        logit Υ(q, a) = (w + W_a) · f(q) + u · g(a) + b,    W_a = 0 for a prompt never seen

    Args:
        strength: λ of the penalty λ/2 (|w|² + |W|² + |u|²); features are standardised.
    """

    def __init__(self, features: Learn = plain, prompt_features: Learn | None = None, strength: float = 100.0) -> None:
        super().__init__(features, prompt_features)
        self.strength = strength

    def fit(self, log: Log) -> Logistic:
        """Learn, from a table of queries and one of prompts: no trial is ever written out."""
        self.learn_texts(log)
        tried, row = np.unique(log.query, return_inverse=True)
        used, column = np.unique(log.prompt, return_inverse=True)
        left = self.query_side.transform([log.queries[i] for i in tried]).astype(np.float64)
        right = self.prompt_rows([log.prompts[i] for i in used]).astype(np.float64)
        (Q, D), (P, E) = left.shape, right.shape

        def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            w, own, u, b = x[:D], x[D : D + P * D].reshape(P, D), x[D + P * D : -1], x[-1]
            score = (left @ (w + own).T + right @ u + b)[row, column]
            off = expit(score) - log.reward
            # [Q, P] what is off, summed over repeats.
            table = np.bincount(row * P + column, off, Q * P).reshape(Q, P)
            to_own = table.T @ left
            slope = np.concatenate([to_own.sum(0), to_own.reshape(-1), table.sum(0) @ right, [off.sum()]])
            value = float(np.logaddexp(0, score).sum() - log.reward @ score + self.strength / 2 * (x[:-1] @ x[:-1]))
            slope[:-1] += self.strength * x[:-1]
            return value, slope

        found = scipy.optimize.minimize(
            loss, np.zeros(D + P * D + E + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000}
        ).x
        self.weight, self.bias = found[:-1], float(found[-1])
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P]."""
        left, right = self.query_side.transform(queries), self.prompt_rows(prompts)
        width, known = left.shape[1], len(self.names)
        w, own, u = np.split(self.weight, [width, width + known * width])
        prompt = right[:, -known:] @ own.reshape(known, width) + w  # [P, D] a prompt's weights on queries
        return expit(left @ prompt.T + right @ u + self.bias)


class TwoTower(Crossed):
    """Two small networks, one for the query and one for the prompt; Υ = σ(u · v + a + b).

    Args:
        width: of the towers and of u and v.
        epochs, rows, rate, decay: of AdamW; of a small log `rows` are fewer, so that an epoch has 16 steps at least.
    """

    def __init__(
        self,
        features: Learn = plain,
        prompt_features: Learn | None = None,
        width: int = 64,
        epochs: int = 12,
        rows: int = 512,
        rate: float = 2e-3,
        decay: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(features, prompt_features)
        self.width, self.epochs, self.rows, self.rate, self.decay, self.seed = width, epochs, rows, rate, decay, seed

    def _logit(self, x: torch.Tensor) -> torch.Tensor:
        u, v = self.left(x[:, : self.query_side.width]), self.right(x[:, self.query_side.width :])
        return (u[:, 1:] * v[:, 1:]).sum(1) / self.width**0.5 + u[:, 0] + v[:, 0]

    def fit(self, log: Log) -> TwoTower:
        """Learn."""
        self.learn_texts(log)
        x, reward = torch.from_numpy(self.trials(log)), torch.from_numpy(log.reward).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.left = _tower(self.query_side.width, self.width)
            self.right = _tower(x.shape[1] - self.query_side.width, self.width)
            learner = torch.optim.AdamW(
                [*self.left.parameters(), *self.right.parameters()], self.rate, weight_decay=self.decay
            )
            rows = min(self.rows, -(-len(x) // 16))
            for _ in range(self.epochs):
                for part in torch.randperm(len(x)).split(rows):
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(self._logit(x[part]), reward[part])
                    learner.zero_grad()
                    loss.backward()
                    learner.step()
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P]; the towers are climbed once a text."""
        with torch.no_grad():
            u = self.left(torch.from_numpy(self.query_side.transform(queries)))
            v = self.right(torch.from_numpy(self.prompt_rows(prompts)))
            logit = u[:, 1:] @ v[:, 1:].T / self.width**0.5 + u[:, :1] + v[:, :1].T
            return torch.sigmoid(logit).double().numpy()


def _tower(inputs: int, width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(inputs, width), torch.nn.GELU(), torch.nn.Linear(width, width + 1))


class Factorised:
    """Rewards as prompt means plus a low-rank table, whose query side is regressed on the query's features.

        r(q, a) ≈ μ_a + u_q · v_a,    u_q = W f(q) for a query never seen

    Args:
        rank: of the table.
        penalty: on squared weights of W.
    """

    def __init__(self, features: Learn = plain, rank: int = 2, penalty: float = 100.0) -> None:
        self.features, self.rank, self.penalty = features, rank, penalty

    def fit(self, log: Log) -> Factorised:
        """Learn."""
        tried = log.tried()
        self.constant = Constant().fit(log)
        self.names = {p: i for i, p in enumerate(log.prompts)}
        table = log.matrix()[tried] - self.constant.predict([""], log.prompts)
        filled = np.where(np.isnan(table), 0.0, table)
        left, size, self.right = np.linalg.svd(filled, full_matrices=False)
        self.right = self.right[: self.rank]
        self.texts = self.features([log.queries[i] for i in tried])
        inputs = self.texts.transform([log.queries[i] for i in tried])
        from sklearn.linear_model import Ridge

        self.side = Ridge(self.penalty).fit(inputs, left[:, : self.rank] * size[: self.rank])
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P]."""
        out = self.constant.predict(queries, prompts)
        moved = np.asarray(self.side.predict(self.texts.transform(queries))).reshape(len(queries), -1) @ self.right
        for column, prompt in enumerate(prompts):
            if prompt in self.names:
                out[:, column] += moved[:, self.names[prompt]]
        return np.clip(out, 0.0, 1.0)
