"""When does choosing a prompt per query pay? Data sets × models × log size × number of prompts × difficulty.

    python bench/prompts_scalability.py --data DIR --json docs/results/prompts_scalability.json --svg docs/results/prompts_scalability.svg

DIR holds the published outcomes of LLaMA-2-7B-chat (llama2_{gsm8k,mawps,svamp}.jsonl.gz and prompts.json); `--champ FILE` adds
CHAMP's v0.json (four models), `--log NAME=FILE` any other log. Of each log so many questions are drawn and the first 2, 4 or all
six prompts; every question drawn is held out once (grouped folds, calibrated logistic proxy, nested), and its pick compared
with the best constant prompt of the part it was held out of. Difficulty is thirds of the questions by what the proxy expects of
all prompts, again held out. Three draws a size, one where the size is the whole log; the random prompt and the oracle are beside.

Nothing is claimed before the run but how it is read: a cell pays where the 95 % interval of the gain, over questions, lies
above 0 at every draw; it grows with the log where the gain at the largest size is above that at the smallest, intervals apart.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import common
from prompt_logs import read
from tokenmdp.lab.report.ink import canvas, colour, fixed_ticks, label_axes, sheet, svg, whisker
from tokenmdp.prompting import champ, choose, intervals, judged, leaks, proxy, stacked
from tokenmdp.prompting import log as logs
from tokenmdp.prompting.features import Once
from tokenmdp.prompting.log import Log

SIZES, PROMPTS, DRAWS, FOLDS = (125, 500, 2000), (2, 4, 6), 3, 5
THIRDS = ("hard", "middle", "easy")


def sources(args: Any) -> dict[str, Log]:
    """The logs by name, `data set, model`."""
    found = {}
    for name in ("gsm8k",) if args.quick else ("gsm8k", "mawps", "svamp"):
        log, six = read(args.data, name)
        found[f"{name}, LLaMA-2-7B-chat"] = log.of_prompts(six).compact()
    if args.champ:
        for model in sorted({row["model"] for row in champ.rows(args.champ)}):
            found[f"CHAMP, {model}"] = logs.read(args.champ, model=model)
    for given in args.log:
        name, _, path = given.partition("=")
        found[name] = logs.read(path)
    return found


def drawn(log: Log, questions: int, prompts: int, seed: int) -> Log:
    """So many questions, with all their queries, and the first prompts."""
    group = leaks.groups(log.queries)
    names = np.random.default_rng(seed).permutation(np.unique(group))[:questions]
    return log.of_queries(np.flatnonzero(np.isin(group, names))).of_prompts(range(prompts)).compact()


def cell(log: Log, once: Once, seed: int) -> dict[str, Any]:
    """What choosing earns on one log, whole and by difficulty."""

    def make() -> stacked.Stacked:
        return stacked.Stacked([lambda: proxy.Logistic(once)], seed=seed)

    values, constant = judged.held_out(log, {"pick": make}, FOLDS, seed)
    value, table = values["pick"], log.matrix()
    picks, each = choose.best(value), np.arange(len(table))
    gained = table[each, picks] - table[each, constant]
    known, group = ~np.isnan(gained), leaks.groups(log.queries)
    third = np.digitize(value.mean(1), np.quantile(value.mean(1), [1 / 3, 2 / 3]))
    out: dict[str, Any] = {
        "trials": len(log),
        "constant": float(np.nanmean(table[each, constant])),
        "random": float(np.nanmean(table)),
        "oracle": float(np.nanmean(np.nanmax(table, axis=1))),
        "gain": intervals.grouped_mean(gained[known], group[known], seed=seed, least=-1.0)._asdict(),
        "auc_within_prompt": judged.within_prompt_auc(log, value[log.query, log.prompt]),
        "by_difficulty": {},
    }
    for number, name in enumerate(THIRDS):
        at = known & (third == number)
        if len(np.unique(group[at])) > 1:
            found = intervals.grouped_mean(gained[at], group[at], seed=seed, least=-1.0)._asdict()
            out["by_difficulty"][name] = {"gain": found, "reward": float(np.nanmean(table[at]))}
    return out


def measure(log: Log, quick: bool) -> list[dict[str, Any]]:
    """All cells of a log."""
    whole = len(np.unique(leaks.groups(log.queries)))
    sizes = [*(s for s in ((60,) if quick else SIZES) if s < whole), *(() if quick else (whole,))]
    out = []
    for size in sizes:
        for seed in range(1 if size == whole or quick else DRAWS):
            once = Once(kept=FOLDS * 5)  # prompts are dropped, questions stay: their features are learned once
            for count in sorted({min(p, len(log.prompts)) for p in (PROMPTS[:1] if quick else PROMPTS)}):
                part = drawn(log, size, count, seed)
                if part.reward.min() < part.reward.max():
                    out.append({"questions": size, "prompts": count, "seed": seed, **cell(part, once, seed)})
    return out


def pooled(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draws of a size together: means, and whether every draw pays."""
    out = []
    for key in dict.fromkeys((c["questions"], c["prompts"]) for c in cells):
        same = [c for c in cells if (c["questions"], c["prompts"]) == key]

        def mean(of: Any, same: Sequence[Mapping[str, Any]] = same) -> float:
            return float(np.mean([of(c) for c in same]))

        out.append(
            {
                "questions": key[0],
                "prompts": key[1],
                "draws": len(same),
                **{end: mean(lambda c, end=end: c["gain"][end]) for end in ("mean", "low", "high")},
                "pays": all(c["gain"]["low"] > 0 for c in same),
                "costs": all(c["gain"]["high"] < 0 for c in same),
                "headroom": mean(lambda c: c["oracle"] - c["constant"]),
                "auc_within_prompt": float(np.mean([c["auc_within_prompt"] or np.nan for c in same])),
                "by_difficulty": {
                    name: mean(lambda c, name=name: c["by_difficulty"][name]["gain"]["mean"])
                    for name in THIRDS
                    if all(name in c["by_difficulty"] for c in same)
                },
            }
        )
    return out


