"""Choose a prompt for each query by a fitted chooser, several under a budget of calls; no language model is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmdp.prompting import log, stored
from tokenmdp.run import Run
from tokenmdp.tasks import files


@dataclass(frozen=True)
class Config:
    model: str = "runs/prompts-fit"  # the run folder of `prompts fit`
    queries: str = "queries.jsonl"  # a file or a hub id with a column query (or question, or prompt)
    calls: int = 1  # prompts chosen for each query, best first: their answers then vote
    limit: int = 0  # queries, the first ones; 0 for all


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Write choices.jsonl: query, the prompts, and what Υ expects of each, less what it costs."""
    chooser, about = stored.load(Path(cfg.model))
    rows = files.rows(cfg.queries)[: cfg.limit or None]
    texts = [log.query_of(row, number) for number, row in enumerate(rows, 1)]
    value = chooser.value(texts)
    picks = chooser.several(texts, cfg.calls) if cfg.calls > 1 else chooser.choose(texts)[:, None]
    for given, text, row, expected in zip(rows, texts, picks.tolist(), value.tolist(), strict=True):
        names, chosen = ([of[i] for i in row] for of in (chooser.prompt_ids, chooser.prompts))
        said = {"query_id": log.id_of(given, text), "query": text, "prompt_ids": names, "prompts": chosen}
        run.append("choices.jsonl", said | {"expected": [expected[i] for i in row]})
    same = float((picks[:, 0] == chooser.constant).mean())
    return {
        "queries": len(texts),
        "share_best_constant": same,
        "abstains": chooser.abstains,
        "fitted_on": about["log"],
        "choices": str(run.folder / "choices.jsonl"),
    }
