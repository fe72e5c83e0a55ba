"""A log of prompts collected here, from two local models, and what choosing among the prompts earns on it.

    python bench/prompts_collected.py --data DIR --first FIRST --second SECOND --json docs/results/prompts_collected.json

DIR holds word problems in {train,valid,test}.jsonl (MAWPS). `--first` is a model cloned on the train problems in the form
"Question: ... Answer:", such as the one `bench/rlvr.py` leaves in runs/rlvr-sft/sft/model, and is asked in that form; `--second`
is any instruct model and is asked through its chat template. Each answers 300 problems of valid and test that train does not
hold, under six prompts, once, and the first hundred of them (of the second model, which takes long, forty) again; answers
are graded as numbers. The share of answers that were cut is in the file: a first try with 80 tokens for both cut most of the
second model's, so that a prompt was worth what it saved in words.

Choosing before asking, which costs one call a problem: a random prompt, the best constant one, each proxy's pick, the pick that
abstains, and the oracle. Choosing after asking all six, which costs six or twelve: the answer its model was most confident of
(mean log-probability), the one whose number it says is right when asked (self-critic: P(yes) against P(no); shown the number
alone, for the whole answer would take the 0.5B model an hour to read), the answer given most often
(self-consistency over prompts). Intervals resample problems, differences are paired.

Thresholds, stated before any run, for each of the two models:

    pick     the abstaining pick's reward is at or above the best constant's
    auc      the proxy of the pick ranks problems within a prompt: AUC above 1/2 by more than its standard error twice
    retest   is reported, no threshold: how often the same question under the same prompt comes out the same

A trial is on disk when it is made, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import common
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting import choose, collect, judged, leaks, stacked
from tokenmdp.prompting import log as logs
from tokenmdp.prompting.log import Log
from tokenmdp.rewards import numerals
from tokenmdp.run import Run
from tokenmdp.tasks import files

PROMPTS = {
    "bare": "Question: {query}\nAnswer:",
    "number": "Question: {query}\nGive the number and nothing else.\nAnswer:",
    "steps": "Question: {query}\nWork it out step by step and end with the number.\nAnswer:",
    "equation": "Question: {query}\nWrite down the equation, then what it comes to.\nAnswer:",
    "check": "Question: {query}\nRead it twice, work it out, and check the result before you say it.\nAnswer:",
    "teacher": "You teach children arithmetic and never make a mistake.\nQuestion: {query}\nAnswer:",
}
CRITIC = "Question: {query}\nProposed answer: {answer}\nIs the proposed answer right? Say yes or no.\nVerdict:"
PROXIES = ("neighbours", "logistic", "boosted", "logistic+boosted")
CHOICE, FOLDS, SEED = "logistic+boosted", 5, 0
QUERIES, ROWS = 300, 50
AGAIN = {"first": 100, "second": 40}  # questions that are asked twice, for the retest
TOKENS = {"first": 80, "second": 256}  # an instruct model explains at length: at 80 most of its answers were cut
THRESHOLDS = {
    "pick": "the abstaining pick's reward at or above the best constant's",
    "auc": "within-prompt AUC of the pick's proxy above 1/2 by more than twice its standard error",
}


def problems(folder: Path, count: int) -> list[dict[str, Any]]:
    """Problems of valid and test that train does not hold, each once."""
    known = [str(row["question"]) for row in files.rows(str(folder / "train.jsonl"))]
    rows = [row for name in ("test", "valid") for row in files.rows(str(folder / f"{name}.jsonl"))]
    rows = [row for row in rows if numerals.known(row["answer"]) is not None]
    found = leaks.find(known, [str(row["question"]) for row in rows])
    fresh = {
        leaks.normalised(str(row["question"])): row for row, same in zip(rows, found.same, strict=True) if not same
    }
    return [{"query": str(row["question"]), "answer": row["answer"]} for row in fresh.values()][:count]


def made(
    run: Run, name: str, policy: Policy, queries: Sequence[Mapping[str, Any]], again: int, tokens: int, quick: bool
) -> Path:
    """The file of a model's trials, complete. The tiny model is never right: to try the rest its even answers are."""
    prompts = [{"prompt_id": key, "prompt": text} for key, text in PROMPTS.items()]
    asked = collect.wanted(queries, prompts, 1)
    asked += [one for one in collect.wanted(queries[:again], prompts, 2) if one.repeat == 1]
    # Prompts of one question have most of their tokens in common, whose cache a chunk shares.
    model = collect.Local(policy, Sampling(tokens, 0.7), chat=by_chat(name, policy), rows=ROWS, seed=SEED)
    trials = collect.Trials(run.folder / f"{name}.jsonl")
    with run.progress(len(asked), f"{name}: trials", "trials") as bar:
        bar.advance(len(trials.done))
        judge = (lambda text, _: float(sum(map(ord, text)) % 2)) if quick else collect.grade
        collect.collect(model, asked, trials, judge, advance=bar.advance)
    return trials.path