def picture(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The gain over the best constant prompt against questions in the log, a chart a log, a line a number of prompts.

    Logs of one size have no curve; they are in the table.
    """
    width, height, columns = 330.0, 240.0, 3
    roles = dict(zip(PROMPTS, ("sft", "bon", "ppo"), strict=True))
    charts = []
    for number, (name, cells) in enumerate(found.items()):
        sizes = sorted({c["questions"] for c in cells})
        if len(sizes) < 2:
            continue
        figure, axes = canvas(width, height, left=44, right=16, top=44, bottom=38)
        for k, (count, role) in enumerate(roles.items()):
            line = sorted((c for c in cells if c["prompts"] == count), key=lambda c: c["questions"])
            x = [math.log(c["questions"]) + 0.06 * (k - 1) for c in line]
            axes.plot(x, [100 * c["mean"] for c in line], color=colour(role), linewidth=2, marker="o", markersize=4)
            for at, c in zip(x, line, strict=True):
                whisker(axes, at, 100 * c["low"], 100 * c["high"], role)
            text = f"{count} prompts" if k == 0 else str(count)
            place = ((48, 124, 142)[k]) / width
            figure.text(place, 1 - 30 / height, text, color=colour(role), fontsize=10.5, fontweight="bold")
        axes.axhline(0, color=colour("rule"), linewidth=1)
        fixed_ticks(axes, [math.log(s) for s in sizes])
        axes.set_xticklabels([f"{s:,}" for s in sizes])
        label_axes(figure, axes, "questions in the log", f"{name}: points over the best constant")
        charts.append(svg(figure, f"gain-{number}", f"{name}: gain over the best constant prompt by log size"))
    return sheet([charts[i : i + columns] for i in range(0, len(charts), columns)], width, height)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--data", type=Path, metavar="DIR", required=True, help="where the published outcomes are")
    out.add_argument("--champ", type=Path, metavar="FILE", help="CHAMP's v0.json")
    out.add_argument("--log", action="append", default=[], metavar="NAME=FILE", help="another log; may be repeated")
    out.add_argument("--svg", type=Path, metavar="FILE", help="draw the curves there")
    args: argparse.Namespace = out.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = {}
    for name, log in sources(args).items():
        start = time.monotonic()
        cells = measure(log, args.quick)
        found[name] = {"cells": cells, "pooled": pooled(cells), "minutes": (time.monotonic() - start) / 60}
        table = Table(title=name, title_justify="left")
        for head in (
            "questions",
            "prompts",
            "gain over the best constant",
            "headroom",
            "AUC within prompt",
            *THIRDS,
            "",
        ):
            table.add_column(head, justify="right")
        for c in found[name]["pooled"]:
            thirds = [f"{c['by_difficulty'][t]:+.3f}" if t in c["by_difficulty"] else "–" for t in THIRDS]
            span = f"{c['mean']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]"
            word = "pays" if c["pays"] else "costs" if c["costs"] else ""
            figures = (f"{c['headroom']:.3f}", f"{c['auc_within_prompt']:.3f}")
            table.add_row(str(c["questions"]), str(c["prompts"]), span, *figures, *thirds, word)
        console.print(table)
    line = common.command()
    for path, word in ((args.data, "DIR"), (args.champ, "CHAMP")):
        line = line.replace(str(path), word) if path else line
    results = {"command": line, **common.machine(), "logs": found}
    common.write(args.json, results)
    if args.svg and any(len({c["questions"] for c in f["pooled"]}) > 1 for f in found.values()):
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        args.svg.write_text(picture({name: f["pooled"] for name, f in found.items()}), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
