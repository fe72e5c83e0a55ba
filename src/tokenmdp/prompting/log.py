"""The log of prompt trials: which prompt was tried on which query, and what came of it.

One trial a row, in the columns

    query_id, query, prompt_id, prompt, response, reward [, propensity, model, cost, repeat, ended, confidence, split, ...]

as JSONL, CSV or Parquet; or a query a row with `correct: {prompt_id: reward}`, as outcomes are published. Queries and
prompts are kept once each, trials as arrays of numbers, so that a million of them fit in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmdp.prompting import champ
from tokenmdp.rewards import numerals
from tokenmdp.tasks import files

LONGEST = 1 << 20  # characters of a query or prompt
COLUMNS = ("query", "prompt", "reward", "repeat", "part", "propensity", "cost", "ended", "confidence", "answer")
UNKNOWN, NOTHING = -1, -2  # in place of a number that a response gave: the log holds no response, or it gave none
MANY_CUT = 0.1  # share of a prompt's answers from which a reader is warned
_NEEDED = ("query", "prompt_id", "reward")


@dataclass(frozen=True)
class Log:
    """N trials of P prompts on Q queries.

    Attributes:
        queries, query_ids: texts and names of the Q queries.
        prompts, prompt_ids: texts and names of the P prompts.
        query, prompt: [N] which query and which prompt a trial was.
        reward: [N] what came of it, in [0, 1].
        repeat: [N] 0 for the first trial of its query and prompt, 1 for the second, ...
        propensity: [N] with what probability the logging policy chose that prompt for that query, where it is known.
        cost: [N] what the trial cost, in the log's own unit, where it is known.
        ended: [N] 1 where the answer ended by itself, 0 where it was cut, NaN where the log does not say.
        confidence: [N] the mean log-probability of the answer's tokens, nats; NaN where the log does not say.
        answer: [N] which number the response gave: trials with equal ones said the same; UNKNOWN or NOTHING else. None
            where they were not asked for, or the log keeps no responses.
        part: [N] which of `parts` a trial is in by the log's own account.
        parts: the names of these, such as train and test; `""` where the log says nothing.
        facts: what was noticed while reading.
    """

    queries: tuple[str, ...]
    query_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    query: NDArray[np.int64]
    prompt: NDArray[np.int64]
    reward: NDArray[np.float64]
    repeat: NDArray[np.int64]
    propensity: NDArray[np.float64] | None = None
    cost: NDArray[np.float64] | None = None
    ended: NDArray[np.float64] | None = None
    confidence: NDArray[np.float64] | None = None
    answer: NDArray[np.int64] | None = None
    part: NDArray[np.int64] | None = None
    parts: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reward)

    def select(self, trials: NDArray[Any]) -> Log:
        """The given trials (a mask or indices); queries and prompts keep their numbers."""
        known = {name: column for name in COLUMNS if (column := getattr(self, name)) is not None}
        return replace(self, **{name: column[trials] for name, column in known.items()})

    def of_part(self, name: str) -> Log:
        """The trials that the log itself puts into a part.

        Raises:
            ValueError: there is no such part.
        """
        if self.part is None or name not in self.parts:
            raise ValueError(
                f"the log's `split` has no {name!r}: it has {', '.join(map(repr, self.parts)) or 'nothing'}"
            )
        return self.select(self.part == self.parts.index(name))

    def of_queries(self, queries: Iterable[int]) -> Log:
        """The trials of some queries."""
        return self.select(np.isin(self.query, list(queries)))

    def of_prompts(self, prompts: Iterable[int]) -> Log:
        """The trials of some prompts."""
        return self.select(np.isin(self.prompt, list(prompts)))

    def only(self, names: str) -> Log:
        """The trials of the prompts named, ids with commas between.

        Raises:
            ValueError: there is no such prompt.
        """
        asked = [name.strip() for name in names.split(",") if name.strip()]
        unknown = [name for name in asked if name not in self.prompt_ids]
        if unknown:
            raise ValueError(f"the log has no prompt {unknown[0]!r}; it has {', '.join(self.prompt_ids)}")
        return self.of_prompts([self.prompt_ids.index(name) for name in asked]).compact()

    def mean_cost(self) -> NDArray[np.float64] | None:
        """[P] what a trial of each prompt cost on average; None where the log does not say."""
        if self.cost is None:
            return None
        count = np.bincount(self.prompt, minlength=len(self.prompts))
        return np.asarray(np.bincount(self.prompt, self.cost, len(self.prompts)) / np.maximum(count, 1))

    def cut(self) -> dict[str, float]:
        """What share of a prompt's answers was cut before it ended, of the prompts of which the log says it of any."""
        if self.ended is None:
            return {}
        told = ~np.isnan(self.ended)
        return {
            self.prompt_ids[p]: float(1 - self.ended[told & (self.prompt == p)].mean())
            for p in np.unique(self.prompt[told])
        }

    def compact(self) -> Log:
        """Without the queries and prompts that have no trial, and the rest numbered anew."""
        queries, query = np.unique(self.query, return_inverse=True)
        prompts, prompt = np.unique(self.prompt, return_inverse=True)
        return replace(
            self,
            queries=tuple(self.queries[i] for i in queries),
            query_ids=tuple(self.query_ids[i] for i in queries),
            prompts=tuple(self.prompts[i] for i in prompts),
            prompt_ids=tuple(self.prompt_ids[i] for i in prompts),
            query=query.astype(np.int64),
            prompt=prompt.astype(np.int64),
        )

    def matrix(self) -> NDArray[np.float64]:
        """[Q, P] the mean reward over repeats; NaN where a prompt was not tried on a query."""
        shape = (len(self.queries), len(self.prompts))
        total, count = np.zeros(shape), np.zeros(shape)
        np.add.at(total, (self.query, self.prompt), self.reward)
        np.add.at(count, (self.query, self.prompt), 1.0)
        return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)

    def tried(self) -> NDArray[np.int64]:
        """The numbers of the queries that have a trial, in order."""
        return np.unique(self.query)


