"""Solvers side by side: the same start, prompts, reward, tokens and evaluation, several seeds, and how sure we are.

    1. start        the model, after a short behaviour cloning of the task's demonstrations
    2. runs         each solver at each seed spends the same number of response tokens (see `solvers`)
    3. judgement    held-out prompts, several responses each; the same uniform numbers for all runs of a seed
    4. verdict      interquartile means, probabilities of improvement, failures (see `ranking`), and a page

Plain baselines are in every table: the start as it is, and the start cloning as many tokens. Seeds vary what is
sampled; the start and the data are the same for all. Each run is a stage of the run's folder, so a comparison that was
killed at any moment goes on with --resume and ends with the same figures, with any number of workers.

Tuning is the same for all: none, or with --tune three learning rates each (a third, one and three times the table's),
judged on training prompts that are held out for it, at seeds that are not in the comparison.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokenmdp import config, judge, rewards, tasks
from tokenmdp.functional import measures
from tokenmdp.lab import ranking, report, solvers, workers
from tokenmdp.lab.solvers import BASELINES, Answers, Given
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import sft
from tokenmdp.rewards.function import RewardFailure
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Prompt, Reward

GRID = (1 / 3, 1.0, 3.0)  # times a solver's learning rate, with --tune
POINTS = 24  # of a learning curve
LEG, WARM_ROWS = 50, 64  # steps of cloning between two looks at the score, and demonstrations a step


@dataclass(frozen=True)
class Config:
    task: str = "addition"  # a task's name, or a source of prompts
    solvers: str = "reinforce,rloo,grpo,ppo"  # by name, with commas between; all for every one there is
    seeds: int = 5  # runs of each solver
    budget_tokens: int = 60_000  # response tokens that each run spends
    model: str = "tiny"  # a name, a folder or a hub id
    reward: str = ""  # what is optimised; empty for the task's own, which is what all are judged by where there is one
    warm_steps: int = 1500  # most steps of behaviour cloning that make the start of the model; 0 takes it as it is
    warm_score: float = 0.5  # what the start is to score on training prompts: the cloning then ends
    warm_learning_rate: float = 5e-3  # of these
    prompts: int = 32  # prompts a phase
    samples: int = 8  # responses a prompt
    max_new_tokens: int = 8  # the horizon H, in tokens
    kl: float = 0.02  # β, reward units a nat, of the methods that do not set it to 0
    rate: float = 1.0  # times every solver's learning rate, which is for the tiny model
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    held_out: int = 200  # prompts judged
    answers: int = 8  # responses to each
    tune: bool = False  # choose every solver's learning rate first
    workers: int = 1  # runs at a time, each in a process of its own with one thread
    micro_tokens: int = 8192  # padded positions in a micro-batch; changes memory, never the gradient


@dataclass(frozen=True)
class Trial:
    """One run of one solver: a seed of the comparison, or one learning rate of its tuning."""

    solver: str
    at: int
    rate: float
    tuning: bool = False

    @property
    def name(self) -> str:
        return f"{self.solver}-{'tune' if self.tuning else 'seed'}-{self.at}"


class Lab:
    """What all trials share: the start, the task, the reward; made once, read from the folder after that."""

    def __init__(self, cfg: Config, run: Run) -> None:
        self.cfg, self.run = cfg, run
        base = catalog.load(cfg.model).freeze()
        self.task: Task = tasks.load(cfg.task, base)
        self.reward: Reward = self.reward_of(base)
        self.judge: Reward = self.task.reward or self.reward
        self.start, self.about = self.clone(base)

    def reward_of(self, base: Policy) -> Reward:
        """What is optimised."""
        if self.cfg.reward:
            return rewards.load(self.cfg.reward, base)
        if self.task.reward is None:
            raise ValueError(f"the task {self.cfg.task} knows no true reward: say what to optimise by --reward")
        return self.task.reward

    def clone(self, base: Policy) -> tuple[Policy, dict[str, Any]]:
        """The start of all solvers, with the length of its responses and its score on training prompts."""
        run, folder = self.run.stage("start"), self.run.folder / "start" / "model"
        done = run.result()
        if done is None:
            start, found = base, self.measured(base)
            legs = range(0, self.cfg.warm_steps, LEG)
            for at in legs:
                if found["score"] >= self.cfg.warm_score:
                    break
                start = self.leg(start, min(LEG, self.cfg.warm_steps - at), f"start-{at // LEG}")
                found = self.measured(start)
            start.save(folder)
            done = run.finish({**found, "fingerprint": start.fingerprint()})
            run.note(f"the start scores {found['score']:.3f} on training prompts")
        start = catalog.load(folder, compute=str(base.backbone.compute).removeprefix("torch.")).freeze()
        start.name = "start"
        return start, done

    def leg(self, policy: Policy, steps: int, name: str) -> Policy:
        """Some steps of behaviour cloning."""
        cfg, known = self.cfg, self.task.demonstrations
        if known is None:
            raise ValueError(f"the task {cfg.task} has no demonstrations to clone first: set warm_steps=0")
        warm = sft.Config(
            steps=steps,
            rows=min(WARM_ROWS, len(known)),
            learning_rate=cfg.warm_learning_rate,
            warmup=min(5, steps),
            evaluate_every=steps,
            micro_tokens=cfg.micro_tokens,
        )
        return sft.train(warm, policy, known, known.select(range(min(64, len(known)))), self.run.stage(name))[0]

    def measured(self, policy: Policy) -> dict[str, float]:
        """How long responses to training prompts are, and what they score."""
        rng = torch.Generator().manual_seed(self.run.seed)
        b = policy.sample(self.task.train[:100], 4, Sampling(self.cfg.max_new_tokens), rng)
        score = self.judge(b)
        if not bool(score.verdict.any()):
            why = next(iter(score.reasons.values()), "no reason was given")
            raise ValueError(
                f"{self.judge.name} gave no verdict on any of {len(b)} responses to training prompts: {why}"
            )
        return {"mean_length": float(b.action.sum()) / len(b), "score": measures.mean(score.value, score.verdict)}

    @property
    def judged(self) -> list[Prompt]:
        """The prompts that all are judged by."""
        return list((self.task.held_out or self.task.train)[: self.cfg.held_out])

    @property
    def learned(self) -> int:
        """How many of them are among those they learn on."""
        return self.task.learned(self.judged)

    def given(self, trial: Trial) -> tuple[Given, Sequence[Any]]:
        """What a trial works on, and the prompts it is judged by."""
        cfg, task, judged = self.cfg, self.task, self.judged
        if trial.tuning:  # never on what the comparison judges by
            judged = list(task.train[-max(1, min(cfg.held_out, len(task.train) // 4)) :])
            task = without(task, judged)
        given = Given(
            start=self.start,
            task=task,
            reward=self.reward,
            tokens=cfg.budget_tokens,
            length=float(self.about["mean_length"]),
            prompts=cfg.prompts,
            samples=cfg.samples,
            max_new_tokens=cfg.max_new_tokens,
            kl=cfg.kl,
            train=cfg.train,
            micro_tokens=cfg.micro_tokens,
            rate=cfg.rate * trial.rate,
        )
        return given, judged

    def conduct(self, trial: Trial) -> dict[str, Any]:
        """Train and judge one solver; from the folder where that is done already.

        An exception of the solver is a failure that is counted. One of the disk ends the comparison: it can go on.
        """
        stage = self.run.stage(trial.name)
        if (done := stage.result()) is not None:
            return done
        solver = solvers.available()[trial.solver]
        given, judged = self.given(trial)
        found: dict[str, Any] = {
            "solver": trial.solver,
            "family": solver.family,
            "at": trial.at,
            "learning_rate": solver.learning_rate * given.rate or None,
            "failure": "",
            "message": "",
            "scores": [],
            "greedy": None,
            "kl": None,
            "tokens": 0,
        }
        try:
            trained = solver.solve(solver, given, stage)
            found |= {"tokens": trained.tokens, **self.judgement(trained.answers, judged, trial.at)}
            if all(x is None for x in found["scores"]):
                found |= {
                    "failure": "no verdict",
                    "message": f"{self.judge.name} judged none of its responses",
                    "scores": [],
                }
        except OSError:
            raise
        except FloatingPointError as fault:
            found |= {"failure": "non-finite", "message": str(fault)}
        except Exception as fault:  # whatever breaks a solver is a result about that solver
            stage.note(f"{trial.name} crashed: {fault!r}")
            found |= {"failure": "crash", "message": f"{type(fault).__name__}: {fault}"}
        found |= {"curve": curve(stage.folder) if solver.family == "online" else [], "seconds": seconds(stage.folder)}
        done = stage.finish(found)
        shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)  # of no use any more, and large
        return done

    def judgement(self, answers: Answers, prompts: Sequence[Any], seed: int) -> dict[str, Any]:
        """Scores a prompt (None where the judge gave no verdict), the greedy score, and how far the policy has moved from
        the start, nats a response.
        """
        cfg = self.cfg
        rng = torch.Generator().manual_seed(1_000_003 * self.run.seed + seed)  # the same for all solvers of a seed
        b = answers.sample(prompts, cfg.answers, Sampling(cfg.max_new_tokens), rng)
        score = self.judge(b)
        out: dict[str, Any] = {
            "scores": [None if math.isnan(x) else round(x, 6) for x in judge.by_prompt(score, cfg.answers).tolist()],
            "no_verdict": int((~score.verdict).sum()),
            "responses": len(b),
        }
        if isinstance(answers, Policy):
            greedy = answers.sample(prompts, 1, Sampling(cfg.max_new_tokens, temperature=0.0), rng)
            with contextlib.suppress(RewardFailure):  # what was sampled has its verdicts; these are a figure beside it
                said = self.judge(greedy)
                out["greedy"] = measures.mean(said.value, said.verdict) if bool(said.verdict.any()) else None
            moved = in_parts(lambda part: {"kl": answers.kl_to(self.start, part)}, b)["kl"]
            out["kl"] = float(moved.sum()) / len(b)
        return out


def without(task: Task, aside: Sequence[Prompt]) -> Task:
    """The task without some of its training prompts, nor demonstrations of them.

    Raises:
        ValueError: nothing is left to learn on.
    """
    known = {p.ids for p in aside}
    train = tuple(p for p in task.train if p.ids not in known)
    if not train:
        raise ValueError(
            f"the task {task.name} gives {len(task.train)} prompts to learn on, too few to set one aside for "
            "tuning: give it two different ones at least, or leave --tune out"
        )
    shown = task.demonstrations
    if shown is not None:
        kept = [row for row, p in enumerate(shown.prompts) if p.ids not in known]
        shown = shown.select(kept) if kept else None
    return replace(task, train=train, demonstrations=shown)


def curve(folder: Path) -> list[list[float]]:
    """Training score against tokens spent, as at most POINTS stretches."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    spent, points = 0.0, []
    for line in lines:
        spent += line.get("num_tokens", 0.0) + line.get("num_tokens_credit", 0.0)
        if "objective/scores" in line:
            points.append((spent, line["objective/scores"]))
    size = math.ceil(len(points) / POINTS) if points else 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in parts]


