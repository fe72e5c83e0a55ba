"""Write new prompts: propose, rank by the fitted Υ, pay for a small check, keep what the check confirms.

The only trials paid for are those of the check: `check` queries × (`finalists` new prompts and the best constant one).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenmdp import stats
from tokenmdp.models import catalog
from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting import collect, leaks, log, stored, write
from tokenmdp.prompting.log import name_of
from tokenmdp.run import Run
from tokenmdp.tasks import files


@dataclass(frozen=True)
class Config:
    chooser: str = "runs/prompts-fit"  # the run folder of `prompts fit`
    queries: str = "queries.jsonl"  # query (or question) and answer: what new prompts are ranked and checked on
    proposals: str = "recombine"  # recombine | the name, folder or hub id of a model that proposes
    count: int = 24  # prompts proposed
    finalists: int = 2  # of them that are paid for
    check: int = 40  # queries of the check, at least 8 different questions
    model: str = "smollm2-135m-instruct"  # who answers in the check: a model; or what the endpoint calls it
    endpoint: str = ""  # base URL of an OpenAI-compatible endpoint; empty for a local model
    max_new_tokens: int = 128
    temperature: float = 0.7
    chat: bool = True  # put it to a local model as a user's message, if it has a chat template


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Propose, rank, check; kept prompts go to prompts.jsonl.

    Raises:
        ValueError: nothing new was proposed, or the check has too few questions to confirm anything.
    """
    chooser, _ = stored.load(Path(cfg.chooser))
    rows = [{**row, "query": log.query_of(row, n)} for n, row in enumerate(files.rows(cfg.queries), 1)]
    ranked = write.ranked(chooser, [str(r["query"]) for r in rows], candidates(cfg, chooser.prompts, run))
    for p in ranked:
        run.append(
            "proposals.jsonl", {"prompt_id": p.prompt_id, "prompt": p.prompt, "added": p.added, "expected": p.expected}
        )
    finalists = ranked[: cfg.finalists]
    if not finalists:
        raise ValueError("nothing new was proposed: raise `count`, or let a model propose")
    constant = chooser.prompts[chooser.constant]
    old = {"prompt_id": name_of(constant), "prompt": constant}
    texts = [old, *({"prompt_id": p.prompt_id, "prompt": p.prompt} for p in finalists)]
    order = np.random.default_rng(run.seed).permutation(len(rows))[: cfg.check]
    questions = len(np.unique(leaks.groups([str(rows[i]["query"]) for i in order])))
    if questions < stats.FEW:
        raise ValueError(
            f"the check has {questions} different questions ({len(order)} of {len(rows)} queries), and fewer than {stats.FEW} "
            "confirm nothing: raise `check`, or give more queries"
        )
    path = run.folder / "check.jsonl"
    asked = collect.wanted([rows[i] for i in order], texts, 1)
    paid = pay(cfg, asked, path, run)
    # What earlier checks in this folder paid for counts where it is the same question to the same model, and only there.
    names = {a.query_id for a in asked}
    trials = [t for t in files.rows(path) if t["query_id"] in names and t["model"] == paid["model"]]
    kept = []
    for p in finalists:
        gain = write.checked(trials, p.prompt_id, old["prompt_id"], run.seed)
        if gain is None:
            run.note(f"dropped: {p.prompt!r}, too few questions were answered under it and the best constant prompt")
            continue
        said = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] over the best constant prompt"
        run.note(f"{'kept' if gain.low > 0 else 'dropped'}: {p.prompt!r}, {said}; Υ expected {p.expected:.3f}")
        if gain.low > 0:
            kept.append(p)
            run.append("prompts.jsonl", {"prompt_id": p.prompt_id, "prompt": p.prompt, "gain": gain._asdict()})
    return {
        "proposed": len(ranked),
        "checked": len(finalists),
        "kept": len(kept),
        "trials_paid": paid["made"],
        "cost": paid["cost"],
    }


def candidates(cfg: Config, prompts: tuple[str, ...], run: Run) -> list[str]:
    """What is proposed."""
    if cfg.proposals == "recombine":
        return write.recombined(prompts, cfg.count, np.random.default_rng(run.seed))
    return write.proposed(catalog.load(cfg.proposals).freeze(), prompts, cfg.count, run.rng)


def pay(cfg: Config, asked: list[collect.Asked], path: Path, run: Run) -> dict[str, Any]:
    """The trials of the check, those not there yet."""
    model = collect.model_of(cfg.model, cfg.endpoint, Sampling(cfg.max_new_tokens, cfg.temperature), cfg.chat, run.seed)
    with run.progress(len(asked), "check", "trials") as bar:
        return {**collect.collect(model, asked, collect.Trials(path), advance=bar.advance), "model": model.name}
