"""Which prompt to use for a query, chosen by Υ without one call to a language model.

    a(q)   = argmax_a Υ(q, a) − price · cost(a)
    gain   = E_q [ r(q, a(q)) − r(q, a*) ],    a* the best constant prompt of the training log

A chooser that is no better than a*, as far as the training log can tell, uses a*: it abstains where the 95 % interval of
the gain, measured on questions its proxy had not seen, includes 0, or where the log tried too little to tell.

Source: Sun, Hüyük & van der Schaar 2023 (Prompt-OIRL), section 3.3 (best of n prompts by Υ); the abstention is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenmdp import mdp, stats
from tokenmdp.prompting import estimate, intervals, leaks, stacked
from tokenmdp.prompting.log import Log
from tokenmdp.prompting.proxy import Proxy
from tokenmdp.prompting.stacked import Stacked
from tokenmdp.stats import Interval

WHOLE = 0.95  # the share of queries × prompts a log must have tried to be read off
TOLD = 0.5  # the share of moved queries on which both prompts must have been tried for a difference to tell
ROUNDS = 500  # of least squares, prompt effects and query effects in turn
Said = TypeVar("Said", int, str)
SETTING = "offline_inverse_rl"  # neither learning nor choosing may act: whoever calls the language model here raises


class Chooser:
    """Chooses prompts for queries.

    Args:
        make: makes the proxy Υ.
        abstain: fall back on the best constant prompt where the gain is not significant.
        folds: of the training questions, to measure the gain; a stack has its own.
        cost: [P] what a call with each prompt costs, in the log's order of prompts.
        price: reward units a unit of cost.

    Attributes:
        prompts, prompt_ids: the texts it chooses between, and their names; its numbers of prompts are places here.
        constant: the number of the best constant prompt.
        worth: [P] what each prompt is worth over all queries, less its cost.
        gain: what choosing gains over it on questions not seen, with its interval; None without `abstain`, or where the log
            cannot tell.
        abstains: whether it uses the constant.
    """

    def __init__(
        self,
        make: Callable[[], Proxy] = Stacked,
        abstain: bool = True,
        folds: int = 4,
        cost: Sequence[float] | NDArray[np.float64] | None = None,
        price: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.make, self.abstain, self.folds, self.cost, self.price, self.seed = make, abstain, folds, cost, price, seed

    def fit(self, log: Log) -> Chooser:
        """Learn Υ, the best constant prompt and the gain.

        Raises:
            ValueError: costs that are not one a prompt; or what splits and proxies raise.
        """
        self.prompts, self.prompt_ids = log.prompts, log.prompt_ids
        self.charge = self.price * np.asarray(self.cost if self.cost is not None else np.zeros(len(log.prompts)))
        if len(self.charge) != len(log.prompts):
            raise ValueError(f"{len(self.charge)} costs for {len(log.prompts)} prompts: one each")
        self.worth = worths(log) - self.charge
        self.constant = int(np.argmax(self.worth))
        with mdp.within(SETTING):
            self.proxy = self.make().fit(log)
            self.gain: Interval | None = self._gain(log) if self.abstain else None
        self.abstains = self.abstain and not (self.gain is not None and self.gain.low > 0)
        return self

    def _gain(self, log: Log) -> Interval | None:
        picks, constant = (np.zeros(len(log.queries), dtype=np.int64) for _ in range(2))
        value = np.full((len(log.queries), len(log.prompts)), np.nan)
        for held, said in self._unseen(log):
            value[held], picks[held] = said, best(said - self.charge)
            constant[held] = best_constant(log.of_queries(np.setdiff1d(log.tried(), held)), self.charge)
        return gained(log, picks, constant, value, leaks.groups(log.queries), self.charge, self.seed)

    def _unseen(self, log: Log) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Fold by fold the queries [q] and what a proxy that did not see them says [q, P]."""
        if isinstance(self.proxy, Stacked):  # it has said so already
            for number in range(self.proxy.folds):
                held = np.flatnonzero(self.proxy.fold == number)
                yield held, self.proxy.held[held]
        else:
            for part, value in stacked.out_of_fold(log, self.make, self.folds, self.seed):
                yield part.tried(), value[part.tried()]

    def value(self, queries: Sequence[str]) -> NDArray[np.float64]:
        """[Q, P] what Υ says, less what a prompt costs."""
        with mdp.within(SETTING):
            return self.proxy.predict(queries, self.prompts) - self.charge

    def choose(self, queries: Sequence[str]) -> NDArray[np.int64]:
        """[Q] the number of the prompt for each query."""
        if self.abstains:
            return np.full(len(queries), self.constant, dtype=np.int64)
        return best(self.value(queries))

    def several(self, queries: Sequence[str], calls: int) -> NDArray[np.int64]:
        """[Q, calls] the prompts to ask, best first, under a budget of calls a query: their answers then vote.

        Raises:
            ValueError: more calls than prompts, or none.
        """
        if not 1 <= calls <= len(self.prompts):
            raise ValueError(f"calls is {calls}; with {len(self.prompts)} prompts it is 1 to {len(self.prompts)}")
        if self.abstains:  # nothing is known of single queries: the prompts that are best on the whole
            return np.tile(np.argsort(-self.worth, kind="stable")[:calls], (len(queries), 1))
        return np.argsort(-self.value(queries), axis=1, kind="stable")[:, :calls]