def read(
    source: str | Path, prompts: str | Path | None = None, model: str = "", only: str = "", answers: bool = False
) -> Log:
    """Read a log, a row at a time.

    Args:
        source: a JSONL, JSON, CSV or Parquet file, gzipped or not, CHAMP's `v0.json`, or a hub id.
        prompts: a file with prompt_id and prompt, for logs that name prompts without their texts.
        model: whose trials to take, of a log of several models.
        only: ids of the prompts whose trials to take, with commas between; empty for all.
        answers: read the numbers that responses give, too, for those who vote: it takes longer than all the rest.

    Raises:
        ValueError: what `Builder.add` and `Builder.build` raise, with the row's number; no trial of that model; no such
            prompt.
    """
    texts: dict[str, str] = {}
    if prompts is not None:
        for row in files.stream(prompts):
            if "prompt_id" not in row or "prompt" not in row:
                raise ValueError(f"{prompts}: a row has {', '.join(row)}; it needs prompt_id and prompt")
            name = str(row["prompt_id"])
            if texts.setdefault(name, str(row["prompt"])) != str(row["prompt"]):
                raise ValueError(f"{prompts}: the prompt_id {name!r} stands for two texts")
    path = Path(source).expanduser()
    builder = Builder(texts, model, answers)
    for number, row in enumerate(champ.rows(path) if champ.recognised(path) else files.stream(source), 1):
        if ".csv" in path.suffixes:  # an empty cell says nothing, not that the response was empty
            row = {name: value for name, value in row.items() if value != ""}
        builder.add(row, f"{source}, row {number}")
    log = builder.build(str(source))
    return log.only(only) if only else log


def query_of(row: Mapping[str, Any], number: int) -> str:
    """The query of a row, which data sets call query, question or prompt.

    Raises:
        ValueError: none of them is a text.
    """
    for name in ("query", "question", "prompt"):
        if isinstance(row.get(name), str) and row[name].strip():
            return _text(row[name], name, f"row {number}")
    raise ValueError(f"row {number} has {', '.join(row)}; it needs a query (or question, or prompt) that is a text")


