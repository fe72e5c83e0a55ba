"""The comparison: each solver gets what it needs, the figures are right by hand, and kill -9 changes none of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import batch
from tiny_recipes import liking, policy, task
from tokenmdp import config
from tokenmdp.lab import compare, ranking, report, solvers
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.run.screen import Bar
from tokenmdp.types import Score

SMALL: dict[str, Any] = {
    "solvers": "rloo", "seeds": 2, "budget_tokens": 600, "warm_steps": 20, "prompts": 4, "samples": 4, "held_out": 12,
    "answers": 2, "max_new_tokens": 4,
}  # fmt: skip


def given(**changes: Any) -> solvers.Given:
    settings: dict[str, Any] = {
        "start": policy().freeze(), "task": task(), "reward": liking(), "tokens": 400, "length": 4.0, "prompts": 4,
        "samples": 4, "max_new_tokens": 5, "kl": 0.02, "train": "all", "micro_tokens": 400,
    }  # fmt: skip
    return solvers.Given(**{**settings, **changes})


# ------------------------------------------------------------ what solvers are given


def test_every_solver_of_the_table_can_be_given_what_it_needs():
    """All settings exist in the recipes and are in range, and the same number of responses a phase comes out."""
    for name, solver in solvers.available().items():
        if solver.family in ("baseline", "decoding"):
            continue
        cfg = solver.config(given(), solver.module(), steps=3, rows=16, samples=4, kl=0.02)
        assert cfg.learning_rate == solver.learning_rate, name
        assert getattr(cfg, "steps", 3) == 3, name
    names = [solver.name for solver in solvers.TABLE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["rloo", "remax", "dapo", "evolution"])
def test_an_online_solver_stops_where_its_tokens_are_spent(name: str, tmp_path: Path):
    """Whatever a phase costs (a greedy response more, groups drawn anew, pairs of tries): within half a phase."""
    solver = solvers.available()[name]
    asked = given(tokens=500, samples=2, prompts=8)
    with Run.open(tmp_path / "run", {}, 0) as run:
        trained = solver.solve(solver, asked, run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    spent = [line["num_tokens"] + line.get("num_tokens_credit", 0.0) for line in lines]
    assert trained.tokens == sum(spent)
    assert abs(sum(spent) - 500) <= max(spent)
    assert sum(spent[:-1]) < 500
    assert len(compare.curve(tmp_path / "run")) == len(lines)


def test_responses_that_become_short_do_not_end_a_run_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The start's responses are said to have forty tokens, and those of training have five at most."""
    totals: list[int] = []
    monkeypatch.setattr(Bar, "advance", lambda bar, k=1: totals.append(bar.total))
    with Run.open(tmp_path / "run", {}, 0) as run:
        trained = solvers.online(solvers.available()["rloo"], given(tokens=500, length=40.0), run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(trained.tokens - 500) <= max(line["num_tokens"] for line in lines) / 2
    assert "warning: rloo spent" not in (tmp_path / "run" / "log.txt").read_text()
    assert all(abs(total - len(lines)) <= 2 for total in totals), "the bar counts phases, not one-token responses"


def test_a_run_whose_phases_are_too_large_to_spend_the_budget_says_so(tmp_path: Path):
    # A phase costs 16 responses of some four tokens; after the first, another would end further from 85.
    with Run.open(tmp_path / "run", {}, 0) as run:
        trained = solvers.online(solvers.available()["rloo"], given(tokens=85), run)
    assert trained.tokens < 81
    said = (tmp_path / "run" / "log.txt").read_text()
    assert f"warning: rloo spent {trained.tokens} of 85 tokens: one more phase of about {trained.tokens}" in said


def test_a_log_spends_the_tokens_and_asks_every_prompt_once_before_any_twice(tmp_path: Path):
    asked = given(tokens=700)
    with Run.open(tmp_path / "run", {}, 0) as run:
        logged, score = solvers.log(asked, run)
    assert 700 <= int(logged.action.sum()) < 700 + 4 * 5 * solvers.CHUNK
    assert len(logged) == len(score.value)
    first = [p.row for p in logged.prompts[:: asked.samples]]
    assert len(set(first[: len(task().train)])) == min(len(first), len(task().train))  # none twice before all once


def test_pairs_by_hand():
    """Prompt 0 scores 3, 1, 1, 2: the best with the worst, then 2 with the other 1. Prompt 1 is all equal: no pair."""
    rows = batch([([1, 2], [3 + i]) for i in range(4)] + [([2, 2], [5]), ([2, 2], [6])])
    rows = replace(rows, group=torch.tensor([0, 0, 0, 0, 1, 1]))
    pairs = solvers.ranked(rows, Score.of(torch.tensor([3.0, 1.0, 1.0, 2.0, 7.0, 7.0])))
    sides = [(int(c[2]), int(r[2])) for c, r in zip(pairs.chosen.tokens, pairs.rejected.tokens, strict=True)]
    assert sides == [(3, 5), (6, 4)]
    with pytest.raises(ValueError, match="none of the 2 responses scores above another"):
        solvers.ranked(rows.select([4, 5]), Score.of(torch.ones(2)))


def test_a_response_without_a_verdict_is_in_no_pair():
    rows = replace(batch([([1], [3]), ([1], [4]), ([1], [5])]), group=torch.zeros(3, dtype=torch.long))
    pairs = solvers.ranked(rows, Score.of(torch.tensor([1.0, float("nan"), 0.0])))
    assert [int(pairs.chosen.tokens[0, 1]), int(pairs.rejected.tokens[0, 1])] == [3, 5]


# ------------------------------------------------------------ what is said of the results


def result(solver: str, scores: list[float | None], family: str = "online", **more: Any) -> dict[str, Any]:
    about = {
        "learning_rate": 1e-3,
        "failure": "",
        "message": "",
        "greedy": 0.5,
        "kl": 0.1,
        "tokens": 100,
        "seconds": 2.0,
    }
    return {"solver": solver, "family": family, "scores": scores, "curve": [[50, 0.2], [100, 0.4]], **about, **more}


def made_up(seeds: int = 5) -> dict[str, list[dict[str, Any]]]:
    """Ten prompts: a start that is right at a few of them, one solver far above it, one that breaks and one that idles."""
    base = [0.0, 0.2, 0.1, 0.3, 0.0, 0.2, 0.1, 0.3, 0.2, 0.1]
    good = [[min(1.0, x + 0.4 + 0.01 * (s + i % 3)) for i, x in enumerate(base)] for s in range(seeds)]
    return {
        "start": [result("start", base, "baseline") for _ in range(seeds)],
        "sft-more": [result("sft-more", [x + 0.1 + 0.01 * s * (i % 2) for i, x in enumerate(base)], "baseline") for s in range(seeds)],
        "good": [result("good", g) for g in good],
        "idle": [result("idle", base) for _ in range(seeds)],
        "broken": [
            result("broken", [] if s < 2 else good[s], failure="crash" if s < 2 else "", message="ValueError: <b>bad</b>" if s < 2 else "")
            for s in range(seeds)
        ],
    }  # fmt: skip


def test_the_rows_by_hand():
    rows = {row["solver"]: row for row in ranking.rows_of(made_up(), solvers.BASELINES)}
    assert rows["start"]["iqm"]["mean"] == pytest.approx(0.15)
    assert rows["start"]["iqm"]["low"] is None  # five runs that are all alike have no interval
    # Seeds of `good` end 0.4 + 0.01 (s + 0.9) above the start, whose mean is 0.15: the middle three have s = 1, 2, 3.
    assert rows["good"]["iqm"]["mean"] == pytest.approx(0.15 + 0.4 + 0.01 * (2 + 0.9))
    assert rows["good"]["improvement"]["start"]["mean"] == 1.0
    assert rows["good"]["failed"] == 0
    # A run without a policy counts as its start.
    assert rows["broken"]["scores"][:2] == pytest.approx([0.15, 0.15])
    assert rows["broken"]["failures"] == {"crash": 2, "non-finite": 0, "no verdict": 0, "not better": 0}
    assert rows["broken"]["messages"] == ["ValueError: <b>bad</b>"]
    assert rows["idle"]["failures"]["not better"] == 5
    assert rows["idle"]["improvement"]["start"]["mean"] == 0.5
    assert next(row["solver"] for row in ranking.rows_of(made_up(), solvers.BASELINES)) == "good"


def test_a_solver_that_gains_the_same_on_every_prompt_beat_its_start():
    """From wrong on all prompts to right on all: a gain of 1 without any spread. One prompt, or no gain, says nothing."""
    start, won = result("start", [0.0] * 50, "baseline"), result("good", [1.0] * 50)
    assert ranking.beats(won, start) == (1.0, 1.0, 1.0)
    rows = ranking.rows_of({"start": [start] * 5, "good": [won] * 5}, solvers.BASELINES)
    assert rows[0]["failures"]["not better"] == 0
    assert ranking.verdict(rows, 5)[0].startswith("The one solver beat its start significantly at every seed")
    assert ranking.beats(start, won) == (-1.0, -1.0, -1.0)
    unknown = (float("-inf"), float("inf"))
    assert ranking.beats(result("idle", [0.0] * 50), start)[1:] == unknown
    assert ranking.beats(result("good", [1.0]), result("start", [0.0]))[1:] == unknown


def test_a_prompt_without_a_verdict_is_no_score_of_zero():
    """Both have a verdict on two prompts only: 0.6 - 0.2 and 0.8 - 0.3."""
    start, mine = result("start", [0.2, 0.3, None, 0.9], "baseline"), result("good", [0.6, 0.8, 0.1, None])
    start, mine = ranking.shared([start, mine])
    assert ranking.final(mine, start) == pytest.approx(0.7)
    assert ranking.beats(mine, start).mean == pytest.approx(0.45)


def test_a_run_that_is_hardly_judged_takes_no_prompts_from_the_others():
    """It is judged on one of the start's four prompts: a failure that counts as its start."""
    start, good = result("start", [0.1, 0.2, 0.3, 0.4], "baseline"), result("good", [0.5, 0.6, None, 0.8])
    runs = [start, good, result("mute", [None, 9.0, None, None]), result("broken", [], failure="crash")]
    found = ranking.shared(runs)
    assert [r["scores"] for r in found] == [[0.1, 0.2, 0.4], [0.5, 0.6, 0.8], [], []]
    assert [r["failure"] for r in found] == ["", "", "no verdict", "crash"]
    assert found[2]["message"] == "judged on 1 of the start's 4 prompts"


def test_a_solver_that_silences_the_judge_where_it_is_hard_does_not_rank_first():
    """`mute` is judged on the two easy prompts of four alone and gains .1 there, `good` gains 1 everywhere."""
    start = [0.0, 0.0, 10.0, 10.0]
    found = {
        "start": [result("start", start, "baseline") for _ in range(5)],
        "good": [result("good", [x + 1.0 + 0.01 * s for x in start]) for s in range(5)],
        "mute": [result("mute", [None, None, 10.1 + 0.01 * s, 10.1 + 0.01 * s]) for s in range(5)],
    }
    rows = ranking.rows_of(found, solvers.BASELINES)
    assert [row["solver"] for row in rows] == ["good", "mute", "start"]
    assert rows[0]["prompts"] == 2
    assert rows[0]["gain"]["mean"] == pytest.approx(1.02)


def test_the_gain_is_over_prompts_that_both_were_judged_on_and_missing_verdicts_are_told():
    """At every seed 0.6 - 0.2 and 0.8 - 0.3, whatever the means over prompts of their own; of 16 responses 5 are missing."""
    some = {"no_verdict": 5, "responses": 16}
    found = {
        "start": [result("start", [0.2, 0.3, None, 0.9], "baseline", no_verdict=0, responses=16) for _ in range(3)],
        "good": [result("good", [0.6, 0.8, 0.1, None], **some) for _ in range(3)],
        "broken": [result("broken", [], failure="crash", message="out of luck") for _ in range(3)],
    }
    rows = ranking.rows_of(found, solvers.BASELINES)
    by = {row["solver"]: row for row in rows}
    assert by["good"]["gain"]["mean"] == pytest.approx(0.45)
    assert by["broken"]["gain"]["mean"] == 0.0
    assert [by[name]["no_verdict"] for name in found] == [0.0, 5 / 16, None]
    said = [sentence for sentence in ranking.verdict(rows, 3) if "no verdict" in sentence]
    assert len(said) == 1
    assert "(good 31.2 %)" in said[0]


def test_the_verdict_says_what_differs_and_what_does_not():
    said = ranking.verdict(ranking.rows_of(made_up(), solvers.BASELINES), 5)
    assert said[0].startswith("1 of 3 solvers beat their start significantly at every seed; good ends highest")
    assert said[1] == "No significant difference between good and broken; it is significantly better than the 1 other."
    assert "significantly above it: good; significantly below it: idle; not significantly different: broken" in said[2]
    assert said[3] == "Runs that crashed: broken 2 of 5; that did not beat their start: idle 5 of 5."
    few = ranking.verdict(ranking.rows_of(made_up(3), solvers.BASELINES), 3)
    assert "cannot be said from 3 seeds" in few[1]


# ------------------------------------------------------------ the verb


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"solvers": "rlo"}, "no solver 'rlo'; did you mean 'rloo'"),
        ({"solvers": " , "}, "no solver was asked for"),
        ({"seeds": 0}, "seeds is 0"),
        ({"rate": 0.0}, "rate=0.0"),
    ],
)
def test_bad_settings_are_errors_that_name_them(changes: dict[str, Any], match: str, tmp_path: Path):
    with pytest.raises(ValueError, match=match), Run.open(tmp_path / "run", {}, 0) as run:
        compare.main(compare.Config(**{**SMALL, **changes}), run)


