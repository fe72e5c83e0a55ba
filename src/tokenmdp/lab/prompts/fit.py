"""Learn from a log of trials which prompt suits which query; keep the chooser. No call to a language model is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmdp.prompting import log as logs
from tokenmdp.prompting import sentences, stacked, stored
from tokenmdp.prompting.choose import Chooser
from tokenmdp.run import Run


@dataclass(frozen=True)
class Config:
    trials: str = "trials.jsonl"  # the log: query, prompt_id, reward and more; a file or a hub id
    prompts: str = ""  # a file of prompt_id and prompt, for logs that only name prompts
    model: str = ""  # whose trials to take, of a log of several models
    only: str = ""  # prompt ids with commas between; empty for all
    proxy: str = "logistic+boosted"  # constant | logistic | boosted, or several with + between: stacked
    sentences: str = ""  # a sentence model for the queries: minilm, a folder or a hub id; empty for none
    components: int = 64  # singular vectors kept of the queries' words, and of their embeddings
    abstain: bool = True  # fall back on the best constant prompt where the gain is not significant
    folds: int = 4  # of the questions, to weigh what is stacked and to measure the gain
    price: float = 0.0  # reward units a unit of the log's cost


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Fit, say what choosing gains over the best constant prompt on questions not seen, and save to `model/`."""
    kept = [name for name in stored.KINDS if name != "stacked"]
    if not set(cfg.proxy.split("+")) <= set(kept):
        raise ValueError(f"proxy is {cfg.proxy!r}; what can be kept is {', '.join(kept)}, or several with + between")
    log = logs.read(cfg.trials, cfg.prompts or None, cfg.model, cfg.only)
    if warning := logs.cut_in_words(log):
        run.note(warning)
    if cfg.price and log.cost is None:
        raise ValueError(f"price is {cfg.price}, but {cfg.trials} has no column cost: leave --price out")
    learn = sentences.learn(cfg.sentences, cfg.components, run.folder / "embeddings")
    count = cfg.proxy.count("+") + 1
    with run.progress(count * (cfg.folds + 1) if count > 1 else 0, "fit", "proxies") as bar:
        make = stacked.named(cfg.proxy, learn, cfg.folds, run.seed, bar.advance)
        chooser = Chooser(make, cfg.abstain, cfg.folds, log.mean_cost(), cfg.price, run.seed).fit(log)
    path = Path(cfg.trials).expanduser()
    known = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    about = {
        "log": cfg.trials,
        "sha256": known,
        "trials": len(log),
        "queries": len(log.queries),
        "sentences": cfg.sentences,
    }
    stored.save(chooser, run.folder / "model", about)
    gain = chooser.gain
    if cfg.abstain and gain is None:
        run.note(
            "the log does not tell what choosing gains: it tried too few prompts on the same queries, and its propensities are "
            "missing, are not those it was made by, or leave too few questions (`prompts evaluate` says which); it will use the "
            "best constant prompt (--no-abstain chooses all the same)"
        )
    if log.prompts == log.prompt_ids:
        run.note(
            "the log names its prompts without their texts, so what is chosen are names: --prompts FILE gives the texts"
        )
    if gain is not None and gain.low == gain.high == 0:
        run.note("Υ would give every query the best constant prompt: there is no gain to measure")
    elif gain is not None:
        does = "it will use the best constant prompt" if chooser.abstains else "it will choose per query"
        run.note(f"gain over the best constant prompt {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]: {does}")
    return {
        "trials": len(log),
        "queries": len(log.queries),
        "best_constant": log.prompt_ids[chooser.constant],
        "gain": None if gain is None else gain._asdict(),
        "abstains": chooser.abstains,
        "model": str(run.folder / "model"),
    }
