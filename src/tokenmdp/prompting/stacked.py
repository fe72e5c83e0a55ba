"""Υ put right, or made of several, by predictions of questions that its members had not seen.

    Υ(q, a) = σ( b_a + Σ_k c_k m_k(q) + d_k ( l_k(q, a) − m_k(q) ) ),   c, d ≥ 0
    l_k     = logit Υ_k of member k,   m_k(q) = its mean over the known prompts

m says how hard a query is, l − m which prompt suits it. A member may know the first well and the second hardly, and only
the second decides a choice: so each has a weight of its own, learned by maximum likelihood on out-of-fold predictions. With
d = 0 all that is left is b, and every query gets the best constant prompt. One member alone is calibrated in that way.

Source: Wolpert 1992 (stacked generalization); Platt 1999 (a line in the logits); Chernozhukov, Demirer, Duflo &
Fernández-Val 2018 (generic machine learning), section 3.1 (a common part and a heterogeneous one, each with its own slope).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.special import expit, logit

from tokenmdp.prompting import leaks, proxy, splits
from tokenmdp.prompting.features import Learn, Once, plain
from tokenmdp.prompting.log import Log
from tokenmdp.prompting.proxy import Proxy

MakeProxy = Callable[[], Proxy]
PENALTY = 1.0  # on c² and d², in trials' worth of log-likelihood: a small log says little about slopes
NEAR = 1e-4  # a member's probability is kept this far from 0 and 1


def usual(features: Learn = plain, seed: int = 0) -> list[MakeProxy]:
    """The members of a stack of which nothing else is said: straight lines and trees."""
    return _members(("logistic", "boosted"), features, seed)


class Stacked:
    """Several proxies as one, or one calibrated.

    Args:
        members: what makes each; None for `usual`.
        folds: of the log's questions.
        tell: called after each of the `len(members) * (folds + 1)` fits.

    Attributes:
        proxies: the members, fitted on the whole log.
        names: the prompts that were tried, and their places in `intercept`.
        intercept: [P] b, of a prompt never tried their mean by trials.
        common, own: [K] c and d.
        held: [Q, P] Υ of the log's queries by members that did not see the query's fold, and weights fitted to the other folds'
            trials; NaN elsewhere. The members whose predictions those weights were fitted to had seen it: a leak of second
            order, as in all stacking that is not nested. On 40 logs of pure chance no gain had an interval above 0.
        fold: [Q] which fold that was; −1 of queries never tried.
    """

    def __init__(
        self,
        members: Sequence[MakeProxy] | None = None,
        folds: int = 4,
        seed: int = 0,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self.members, self.folds, self.seed, self.tell = members, folds, seed, tell

    def fit(self, log: Log) -> Stacked:
        """Learn on parts, weigh on the rest, learn on all."""
        members = usual(seed=self.seed) if self.members is None else self.members
        known = np.unique(log.prompt)
        self.names = {log.prompts[i]: n for n, i in enumerate(known)}
        said = np.full((len(log.queries), len(log.prompts), len(members)), np.nan)
        self.fold = np.full(len(log.queries), -1)
        for k, make in enumerate(members):
            for number, (part, value) in enumerate(out_of_fold(log, make, self.folds, self.seed)):
                at = part.tried()
                said[at, :, k], self.fold[at] = _logit(value[at]), number
                self.tell()
        place = np.full(len(log.prompts), -1)
        place[known] = np.arange(len(known))
        count = np.bincount(place[log.prompt])
        self.held = np.full(said.shape[:2], np.nan)
        for number in range(self.folds):
            rest, mine = log.of_queries(np.flatnonzero(self.fold != number)), self.fold == number
            weights = _weighed(rest, place, said, known)
            self.held[mine] = expit(_score(said[mine], said[mine][:, known].mean(1), place, *weights, count))
        self.intercept, self.common, self.own = _weighed(log, place, said, known)
        self.count = count
        self.proxies = []
        for make in members:
            self.proxies.append(make().fit(log))
            self.tell()
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P]."""
        every = [*self.names, *dict.fromkeys(p for p in prompts if p not in self.names)]
        said = np.stack([_logit(member.predict(queries, every)) for member in self.proxies], axis=-1)
        where = [every.index(p) for p in prompts]
        place = np.asarray([self.names.get(p, -1) for p in prompts])
        mean = said[:, : len(self.names)].mean(1)
        return expit(_score(said[:, where], mean, place, self.intercept, self.common, self.own, self.count))


