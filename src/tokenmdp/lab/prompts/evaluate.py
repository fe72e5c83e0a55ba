"""How well Υ predicts a log's trials, and whether choosing prompts by it pays: every question held out once.

1. leaks       which queries repeat others; they stay on one side of every split
2. prediction  each proxy's accuracy, precision, AUC pooled and within prompts, calibration, beside how often two trials of
               one question and prompt agree (`retest`: a predictor can do better)
3. choice      reward of random, best constant (of the training part), each proxy's pick, the pick that abstains, and
               the oracle (in hindsight the best, so where answers vary by chance, part of it is luck), paired by query, with
               intervals that resample questions; where the log has responses, also what it earns to ask every prompt and
               keep the surest answer, or the one given most often; where it tried only part of the prompts, estimated off-policy, with
               what the log is worth for each policy (effective questions) and the mean weight, which should be 1
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenmdp.lab import report
from tokenmdp.prompting import choose, judged, leaks, sentences, shown, stacked
from tokenmdp.prompting import log as logs
from tokenmdp.prompting.features import Once
from tokenmdp.run import Run


@dataclass(frozen=True)
class Config:
    trials: str = "trials.jsonl"  # the log: query, prompt_id, reward and more; a file or a hub id
    prompts: str = ""  # a file of prompt_id and prompt, for logs that only name prompts
    model: str = ""  # whose trials to take, of a log of several models
    only: str = ""  # prompt ids with commas between; empty for all
    proxies: str = "constant,neighbours,logistic,boosted"  # what to compare, with commas between
    choice: str = "logistic+boosted"  # the proxy whose pick abstains; + stacks
    folds: int = 5  # of the questions; each is held out once
    inner: int = 4  # folds within, to weigh what is stacked and to measure the gain that abstaining goes by
    sentences: str = ""  # a sentence model for the queries: minilm, a folder or a hub id; empty for none
    components: int = 64  # singular vectors kept of the queries' words, and of their embeddings
    published: bool = False  # split as the log's own `split` column says, not by question
    allow_leak: bool = False  # go on although held-out queries repeat others

    def __post_init__(self) -> None:
        if self.choice == "constant":
            raise ValueError(
                "choice is 'constant', which chooses nothing: it is in every table anyway; name another proxy"
            )


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Read the log, judge the proxies and the choices, print the table."""
    log = logs.read(cfg.trials, cfg.prompts or None, cfg.model, cfg.only, answers=True)
    if warning := logs.cut_in_words(log):
        run.note(warning)
    found = evaluate(cfg, log, run)
    (run.folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = report.build(run.folder)
    for table in tables(found):
        Console(width=120).print(table)
    return {
        "report": str(page),
        "verdict": found["verdict"],
        "best_constant": found["best_constant"],
        "trials": found["facts"]["trials"],
        "queries": found["facts"]["queries"],
    }


def evaluate(cfg: Config, log: logs.Log, run: Run) -> dict[str, Any]:
    """The figures of a log."""
    learn = sentences.learn(cfg.sentences, cfg.components, run.folder / "embeddings")
    once = Once(learn, kept=cfg.folds * (cfg.inner + 1))
    makers = {name: stacked.named(name, once, cfg.inner, run.seed) for name in names_of(cfg)}
    repeated = 1 - len(np.unique(leaks.groups(log.queries))) / len(log.queries)
    run.note(
        f"{len(log)} trials of {len(log.prompts)} prompts on {len(log.queries)} queries; {repeated:.1%} repeat another's question"
    )
    if cfg.published:
        values, constant, held = published(cfg, log, makers)
    else:
        with run.progress(len(makers) * cfg.folds, "held out", "fits") as bar:
            values, constant = judged.held_out(log, makers, cfg.folds, run.seed, bar.advance)
        held = log
    picks = {name: choose.best(value) for name, value in values.items() if name != "constant"}
    picks["abstaining"] = judged.abstaining(held, values[cfg.choice], constant, cfg.inner, run.seed)
    earned = judged.choices(held, picks, constant, run.seed, values[cfg.choice])
    asked = judged.after_asking(held, constant, run.seed)
    for name, row in asked.items():
        if row["left_out"]:
            run.note(
                f"warning: {name} is judged on {row['queries']} queries; {row['left_out']} more are left out, for the log does not "
                "say of every prompt there what it goes by"
            )
    earned |= asked
    pick = picks.get(cfg.choice, constant)
    over_one = None
    if len(np.unique(constant)) > 1:
        one = np.full_like(constant, choose.best_constant(held))
        row = judged.choices(held, {cfg.choice: pick}, one, run.seed, values[cfg.choice])[cfg.choice]
        over_one = None if row.get("untold") else row["over_constant"]
    return {
        "kind": "prompts",
        "title": "Which prompt for which query",
        "log": cfg.trials,
        "choice": cfg.choice,
        "best_constant": named(log, constant),
        "over_one_constant": over_one,
        "by_prompt": shown.by_prompt(held, pick),
        "by_cluster": shown.by_cluster(held, pick, constant, values[cfg.choice], run.seed),
        "moved": shown.moved(held, pick, constant),
        "changed": shown.changed(held, pick, constant),
        "verdict": judged.in_words(earned, cfg.choice, "abstaining", over_one),
        "facts": {**log.facts, "trials": len(log), "queries": len(log.queries), "prompts": len(log.prompts)},
        "repeated_questions": repeated,
        "prediction": {name: judged.prediction(held, value) for name, value in values.items()},
        "choices": earned,
    }


def named(log: logs.Log, constant: np.ndarray[Any, Any]) -> str:
    """The best constant prompt by its id; where it differs between folds each with its share of the queries."""
    count = np.bincount(constant)
    order = [int(p) for p in np.argsort(-count, kind="stable") if count[p]]
    if len(order) == 1:
        return log.prompt_ids[order[0]]
    return ", ".join(f"{log.prompt_ids[p]} on {count[p] / len(constant):.0%}" for p in order)


def names_of(cfg: Config) -> list[str]:
    """The proxies to compare; the one whose pick abstains is among them."""
    return list(dict.fromkeys([name.strip() for name in cfg.proxies.split(",") if name.strip()] + [cfg.choice]))


def published(cfg: Config, log: logs.Log, makers: dict[str, Any]) -> tuple[dict[str, Any], Any, logs.Log]:
    """As the log's own column splits its trials, if no question is on both sides.

    Raises:
        Leak: some are, and `allow_leak` is not set.
        ValueError: the log names no train or no test.
    """
    learned, held = log.of_part("train"), log.of_part("test")
    leaks.check(log, learned.tried(), held.tried(), cfg.allow_leak)
    at = held.tried()
    values = {}
    for name, make in makers.items():
        values[name] = np.full((len(log.queries), len(log.prompts)), np.nan)
        values[name][at] = make().fit(learned).predict([log.queries[i] for i in at], log.prompts)
    return values, np.full(len(log.queries), choose.best_constant(learned)), held


def tables(found: dict[str, Any]) -> list[Table]:
    """The figures for a terminal."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    def span(x: dict[str, float]) -> str:
        return f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"

    first = Table(title=found["verdict"], title_justify="left")
    estimated = any("overlap" in row for row in found["choices"].values())
    for name in (
        "choice",
        "calls",
        "reward [95 %]",
        "over the best constant",
        "queries",
        *["worth, questions", "mean weight"] * estimated,
    ):
        first.add_column(name, justify="left" if name == "choice" else "right")
    for name, row in found["choices"].items():
        lies = row.get("overlap")
        diagnosed = [f"{lies['effective']:.0f}", f"{lies['mean']:.2f}"] if lies else []
        calls = "–" if name == "oracle" else str(row.get("calls", 1))
        figures = ["–", "–"] if row.get("untold") else [span(row["reward"]), span(row["over_constant"])]
        first.add_row(name, calls, *figures, str(row["queries"]), *diagnosed)
    second = Table(title="what Υ says of held-out trials", title_justify="left")
    kinds = ("accuracy", "precision", "auc", "auc_within_prompt", "squared_error", "ece", "retest")
    for name in ("proxy", *kinds):
        second.add_column(name.replace("_", " "), justify="left" if name == "proxy" else "right")
    for name, row in found["prediction"].items():
        second.add_row(name, *(number(row[kind]) for kind in kinds))
    return [first, second]
