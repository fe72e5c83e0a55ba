"""What a report shows of a choice: by prompt, by kind of query, and where it changed the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmdp import stats
from tokenmdp.prompting import choose, leaks
from tokenmdp.prompting.features import Features
from tokenmdp.prompting.log import Log

KINDS, FEWEST, WORDS = 6, 20, 3  # clusters at most, queries to one on average, words of its name
EXAMPLES, LONGEST = 16, 240  # rows, and characters of a text


def by_prompt(log: Log, pick: NDArray[np.int64]) -> list[dict[str, Any]]:
    """A row a prompt: how its trials went, how many were cut, for what share of queries it was chosen, what it costs.

    Trials of one question, repeats too, are one cluster.
    """
    chosen = np.bincount(pick[log.tried()], minlength=len(log.prompts)) / len(log.tried())
    cost, cut, group = log.mean_cost(), log.cut(), leaks.groups(log.queries)[log.query]
    out = []
    for at in np.unique(log.prompt):
        here = log.prompt == at
        out.append(
            {
                "id": log.prompt_ids[at],
                "text": log.prompts[at][:LONGEST],
                "rate": stats.clustered_wilson(log.reward[here], group[here])._asdict(),
                "chosen": float(chosen[at]),
                "cost": None if cost is None else float(cost[at]),
                "cut": cut.get(log.prompt_ids[at]),
            }
        )
    return out


def by_cluster(
    log: Log, pick: NDArray[np.int64], constant: NDArray[np.int64], value: NDArray[np.float64], seed: int = 0
) -> list[dict[str, Any]]:
    """A row a kind of query: words that set it apart, and what the pick gains over the constant there.

    Args:
        value: [Q, P] Υ that did not see these trials, for estimates of what the log did not try.

    Returns:
        Nothing for logs of fewer than 40 queries; kinds of which the log says too little have no interval (`choose.gained`).
    """
    tried = log.tried()
    texts = [log.queries[i] for i in tried]
    count = min(KINDS, len(tried) // FEWEST)
    if count < 2:
        return []
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    kind = KMeans(count, n_init=4, random_state=seed).fit_predict(Features(components=16).fit(texts).transform(texts))
    counts = TfidfVectorizer(stop_words="english", min_df=2, token_pattern=r"[A-Za-z]{3,}")
    try:
        seen = counts.fit_transform(texts).toarray()
        names = counts.get_feature_names_out()
    except ValueError:  # no word is there twice
        seen, names = np.zeros((len(texts), 1)), np.asarray(["query"])
    group = leaks.groups(log.queries)
    out = []
    for number in range(count):
        here = np.flatnonzero(kind == number)
        apart = seen[here].mean(0) - seen.mean(0)
        middle = here[len(here) // 2]
        row: dict[str, Any] = {
            "id": ", ".join(names[np.argsort(-apart)[:WORDS]]),
            "queries": len(here),
            "text": texts[middle][:LONGEST],
        }
        gain = choose.gained(log.of_queries(tried[here]), pick, constant, value, group, seed=seed)
        if gain is not None:
            row["over_constant"] = gain._asdict()
        out.append(row)
    return out


def moved(log: Log, pick: NDArray[np.int64], constant: NDArray[np.int64]) -> dict[str, int]:
    """On how many queries the pick is another prompt than the constant, and on how many of these the log tried both."""
    tried, table = log.tried(), log.matrix()
    at = tried[pick[tried] != constant[tried]]
    both = ~np.isnan(table[at, pick[at]]) & ~np.isnan(table[at, constant[at]])
    return {"queries": len(at), "both_tried": int(both.sum())}


def changed(log: Log, pick: NDArray[np.int64], constant: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Queries on which the pick came out otherwise than the constant: half of the rows gained, half lost."""
    tried, table = log.tried(), log.matrix()
    before, after = table[tried, constant[tried]], table[tried, pick[tried]]
    rows = []
    for sign in (1, -1):
        for i in np.flatnonzero(sign * (after - before) > 0)[: EXAMPLES // 2]:
            at = tried[i]
            rows.append(
                {
                    "query": log.queries[at][:LONGEST],
                    "constant": log.prompt_ids[constant[at]],
                    "pick": log.prompt_ids[pick[at]],
                    "before": round(float(before[i]), 2),
                    "after": round(float(after[i]), 2),
                }
            )
    return rows
