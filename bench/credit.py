"""Credit assignment: does any scheme know better than `uniform` which token earned the score, and does it matter?

    python bench/credit.py --json docs/results/credit.json

The task is to reverse words of four letters with the tiny character model, first cloned until it is right about a third
of the time; a verifier says 0 or 1, the same for every scheme. What the schemes read was learned from that start: a
reward model from pairs of a right and a wrong response, put on the verifier's scale (`attention`, `shaped`), a policy
from the same pairs by DPO (`implicit`), a process reward from labels by resets, a step a token (`process`).

1. Error. From every state along responses of the start, 256 futures give V, and so A(s_t, a_t) = V(s_{t+1}) − V(s_t).
   For each scheme: the mean squared error of its token rewards r_t as A, and of score − Σ_{u≥t} r_u as V(s_t). Baseline
   of all that have none of their own: the mean score of the prompt's other seven responses. Intervals over responses.
2. Learning. PPO with each scheme, the same number of responses, five seeds: the mean verifier's score over the run
   (area) and over its last quarter (final). The second column counts the tokens `branch` draws besides: its run ends
   where all tokens together reach what `uniform` drew in all. Intervals of differences from `uniform` over seeds, paired.

Stated before any run, on 95 % intervals of the difference from `uniform`:
    better    in error, the whole interval is below 0; in learning, above 0
    worse     the other way round
    otherwise no difference was found, and it is said that the scheme does not beat it

Finished parts are kept in --runs and not taken again; a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import common
from tokenmdp import stats, tasks
from tokenmdp.functional import returns
from tokenmdp.models import catalog, tree
from tokenmdp.models.heads import Critic
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import dpo, ppo, process_reward, reward_model, sft
from tokenmdp.rewards import assign, steps
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import Task, data
from tokenmdp.types import Batch, Pairs

CONTROL = "uniform"
OWN_BASELINE = ("shaped", "branch")


@dataclass(frozen=True)
class Size:
    """How much is done; everything else follows from it."""

    length: int = 4  # letters of a word
    clone_steps: int = 120  # of behaviour cloning, before anything else: right about a third of the time
    pair_prompts: int = 600  # prompts answered eight times, for pairs and step labels
    learn_steps: int = 120  # of DPO
    epochs: int = 4  # of the reward model and the process reward
    states_of: int = 96  # responses along which V is measured
    futures: int = 256  # from each state
    seeds: int = 5
    ppo_steps: int = 60
    prompts: int = 32  # a phase, four responses each


QUICK = Size(
    length=3,
    clone_steps=60,
    pair_prompts=24,
    learn_steps=4,
    epochs=1,
    states_of=6,
    futures=8,
    seeds=2,
    ppo_steps=3,
    prompts=4,
)
SAMPLING = Sampling(max_new_tokens=6)


@dataclass(frozen=True)
class World:
    """What every arm starts from."""

    start: Policy
    task: Task
    folder: Path

    def schemes(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """For each arm the credit setting, and what else of PPO's config differs."""
        rm, preferred, steps_ = (self.folder / name for name in ("rm", "dpo", "prm"))
        return {
            "last": ("last", {}),
            "uniform": ("uniform", {}),
            "attention": (f"attention:{rm}", {}),
            "attention, half": (f"attention:{rm}@0.5", {}),
            "shaped": (f"shaped:{rm}", {}),
            "implicit": (f"implicit:{preferred}@0.1", {}),
            "process": (f"process:{steps_}", {}),
            "branch:4": ("branch:4", {}),
            "branch:4, λ = 0": ("branch:4", {"lam": 0.0}),
        }


# -- what comes before -------------------------------------------------------------------------------------------------


def prepare(folder: Path, size: Size) -> tuple[World, dict[str, Any]]:
    """The start, the reward model, the preferred policy and the process reward: made once, then read."""
    done = folder / "prepared.json"
    blank = catalog.load("tiny")
    task = tasks.load("reversal", blank, length=size.length, letters=8)
    if not done.is_file():
        facts = _make(folder, size, blank, task)
        done.write_text(json.dumps(facts, indent=1) + "\n")
    start = catalog.load(folder / "start").freeze()
    return World(start, task, folder), json.loads(done.read_text())