def by_chat(name: str, policy: Policy) -> bool:
    """Whether a model is asked through its chat template."""
    return name == "second" and bool(policy.tokenizer.chat_template)


def criticised(run: Run, name: str, policy: Policy, trials: Sequence[Mapping[str, Any]]) -> list[float]:
    """P(yes) against P(no) that each answer is right, by the model that gave it."""
    path = run.folder / f"{name}-critic.json"
    if path.is_file():
        return list(json.loads(path.read_text()))
    spelled = [(f" {word}", f"\n{word}", f" {word.lower()}") for word in ("Yes", "No")]
    ways = [sorted({policy.encode(f"Verdict:{text}")[-1] for text in of}) for of in spelled]  # a token counts once
    said: list[float] = []
    with run.progress(len(trials), f"{name}: critic", "answers") as bar:
        for start in range(0, len(trials), ROWS):
            part = trials[start : start + ROWS]
            texts = [CRITIC.replace("{query}", t["query"]).replace("{answer}", in_short(t["response"])) for t in part]
            asked = [policy.prompt([{"role": "user", "content": x}] if by_chat(name, policy) else x) for x in texts]
            yes, no = policy.next_mass(asked, ways)
            said += (yes / (yes + no).clamp_min(1e-12)).tolist()
            bar.advance(len(part))
    path.write_text(json.dumps(said))
    return said


def in_short(response: str) -> str:
    """The number that a response gives, or its end where it gives none."""
    said = numerals.answer(response)
    return response.strip()[-60:] if said is None else numerals.written(said.value) + "%" * said.percent


def before(log: Log, quick: bool) -> dict[str, Any]:
    """Choosing without asking: one call a problem."""
    names = PROXIES[1:2] if quick else PROXIES
    choice = "logistic" if quick else CHOICE
    values, constant = judged.held_out(log, {n: stacked.named(n, seed=SEED) for n in ("constant", *names)}, FOLDS, SEED)
    picks = {name: choose.best(values[name]) for name in names}
    picks["abstaining"] = judged.abstaining(log, values[choice], constant, FOLDS, SEED)
    earned = judged.choices(log, picks, constant, SEED)
    score = values[choice][log.query, log.prompt]
    right = log.reward > 0.5
    return {
        "choices": earned,
        "prediction": {name: judged.prediction(log, value) for name, value in values.items()},
        "verdict": judged.in_words(earned, choice),
        "auc_standard_error": auc_error(log, score, right),
        "auc": judged.within_prompt_auc(log, score),
        "constant": [int(i) for i in constant],
    }


def auc_error(log: Log, score: NDArray[np.float64], right: NDArray[np.bool_]) -> float | None:
    """The spread of the within-prompt AUC when questions are resampled."""
    rng = np.random.default_rng(SEED)
    found = []
    place = np.unique(log.query, return_inverse=True)[1]
    rows = [np.flatnonzero(place == i) for i in range(place.max() + 1)]
    for _ in range(200):
        at = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        one = judged.within_prompt_auc(log.select(at), score[at])
        found += [] if one is None else [one]
    return float(np.std(found)) if len(found) > 1 else None


