"""Which prompt to use for a query, chosen by Υ without one call to a language model.

    a(q)   = argmax_a Υ(q, a) − price · cost(a)
    gain   = E_q [ r(q, a(q)) − r(q, a*) ],    a* the best constant prompt of the training log

A chooser that is no better than a*, as far as the training log can tell, uses a*: it abstains where the 95 % interval of
the gain, measured on questions its proxy had not seen, includes 0.

Source: Sun, Hüyük & van der Schaar 2023 (Prompt-OIRL), section 3.3 (best of n prompts by Υ); the abstention is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tokenmdp import mdp
from tokenmdp.prompting import intervals, leaks, stacked
from tokenmdp.prompting.log import Log
from tokenmdp.prompting.proxy import Proxy
from tokenmdp.prompting.stacked import Stacked
from tokenmdp.stats import Interval

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
        prompts: the texts it chooses between.
        constant: the number of the best constant prompt.
        gain: what choosing gains over it on questions not seen, with its interval; None without `abstain`.
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
        self.prompts = log.prompts
        self.charge = self.price * np.asarray(self.cost if self.cost is not None else np.zeros(len(log.prompts)))
        if len(self.charge) != len(log.prompts):
            raise ValueError(f"{len(self.charge)} costs for {len(log.prompts)} prompts: one each")
        self.constant = best_constant(log, self.charge)
        with mdp.within(SETTING):
            self.proxy = self.make().fit(log)
            self.gain: Interval | None = self._gain(log) if self.abstain else None
        self.abstains = self.gain is not None and not self.gain.low > 0
        return self

    def _gain(self, log: Log) -> Interval:
        table = log.matrix()
        gained, group = [], []
        names = leaks.groups(log.queries)
        for held, value in self._unseen(log):
            rest = log.of_queries(np.setdiff1d(log.tried(), held))
            chosen, constant = best(value - self.charge), best_constant(rest, self.charge)
            difference = table[held, chosen] - self.charge[chosen] - table[held, constant] + self.charge[constant]
            known = ~np.isnan(difference)  # of a log that did not try everything, the queries that tell
            gained.append(difference[known])
            group.append(names[held][known])
        return intervals.grouped_mean(np.concatenate(gained), np.concatenate(group), seed=self.seed)

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
        return np.argsort(-self.value(queries), axis=1, kind="stable")[:, :calls]


def best(value: NDArray[np.float64]) -> NDArray[np.int64]:
    """[Q] the first of the largest of each row."""
    return np.asarray(np.argmax(np.where(np.isnan(value), -np.inf, value), axis=1), dtype=np.int64)


def best_constant(log: Log, charge: NDArray[np.float64] | None = None) -> int:
    """The prompt with the highest mean reward in the log, queries counted alike; the first of equals."""
    table = log.matrix()
    tried = ~np.isnan(table).all(0)
    means = np.full(table.shape[1], -np.inf)
    means[tried] = np.nanmean(table[:, tried], axis=0)
    return int(np.argmax(means if charge is None else means - charge))


def vote(answers: Sequence[str | None]) -> str | None:
    """The answer given most often (self-consistency), the earliest of equals; None where nobody answered.

    Source: Wang et al. 2023 (self-consistency), section 2.
    """
    given = [answer for answer in answers if answer is not None]
    return max(given, key=lambda answer: (given.count(answer), -given.index(answer))) if given else None