def _make(folder: Path, size: Size, blank: Policy, task: Task) -> dict[str, Any]:
    assert task.demonstrations is not None
    assert task.reward is not None
    rng = torch.Generator().manual_seed(0)
    with _run(folder, "sft") as run:
        clone = sft.Config(steps=size.clone_steps, rows=32, learning_rate=3e-3, evaluate_every=10**6)
        learned, kept = data.split(task.demonstrations, 0.05, rng)
        start, _ = sft.train(clone, blank, learned, kept, run)
    start.freeze()
    start.save(folder / "start")
    prompts = task.draw(size.pair_prompts, rng)
    answers = start.sample(prompts, 8, SAMPLING, rng)
    right = task.reward(answers).value > 0.5
    pairs, kept_pairs = data.split(_pairs(answers, right), 0.1, rng)
    with _run(folder, "rm-run") as run:
        fit = reward_model.Config(epochs=size.epochs, learning_rate=1e-3, head_learning_rate=1e-2, micro_tokens=4096)
        rm, said = reward_model.train(fit, start, pairs, kept_pairs, run)
    _rescale(rm, answers, right)
    rm.save(folder / "rm")
    with _run(folder, "dpo-run") as run:
        prefer = dpo.Config(steps=size.learn_steps, learning_rate=3e-4, evaluate_every=10**6, micro_tokens=4096)
        preferred, _ = dpo.train(prefer, start, pairs, run)
    preferred.save(folder / "dpo")
    labels = steps.label(answers, start, task.reward, 8, SAMPLING, rng, delimiter="")
    with _run(folder, "prm-run") as run:
        judge = process_reward.Config(
            delimiter="", epochs=size.epochs, rows=64, learning_rate=1e-3, head_learning_rate=1e-2, micro_tokens=4096
        )
        prm, steps_said = process_reward.train(judge, start, answers, labels.label, labels.mask, run)
    prm.save(folder / "prm")
    return {
        "start_score": float(right.float().mean()),
        "reward_model_accuracy": said["accuracy"],
        "step_accuracy": steps_said["step_accuracy"],
        "right_answers": int(labels.right.sum()),
        "right_answers_with_wrong_steps": int(labels.wrong_steps().sum()),
        "pairs": len(pairs),
    }


def _rescale(rm: RewardModel, answers: Batch, right: Tensor) -> None:
    """Put the reward model's scores on the verifier's scale, mean and spread: as a potential they are added to it."""
    rm.normalise(answers)
    mean, spread = float(right.float().mean()), float(right.float().std(unbiased=False))
    rm.scale = rm.scale / max(spread, 1e-6)
    rm.shift = rm.shift - mean * rm.scale


def _run(folder: Path, name: str) -> Run:
    return Run.open(folder / "parts" / name, config={}, seed=0, resume=True)


def _pairs(answers: Batch, right: Tensor) -> Pairs:
    """Right and wrong responses to the same prompt, side by side, each used at most once."""
    chosen, rejected = [], []
    for group in answers.group.unique():
        mine = (answers.group == group).nonzero()[:, 0]
        for good, bad in zip(mine[right[mine]].tolist(), mine[~right[mine]].tolist(), strict=False):
            chosen.append(good)
            rejected.append(bad)
    if len(chosen) < 2:
        raise ValueError(
            f"{len(chosen)} pairs of a right and a wrong response to one prompt: clone the start for more or fewer steps"
        )
    return Pairs(answers.select(chosen), answers.select(rejected), torch.zeros(len(chosen)))


# -- 1. error ----------------------------------------------------------------------------------------------------------


def errors(world: World, size: Size, bar: Progress) -> dict[str, Any]:
    """For each scheme the squared errors of its token rewards and of the values they imply, a number a response."""
    reward = world.task.reward
    assert reward is not None
    rng = torch.Generator().manual_seed(1)
    b = world.start.sample(world.task.draw(size.states_of, rng), 8, SAMPLING, rng)
    score = reward(b)
    first = torch.arange(0, len(b), 8)  # V is measured along the first response to each prompt
    judged = b.select(first)
    value = truth(world, judged, size.futures, rng, bar)
    action, won = judged.action, score.value[first]
    following = _following(value, action, won)
    advantage = torch.where(action, following - value, 0.0)
    out: dict[str, Any] = {"truth": {"responses": size.states_of, "states": int(action.sum()), "futures": size.futures}}
    noise = (value * (1 - value))[action].mean() / max(1, size.futures - 1)
    out["truth"]["mean_variance_of_a_value"] = float(noise)
    found: dict[str, dict[str, Any]] = {}
    for name, (spec, changes) in world.schemes().items():
        if changes:  # the same token rewards as the arm it varies
            continue
        scheme = assign.load(spec, reward, world.start, SAMPLING)
        own = spec.startswith(OWN_BASELINE)
        baseline = 0.0 if own else score.value - returns.leave_one_out(score.value, b.group)
        paid = scheme.paid(b, score)
        reward_t = scheme(b, paid, paid.value - baseline, world.start, torch.Generator().manual_seed(2))
        given = reward_t[first, : action.shape[1]]
        implied = won[:, None] - returns.discounted(given, action)
        found[name] = {
            "advantage": _per_response((given - advantage).square(), action),
            "value": _per_response((implied - value).square(), action),
            "correlation": _correlation(given[action], advantage[action]),
        }
    for name, row in found.items():
        out[name] = {
            "correlation_of_rewards_with_advantage": row["correlation"],
            **{f"{what}_mse": _interval(row[what]) for what in ("advantage", "value")},
        }
        if name != CONTROL:
            for what in ("advantage", "value"):
                out[name][f"{what}_minus_{CONTROL}"] = _difference(row[what], found[CONTROL][what])
    return out