def of_model(run: Run, name: str, path: str, queries: Sequence[Mapping[str, Any]], args: Any) -> dict[str, Any]:
    """Everything about one model."""
    policy = catalog.load(path).freeze()
    again, tokens = (4, 8) if args.quick else (AGAIN[name], TOKENS[name])
    file = made(run, name, policy, queries, again, tokens, args.quick)
    rows = files.rows(str(file))
    log = logs.read(file, answers=True)
    first = [row for row in rows if row["repeat"] == 0]
    critic = np.full(len(log), np.nan)  # of first tries; trials are in the order of the file
    critic[log.repeat == 0] = criticised(run, name, policy, first)
    found = before(log, args.quick)
    constant = np.asarray(found.pop("constant"))
    asked = judged.after_asking(log, constant, SEED, {"self-critic": critic})
    asked["self-critic"]["calls"] *= 2
    cuts: dict[str, list[bool]] = {}
    for row in rows:  # rows from before it was written down are told by their length
        ended = row.get("ended", len(policy.encode(row["response"])) < tokens)
        cuts.setdefault(row["prompt_id"], []).append(not ended)
    by_prompt = {log.prompt_ids[p]: float(log.reward[log.prompt == p].mean()) for p in range(len(log.prompts))}
    return {
        "model": policy.name,
        "trials": len(log),
        "questions": len(np.unique(leaks.groups(log.queries))),
        "by_prompt": by_prompt,
        "cut": {key: float(np.mean(cut)) for key, cut in cuts.items()},
        **found,
        "after_asking_all": asked,
    }


def show(found: Mapping[str, Any], console: Console) -> None:
    """A table a model."""
    for name, one in found.items():
        table = Table(title=f"{name} ({one['model']}): {one['verdict']}", title_justify="left")
        for head in ("choice", "calls", "reward [95 %]", "over the best constant"):
            table.add_column(head, justify="left" if head == "choice" else "right")
        rows = [*((k, 1, v) for k, v in one["choices"].items())]
        rows += [(k, v["calls"], v) for k, v in one["after_asking_all"].items()]
        for label, calls, row in rows:
            cells = ("{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row[k]) for k in ("reward", "over_constant"))
            table.add_row(label, str(calls), *cells)
        console.print(table)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--data", type=Path, metavar="DIR", required=True, help="where the word problems are")
    out.add_argument("--first", default="tiny", help="a model cloned on the train problems")
    out.add_argument("--second", default="tiny", help="an instruct model: a name, a folder, a GGUF file or a hub id")
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is")
    out.add_argument("--fresh", action="store_true", help="begin anew")
    args: argparse.Namespace = out.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    folder = args.runs / ("prompts-collected-quick" if args.quick else "prompts-collected")
    queries = problems(args.data, 24 if args.quick else QUERIES)
    if args.fresh:  # a run begun anew leaves files alone that it does not know
        for old in (f"{name}{end}" for name in ("first", "second") for end in (".jsonl", "-critic.json")):
            (folder / old).unlink(missing_ok=True)
    with Run.open(
        folder, {"queries": len(queries)}, SEED, resume=folder.exists() and not args.fresh, overwrite=args.fresh
    ) as run:
        found = {
            name: of_model(run, name, "tiny" if args.quick else path, queries, args)
            for name, path in (("first", args.first), ("second", args.second))
        }
    passed = {
        "pick": all(one["choices"]["abstaining"]["over_constant"]["mean"] >= 0 for one in found.values()),
        "auc": all(
            one["auc"] is not None
            and one["auc_standard_error"] is not None
            and one["auc"] - 0.5 > 2 * one["auc_standard_error"]
            for one in found.values()
        ),
    }
    line = common.command()
    for path, word in ((str(args.data), "DIR"), (args.first, "FIRST"), (args.second, "SECOND")):
        line = line.replace(path, word)
    results = {
        "command": line,
        **common.machine(),
        "seed": SEED,
        "prompts": PROMPTS,
        "thresholds": THRESHOLDS,
        "passed": passed,
    }
    results["models"] = found
    common.write(args.json, results)
    show(found, console)
    for name, fine in passed.items():
        console.print(f"{'passed' if fine else 'FAILED'}: {THRESHOLDS[name]}", highlight=False)
    return results


if __name__ == "__main__":
    main()