class Builder:
    """Takes rows one by one and keeps numbers.

    Args:
        texts: of prompts that rows only name.
        model: whose trials to take; "" where they are all of one.
        read_answers: read the numbers that responses give.
    """

    def __init__(self, texts: Mapping[str, str] | None = None, model: str = "", read_answers: bool = False) -> None:
        self.texts, self.model, self.read_answers = dict(texts or {}), model, read_answers
        self.models: dict[str, int] = {}
        self.queries: dict[str, int] = {}
        self.query_texts: list[str] = []
        self.parts: dict[str, int] = {}
        self.answers: dict[str, int] = {}  # the numbers that responses gave, as they came
        self.prompts: dict[str, int] = {}
        self.prompt_texts: list[str] = []
        self.seen: dict[tuple[int, int], int] = {}  # trials of a query and a prompt so far
        self.named: set[tuple[int, int, int]] = set()  # those whose repeat the log numbers itself
        self.columns: dict[str, list[float]] = {c: [] for c in COLUMNS}

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Take a row: one trial, or with `correct` one trial for every prompt in it.

        Raises:
            ValueError: a column is missing, a text is too long or of another kind, one id stands for two texts, a
                reward or propensity is outside its range, or a trial is there twice.
        """
        name = str(row.get("model") or "")
        self.models[name] = self.models.get(name, 0) + 1
        if self.model and name != self.model:
            return
        if len(self.models) > 1 and not self.model:
            known = " and ".join(repr(one) for one in self.models)
            raise ValueError(
                f"{where}: the log holds trials of several models, {known}: what suits one need not suit another; name one with --model"
            )
        if isinstance(row.get("correct"), Mapping):
            for prompt_id, reward in row["correct"].items():
                if reward is not None:  # a table that is the same for all rows says so of what was not tried
                    self._trial({**row, "prompt_id": prompt_id, "reward": reward}, where)
        else:
            self._trial(row, where)

    def _trial(self, row: Mapping[str, Any], where: str) -> None:
        missing = [column for column in _NEEDED if row.get(column) is None]
        if missing:
            raise ValueError(
                f"{where} has no {' and no '.join(missing)}; its columns are {', '.join(map(str, row))}: a trial needs "
                "query, prompt_id and reward (or correct, a table of rewards by prompt_id)"
            )
        text = _text(row["query"], "query", where)
        query = self._query(id_of(row, text), text, where)
        part = self.parts.setdefault(str(row.get("split") or ""), len(self.parts))
        prompt = self._prompt(str(row["prompt_id"]), row.get("prompt"), where)
        reward = _number(row["reward"], "reward", where)
        if not 0 <= reward <= 1:
            raise ValueError(f"{where}: reward is {reward}; it must be in [0, 1]: scale it")
        self._repeat(row, query, prompt, where)
        self.columns["part"].append(part)
        self.columns["query"].append(query)
        self.columns["prompt"].append(prompt)
        self.columns["reward"].append(reward)
        for name in ("propensity", "cost"):
            value = row.get(name)
            self.columns[name].append(math.nan if value in (None, "") else _number(value, name, where))
        self.columns["ended"].append(_yes(row.get("ended"), "ended", where))
        sure = row.get("confidence")
        self.columns["confidence"].append(math.nan if sure in (None, "") else _number(sure, "confidence", where))
        response = row.get("response") if self.read_answers else None
        said = numerals.answer(response) if isinstance(response, str) else None
        number = self.answers.setdefault(str(said), len(self.answers)) if said is not None else None
        unsaid = NOTHING if isinstance(response, str) else UNKNOWN
        self.columns["answer"].append(unsaid if number is None else number)
        propensity = self.columns["propensity"][-1]
        if not (math.isnan(propensity) or 0 < propensity <= 1):
            raise ValueError(f"{where}: propensity is {propensity}; it must be in (0, 1]: what was tried had a chance")

    def _query(self, name: str, text: str, where: str) -> int:
        if name not in self.queries:
            self.queries[name] = len(self.queries)
            self.query_texts.append(text)
        number = self.queries[name]
        if self.query_texts[number] != text:
            raise ValueError(
                f"{where}: the query_id {name!r} stands for two texts: {self.query_texts[number]!r:.60} and {text!r:.60}"
            )
        return number

    def _prompt(self, name: str, given: Any, where: str) -> int:
        if given is None and self.texts and name not in self.texts:
            raise ValueError(f"{where}: the file of prompts has no {name!r}; it has {', '.join(self.texts)}")
        text = self.texts.get(name, name) if given is None else _text(given, "prompt", where)
        if name not in self.prompts:
            if text in self.prompt_texts:
                twin = list(self.prompts)[self.prompt_texts.index(text)]
                raise ValueError(
                    f"{where}: the prompts {twin!r} and {name!r} are the same text: give them one prompt_id"
                )
            self.prompts[name] = len(self.prompts)
            self.prompt_texts.append(text)
        number = self.prompts[name]
        if given is not None and self.prompt_texts[number] != text:
            raise ValueError(
                f"{where}: the prompt_id {name!r} stands for two texts: {self.prompt_texts[number]!r:.60} and {text!r:.60}"
            )
        return number

    def _repeat(self, row: Mapping[str, Any], query: int, prompt: int, where: str) -> None:
        count = self.seen.get((query, prompt), 0)
        self.seen[query, prompt] = count + 1
        if row.get("repeat") in (None, ""):
            self.columns["repeat"].append(count)
            return
        repeat = int(_number(row["repeat"], "repeat", where))
        if (query, prompt, repeat) in self.named:
            raise ValueError(
                f"{where}: repeat {repeat} of the prompt {row['prompt_id']!r} on the query {self.query_texts[query]!r:.60} is there "
                "twice: drop one, or number them"
            )
        self.named.add((query, prompt, repeat))
        self.columns["repeat"].append(repeat)

    def build(self, source: str = "the log") -> Log:
        """The log.

        Raises:
            ValueError: there is no trial, there is one prompt only, or all rewards are equal: nothing to choose or learn.
        """
        reward = np.asarray(self.columns["reward"])
        known = ", ".join(f"{name or 'unnamed'} ({count})" for name, count in self.models.items())
        if not len(reward):
            raise ValueError(f"{source} has no trials" + (f" of {self.model!r}: it has {known}" if self.model else ""))
        if len(self.prompts) < 2:
            raise ValueError(
                f"{source} tries one prompt only, {next(iter(self.prompts))!r}: there is nothing to choose between"
            )
        if reward.min() == reward.max():
            raise ValueError(f"{source}: all {len(reward)} rewards are {reward[0]:g}: there is nothing to learn from")
        optional = {name: np.asarray(self.columns[name]) for name in ("propensity", "cost")}
        for name, values in optional.items():
            some = np.isnan(values)
            if some.any() and not some.all():
                raise ValueError(
                    f"{source}: {int(some.sum())} of {len(some)} trials have no {name}: give it for all or for none"
                )
        repeat = np.asarray(self.columns["repeat"], dtype=np.int64)
        ended, confidence = (np.asarray(self.columns[name]) for name in ("ended", "confidence"))
        answer = np.asarray(self.columns["answer"], dtype=np.int64)
        facts = {
            "trials": len(reward),
            "queries": len(self.queries),
            "prompts": len(self.prompts),
            "repeated": len(reward) - len(set(zip(self.columns["query"], self.columns["prompt"], strict=True))),
            "untried": len(self.queries) * len(self.prompts) - len(self.seen),
        }
        return Log(
            queries=tuple(self.query_texts),
            query_ids=tuple(self.queries),
            prompts=tuple(self.prompt_texts),
            prompt_ids=tuple(self.prompts),
            query=np.asarray(self.columns["query"], dtype=np.int64),
            prompt=np.asarray(self.columns["prompt"], dtype=np.int64),
            reward=reward,
            repeat=repeat,
            **{name: None if np.isnan(values).all() else values for name, values in optional.items()},
            ended=None if np.isnan(ended).all() else ended,
            confidence=None if np.isnan(confidence).all() else confidence,
            answer=answer if self.answers else None,
            part=np.asarray(self.columns["part"], dtype=np.int64),
            parts=tuple(self.parts),
            facts=facts,
        )


def name_of(text: str) -> str:
    """A short name for a text: the first twelve hex digits of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def id_of(row: Mapping[str, Any], text: str) -> str:
    """The query_id of a row, where it has one (0 is one); else a name made of its query."""
    given = row.get("query_id")
    return name_of(text) if given is None or given == "" else str(given)


