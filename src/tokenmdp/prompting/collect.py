"""Trials made: queries × prompts × repeats put to a model, graded, and written down one by one.

A trial costs money or minutes, so none is ever made twice: each is appended to the file and flushed to disk when it is there,
and what the file holds already is not asked again, whatever ended the last attempt. A half-written last line is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting.log import id_of, name_of
from tokenmdp.rewards import numerals
from tokenmdp.rewards.verifier import after_thinking

Key = tuple[str, str, str, int]
Question = tuple[str, str]
QUERY = "{query}"  # where a prompt that has it takes the query


@dataclass(frozen=True)
class Asked:
    """One trial to make.

    Attributes:
        text: what the model reads: the prompt with the query where it says {query}, else the query and the prompt after it.
        repeat: 0 for the first trial of this query and prompt.
    """

    query_id: str
    query: str
    answer: Any
    prompt_id: str
    prompt: str
    repeat: int

    @property
    def text(self) -> str:
        query = self.query.strip()
        return self.prompt.replace(QUERY, query) if QUERY in self.prompt else f"{query} {self.prompt.strip()}"


@dataclass(frozen=True)
class Answered:
    """What came back: a text and its cost in tokens, or why there is none.

    Attributes:
        confidence: mean log-probability of the text's tokens as they were sampled, nats; None where nobody says.
        ended: whether it ended by itself; False if it was cut at the most tokens it may have, None where nobody says.
    """

    asked: Asked
    text: str | None
    tokens_in: int = 0
    tokens_out: int = 0
    fault: str = ""
    confidence: float | None = None
    ended: bool | None = None


class Model(Protocol):
    """Whatever answers: the answers come in any order.

    Attributes:
        settings: what its answers depend on besides the text.
    """

    name: str
    settings: dict[str, Any]

    def answer(self, asked: Sequence[Asked]) -> Iterator[Answered]: ...


def settings_of(sampling: Sampling) -> dict[str, Any]:
    """What is told apart in a log."""
    return {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}


class Local:
    """A policy, through our own rollout engine.

    Args:
        chat: put the text to it as a user's message, through its chat template, if it has one.
        rows: trials answered at a time.
        seed: of the sampling; the answers to `rows` trials asked together depend on it and on which these are.
    """

    def __init__(self, policy: Policy, sampling: Sampling, chat: bool = True, rows: int = 16, seed: int = 0) -> None:
        self.policy, self.sampling, self.rows, self.seed = policy, sampling, rows, seed
        self.chat = chat and bool(policy.tokenizer.chat_template)
        self.name = policy.name
        # The weights themselves: a name is a folder's own, and runs/a/model and runs/b/model are both "model".
        self.settings = {**settings_of(sampling), "chat": self.chat, "fingerprint": policy.fingerprint()}

    def answer(self, asked: Sequence[Asked]) -> Iterator[Answered]:
        """In order."""
        for start in range(0, len(asked), self.rows):
            part = asked[start : start + self.rows]
            texts = [[{"role": "user", "content": a.text}] if self.chat else a.text for a in part]
            prompts = [self.policy.prompt(text, row) for row, text in enumerate(texts)]
            key = name_of(f"{self.seed} {part[0].query_id} {part[0].prompt_id} {part[0].repeat}")
            rng = torch.Generator().manual_seed(int(key, 16))
            b = self.policy.sample(prompts, 1, self.sampling, rng)
            assert b.logp_mu is not None, "sampled here"
            sure = (b.logp_mu * b.action).sum(1) / b.action.sum(1)
            for i, (a, p) in enumerate(zip(part, prompts, strict=True)):
                out = int(b.action[i].sum())
                yield Answered(a, b.texts[i], len(p.ids), out, confidence=float(sure[i]), ended=bool(b.ended[i]))


class Endpoint:
    """Any endpoint that speaks OpenAI's chat protocol, through the `openai` client.

    Args:
        model: the name it goes by there.
        base_url: where it is; None for the client's own default. The key is read from OPENAI_API_KEY.
        concurrency: requests under way at a time.
        per_minute: the most requests begun in a minute; 0 for no limit.
        retries: of a request that fails for a reason that may pass (no connection, a time-out, 408, 409, 429, 5xx).
        timeout_seconds: of one request.

    Raises:
        ImportError: the `openai` package is not installed.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        base_url: str | None = None,
        concurrency: int = 4,
        per_minute: int = 0,
        retries: int = 4,
        timeout_seconds: float = 60.0,
    ) -> None:
        try:
            import openai
        except ImportError as fault:
            raise ImportError("an endpoint needs the openai package: pip install 'tokenmdp[endpoint]'") from fault
        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers ask for none, and the client for some
        self.client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=retries, timeout=timeout_seconds)
        self.faults: tuple[type[Exception], ...] = (openai.OpenAIError, ValueError)
        self.name, self.sampling, self.concurrency = model, sampling, concurrency
        self.settings = settings_of(sampling)
        self.pace = Pace(per_minute)

    def answer(self, asked: Sequence[Asked]) -> Iterator[Answered]:
        """As they come; no more are under way than `concurrency`, so that whoever stops listening has paid for few."""
        todo = iter(asked)
        with ThreadPoolExecutor(self.concurrency) as pool:
            going: set[Future[Answered]] = set()
            try:
                while True:
                    for one in todo:
                        going.add(pool.submit(self._ask, one))
                        if len(going) >= self.concurrency:
                            break
                    if not going:
                        return
                    done, going = wait(going, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                for future in going:
                    future.cancel()

    def _ask(self, asked: Asked) -> Answered:
        self.pace.wait()
        try:
            reply = self.client.chat.completions.create(
                model=self.name,
                messages=[{"role": "user", "content": asked.text}],
                max_tokens=self.sampling.max_new_tokens,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
            )
        except self.faults as fault:
            return Answered(asked, None, fault=f"{type(fault).__name__}: {fault}"[:300])
        try:  # what an endpoint sends is believed in no part of it
            text, why = reply.choices[0].message.content, getattr(reply.choices[0], "finish_reason", None)
        except (AttributeError, TypeError, IndexError, KeyError):
            text, why = None, None
        if not isinstance(text, str):
            return Answered(asked, None, fault="the endpoint's reply holds no text")
        used = [getattr(getattr(reply, "usage", None), name, 0) for name in ("prompt_tokens", "completion_tokens")]
        read, written = (n if isinstance(n, int) and n > 0 else 0 for n in used)
        return Answered(asked, text, read, written, ended={"stop": True, "length": False}.get(str(why)))


class Pace:
    """Lets no more than so many through in a minute, evenly."""

    def __init__(self, per_minute: int) -> None:
        self.gap = 60.0 / per_minute if per_minute else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Until it is one's turn."""
        with self.lock:
            now = time.monotonic()
            at = max(now, self.next)
            self.next = at + self.gap
        time.sleep(at - now)


def model_of(
    name: str, endpoint: str, sampling: Sampling, chat: bool, seed: int, rows: int = 16, **requests: Any
) -> Model:
    """Who answers: what the endpoint calls by that name or, without an endpoint, a local model.

    Args:
        endpoint: base URL; "" for a local model, a name, a folder or a hub id.
        chat, rows, seed: of `Local`.
        requests: of `Endpoint`.
    """
    if endpoint:
        return Endpoint(name, sampling, endpoint, **requests)
    return Local(catalog.load(name).freeze(), sampling, chat, rows, seed)


class Trials:
    """A file of trials that only grows, and that one process writes at a time.

    Attributes:
        done: of what it holds, (query_id, prompt_id, model, repeat), and what was asked there.
        dropped: bytes of a half-written last line; they go when the next trial comes.

    Raises:
        ValueError: the file holds something else than trials, or a kind of file that cannot grow line by line; nothing
            is changed.
        OSError: another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".jsonl":
            raise ValueError(f"{path}: trials are appended line by line, to a file called *.jsonl")
        self.path, self.done, self.dropped = path, dict[Key, Question](), 0
        self.settings: dict[str, Any] = {}  # of each model, where the file says
        path.parent.mkdir(parents=True, exist_ok=True)
        self.guard = path.with_suffix(".lock").open("w")
        try:
            fcntl.lockf(self.guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as fault:
            self.guard.close()
            raise OSError(f"another process is adding to {path}: wait for it, or collect into another file") from fault
        data = path.read_bytes() if path.exists() else b""
        self.end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self.end].splitlines(), 1):
            self._know(line, number)
        if self.end < len(data):
            try:  # a whole trial that somebody's editor has left without an end
                self._know(data[self.end :], data.count(b"\n") + 1)
                self.end = len(data)
            except ValueError:
                if not self.end:
                    raise
                self.dropped = len(data) - self.end
        self.endless = data[: self.end][-1:] not in (b"", b"\n")

    def _know(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            self._take(row)
        except (ValueError, KeyError, TypeError) as fault:
            raise ValueError(
                f"{self.path}, line {number}: not a trial ({fault!r}); nothing was changed: mend the line, or collect into another file"
            ) from fault

    def _take(self, row: Mapping[str, Any]) -> None:
        key = (str(row["query_id"]), str(row["prompt_id"]), str(row["model"]), int(row["repeat"]))
        self.done[key] = (str(row["query"]), str(row["prompt"]))
        if "settings" in row:
            self.settings[key[2]] = row["settings"]

    def holds(self, asked: Asked, model: str) -> bool:
        """Whether a trial is there.

        Raises:
            ValueError: there is one of another text under these names: it would pass for the answer to this one.
        """
        found = self.done.get((asked.query_id, asked.prompt_id, model, asked.repeat))
        for column, was, now in zip(("query", "prompt"), found or (), (asked.query, asked.prompt), strict=False):
            if was != now:
                name = asked.query_id if column == "query" else asked.prompt_id
                raise ValueError(
                    f"{self.path} holds trials of another text as {column}_id {name!r}: {was!r:.60}, and now {now!r:.60}. Give the "
                    "new text a new name, or collect into another file"
                )
        return found is not None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a trial and see it onto the disk."""
        line = b"\n" * self.endless + json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        if self.dropped:
            os.truncate(self.path, self.end)
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.dropped, self.endless = 0, False
        self._take(row)

    def close(self) -> None:
        """Let others write."""
        self.guard.close()


class TooManyFaults(OSError):
    """The model fails too often to go on paying for it."""


def wanted(queries: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]], repeats: int) -> list[Asked]:
    """Every trial: repeats outermost, so that what is there after an interruption is a smaller whole log.

    Raises:
        ValueError: a row without its columns, two texts or answers of one id, or none.
    """
    if not queries or not prompts or repeats < 1:
        raise ValueError(
            f"{len(queries)} queries, {len(prompts)} prompts, {repeats} repeats: there must be some of each"
        )
    asked = []
    for kind, rows, needed in (("query", queries, ("query", "answer")), ("prompt", prompts, ("prompt_id", "prompt"))):
        for number, row in enumerate(rows, 1):
            missing = [name for name in needed if row.get(name) in (None, "")]
            if missing:
                raise ValueError(f"{kind} {number} has no {' and no '.join(missing)}; its columns are {', '.join(row)}")
    named = _named(queries)
    seen = set[str]()
    for p in prompts:
        if str(p["prompt_id"]) in seen:
            raise ValueError(f"the prompt_id {str(p['prompt_id'])!r} is there twice: each prompt once")
        seen.add(str(p["prompt_id"]))
    for repeat in range(repeats):
        for query_id, q in named.items():
            for p in prompts:
                asked.append(
                    Asked(query_id, str(q["query"]), q["answer"], str(p["prompt_id"]), str(p["prompt"]), repeat)
                )
    return asked


