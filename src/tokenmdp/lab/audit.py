"""Does T(s, a) = concat(s, a) survive the way through text? What a model's own responses become, by kind of query.

The dynamics hold by construction for tokens that are carried as tokens. They break where text is passed on and read again: an
endpoint that returns strings, a second turn that renders the chat anew, a stop string. For each kind of query a few responses
are sampled and each is asked:

    reread     is it other tokens when its text is read again?            decode, then encode
    joined     are prompt and response others when their text is read as one?      a merge across the border counts here
    next turn  does the chat, rendered with the reply and one more message, not begin with the tokens that were sampled?
    character  does it end in half a character, or hold what is none?
    stop       does a stop string in it begin or end inside a token?      cut there, the response is no prefix of itself
    paths      by how many nats a token do the cached and the full forward pass differ?

and of the model itself: which of its special tokens can a user's text spell? Nothing is trained. A figure above 0 is no fault of
the model; it says what must not be done with it, and how often it would matter. What carries tokens is not touched by any of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmdp import stats, tasks
from tokenmdp.lab.checks import logp_of
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import files, formats
from tokenmdp.types import Batch, Prompt

SCRATCH = True  # a tool: it leaves no run folder behind unless one is asked for

KINDS: Mapping[str, tuple[str, ...]] = {
    "prose": (
        "Describe a harbour at dawn in three sentences.",
        "Why do people keep diaries?",
        "Tell me about your favourite season.",
        "Write the first lines of a detective story.",
    ),
    "sums": (
        "What is 48 + 77?",
        "A shop sells 12 pens at $1.25 each. What do they cost?",
        "Convert 3.75 hours to minutes.",
        "Which is larger, 0.9 or 0.11?",
    ),
    "code": (
        "Write a Python function that reverses a list.",
        "Show an SQL query that counts rows by country.",
        "Write a C loop that prints 1 to 10.",
        "Give a JSON object that describes a book.",
    ),
    "layout": (
        "Make a table with two columns: month, days.",
        "List five fruits, one a line, with a blank line between them.",
        "Indent a nested list three levels deep.",
        "Write a haiku and sign it on its own line.",
    ),
    "addresses": (
        "Give an example of a URL with a query string.",
        "What does the path /usr/local/bin usually hold?",
        "Write an e-mail address for John O'Neil at example.com.",
        "Show an ISO 8601 date and time with a time zone.",
    ),
    "other scripts": (
        "Translate 'good morning' into Japanese, Russian and Arabic.",
        "Schreibe einen Satz über Übermut und Größe.",
        "请用中文介绍一下北京。",
        "Напиши короткое предложение о погоде.",
    ),
    "symbols": (
        "Use five emoji to describe a birthday party 🎉.",
        "Write the quadratic formula with √ and ±.",
        "What does the symbol ☯ mean?",
        "Repeat after me: naïve café, 25 °C, “quoted” — done…",
    ),
}
MOST = 32  # prompts of a named task
AFTER = "Go on."  # the user's next message
RATES = ("reread", "joined", "next turn", "character", "stop")


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    task: str = ""  # a task's name, or a file or hub id of prompts of yours, with a column `kind` if you like; empty for kinds of ours
    stops: tuple[str, ...] = (
        r"\n\n",
        "###",
        "User:",
    )  # strings at which others would cut a response; \n is a line break, \t a tab
    samples: int = 4  # responses to each prompt
    max_new_tokens: int = 48  # the horizon H, in tokens
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1 or not all(self.stops):
            raise ValueError(f"samples={self.samples}, stops={self.stops}: at least 1, and no empty string")


@dataclass(frozen=True)
class Query:
    """A prompt with its kind, and its messages where it is a chat."""

    kind: str
    prompt: Prompt
    messages: tuple[Mapping[str, str], ...] = ()


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Sample, read again, print what changed."""
    policy = catalog.load(cfg.model).freeze()
    queries = asked(cfg, policy)
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature)
    with run.progress(len(queries) * cfg.samples, "responses", "responses") as bar:
        b = policy.sample([q.prompt for q in queries], cfg.samples, sampling, run.rng, bar.advance)
    rows = looked_at(policy, [q for q in queries for _ in range(cfg.samples)], b, cfg.stops, cfg.temperature)
    for i, row in enumerate(rows):
        run.sample(b, i, row["kind"], **{name: row[name] for name in RATES})
    found = measured(rows)
    for kind, row in found.items():
        run.append("audit.jsonl", {"kind": kind, **row})
    spelled = special_tokens(policy)
    verdict = in_words(found["all"], spelled)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table(found, policy.name))
    console.print(verdict, highlight=False, markup=False)
    shares = {name: found["all"][name]["mean"] for name in RATES if name in found["all"]}
    return {
        "verdict": verdict,
        **shares,
        "spelled": spelled,
        "responses": len(b),
        **policy.paths,
    }


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `rates` says of each kind of query, and of all."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {**{kind: rates([row for row in rows if row["kind"] == kind]) for kind in kinds}, "all": rates(rows)}


def asked(cfg: Config, policy: Policy) -> list[Query]:
    """The queries: ours as chats where the model has a template, the user's as they are."""
    chat = bool(policy.tokenizer.chat_template)
    queries: list[Query] = []
    messages: tuple[Mapping[str, str], ...]
    if cfg.task in tasks.names():
        prompts = tasks.load(cfg.task, policy).first(MOST, lambda text: None)
        return [Query(cfg.task, prompt) for prompt in prompts]
    if not cfg.task:
        for kind, texts in KINDS.items():
            for text in texts:
                messages = ({"role": "user", "content": text},) if chat else ()
                queries.append(Query(kind, policy.prompt(messages or text, len(queries)), messages))
        return queries
    for i, line in enumerate(files.rows(cfg.task)):
        content, columns = formats.prompt(line, i)
        messages = () if isinstance(content, str) else tuple(content)
        kind = str(columns.get("kind") or "yours")
        queries.append(Query("all, yours" if kind == "all" else kind, policy.prompt(content, i, columns), messages))
    return queries