def cut_in_words(log: Log) -> str:
    """A warning where a tenth of a prompt's answers, or more, were cut; empty where not."""
    most = {name: share for name, share in log.cut().items() if share >= MANY_CUT}
    if not most:
        return ""
    said = ", ".join(f"{name} {share:.0%}" for name, share in sorted(most.items(), key=lambda item: -item[1]))
    return (
        f"answers were cut before they ended: {said}. A cut answer is graded by what it had said, so such a prompt is judged "
        "by the length of its answers, too: collect again with more new tokens"
    )


def retest(log: Log) -> float | None:
    """How often two trials of one query and one prompt agree.

        mean over pairs (i, j) of repeats of  r_i r_j + (1 − r_i)(1 − r_j)

    A predictor can do better. Where a trial goes well with probability p, two agree with a = p² + (1 − p)², and whoever
    says the likelier of the two is right with max(p, 1 − p) = (1 + √(2a − 1)) / 2. So for rewards of 0 and 1 the accuracy
    of any prediction is at most (1 + √(2a − 1)) / 2, a ≥ 1/2 the mean over what was tried (Jensen's inequality).

    Returns:
        None where nothing was tried twice.
    """
    shape = (len(log.queries), len(log.prompts))
    count, total, squares = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    at = (log.query, log.prompt)
    for sums, values in ((count, np.ones(len(log))), (total, log.reward), (squares, log.reward**2)):
        np.add.at(sums, at, values)
    pairs = count * (count - 1)
    if not pairs.any():
        return None
    both_right = total**2 - squares  # Σ_{i ≠ j} r_i r_j
    both_wrong = pairs - 2 * (count - 1) * total + both_right
    return float((both_right + both_wrong).sum() / pairs.sum())


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column} is {value!r:.60}; it must be a text that is not empty")
    if len(value) > LONGEST:
        raise ValueError(f"{where}: {column} has {len(value)} characters, more than {LONGEST}: cut it or drop the row")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(
            f"{where}: {column} holds half of a surrogate pair, which no file can be written with: mend it"
        )
    return value


