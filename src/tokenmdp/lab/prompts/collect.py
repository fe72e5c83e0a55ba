"""Put queries and prompts to a model, grade the answers, and append every trial to a log that never pays twice.

The model is a local one, through our own rollout engine, or any endpoint that speaks OpenAI's chat protocol
(`--endpoint URL`, the key in OPENAI_API_KEY). Run the same command again and it goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting import collect, log
from tokenmdp.run import Run
from tokenmdp.tasks import files

SCRATCH = AGAIN = True  # what it leaves behind is the log itself, and there it goes on


@dataclass(frozen=True)
class Config:
    queries: str = "queries.jsonl"  # query (or question), answer and, if you like, query_id: a file or a hub id
    prompts: str = "prompts.jsonl"  # prompt_id, prompt
    trials: str = "trials.jsonl"  # the log: appended to, created where it is not there
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id; or what the endpoint calls it
    endpoint: str = ""  # base URL of an OpenAI-compatible endpoint; empty for a local model
    limit: int = 0  # queries used, the first ones; 0 for all
    repeats: int = 1  # trials of every query and prompt
    max_new_tokens: int = 128
    temperature: float = 0.7  # of sampling; at 0 repeats say nothing
    chat: bool = True  # put it to a local model as a user's message, if it has a chat template
    rows: int = 16  # trials a local model answers at a time
    concurrency: int = 4  # requests under way at an endpoint
    per_minute: int = 0  # most requests a minute; 0 for no limit
    timeout_seconds: float = 60.0  # of one request
    price_in: float = 0.0  # of a million tokens read
    price_out: float = 0.0  # of a million tokens written


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Collect; print what was made and what it cost."""
    queries = [{**row, "query": log.query_of(row, n)} for n, row in enumerate(files.stream(cfg.queries), 1)]
    queries, prompts = queries[: cfg.limit or None], files.rows(cfg.prompts)
    asked = collect.wanted(queries, prompts, cfg.repeats)
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature)
    trials = collect.Trials(Path(cfg.trials))
    if trials.dropped:
        run.note(
            f"the last line of {cfg.trials} was half written and goes ({trials.dropped} bytes): that trial is made again"
        )
    model = collect.model_of(
        cfg.model,
        cfg.endpoint,
        sampling,
        cfg.chat,
        run.seed,
        rows=cfg.rows,
        concurrency=cfg.concurrency,
        per_minute=cfg.per_minute,
        timeout_seconds=cfg.timeout_seconds,
    )
    with run.progress(len(asked), "collect", "trials") as bar:
        found = collect.collect(
            model, asked, trials, price_in=cfg.price_in, price_out=cfg.price_out, advance=bar.advance
        )
    said = ", ".join(f"{name} {value:,.6g}" for name, value in found.items() if name != "fault")
    run.note(
        said + (f"; the last failure: {found['fault']}; run this again to make what failed" if found["failed"] else "")
    )
    if found["cut"]:
        run.note(
            f"{found['cut']} of {found['made']} answers were cut at max_new_tokens={cfg.max_new_tokens} and are graded by what they had "
            "said: a prompt that makes answers short looks good; give a larger one"
        )
    if len(asked) < len(queries) * len(prompts) * cfg.repeats:
        run.note(
            f"{len(queries) - len(asked) // (len(prompts) * cfg.repeats)} queries are there twice and were asked once"
        )
    return found
