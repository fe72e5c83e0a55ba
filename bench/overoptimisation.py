"""Gold and proxy against √KL: what optimising a learned reward gains, and where it stops gaining.

    python bench/overoptimisation.py --part toy  --json docs/results/overoptimisation.json --svg docs/results/overoptimisation.svg
    python bench/overoptimisation.py --part real --json docs/results/overoptimisation.json --svg docs/results/overoptimisation.svg

The second adds its part to the file of the first.

    toy          the untrained tiny model writes a dozen characters. Each character has a value; gold is the sum over the
                 different ones less ½ for every repeat. The start hardly repeats itself, so no label tells of repeats: what
                 an optimiser does to such a proxy is known beforehand, and the measurement must show it
    real         controlled sentiment on the embedded model after behaviour cloning, for as long as an hour allows

    labels       noisy gold preferences between two responses to each of few prefixes, P(first) = σ(3 (gold₁ − gold₂))
    proxies      from the same labels: `single`, one linear Bradley–Terry head on the frozen start's mean state, and
                 ensembles of five such heads, each on a resample of the pairs: `mean`, `min`, `mean − 0.5 variance`
    best of n    held-out prefixes, many samples each, drawn once for all proxies; gold of the proxy's favourite among n,
                 for every n, unbiased (order statistics), at the analytic KL
    PPO          against `single` and against ensembles, no KL in the reward; along training the policy answers the same
                 held-out prefixes, and its KL to the start is summed exactly over the vocabulary at every state visited

Both published forms are fitted to gold's mean curve over the seeds, R(d) = d (α − β d) and R(d) = d (α − β log d) with
d = √KL: α, β, R² and the peak with intervals that resample prompts. Gains are over the start, in standard deviations of
the respective reward over the start's samples.

Stated before any run, and judged on each part with `single` unless said otherwise:

    best_of_n_form   the best-of-n form explains best-of-n: R² at least 0.9
    rl_form          the RL form explains PPO: R² at least 0.8
    overoptimised    PPO loses gold: what gold falls from its highest point to the end of training, the point chosen on one
                     half of the prompts and the fall measured on the other, has an interval above 0
    proxy_rises      while the proxy's mean gain at the end is above that at gold's highest point
    ensemble         PPO against `mean − 0.5 variance` ends with more gold than against `single`: paired by prompt, mean over
                     the seeds, lower end above 0

A threshold that is missed is a result and stays in the file. Run folders go on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import string
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import common
from reward_ranking import ROWS, above, answered, difference, embedded, labelled, rounded
from tokenmdp import stats
from tokenmdp.functional import overoptimisation
from tokenmdp.functional.overoptimisation import Form
from tokenmdp.lab import concordance, demo, optimised
from tokenmdp.lab.report.ink import canvas, colour, label_axes, sheet, svg
from tokenmdp.models import catalog
from tokenmdp.models.heads import Critic
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import ppo, sft
from tokenmdp.rewards import embedding_head
from tokenmdp.rewards.embedding_head import Head
from tokenmdp.rewards.ensemble import combine
from tokenmdp.run import Run
from tokenmdp.stats import Array
from tokenmdp.tasks import Task, sentiment
from tokenmdp.types import Batch, Prompt, Reward, Score

VARIANCE = 0.5  # λ, in 1/spreads of a member over the start's samples
MEMBERS = 5
ARMS: dict[str, tuple[int, str, float]] = {  # heads, rule, price of their variance
    "single": (1, "mean", 0.0),
    "mean": (MEMBERS, "mean", 0.0),
    "min": (MEMBERS, "min", 0.0),
    "mean - variance": (MEMBERS, "mean", VARIANCE),
}
FORM: dict[str, Form] = {"best_of_n": "best_of_n", "ppo": "rl"}  # what was published for which way of optimising
BON_R2, RL_R2 = 0.9, 0.8
THRESHOLDS = {
    "best_of_n_form": f"R² of the best-of-n form on best-of-n, single proxy, at least {BON_R2}",
    "rl_form": f"R² of the RL form on PPO, single proxy, at least {RL_R2}",
    "overoptimised": "gold's fall from its highest point to the end of PPO, single proxy, interval above 0",
    "proxy_rises": "the single proxy's gain at PPO's end above that at gold's highest point",
    "ensemble": "PPO's last gold against mean − variance less against single, interval above 0",
}


@dataclass(frozen=True)
class Size:
    """What the parts differ in."""

    task: str  # sentiment | characters
    sft: sft.Config | None
    ppo: ppo.Config
    labels: int  # pairs paid for, a seed
    prompts: int  # held-out prefixes judged
    samples: int  # of the start, each: n goes up to here
    answers: int  # of the policy in training, each, at every look
    looks: tuple[int, ...]  # updates of PPO after which it is looked at
    arms: tuple[str, ...]  # that PPO is run against


def _looks(steps: int, count: int) -> tuple[int, ...]:
    """1, …, `steps`, about evenly spaced in their roots, as √KL grows at first."""
    return tuple(sorted({max(1, round(steps * (i / count) ** 2)) for i in range(1, count + 1)}))


TINY, REAL = demo.SIZES["tiny"], demo.SIZES["full"]
SIZES = {
    "toy": Size(
        task="characters",
        sft=None,
        ppo=replace(TINY.ppo, steps=48, max_new_tokens=12, kl=0.0),
        labels=200,
        prompts=48,
        samples=128,
        answers=8,
        looks=_looks(48, 12),
        arms=("single", "min", "mean - variance"),
    ),
    "real": Size(
        task="sentiment",
        sft=REAL.sft,
        ppo=replace(REAL.ppo, steps=24, kl=0.0, train="top-6", learning_rate=1e-4),
        labels=200,
        prompts=48,
        samples=64,
        answers=2,
        looks=(1, 3, 6, 10, 16, 24),
        arms=("single", "mean - variance"),
    ),
}
QUICK = replace(
    SIZES["toy"],
    ppo=replace(SIZES["toy"].ppo, steps=4, prompts=4, samples=2),
    labels=24,
    prompts=6,
    samples=8,
    answers=2,
    looks=(1, 2, 4),
    arms=("single", "mean - variance"),
)

# ------------------------------------------------------------ proxies


class Proxy:
    """Linear heads on the mean state of a frozen body, as one reward.

    The body is read once a batch for all heads. Heads are normalised over the start's samples, as `combine` needs.
    """

    def __init__(self, body: Policy, heads: Sequence[tuple[Head, float, float]], rule: str, penalty: float) -> None:
        self.body, self.heads, self.rule, self.penalty = body, heads, rule, penalty
        self.name = f"{rule} of {len(heads)}"

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """[B] the score of embeddings."""
        each = [(head.score(states) - shift) / scale for head, shift, scale in self.heads]
        return combine(torch.stack(each), self.rule, self.penalty)

    def __call__(self, batch: Batch) -> Score:
        return Score.of(self.of(embedded(self.body, batch)).to(batch.tokens.device))


def proxies(body: Policy, states: torch.Tensor, gold: Array, start: torch.Tensor, seed: int) -> dict[str, Proxy]:
    """Every arm's proxy from the same labels.

    Args:
        states: [2N, D] embeddings of two responses to each of N prefixes; gold: [2N] what the labels are drawn by.
        start: [M, D] embeddings of the start's samples, over which heads are normalised.
    """
    chosen, rejected = labelled(gold, "same", 3.0, seed)
    rng = np.random.default_rng([seed, 7])
    fitted: list[tuple[Head, float, float]] = []
    for member in range(MEMBERS + 1):  # the first has each pair once, the others a resample
        rows = rng.integers(len(chosen), size=len(chosen)) if member else np.arange(len(chosen))
        head = embedding_head.fit(states[chosen[rows]], states[rejected[rows]])
        over = head.score(start)
        fitted.append((head, float(over.mean()), max(float(over.std(unbiased=False)), 1e-9)))
    return {
        arm: Proxy(body, fitted[:1] if count == 1 else fitted[1:], rule, penalty)
        for arm, (count, rule, penalty) in ARMS.items()
    }


# ------------------------------------------------------------ PPO, looked at along the way


class Watched(Policy):
    """A start that remembers the policy PPO makes of it, so that this can be looked at in training."""

    made: Policy

    def twin(self, train: str, name: str | None = None) -> Policy:
        self.made = super().twin(train, name)
        return self.made


class Look:
    """Gold, for PPO's record, which at chosen updates has the policy answer held-out prefixes first."""

    name = "gold"

    def __init__(
        self, gold: Reward, proxy: Proxy, start: Watched, asked: Sequence[Prompt], size: Size, stage: Run
    ) -> None:
        self.gold, self.proxy, self.start, self.asked, self.size, self.stage = gold, proxy, start, asked, size, stage

    def __call__(self, batch: Batch) -> Score:
        log = self.stage.folder / "metrics.jsonl"  # PPO asks once a phase, before it logs the phase
        updates = 1 + (len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0)
        if updates in self.size.looks:
            self.look(updates)
        return self.gold(batch)

    def look(self, updates: int) -> None:
        """Append what the policy is worth now to curve.jsonl."""
        policy, n = self.start.made, self.size.answers
        rng = torch.Generator().manual_seed(1_000 * self.stage.seed + updates)
        sampling = Sampling(max_new_tokens=self.size.ppo.max_new_tokens)
        many = max(1, ROWS // n)
        parts = [policy.sample(self.asked[i : i + many], n, sampling, rng) for i in range(0, len(self.asked), many)]
        b = Batch.concat(parts)
        nats = in_parts(lambda part: {"kl": policy.kl_to(self.start, part)}, b)["kl"].sum(-1)
        line: dict[str, Any] = {"updates": updates, "kl": float(nats.mean())}
        for name, reward in (("gold", self.gold), ("proxy", self.proxy)):
            line[name] = reward(b).value.double().view(-1, n).mean(1).tolist()
        self.stage.append("curve.jsonl", line)


def optimise(
    run: Run, name: str, start: Policy, proxy: Proxy, gold: Reward, task: Task, asked: Sequence[Prompt], size: Size
) -> list[dict[str, Any]]:
    """PPO against a proxy; the looks taken along the way."""
    stage = run.stage(name)
    if stage.result() is None:
        watched = Watched(start.model, start.tokenizer, start.name, str(start.backbone.compute).removeprefix("torch."))
        watched.freeze()
        critic = Critic(start.backbone.twin(size.ppo.critic_train))
        ppo.train(size.ppo, watched, critic, proxy, task, stage, Look(gold, proxy, watched, asked, size, stage))
        stage.finish({})
    return [json.loads(line) for line in (stage.folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------ a part


class Values:
    """The toy's gold: what the different characters of a response are worth together, less a price for every repeat."""

    name = "values"

    def __init__(self, repeat: float = 0.5, seed: int = 0) -> None:
        self.repeat = repeat
        characters = [c for c in string.printable if c.isprintable()]
        drawn = np.random.default_rng(seed).normal(size=len(characters))
        self.value = dict(zip(characters, drawn.tolist(), strict=True))

    def of(self, text: str) -> float:
        said = set(text)
        return sum(self.value.get(c, 0.0) for c in sorted(said)) - self.repeat * (len(text) - len(said))

    def __call__(self, batch: Batch) -> Score:
        return Score.of(torch.tensor([self.of(text) for text in batch.texts], device=batch.tokens.device))


def characters(policy: Policy, prompts: int = 2000, seed: int = 0) -> Task:
    """The toy: four letters to go on from, and `Values`; nothing held out is a training prompt."""
    rng = np.random.default_rng(seed)
    texts = dict.fromkeys("".join(rng.choice(list(string.ascii_lowercase), 4)) for _ in range(prompts))
    asked = tuple(policy.prompt(text, row) for row, text in enumerate(texts))
    return Task(name="characters", train=asked[200:], held_out=asked[:200], reward=Values())


def begun(run: Run, size: Size) -> tuple[Policy, Task]:
    """The policy that everything starts from, and the task."""
    if size.task == "characters":
        policy = catalog.tiny().freeze()
        return policy, characters(policy)
    policy = catalog.load(REAL.model).freeze()
    task = sentiment.load(policy, REAL.prefix_tokens, size.ppo.max_new_tokens, seed=0)
    if size.sft is None:
        return policy, task
    stage, shown = run.stage("sft"), task.demonstrations
    assert shown is not None, "the sentiment task brings demonstrations"
    if stage.result() is None:
        kept = max(32, len(shown) // 20)
        clone, _ = sft.train(size.sft, policy, shown.select(range(kept, len(shown))), shown.select(range(kept)), stage)
        clone.save(stage.folder / "model")
        stage.finish({})
    clone = catalog.load(stage.folder / "model").freeze()
    clone.name = "sft"
    return clone, task


def measured(run: Run, size: Size, seeds: Sequence[int]) -> dict[str, Any]:
    """Every curve of a part: gold and proxy gained, prompt by prompt, for best of n and for PPO."""
    policy, task = begun(run, size)
    assert task.reward is not None, "both tasks bring their gold reward"
    gold, horizon = task.reward, size.ppo.max_new_tokens
    asked = task.held_out[: size.prompts]
    own, value = answered(run, "samples", policy, gold, asked, size.samples, horizon)
    states = embedded(policy, own)
    table = value.reshape(-1, size.samples)
    found: dict[str, Any] = {"gold_spread": float(table.std()), "gold_start": float(table.mean()), "seeds": {}}
    ns = optimised.numbers(size.samples)
    for seed in seeds:
        given = task.train[seed * size.labels : (seed + 1) * size.labels]
        answers, truth = answered(run, f"labels-{seed}", policy, gold, given, 2, horizon)
        fitted = proxies(policy, embedded(policy, answers), truth, states, seed)
        arms: dict[str, Any] = {}
        for arm, proxy in fitted.items():
            score = proxy.of(states).double().numpy().reshape(table.shape)
            spread = float(score.std())
            d, gained, proxied = optimised.best_of_n(score, table, ns)
            agree = concordance.by_ranks(score, table)["pooled"]
            arms[arm] = {
                "spearman": agree,
                "best_of_n": {"d": d, "gold": gained / table.std(), "proxy": proxied / spread},
            }
            if arm in size.arms:
                name = f"ppo-{arm.replace(' - ', '-')}-{seed}"
                looks = optimise(run, name, policy, proxy, gold, task, asked, size)
                curve = {"d": np.array([0.0, *(math.sqrt(max(0.0, x["kl"])) for x in looks)])}
                for what, base, unit in (("gold", table, table.std()), ("proxy", score, spread)):
                    after = np.array([x[what] for x in looks]).T - base.mean(1, keepdims=True)
                    curve[what] = np.concatenate([np.zeros((len(after), 1)), after / unit], axis=1)
                arms[arm]["ppo"] = curve
        found["seeds"][seed] = arms
    return found


def r_squared(curve: Mapping[str, Array]) -> dict[str, float]:
    """How well each form explains one seed's mean curve."""
    d, gold = torch.from_numpy(curve["d"]), torch.from_numpy(curve["gold"].mean(0))
    return {form: float(overoptimisation.fit(d, gold, form).r_squared) for form in overoptimisation.FORMS}


def judged(found: Mapping[str, Any], looks: Sequence[int]) -> dict[str, Any]:
    """Curves, fits, losses and comparisons of a part, as the results file has them."""
    seeds = list(found["seeds"].values())
    out: dict[str, Any] = {"gold_spread": found["gold_spread"], "gold_start": found["gold_start"], "arms": {}}
    last: dict[str, Array] = {}
    for arm in seeds[0]:
        figures: dict[str, Any] = {"spearman": [s[arm]["spearman"] for s in seeds]}
        for how in ("best_of_n", "ppo"):
            curves = [s[arm][how] for s in seeds if how in s[arm]]
            if not curves:
                continue
            mean = {what: np.mean([c[what] for c in curves], axis=0) for what in ("gold", "proxy")}  # [P, K]
            d = np.mean([c["d"] for c in curves], axis=0)
            figures[how] = {
                "d": d.tolist(),
                "d_by_seed": [c["d"].tolist() for c in curves],
                "gold": mean["gold"].mean(0).tolist(),
                "gold_by_seed": [c["gold"].mean(0).tolist() for c in curves],
                "proxy": mean["proxy"].mean(0).tolist(),
                "fits": optimised.fits(d, mean["gold"]),
                "r_squared_by_seed": [r_squared(c) for c in curves],
                "lost": optimised.lost(mean["gold"]),
                "last": concordance.said(lambda g=mean["gold"]: stats.bootstrap_mean(g[:, -1])),
            }
            last[f"{how} {arm}"] = mean["gold"][:, -1]
        out["arms"][arm] = figures
    out["looks"] = [0, *looks]
    out["ensemble_less_single"] = {
        name: concordance.said(lambda a=value, b=last[f"{how} single"]: stats.bootstrap_mean(a - b))
        for name, value in last.items()
        for how in [name.partition(" ")[0]]
        if not name.endswith(" single")
    }
    return out


def verdicts(part: Mapping[str, Any]) -> dict[str, bool]:
    """Each threshold."""
    single = part["arms"]["single"]
    bon, rl = single["best_of_n"], single["ppo"]
    top = int(np.argmax(rl["gold"]))
    return {
        "best_of_n_form": bon["fits"]["best_of_n"]["r_squared"]["mean"] >= BON_R2,
        "rl_form": rl["fits"]["rl"]["r_squared"]["mean"] >= RL_R2,
        "overoptimised": above(rl["lost"], 0),
        "proxy_rises": rl["proxy"][-1] > rl["proxy"][top],
        "ensemble": above(part["ensemble_less_single"].get("ppo mean - variance", {}), 0),
    }


def in_words(part: Mapping[str, Any]) -> list[str]:
    """What was found, as sentences."""
    out = []
    for arm, figures in part["arms"].items():
        for how, called in (("best_of_n", "best of n"), ("ppo", "PPO")):
            if how not in figures:
                continue
            c = figures[how]
            fit = {form: c["fits"][form] for form in ("best_of_n", "rl")}
            out.append(
                f"{called} against {arm}: gold {c['gold'][-1]:+.2f} and proxy {c['proxy'][-1]:+.2f} spreads at √KL "
                f"{c['d'][-1]:.2f}; gold lost since its highest point {shown(c['lost'])}; R² {fit['best_of_n']['r_squared']['mean']:.2f} "
                f"(best-of-n form), {fit['rl']['r_squared']['mean']:.2f} (RL form)."
            )
    for name, found in part["ensemble_less_single"].items():
        out.append(f"{name} less single, last gold: {difference(found)}.")
    return out


def shown(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]" if "low" in found else "without interval"


# ------------------------------------------------------------ the picture


def picture(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Gold and proxy against √KL, a row a part, best of n left and PPO right; one SVG that stands alone."""
    width, height = 380.0, 300.0
    roles = dict(zip(ARMS, ("ppo", "sft", "bon", "arm3"), strict=True))
    charts = []
    for name, part in parts.items():
        row = []
        for how, called in (("best_of_n", "best of n"), ("ppo", "PPO")):
            figure, axes = canvas(width, height, left=40, right=16, top=34, bottom=38)
            drawn = 0
            for arm, figures in part["arms"].items():
                if how not in figures or arm == "mean":
                    continue
                c, role = figures[how], roles[arm]
                axes.plot(c["d"], c["gold"], color=colour(role), linewidth=2.2)
                axes.plot(c["d"], c["proxy"], color=colour(role), linewidth=1.4, linestyle=(0, (4, 3)))
                fit, form = c["fits"][FORM[how]], FORM[how]
                x = torch.linspace(0, max(c["d"]), 80).double()
                y = overoptimisation.gain(x, fit["alpha"]["mean"], fit["beta"]["mean"], form)
                axes.plot(x.tolist(), y.tolist(), color=colour(role), linewidth=1, alpha=0.5)
                y_at = 1 - (40 + 14 * drawn) / height
                figure.text(48 / width, y_at, arm, color=colour(role), fontsize=10.5, fontweight="bold", va="center")
                drawn += 1
            axes.axhline(0, color=colour("rule"), linewidth=1)
            title = f"{name}, {called}: gold solid (faint: the form), proxy dashed; in spreads"
            label_axes(figure, axes, "√KL to the start, √nats", title)
            row.append(svg(figure, f"{name}-{how.replace('_', '-')}", title))
        charts.append(row)
    return sheet(charts, width, height)


# ------------------------------------------------------------ the bench


def show(results: Mapping[str, Any]) -> None:
    """The fits as a table, the sentences, the thresholds."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name, part in results["parts"].items():
        table = Table(title=f"{name}: forms fitted to gold", title_justify="left")
        for head in ("", "arm", "form", "α", "β", "R²", "peak, √nats", "turns"):
            table.add_column(head, justify="right" if head not in ("", "arm", "form") else "left")
        for arm, figures in part["arms"].items():
            for how in ("best_of_n", "ppo"):
                for form, fit in figures.get(how, {}).get("fits", {}).items():
                    cells = [
                        f"{fit[x]['mean']:.2f}" if fit[x]["mean"] is not None else "–"
                        for x in ("alpha", "beta", "r_squared", "peak")
                    ]
                    if fit["turns"] < 0.5:  # a peak that most resamples put beyond what was measured is no finding
                        cells[-1] = "beyond"
                    table.add_row(how, arm, form, *cells, f"{fit['turns']:.0%}")
        console.print(table)
        for line in part["verdict"]:
            console.print(line, highlight=False)
        for threshold, passed in part["passed"].items():
            console.print(f"{'passed' if passed else 'FAILED'}: {threshold}, {THRESHOLDS[threshold]}", highlight=False)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--part", choices=("toy", "real"), default="toy")
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    out.add_argument("--svg", type=Path, metavar="FILE", help="draw the curves there")
    out.add_argument("--fresh", action="store_true", help="begin the part anew")
    args: argparse.Namespace = out.parse_args(argv)
    size = QUICK if args.quick else SIZES[args.part]
    name = f"{args.part}{'-quick' * args.quick}"
    before: dict[str, Any] = {}
    if args.json is not None and args.json.exists():
        before = json.loads(args.json.read_text(encoding="utf-8")).get("parts", {})
    folder = args.runs / f"overoptimisation-{name}"
    again = args.fresh and (folder / "config.json").exists()
    begun = time.monotonic()
    with Run.open(folder, asdict(size), 0, resume=not again, overwrite=again) as run:
        part = rounded(judged(measured(run, size, args.seeds), size.looks))
    part |= {
        "command": common.command(),
        **common.machine(),
        "seeds": args.seeds,
        "settings": asdict(size),
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "passed": verdicts(part),
        "verdict": in_words(part),
    }
    results: dict[str, Any] = {"thresholds": THRESHOLDS, "parts": {**before, name: part}}
    common.write(args.json, results)
    if args.svg is not None:
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        args.svg.write_text(picture(results["parts"]), encoding="utf-8")
    show({**results, "parts": {name: part}})
    return results


if __name__ == "__main__":
    main()