def _number(value: Any, column: str, where: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {column} is {value!r:.60}; it must be a number") from None
    if not math.isfinite(found):
        raise ValueError(f"{where}: {column} is {found}; it must be finite")
    return found


def _yes(value: Any, column: str, where: str) -> float:
    """1 for yes, 0 for no, NaN where nothing is said; files without types write the words."""
    if value in (None, ""):
        return math.nan
    found = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}.get(str(value).strip().lower().removesuffix(".0"))
    if found is None:
        raise ValueError(f"{where}: {column} is {value!r:.60}; it must be true or false")
    return found


def write(log: Log, path: Path, responses: Sequence[str] | None = None) -> None:
    """Write a log as JSONL, one trial a row; `responses` are the texts that go with the trials, where they are kept."""
    import json

    with open(path, "w", encoding="utf-8") as file:
        for i in range(len(log)):
            q, p = int(log.query[i]), int(log.prompt[i])
            row: dict[str, Any] = {
                "query_id": log.query_ids[q],
                "query": log.queries[q],
                "prompt_id": log.prompt_ids[p],
            }
            row |= {"prompt": log.prompts[p], "reward": float(log.reward[i]), "repeat": int(log.repeat[i])}
            if responses is not None:
                row["response"] = responses[i]
            for name, values in (("propensity", log.propensity), ("cost", log.cost)):
                if values is not None:
                    row[name] = float(values[i])
            if log.confidence is not None and not math.isnan(log.confidence[i]):
                row["confidence"] = float(log.confidence[i])
            if log.ended is not None and not math.isnan(log.ended[i]):
                row["ended"] = bool(log.ended[i])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