def looked_at(
    policy: Policy, queries: Sequence[Query], b: Batch, stops: Sequence[str], temperature: float
) -> list[dict[str, Any]]:
    """For each response what becomes of it; None where a question does not arise."""
    assert b.logp_mu is not None, "sampled here"
    apart = ((logp_of(policy, b, temperature or 1.0) - b.logp_mu).abs() * b.action).sum(-1) / b.action.sum(-1)
    cuts = [stop.replace(r"\n", "\n").replace(r"\t", "\t") for stop in stops]
    rows = []
    for i, query in enumerate(queries):
        ids = b.tokens[i][b.action[i]].tolist()
        own = ids[:-1] if bool(b.ended[i]) else ids
        text, prompt = b.texts[i], query.prompt
        state, joined = [*prompt.ids, *own], policy.encode(prompt.text + text)
        rows.append(
            {
                "kind": query.kind,
                "prompt": prompt.row,
                "reread": policy.encode(policy.decode(own)) != own,
                "joined": state not in (joined, [*policy.opening, *joined]),
                "next turn": next_turn(policy, query, text, state),
                "character": "\ufffd" in text,
                "stop": stopped(policy, own, cuts),
                "paths": float(apart[i])
                if temperature > 0
                else None,  # a greedy token has no other log-probability than 0
            }
        )
    return rows


def next_turn(policy: Policy, query: Query, reply: str, sampled: list[int]) -> bool | None:
    """Whether the chat rendered with the reply in it is another state than the one that was sampled; None of no chat, or
    where the template refuses it.
    """
    if not query.messages:
        return None
    chat = [*query.messages, {"role": "assistant", "content": reply}, {"role": "user", "content": AFTER}]
    try:
        rendered = policy.encode(policy.chat(chat, begin_reply=True))
    except ValueError:
        return None
    return rendered[: len(sampled)] != sampled


def stopped(policy: Policy, own: Sequence[int], stops: Sequence[str]) -> bool | None:
    """Whether the first stop string of a response begins or ends inside a token; None where it has none."""
    text = policy.decode(own)
    at = [(text.find(stop), stop) for stop in stops if stop in text]
    if not at:
        return None
    begin, stop = min(at)
    borders = {len(policy.decode(own[:k])) for k in range(len(own) + 1)}
    return not {begin, begin + len(stop)} <= borders


def special_tokens(policy: Policy) -> list[str]:
    """The special tokens that a text can spell: a user who writes one ends a turn, or begins one in another's name."""
    tokenizer = policy.tokenizer
    known: dict[str, Any] = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known |= {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}

    def count(text: str, number: int) -> int:
        return policy.encode(f"say {text} twice").count(number)

    # Taken apart it is no longer spelled; what is unknown either way, as an unknown token's own letters may be, is not told.
    return sorted(
        token for token, number in known.items() if count(token, number) > count(f"{token[:1]} {token[1:]}", number)
    )


def rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of some responses the share to which each thing happened, with an interval over prompts, and the paths' distance."""
    out: dict[str, Any] = {"responses": len(rows)}
    for name in RATES:
        known = [row for row in rows if row[name] is not None]
        if known:
            share = stats.clustered_wilson(
                np.array([float(row[name]) for row in known]), [row["prompt"] for row in known]
            )
            out[name] = {**share._asdict(), "of": len(known)}
    apart = [row["paths"] for row in rows if row["paths"] is not None]
    out["paths"] = float(np.mean(apart)) if apart else None
    return out


def in_words(found: Mapping[str, Any], spelled: Sequence[str]) -> str:
    """What must not be done with this model's responses, as sentences."""
    happens = {name: found[name] for name in RATES if name in found and found[name]["mean"] > 0}
    what = {
        "reread": "of responses are other tokens when their text is read again: pass tokens on, not text",
        "joined": "differ when prompt and response are read as one text",
        "next turn": "of chats, rendered anew with the reply, do not begin with what was sampled: build later turns from tokens",
        "character": "hold half a character",
        "stop": "of the stop strings begin or end inside a token: cut at tokens, or let the end-of-text token end responses",
    }
    said = [f"{x['mean']:.0%} [{x['low']:.0%}, {x['high']:.0%}] {what[name]}." for name, x in happens.items()]
    if not said:
        most = max((found[name]["high"] for name in RATES if name in found), default=1.0)
        said = [
            f"Nothing changed on the way through text in {found['responses']} responses to these queries (95 %: up to {most:.0%} may)."
        ]
    if "next turn" not in found:
        said.append("Later turns were not looked at: these are no chats, or the template refuses a second turn.")
    if spelled:
        said.append(f"A user's text can spell {', '.join(spelled)}: take such strings out of what users write.")
    return " ".join(said)


def table(found: Mapping[str, Mapping[str, Any]], name: str) -> Table:
    """A line a kind of query."""
    shown = Table(
        title=Text(f"{name}: what changes on the way through text, share of responses [95 %]"), title_justify="left"
    )
    for head in ("kind", "responses", *RATES, "paths, nats"):
        shown.add_column(head, justify="left" if head == "kind" else "right")
    for kind, row in found.items():
        cells = [
            f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" if (x := row.get(rate)) else "–" for rate in RATES
        ]
        shown.add_row(Text(kind), str(row["responses"]), *cells, "–" if row["paths"] is None else f"{row['paths']:.2g}")
    return shown