def seconds(folder: Path) -> float:
    """Wall-clock of the steps, those of an earlier attempt included."""
    path = folder / "times.jsonl"
    return sum(json.loads(line)["seconds"] for line in path.read_text().splitlines()) if path.exists() else 0.0


# ------------------------------------------------------------ running the trials


def conduct_all(lab: Lab, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every trial's result, in order; those not yet done are done, one after the other or in worker processes."""
    line = [sys.executable, "-m", "tokenmdp.lab.compare", str(lab.run.folder)]
    orders = [asdict(trial) for trial in trials]
    workers.conduct(
        lab.run,
        "comparison",
        orders,
        lambda o: Trial(**o).name,
        lambda o: lab.conduct(Trial(**o)),
        line,
        lab.cfg.workers,
        in_short,
    )
    return [lab.conduct(trial) for trial in trials]


def in_short(found: Mapping[str, Any]) -> str:
    """A few words about a trial that has ended."""
    how = found["failure"] or f"score {ranking.mean(found['scores']):.3f}"
    return f"{how}, {found['tokens']} tokens in {found['seconds']:.1f} s"


def joined(folder: Path) -> Lab:
    """The lab of the comparison in `folder`, for a process that shares its trials."""
    run = workers.run_of(folder)
    return Lab(config.build(Config, run.config, str(folder / "config.json")), run)


def work(folder: Path) -> None:
    """Be one of the processes that share the trials of the comparison in `folder`."""

    def hired() -> Callable[[Any], Any]:
        lab = joined(folder)
        return lambda order: lab.conduct(Trial(**order))

    workers.serve(hired)


def judged_start(lab: Lab) -> None:
    """Judge the start at every seed, before anything trains: all else is told against it.

    Raises:
        ValueError: at some seed the judge gave no verdict on any held-out prompt, or failed.
    """
    trials = [Trial("start", seed, 1.0) for seed in range(lab.cfg.seeds)]
    for trial, found in zip(trials, conduct_all(lab, trials), strict=True):
        if found["failure"]:
            raise ValueError(
                f"the start cannot be judged on the held-out prompts at seed {trial.at} ({found['failure']}: "
                f"{found['message']}), so there is nothing to compare with: mend the judge {lab.judge.name}, and run into "
                "another folder"
            )


def rates(lab: Lab, names: Sequence[str]) -> dict[str, float]:
    """What each solver's learning rate is multiplied with: 1, or the best of the grid; of equals the smallest."""
    known = solvers.available()
    if not lab.cfg.tune:
        return dict.fromkeys(names, 1.0)
    trials = [
        Trial(name, at, rate, tuning=True)
        for name in names
        if known[name].learning_rate
        for at, rate in enumerate(GRID)
    ]
    best: dict[str, tuple[float, float]] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    for trial, found in zip(trials, conduct_all(lab, trials), strict=True):
        tried.setdefault(trial.solver, []).append(found)
    level = [found for runs in tried.values() for found in (ranking.shared(runs) if runs[0]["scores"] else runs)]
    for trial, found in zip(trials, level, strict=True):
        score = ranking.mean(found["scores"]) if found["scores"] else -math.inf
        if trial.solver not in best or score > best[trial.solver][0]:
            best[trial.solver] = (score, trial.rate)
    return {name: best[name][1] if name in best else 1.0 for name in names}


# ------------------------------------------------------------ the verb


def chosen(spec: str) -> list[str]:
    """The solvers that were asked for, the baselines first.

    Raises:
        ValueError: there is no such solver, with a suggestion; or none was asked for.
    """
    known = solvers.available()
    asked = list(known) if spec.strip() == "all" else [name.strip() for name in spec.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise ValueError(f"there is no solver {name!r}{config.did_you_mean(name, known)}")
    if not asked:
        raise ValueError(
            f"no solver was asked for: --solvers takes names with commas between, or all: {', '.join(known)}"
        )
    return list(dict.fromkeys([*BASELINES, *asked]))


def check(cfg: Config) -> None:
    """Raises ValueError for sizes below 1."""
    for name in ("seeds", "budget_tokens", "prompts", "samples", "held_out", "answers", "workers"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}; it must be at least 1")
    if cfg.warm_steps < 0 or not cfg.rate > 0:
        raise ValueError(f"warm_steps={cfg.warm_steps}, rate={cfg.rate}: the first is at least 0, the second positive")


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Run (or go on with) every solver at every seed; write summary.json and report.html, print table and verdict."""
    check(cfg)
    names = chosen(cfg.solvers)
    lab = Lab(cfg, run)
    if seen := lab.learned:
        run.note(
            f"warning: {seen} of the prompts judged are among those that the task {lab.task.name} gives to learn on, so "
            "solvers are judged on prompts they learned on"
        )
    if lab.task.demonstrations is None:
        names.remove("sft-more")  # there is nothing to clone
    judged_start(lab)
    scaled = rates(lab, names)
    # Seed by seed, so that an unfinished comparison is one with fewer seeds and not one with fewer solvers.
    trials = [Trial(name, seed, scaled[name]) for seed in range(cfg.seeds) for name in names]
    found = conduct_all(lab, trials)
    results = {name: [r for t, r in zip(trials, found, strict=True) if t.solver == name] for name in names}
    summary = summed_up(cfg, run, lab, results)
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    page = report.build(run.folder)
    for line in (*table(summary), *summary["verdict"]):
        Console(width=None if sys.stdout.isatty() else 150).print(line)
    first = summary["rows"][0]
    return {"highest": f"{first['solver']}, {first['iqm']['mean']:.3f}", "report": str(page)}


def summed_up(cfg: Config, run: Run, lab: Lab, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the page and the results file are made of."""
    rows = ranking.rows_of(results, BASELINES)
    asked = {k: v for k, v in config.plain(cfg).items() if v != getattr(Config, k)}
    flags = [word for k, v in asked.items() for word in (f"--{k.replace('_', '-')}", *([] if v is True else [str(v)]))]
    tuned = "three learning rates for each solver" if cfg.tune else "none: learning rates as in the solvers' table"
    return {
        "kind": "compare",
        "title": f"Solvers side by side: {cfg.task}",
        "command": shlex.join(["tokenmdp", "compare", *flags, "--seed", str(run.seed)]),
        "task": cfg.task,
        "model": cfg.model,
        "reward": lab.reward.name,
        "judge": lab.judge.name,
        "seed": run.seed,
        "seeds": cfg.seeds,
        "budget_tokens": cfg.budget_tokens,
        "held_out": len(results["start"][0]["scores"]),
        "learned": lab.learned,
        "answers": cfg.answers,
        "tuning": tuned,
        "start": lab.about,
        "verdict": ranking.verdict(rows, cfg.seeds),
        "rows": rows,
    }


def table(summary: dict[str, Any]) -> Iterator[Table]:
    """The rows for a terminal."""

    def span(interval: dict[str, Any] | None, digits: int = 3) -> str:
        if interval is None:
            return "–"
        ends = "" if interval["low"] is None else f" [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
        return f"{interval['mean']:.{digits}f}{ends}"

    shown = Table(title=f"{summary['title']}, {summary['budget_tokens']:,} tokens, {summary['seeds']} seeds")
    shown.add_column("solver")
    for name in (
        "IQM [95 %]",
        "gain over start",
        "P(> start)",
        "P(> sft-more)",
        "no verdict",
        "failed",
        "tokens",
        "seconds",
    ):
        shown.add_column(name, justify="right")
    for row in summary["rows"]:
        won = [span(row["improvement"].get(name), 2) for name in BASELINES]
        cost = [f"{row[key] or 0:,.0f}" for key in ("tokens", "seconds")]
        unjudged = "–" if row["no_verdict"] is None else f"{100 * row['no_verdict']:.1f} %"
        failed = f"{row['failed']}/{row['runs']}"
        shown.add_row(row["solver"], span(row["iqm"]), span(row["gain"]), *won, unjudged, failed, *cost)
    yield shown


if __name__ == "__main__":
    work(Path(sys.argv[1]))