def run_here(folder: Path, **changes: Any) -> dict[str, Any]:
    """The small comparison in this process."""
    cfg = compare.Config(**{**SMALL, **changes})
    with Run.open(folder, config.plain(cfg), 0, resume=True) as run:
        run.finish(compare.main(cfg, run))
    return dict(json.loads((folder / "summary.json").read_text()))


def facts(folder: Path) -> dict[str, Any]:
    """Everything of a comparison that must not depend on when it was killed, or on the number of workers."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("metrics.jsonl")}
    summary = json.loads((folder / "summary.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in summary["rows"]]
    return {**found, "rows": rows, "verdict": summary["verdict"]}


def test_a_comparison_that_learns_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The start knows nothing after 20 steps: what needs a success to learn from fails, is counted, and stops nobody."""
    found = run_here(tmp_path, solvers=" awr, rloo", seeds=2)
    assert "P(> start)" in capsys.readouterr().out
    assert shlex.split(found["command"])[2:6] == ["--solvers", " awr, rloo", "--seeds", "2"]
    rows = {row["solver"]: row for row in found["rows"]}
    assert set(rows) == {"start", "sft-more", "rloo", "awr"}
    assert [rows[name]["failed"] for name in ("start", "sft-more", "rloo", "awr")] == [0, 2, 2, 2]
    assert rows["start"]["tokens"] == 0
    assert rows["rloo"]["tokens"] == pytest.approx(600, rel=0.2)
    assert not list(tmp_path.glob("*-seed-*/checkpoints"))