def truth(world: World, judged: Batch, futures: int, rng: torch.Generator, bar: Progress) -> Tensor:
    """[B, L] V of the state before each token, from many futures, a few responses at a time."""
    assert world.task.reward is not None
    out = torch.zeros(judged.tokens.shape)
    at_once = max(1, 2048 // futures)
    task = bar.add_task("values by resets", total=len(judged))
    for begin in range(0, len(judged), at_once):
        rows = torch.arange(begin, min(begin + at_once, len(judged)))
        part = judged.select(rows)
        at = [row.nonzero()[:, 0].tolist() for row in part.action]
        drawn = tree.branch(world.start, part, at, futures, SAMPLING, rng)
        said = world.task.reward(drawn.batch)
        out[rows, : part.tokens.shape[1]] = returns.branch(
            said.value, drawn.parent, drawn.at, part.action, said.verdict
        )
        bar.advance(task, len(rows))
    return out


def _following(value: Tensor, action: Tensor, end: Tensor) -> Tensor:
    """V of the state after each action: the next state's, and after the last action the outcome."""
    after, columns = end, []
    for t in reversed(range(value.shape[1])):
        columns.append(after)
        after = torch.where(action[:, t], value[:, t], after)
    return torch.stack(columns[::-1], dim=1)


def _per_response(squared: Tensor, action: Tensor) -> np.ndarray:
    return (torch.where(action, squared, 0.0).sum(1) / action.sum(1).clamp(min=1)).double().numpy()


def _correlation(x: Tensor, y: Tensor) -> float | None:
    if float(x.std()) == 0 or float(y.std()) == 0:
        return None
    return round(float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1]), 4)


# -- 2. learning -------------------------------------------------------------------------------------------------------


def learn(world: World, size: Size, name: str, seed: int, folder: Path) -> dict[str, list[float]]:
    """One arm at one seed: score and tokens, step by step."""
    spec, changes = world.schemes()[name]
    slug = re.sub(r"[^\w]+", "_", name)
    kept = folder / "arms" / f"{slug}-{seed}.json"
    if not kept.is_file():
        assert world.task.reward is not None
        cfg = ppo.Config(
            steps=size.ppo_steps, prompts=size.prompts, samples=4, max_new_tokens=SAMPLING.max_new_tokens,
            learning_rate=3e-4, critic_learning_rate=3e-3, kl=0.0, micro_tokens=8192, credit=spec,
        )  # fmt: skip
        cfg = replace(cfg, **changes)
        critic = Critic(world.start.backbone.twin("head"))
        with Run.open(folder / "arms" / f"{slug}-{seed}", config=asdict(cfg), seed=seed, resume=True) as run:
            ppo.train(cfg, world.start, critic, world.task.reward, world.task, run)
            lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        names = {"score": "objective/scores", "tokens": "num_tokens", "besides": "num_tokens_credit"}
        kept.write_text(json.dumps({ours: [line[theirs] for line in lines] for ours, theirs in names.items()}) + "\n")
    return dict(json.loads(kept.read_text()))