def _score(
    said: NDArray[np.float64],
    mean: NDArray[np.float64],
    place: NDArray[np.int64],
    intercept: NDArray[np.float64],
    common: NDArray[np.float64],
    own: NDArray[np.float64],
    count: NDArray[np.int64],
) -> NDArray[np.float64]:
    """[Q, P] log-odds from members' [Q, P, K], their means [Q, K], and each prompt's place among the intercepts."""
    base = np.where(place >= 0, intercept[place], np.average(intercept, weights=count))
    return np.asarray(base + (mean @ common)[:, None] + (said - mean[:, None]) @ own)


def _weighed(
    log: Log, place: NDArray[np.int64], said: NDArray[np.float64], known: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """b, c and d of the log's trials, by maximum likelihood with a small penalty."""
    mean = said[:, known].mean(1)[log.query]
    slopes = np.concatenate([mean, said[log.query, log.prompt] - mean], axis=1)
    which, P, K = place[log.prompt], len(known), said.shape[2]

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        score = x[which] + slopes @ x[P:]
        off = expit(score) - log.reward
        value = np.logaddexp(0, score).sum() - log.reward @ score + 0.5 * PENALTY * (x[P:] @ x[P:])
        slope = np.concatenate([np.bincount(which, off, P), off @ slopes + PENALTY * x[P:]])
        # A prompt that always fails has no finite b of largest likelihood: this holds it within reach.
        return value + 0.5 * NEAR * (x[:P] @ x[:P]), slope + np.concatenate([NEAR * x[:P], np.zeros(2 * K)])

    start = np.concatenate([np.zeros(P), np.ones(2 * K) / K])
    # A slope below 0 would turn an order round because of noise: then nothing is known of it.
    found = scipy.optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(None, None)] * P + [(0, None)] * (2 * K)
    ).x
    return found[:P], found[P : P + K], found[P + K :]


def out_of_fold(log: Log, make: MakeProxy, count: int, seed: int) -> Iterator[tuple[Log, NDArray[np.float64]]]:
    """For each fold of the log's questions its trials, and [Q, P] predictions of a proxy that did not see them.

    Rows of queries outside the fold are NaN.
    """
    tried = log.tried()
    for learned, held in splits.folds(leaks.groups([log.queries[i] for i in tried]), count, seed):
        value = np.full((len(log.queries), len(log.prompts)), np.nan)
        at = tried[held]
        value[at] = make().fit(log.of_queries(tried[learned])).predict([log.queries[i] for i in at], log.prompts)
        yield log.of_queries(at), value


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logit(np.clip(p, NEAR, 1 - NEAR)))


def named(
    name: str, features: Learn = plain, folds: int = 4, seed: int = 0, tell: Callable[[], None] = lambda: None
) -> MakeProxy:
    """What makes the proxy of a name; names with + between are stacked (see `Stacked` for `folds` and `tell`).

    Raises:
        ValueError: there is none of that name.
    """
    known: dict[str, MakeProxy] = {
        "constant": proxy.Constant,
        "neighbours": lambda: proxy.Neighbours(features),
        "logistic": lambda: proxy.Logistic(features),
        "boosted": lambda: proxy.Boosted(features, seed=seed),
        "two-tower": lambda: proxy.TwoTower(features, seed=seed),
        "factorised": lambda: proxy.Factorised(features),
    }
    parts = [part.strip() for part in name.split("+")]
    wrong = next((part for part in parts if part not in known), None)
    if wrong is not None:
        raise ValueError(f"there is no proxy {wrong!r}: it is one of {', '.join(known)}, or several with + between")
    if len(parts) == 1:
        return known[parts[0]]
    members = _members(parts, features, seed)
    return lambda: Stacked(members, folds, seed, tell)


def _members(names: Sequence[str], features: Learn, seed: int) -> list[MakeProxy]:
    """What makes the proxies of these names, on the same features."""
    once = features if isinstance(features, Once) else Once(features)
    return [named(name, once, seed=seed) for name in names]
