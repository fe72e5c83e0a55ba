"""Trials made: queries × prompts × repeats put to a model, graded, and written down one by one.

A trial costs money or minutes, so none is ever made twice: each is appended to the file and flushed to disk when it is there,
and what the file holds already is not asked again, whatever ended the last attempt. A half-written last line is dropped.
"""

from __future__ import annotations

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
from tokenmdp.prompting.log import name_of
from tokenmdp.rewards import numerals
from tokenmdp.rewards.verifier import after_thinking

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
    """

    asked: Asked
    text: str | None
    tokens_in: int = 0
    tokens_out: int = 0
    fault: str = ""
    confidence: float | None = None


class Model(Protocol):
    """Whatever answers: the answers come in any order."""

    name: str

    def answer(self, asked: Sequence[Asked]) -> Iterator[Answered]: ...


class Local:
    """A policy, through our own rollout engine.

    Args:
        chat: put the text to it as a user's message, through its chat template.
        rows: trials answered at a time.
        seed: of the sampling; the answers to `rows` trials asked together depend on it and on which these are.
    """

    def __init__(self, policy: Policy, sampling: Sampling, chat: bool = True, rows: int = 16, seed: int = 0) -> None:
        self.policy, self.sampling, self.chat, self.rows, self.seed = policy, sampling, chat, rows, seed
        self.name = policy.name

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
                yield Answered(a, b.texts[i], len(p.ids), int(b.action[i].sum()), confidence=float(sure[i]))


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
            text = reply.choices[0].message.content if getattr(reply, "choices", None) else None
        except self.faults as fault:
            return Answered(asked, None, fault=f"{type(fault).__name__}: {fault}"[:300])
        if not isinstance(text, str):
            return Answered(asked, None, fault="the endpoint's reply holds no text")
        used = reply.usage
        return Answered(asked, text, used.prompt_tokens if used else 0, used.completion_tokens if used else 0)


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
    """A file of trials that only grows.

    Attributes:
        done: (query_id, prompt_id, model, repeat) of what it holds.
        dropped: bytes of a half-written last line that were taken away.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.done, self.dropped = path, set[tuple[str, str, str, int]](), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            self.dropped = len(data) - whole
            for number, line in enumerate(data[:whole].splitlines(), 1):
                self._know(line, number)
            if self.dropped:
                os.truncate(path, whole)

    def _know(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            self.done.add((str(row["query_id"]), str(row["prompt_id"]), str(row["model"]), int(row["repeat"])))
        except (ValueError, KeyError, TypeError) as fault:
            raise ValueError(
                f"{self.path}, line {number}: not a trial ({fault!r}); nothing was changed: mend the line, or collect into another file"
            ) from fault

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a trial and see it onto the disk."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.done.add((str(row["query_id"]), str(row["prompt_id"]), str(row["model"]), int(row["repeat"])))


class TooManyFaults(RuntimeError):
    """The model fails too often to go on paying for it."""


def wanted(queries: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]], repeats: int) -> list[Asked]:
    """Every trial: repeats outermost, so that what is there after an interruption is a smaller whole log.

    Raises:
        ValueError: a row without its columns, two queries or prompts of one id, or none.
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
    ids = [str(q.get("query_id") or name_of(str(q["query"]))) for q in queries]
    for kind, names in (("query_id", ids), ("prompt_id", [str(p["prompt_id"]) for p in prompts])):
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise ValueError(f"the {kind} {twice!r} is there twice: each query and each prompt once")
    for repeat in range(repeats):
        for query_id, q in zip(ids, queries, strict=True):
            for p in prompts:
                asked.append(
                    Asked(query_id, str(q["query"]), q["answer"], str(p["prompt_id"]), str(p["prompt"]), repeat)
                )
    return asked


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
        Trials made now, found there, and failed; tokens and cost of those made now.

    Raises:
        TooManyFaults: with the last reason; the same call goes on from here.
    """
    todo = [a for a in asked if (a.query_id, a.prompt_id, model.name, a.repeat) not in trials.done]
    for one in todo:
        judge("", one.answer)  # an answer that cannot be graded is found before anything is paid
    out = {"made": 0, "found": len(asked) - len(todo), "failed": 0, "tokens_in": 0, "tokens_out": 0, "cost": 0.0}
    row_of_faults = 0
    for answered in model.answer(todo):
        a = answered.asked
        if answered.text is None:
            out["failed"] += 1
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
                "response": answered.text,
                "reward": judge(answered.text, a.answer),
                "cost": cost,
                **({} if answered.confidence is None else {"confidence": answered.confidence}),
            }
        )
        out["made"] += 1
        out["tokens_in"] += answered.tokens_in
        out["tokens_out"] += answered.tokens_out
        out["cost"] += cost
        if advance is not None:
            advance(1)
    return out