def curves(world: World, size: Size, folder: Path, bar: Progress) -> dict[str, Any]:
    """All arms at all seeds, and their differences from the control."""
    names = list(world.schemes())
    task = bar.add_task("learning", total=len(names) * size.seeds)
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in names}
    for seed in range(size.seeds):  # seed by seed: what is there when it is stopped compares all arms
        for name in names:
            bar.update(task, description=f"{name}, seed {seed}")
            runs[name].append(learn(world, size, name, seed, folder))
            bar.advance(task)
    budget = [sum(run["tokens"]) for run in runs[CONTROL]]
    figures = {
        name: {
            "area": [_mean_until(r, r["tokens"], limit) for r, limit in zip(rows, budget, strict=True)],
            "area_counting_all": [_mean_until(r, _all_tokens(r), limit) for r, limit in zip(rows, budget, strict=True)],
            "final": [float(np.mean(r["score"][-max(1, len(r["score"]) // 4) :])) for r in rows],
            "tokens": [sum(r["tokens"]) for r in rows],
            "tokens_besides": [sum(r["besides"]) for r in rows],
            "curve": np.mean([r["score"] for r in rows], axis=0).round(4).tolist(),
        }
        for name, rows in runs.items()
    }
    for name, row in figures.items():
        for what in ("area", "area_counting_all", "final"):
            row[f"{what}_mean"] = round(float(np.mean(row[what])), 4)
            if name != CONTROL:
                row[f"{what}_minus_{CONTROL}"] = _difference(row[what], figures[CONTROL][what])
    return figures


def _all_tokens(run: Mapping[str, list[float]]) -> list[float]:
    return [a + b for a, b in zip(run["tokens"], run["besides"], strict=True)]


def _mean_until(run: Mapping[str, list[float]], spent: Sequence[float], budget: float) -> float:
    """The mean score of the steps whose tokens fit the budget; the first step always does."""
    inside = max(1, int((np.cumsum(spent) <= budget).sum()))
    return float(np.mean(run["score"][:inside]))


# -- words -------------------------------------------------------------------------------------------------------------


def _interval(values: Sequence[float] | np.ndarray) -> list[float]:
    if np.ptp(values) == 0:
        return [float(np.mean(values))] * 3
    return [round(x, 5) for x in stats.bootstrap_mean(values)]


def _difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> list[float]:
    """Mean of a − b with its 95 % interval."""
    return _interval(np.asarray(a) - np.asarray(b))


def verdict(name: str, what: str, difference: Sequence[float], less_is_better: bool) -> str:
    """What the interval of a difference from the control says, in words."""
    mean, low, high = difference
    if low == high:
        return f"{name} and {CONTROL} differ by {mean:.4g} in {what} everywhere, so there is no interval and no verdict"
    if low <= 0 <= high:
        word = "does not differ from" if name == "last" else "does not beat"
    else:
        word = "beats" if (high < 0) == less_is_better else "is worse than"
    return f"{name} {word} {CONTROL} in {what}: difference {mean:.4g} [{low:.4g}, {high:.4g}]"


def verdicts(error: Mapping[str, Any], learning: Mapping[str, Any]) -> list[str]:
    """A sentence for every scheme and measure."""
    out = []
    for name, row in error.items():
        for what, words in (("advantage", "squared error as an advantage"), ("value", "squared error of its values")):
            if f"{what}_minus_{CONTROL}" in row:
                out.append(verdict(name, words, row[f"{what}_minus_{CONTROL}"], less_is_better=True))
    for name, row in learning.items():
        if name != CONTROL:
            out.append(verdict(name, "mean score at equal responses", row[f"area_minus_{CONTROL}"], False))
            if sum(row["tokens_besides"]):
                out.append(
                    verdict(name, "mean score at equal tokens in all", row[f"area_counting_all_minus_{CONTROL}"], False)
                )
    return out


def show(error: Mapping[str, Any], learning: Mapping[str, Any]) -> None:
    """Both tables."""
    table = Table(title="credit assignment", title_justify="left")
    for column in (
        "",
        "MSE as A",
        "MSE of V",
        "corr. with A",
        "area",
        "area, all tokens",
        "final",
        "tokens",
        "besides",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in learning.items():
        seen = error.get(name)
        first = ["", "", ""]
        if seen:
            r = seen["correlation_of_rewards_with_advantage"]
            first = [f"{seen['advantage_mse'][0]:.4f}", f"{seen['value_mse'][0]:.4f}", "–" if r is None else f"{r:.2f}"]
        last = [f"{np.mean(row[what]):,.0f}" for what in ("tokens", "tokens_besides")]
        table.add_row(name, *first, *(f"{row[f'{w}_mean']:.3f}" for w in ("area", "area_counting_all", "final")), *last)
    Console(width=140).print(table)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--runs", type=Path, default=Path("runs/credit"), help="where finished parts are kept")
    args: argparse.Namespace = out.parse_args(argv)
    size = QUICK if args.quick else Size()
    folder: Path = args.runs / ("quick" if args.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    settled = folder / "size.json"
    if settled.is_file() and json.loads(settled.read_text()) != asdict(size):
        raise SystemExit(f"{folder} holds a run of another size: remove it, or give another --runs")
    settled.write_text(json.dumps(asdict(size)) + "\n")
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    world, facts = prepare(folder, size)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        measured = folder / "errors.json"
        if not measured.is_file():
            measured.write_text(json.dumps(errors(world, size, bar), indent=1) + "\n")
        error = json.loads(measured.read_text())
        learning = curves(world, size, folder, bar)
    found = {
        "_meta": {
            "command": common.command(),
            **common.machine(),
            "size": asdict(size),
            "seeds": list(range(size.seeds)),
        },
        "prepared": facts,
        "error": error,
        "learning": learning,
        "verdicts": verdicts(error, learning),
    }
    common.write(args.json, found)
    show(error, learning)
    for sentence in found["verdicts"]:
        print(sentence)
    return found


if __name__ == "__main__":
    main()