def _named(queries: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Queries by their ids; one that is there twice, with the same answer, once.

    Raises:
        ValueError: an id stands for two texts or two answers.
    """
    named: dict[str, Mapping[str, Any]] = {}
    for number, q in enumerate(queries, 1):
        query_id = id_of(q, str(q["query"]))
        first = named.setdefault(query_id, q)
        for column in ("query", "answer"):
            if first[column] != q[column]:
                raise ValueError(
                    f"query {number} has the {column} {q[column]!r:.60}, and an earlier one of the same name {query_id!r} has "
                    f"{first[column]!r:.60}: each query once"
                )
    return named


def grade(text: str, answer: Any) -> float:
    """1 where the number said after any thinking is the answer, else 0.

    Raises:
        ValueError: the answer holds no number.
    """
    right = numerals.known(answer)
    if right is None:
        raise ValueError(f"the answer {answer!r:.60} holds no number: grade by a function of your own")
    said = numerals.answer(after_thinking(text) or "")
    return float(said is not None and numerals.same(said, right, 1e-6))


def collect(
    model: Model,
    asked: Sequence[Asked],
    trials: Trials,
    judge: Callable[[str, Any], float] = grade,
    price_in: float = 0.0,
    price_out: float = 0.0,
    advance: Callable[[int], None] | None = None,
    most_faults: int = 20,
) -> dict[str, Any]:
    """Make the trials that the file does not hold yet.

    Args:
        price_in, price_out: what a million tokens read and written cost; the log's `cost` is in their unit.
        advance: called with a number of trials made, for a progress bar.
        most_faults: failures in a row after which it stops; what was made by then is kept.

    Returns:
        Trials made now, found there, and failed; of those made now how many were cut at the most tokens they may have, their
        tokens and cost; the last `fault`, if any failed.

    Raises:
        ValueError: the file holds trials of a model of this name with other settings or other weights.
        TooManyFaults: with the last reason; the same call goes on from here.
    """
    there = trials.settings.get(model.name, model.settings)
    unknown = {k: v for k, v in model.settings.items() if k == "fingerprint"}  # of trials written before it was kept
    if unknown | there != model.settings:
        raise ValueError(
            f"{trials.path} holds trials of {model.name} with {there}, and now it is asked with {model.settings}: "
            "answers of the two must not be mixed; collect into another file"
        )
    todo = [a for a in asked if not trials.holds(a, model.name)]
    for one in todo:
        judge("", one.answer)  # an answer that cannot be graded is found before anything is paid
    out: dict[str, Any] = {"made": 0, "found": len(asked) - len(todo), "failed": 0, "cut": 0}
    out |= {"tokens_in": 0, "tokens_out": 0, "cost": 0.0}
    row_of_faults = 0
    for answered in model.answer(todo):
        a = answered.asked
        if answered.text is None:
            out |= {"failed": out["failed"] + 1, "fault": answered.fault}
            row_of_faults += 1
            if row_of_faults >= most_faults:
                raise TooManyFaults(
                    f"{model.name} failed {row_of_faults} times in a row, last: {answered.fault}. {out['made']} trials were made "
                    f"and are in {trials.path}; the same command goes on from there"
                )
            continue
        row_of_faults = 0
        cost = (price_in * answered.tokens_in + price_out * answered.tokens_out) / 1e6
        trials.add(
            {
                "query_id": a.query_id,
                "query": a.query,
                "prompt_id": a.prompt_id,
                "prompt": a.prompt,
                "repeat": a.repeat,
                "model": model.name,
                "settings": model.settings,
                "response": answered.text,
                "reward": judge(answered.text, a.answer),
                "cost": cost,
                **({} if answered.confidence is None else {"confidence": answered.confidence}),
                **({} if answered.ended is None else {"ended": answered.ended}),
            }
        )
        out["made"] += 1
        out["cut"] += answered.ended is False
        out["tokens_in"] += answered.tokens_in
        out["tokens_out"] += answered.tokens_out
        out["cost"] += cost
        if advance is not None:
            advance(1)
    if out["failed"] and not out["made"]:
        raise TooManyFaults(f"{model.name} answered none of {out['failed']} questions, last: {out['fault']}")
    return out