def test_kill_9_and_workers_leave_the_figures_as_they_are(tmp_path: Path):
    size = {"solvers": "rloo", "seeds": 1, "budget_tokens": 4000}
    run_here(tmp_path / "whole", **size)
    size["workers"] = 2
    flags = [word for k, v in {**SMALL, **size}.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    line = [sys.executable, "-m", "tokenmdp", "compare", *flags, "--threads", "1", "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = tmp_path / "killed" / "rloo-seed-0" / "metrics.jsonl"
    while process.poll() is None and not (begun.exists() and begun.stat().st_size):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (begun.parent / "result.json").exists(), "it was to be killed, and had ended"
    length, again = begun.stat().st_size, -1
    while length != again:  # its workers end by themselves, at once
        length, again = again, begun.stat().st_size
        time.sleep(0.3)
    run_here(tmp_path / "killed", **size)
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


def test_tuning_never_sees_what_the_comparison_judges_by(tmp_path: Path):
    cfg = compare.Config(**{**SMALL, "warm_steps": 0})
    with Run.open(tmp_path / "run", config.plain(cfg), 0) as run:
        lab = compare.Lab(cfg, run)
        tuned, by = lab.given(compare.Trial("rloo", 0, 1 / 3, tuning=True))
        plain, judged = lab.given(compare.Trial("rloo", 0, 1.0))
    assert len(by) == len(judged) == 12
    assert not {p.ids for p in by} & {p.ids for p in judged}
    assert not {p.ids for p in by} & {p.ids for p in tuned.task.train}
    assert plain.task.train == lab.task.train
    shown = tuned.task.demonstrations
    assert shown is not None
    assert len(shown) == len(tuned.task.train), "what is cloned answers nothing that tuning judges by"
    assert not {p.ids for p in by} & {p.ids for p in shown.prompts}
    assert len(plain.task.demonstrations or []) == len(lab.task.train)
    assert tuned.rate == pytest.approx(plain.rate / 3)


def test_few_training_prompts_are_tuned_on_and_one_alone_is_not(tmp_path: Path):
    cfg = compare.Config(**{**SMALL, "warm_steps": 0})
    trial = compare.Trial("rloo", 0, 1.0, tuning=True)
    with Run.open(tmp_path / "run", config.plain(cfg), 0) as run:
        lab = compare.Lab(cfg, run)
        three, whole = lab.task.train[:3], lab.task
        lab.task = replace(whole, train=three)
        few, by = lab.given(trial)
        assert (few.task.train, by) == (three[:2], [three[2]])
        lab.task = replace(whole, train=three[:1])
        with pytest.raises(ValueError, match="1 prompts to learn on, too few to set one aside for tuning"):
            lab.given(trial)


@pytest.mark.parametrize(("task", "learned"), [("addition", 0), ("copying", 12)])
def test_prompts_that_solvers_are_judged_and_learn_on_are_counted(task: str, learned: int, tmp_path: Path):
    cfg = compare.Config(**{**SMALL, "warm_steps": 0, "task": task})
    with Run.open(tmp_path / "run", config.plain(cfg), 0) as run:
        assert compare.Lab(cfg, run).learned == learned
    rows = ranking.rows_of(made_up(), solvers.BASELINES)
    (tmp_path / "summary.json").write_text(
        json.dumps(summary_of(rows, 5) | {"held_out": 12, "learned": learned, "answers": 2})
    )
    page = report.build(tmp_path).read_text()
    assert ("over 12 held-out prompts, 2 sampled" in page) == (not learned)
    assert ("over 12 prompts, of which 12 are among those that solvers learned on, 2 sampled" in page) == bool(learned)


def test_a_judge_that_says_nothing_of_the_start_stops_it_before_anything_trains(tmp_path: Path):
    cfg = compare.Config(**{**SMALL, "warm_steps": 0})
    with Run.open(tmp_path / "run", config.plain(cfg), 0) as run:
        lab = compare.Lab(cfg, run)
        lab.judge = FunctionReward(lambda completions, **_: [None] * len(completions), name="mute", max_missing=1.0)
        with pytest.raises(ValueError, match=r"cannot be judged .* at seed 0 \(no verdict: mute judged none"):
            compare.judged_start(lab)


# ------------------------------------------------------------ the page


class Ids(HTMLParser):
    """The ids of a page, and what it links to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.anchors += [found["href"][1:]] if (found.get("href") or "").startswith("#") else []


def summary_of(rows: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    about = {"kind": "compare", "title": "Solvers side by side: addition", "task": "addition", "seeds": seeds}
    return {**about, "budget_tokens": 100, "verdict": ranking.verdict(rows, seeds), "rows": rows}


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_page_shows_every_solver_and_loads_nothing(seeds: int, tmp_path: Path):
    rows = ranking.rows_of(made_up(seeds), solvers.BASELINES)
    (tmp_path / "summary.json").write_text(json.dumps(summary_of(rows, seeds)))
    page = report.build(tmp_path).read_text()
    assert all(f">{name}<" in page for name in made_up())
    assert "<b>bad</b>" not in page
    assert "&lt;b&gt;bad&lt;/b&gt;" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    parsed = Ids(page)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert set(parsed.anchors) <= set(parsed.ids)


def test_the_page_shows_two_digits_of_a_learning_rate(tmp_path: Path):
    found = {"start": [result("start", [0.1, 0.2], "baseline", learning_rate=None)]}
    found |= {
        f"r{at}": [result(f"r{at}", [0.3, 0.5], learning_rate=x)] for at, x in enumerate((3e-4, 1.5e-5, 1e-3 / 3))
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary_of(ranking.rows_of(found, solvers.BASELINES), 1)))
    page = report.build(tmp_path).read_text()
    assert all(f">{rate}<" in page for rate in ("3e−4", "1.5e−5", "3.3e−4"))


def test_the_page_says_what_is_missing(tmp_path: Path):
    (tmp_path / "summary.json").write_text(
        json.dumps({"kind": "compare", "rows": [{"solver": "odd", "scores": ["x"]}]})
    )
    page = report.build(tmp_path).read_text()
    assert "No verdict here" in page
    assert "No learning curves here" in page