def best(value: NDArray[np.float64]) -> NDArray[np.int64]:
    """[Q] the first of the largest of each row."""
    return np.asarray(np.argmax(np.where(np.isnan(value), -np.inf, value), axis=1), dtype=np.int64)


def best_constant(log: Log, charge: NDArray[np.float64] | None = None) -> int:
    """The prompt that is worth most in the log; the first of equals."""
    return int(np.argmax(worths(log) - (0.0 if charge is None else charge)))


def worths(log: Log) -> NDArray[np.float64]:
    """[P] what each prompt is worth over the log's queries, counted alike; −∞ for one that was never tried.

    Of a log that tried everything the mean reward. A log that tried some prompts on the easier queries must not credit
    them with that: with propensities trials are weighted by their inverse (SNIPS), without them
    r(q, a) = worth_a + ease_q is fitted by least squares, which compares prompts within queries as far as it can.
    """
    table = log.matrix()[log.tried()]
    known = ~np.isnan(table)
    out = np.full(table.shape[1], -np.inf)
    tried = known.any(0)
    if known.all():
        return np.asarray(table.mean(0))
    if log.propensity is not None:
        top, below = (
            np.bincount(log.prompt, x / log.propensity, table.shape[1]) for x in (log.reward, np.ones(len(log)))
        )
        out[tried] = top[tried] / below[tried]
        return out
    filled, count = np.where(known, table, 0.0), known.sum(0)
    ease = np.zeros(len(table))
    worth = np.zeros(table.shape[1])
    for _ in range(ROUNDS):
        before = worth
        worth = np.where(tried, (filled - known * ease[:, None]).sum(0) / np.maximum(count, 1), 0.0)
        ease = (filled - known * worth).sum(1) / known.sum(1)
        if np.abs(worth - before).max() < 1e-9:
            break
    out[tried] = worth[tried] + ease.mean()
    return out


def whole(log: Log) -> bool:
    """Whether (nearly) every prompt was tried on every query, so that choices can be read off the log."""
    return bool((~np.isnan(log.matrix()[log.tried()])).mean() >= WHOLE)


def gained(
    log: Log,
    picks: NDArray[np.int64],
    constant: NDArray[np.int64],
    value: NDArray[np.float64],
    group: NDArray[np.int64],
    charge: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> Interval | None:
    """What picks earn over the constant on the log's queries, less what the prompts cost, with its 95 % interval.

    Where (nearly) everything was tried it is the mean difference; else, by propensities, the doubly robust estimate; else
    the mean difference on the queries where both were tried. None if that leaves out most of those that move, or
    fewer questions than an interval can be trusted for; or if the log says too little of either policy, or its
    propensities are not its own (`estimate.Overlap`).

    Args:
        picks, constant: [Q] prompts.
        value: [Q, P] Υ that did not see the queries.
        group: [Q] which queries are one question.
        charge: [P] reward units that a prompt costs.
    """
    at, table = log.tried(), log.matrix()
    cost = np.zeros(table.shape[1]) if charge is None else charge
    if not whole(log) and log.propensity is not None:
        policies = [estimate.greedy(x, table.shape[1]) for x in (picks, constant)]
        lies = [estimate.overlap(estimate.weights(log, policy), group[log.query]) for policy in policies]
        if any(one.fault("it") for one in lies):
            return None
        found = estimate.difference(log, policies[0], policies[1], np.nan_to_num(value), group, seed)
        dearer = float((cost[picks] - cost[constant])[at].mean())
        return Interval(*(end - dearer for end in found))
    difference = (table[at, picks[at]] - cost[picks[at]]) - (table[at, constant[at]] - cost[constant[at]])
    known, moved = ~np.isnan(difference), picks[at] != constant[at]
    if (moved.any() and known[moved].mean() < TOLD) or len(np.unique(group[at][known])) < stats.FEW:
        return None
    most = 1.0 + float(np.ptp(cost))
    return intervals.grouped_mean(difference[known], group[at][known], seed=seed, least=-most, most=most)


def vote(answers: Sequence[Said | None]) -> Said | None:
    """The answer given most often (self-consistency), the earliest of equals; None where nobody answered.

    Source: Wang et al. 2023 (self-consistency), section 2.
    """
    given = [answer for answer in answers if answer is not None]
    return max(given, key=lambda answer: (given.count(answer), -given.index(answer))) if given else None
