"""Does a reward model rank responses to different prompts as held-out preferences do?

    python bench/reward_ranking.py --data PAIRS.jsonl.gz --json docs/results/reward_ranking.json

Two parts; the second needs a file of human preferences (hh-rlhf transcripts or any columns `reward-eval` reads).

    sentiment   the embedded model continues the openings of reviews; the gold reward (a classifier's log-odds) draws noisy
                preferences, P(first) = σ(3 (gold₁ − gold₂)). As many labels go to pairs of one prompt as to pairs of two
                prompts, of the same responses, and a reward model is fitted to either: `tuned` trains blocks of it
                and a head as the demo does, `head` a linear head on frozen states (ridge-penalised Bradley–Terry). Each is judged on
                held-out pairs of both kinds, and on the policy's own samples on held-out prefixes
    human       a linear head and a small MLP on frozen states of the same body, Bradley–Terry, four folds: each pair is
                judged by a head that saw neither it nor any conversation with the same first human turn. Doubles and
                pairs with two equal sides are out. `leaky` splits by row instead, to see what that would have claimed

In every table: one half, which is what a constant is right on; `longer`, the rule that the longer one is better; and for
sentiment `gold`, which no reward can beat but for luck, since labels are noisy.

Stated before any run:

    held_out   `tuned` on pairs of one prompt is right on more than half of the held-out preferences between responses to
               one prompt: lower end of the 95 % interval over all seeds' pairs above ½
    samples    its rank correlation with gold on the policy's own samples, all prompts together: lower end above 0 at every
               seed
    cross      it orders samples of two different prompts as gold does in more than half of the pairs: lower end above ½ at
               every seed
    human      the linear head is right on more human pairs than the rule `longer`: lower end of the paired difference above
               0 at every seed

Whether pairs of two prompts teach the order across prompts better than pairs of one is asked with an interval and no
threshold. Intervals over pairs are Wilson's, those of samples and of differences resample prompts (human: first turns).
The run folder goes on where it stopped; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

import common
from tokenmdp import stats
from tokenmdp.lab import concordance, demo, pair_figures, preference_file
from tokenmdp.lab.pair_figures import Labels, Scored, by_cluster, right
from tokenmdp.models import catalog, embedding_cache
from tokenmdp.models.embedding import OwnBody
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import reward_model
from tokenmdp.rewards import embedding_head
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.stats import Array
from tokenmdp.tasks import files, formats, sentiment
from tokenmdp.types import Batch, Pairs, Prompt, Reward

KINDS = ("same", "cross")
ARMS = ("tuned same", "tuned cross", "head same", "head cross", "longer", "gold")
THRESHOLDS = {
    "held_out": "tuned on pairs of one prompt: accuracy on held-out preferences of one prompt, lower end above ½",
    "samples": "its Spearman correlation with gold on the policy's own samples, lower end above 0 at every seed",
    "cross": "its concordance with gold on sampled pairs of two prompts, lower end above ½ at every seed",
    "human": "linear head less `longer` on human pairs, lower end above 0 at every seed",
}
ROWS = 64  # responses sampled at a time
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """What the sizes differ in."""

    model: str
    labelled: int  # prefixes with two responses: pairs of each kind to learn from
    held_out: int  # prefixes with two responses: pairs of each kind to judge on
    prompts: int  # held-out prefixes sampled from
    samples: int  # responses to each
    rm: reward_model.Config
    human: int  # rows of the human file; 0 for all
    human_seeds: int
    prefix: int = 8
    horizon: int = 24
    sharpness: float = 3.0
    folds: int = 4


FULL = Size(
    model="smollm2-135m-instruct",
    labelled=500,
    held_out=200,
    prompts=48,
    samples=8,
    rm=demo.SIZES["full"].rm,
    human=0,
    human_seeds=5,
)
QUICK = Size(
    model="tiny",
    labelled=48,
    held_out=32,
    prompts=8,
    samples=4,
    rm=reward_model.Config(rows=16, learning_rate=1e-3, pool="mean"),
    human=60,
    human_seeds=2,
)

# ------------------------------------------------------------ sentiment


def answered(
    run: Run, name: str, policy: Policy, gold: Reward, prompts: Sequence[Prompt], n: int, horizon: int
) -> tuple[Batch, Array]:
    """`n` responses to each prompt and what gold says of them; from the stage's folder where that is done."""
    stage = run.stage(name)
    if stage.result() is None:
        sampling = Sampling(max_new_tokens=horizon)
        size = max(1, ROWS // n)
        chunks = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        for step in stage.steps(len(chunks), title=name):
            b = policy.sample(chunks[step], n, sampling, stage.rng)
            value = gold(b).value
            for i in range(len(b)):
                line = {"ids": b.tokens[i][b.action[i]].tolist(), "ended": bool(b.ended[i]), "gold": float(value[i])}
                stage.append("responses.jsonl", {**line, "text": b.texts[i]})
        stage.finish({"responses": n * len(prompts)})
    lines = [json.loads(line) for line in (stage.folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = Batch.build(
        [prompt for prompt in prompts for _ in range(n)],
        [line["ids"] for line in lines],
        texts=[line["text"] for line in lines],
        ended=[line["ended"] for line in lines],
        pad=policy.eos_ids[0],
    )
    return batch, np.array([line["gold"] for line in lines])


def labelled(gold: Array, kind: str, sharpness: float, seed: int) -> tuple[Index, Index]:
    """Rows of the chosen and of the rejected sides, of two responses a prompt: rows 2i and 2i + 1 are prompt i's.

    For `cross` the first response of each prompt meets the second of another, each response being in one pair.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    first = np.arange(0, len(gold), 2)
    second = first + 1
    if kind == "cross":
        ring = rng.permutation(len(first))
        partner = np.empty_like(ring)
        partner[ring] = np.roll(ring, 1)  # a ring has no prompt that meets itself
        second = second[partner]
    wins = rng.random(len(first)) < 1 / (1 + np.exp(-sharpness * (gold[first] - gold[second])))
    return np.where(wins, first, second), np.where(wins, second, first)


def embedded(policy: Policy, batch: Batch, kept: Path | None = None) -> Tensor:
    """[B, D] the mean state of the frozen body over each row; `kept` is a folder for what was read."""
    body = OwnBody(policy)
    return embedding_cache.embedded(body, batch, None if kept is None else embedding_cache.Cache(kept, body)).cpu()


def tuned(run: Run, name: str, policy: Policy, learned: Pairs, kept: Pairs, size: Size) -> RewardModel:
    """A reward model on the policy's body; from the stage's folder where that is done."""
    stage = run.stage(name)
    if stage.result() is None:
        reward, _ = reward_model.train(size.rm, policy, learned, kept, stage)
        reward.save(stage.folder / "model")
        stage.finish({})
    return RewardModel.load(stage.folder / "model", policy)


def sides(batch: Batch, rows: tuple[Index, Index]) -> Pairs:
    chosen, rejected = rows
    return Pairs(batch.select(chosen.tolist()), batch.select(rejected.tolist()), torch.zeros(len(chosen)))


def one_seed(run: Run, size: Size) -> dict[str, Any]:
    """One seed: its data, its four reward models, and every score of the held-out responses and of the samples."""
    policy = (catalog.tiny(sentiment.texts(seed=0)) if size.model == "tiny" else catalog.load(size.model)).freeze()
    task = sentiment.load(policy, size.prefix, size.horizon, seed=run.seed)
    assert task.reward is not None, "the sentiment task brings its gold reward"
    count = size.labelled + size.held_out
    data_, gold_d = answered(run, "data", policy, task.reward, task.train[:count], 2, size.horizon)
    asked = task.held_out[: size.prompts]
    own, gold_s = answered(run, "samples", policy, task.reward, asked, size.samples, size.horizon)
    cut = 2 * size.labelled
    learned, judged = data_.select(range(cut)), data_.select(range(cut, len(data_)))
    gold_l, gold_h = gold_d[:cut], gold_d[cut:]
    held = {kind: labelled(gold_h, kind, size.sharpness, run.seed + 1000) for kind in KINDS}
    features = {name: embedded(policy, b) for name, b in (("l", learned), ("h", judged), ("s", own))}
    scores: dict[str, dict[str, Array]] = {"gold": {"h": gold_h, "s": gold_s}}
    scores["longer"] = {n: b.action.sum(-1).double().numpy() for n, b in (("h", judged), ("s", own))}
    for kind in KINDS:
        c, r = labelled(gold_l, kind, size.sharpness, run.seed)
        model = tuned(run, f"tuned-{kind}", policy, sides(learned, (c, r)), sides(judged, held[kind]), size)
        scores[f"tuned {kind}"] = {n: model(b).value.double().numpy() for n, b in (("h", judged), ("s", own))}
        head = embedding_head.fit(features["l"][c], features["l"][r])
        scores[f"head {kind}"] = {n: head.score(features[n]).double().numpy() for n in ("h", "s")}
    return {"scores": scores, "held": held, "gold": gold_h, "samples": size.samples}


def correct(found: Mapping[str, Any], arm: str, kind: str, order: str) -> Array:
    """[N] right (1), tied (½) or wrong (0) on the held-out pairs, against the noisy preference or gold's own order."""
    score, (chosen, rejected) = found["scores"][arm]["h"], found["held"][kind]
    if order == "gold":
        better = found["gold"][chosen] >= found["gold"][rejected]
        chosen, rejected = np.where(better, chosen, rejected), np.where(better, rejected, chosen)
    return right(score[chosen] - score[rejected])


def on_samples(found: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """Agreement with gold on the policy's own samples."""
    score, gold = (found["scores"][name]["s"].reshape(-1, found["samples"]) for name in (arm, "gold"))
    ranks = concordance.by_ranks(score, gold)
    return {**concordance.by_pairs(score, gold), **{f"spearman_{name}": value for name, value in ranks.items()}}


def of_pairs(values: Array) -> dict[str, Any]:
    """A rate with Wilson's interval over pairs, no two of which share a response."""
    return {**stats.wilson(float(values.sum()), len(values))._asdict(), "n": len(values)}


def of_turns(values: Array, cluster: Labels) -> dict[str, Any]:
    """The mean over first turns, each counting once, with an interval that resamples them."""
    means = by_cluster(values, cluster)
    return {
        **concordance.said(lambda: stats.bounded(stats.bootstrap_mean(means), 0.0, 1.0)),
        "n": len(values),
    }


def less(a: Array, b: Array) -> dict[str, Any]:
    """The mean difference with its interval over pairs, or prompts."""
    return concordance.said(lambda: stats.bootstrap_mean(a - b))


def sentiment_results(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The tables: accuracies over all seeds' held-out pairs, differences between arms, samples seed by seed."""
    found = list(seeds.values())

    def pool(arm: str, kind: str, order: str = "preference") -> Array:
        return np.concatenate([correct(f, arm, kind, order) for f in found])

    return {
        "held_out": {arm: {kind: of_pairs(pool(arm, kind)) for kind in KINDS} for arm in ARMS},
        "held_out_by_seed": {
            arm: {kind: [of_pairs(correct(f, arm, kind, "preference"))["mean"] for f in found] for kind in KINDS}
            for arm in ARMS
        },
        "gold_order": {arm: {kind: of_pairs(pool(arm, kind, "gold")) for kind in KINDS} for arm in ARMS[:-1]},
        "differences": {
            "cross labels less same labels, on same": less(pool("tuned cross", "same"), pool("tuned same", "same")),
            "cross labels less same labels, on cross": less(pool("tuned cross", "cross"), pool("tuned same", "cross")),
            "tuned less head, on same": less(pool("tuned same", "same"), pool("head same", "same")),
            "tuned less longer, on same": less(pool("tuned same", "same"), pool("longer", "same")),
        },
        "samples": {str(seed): {arm: on_samples(f, arm) for arm in ARMS[:-1]} for seed, f in seeds.items()},
    }


# ------------------------------------------------------------ human pairs


def folds(groups: Sequence[str], count: int, seed: int) -> Index:
    """[N] the fold of each row; rows of one group share it, and folds have about as many rows each."""
    names = list(dict.fromkeys(groups))
    size = dict.fromkeys(names, 0)
    for name in groups:
        size[name] += 1
    held = np.zeros(count)
    where: dict[str, int] = {}
    for at in np.random.default_rng(seed).permutation(len(names)):
        where[names[at]] = int(held.argmin())
        held[where[names[at]]] += size[names[at]]
    return np.array([where[name] for name in groups])


def out_of_fold(chosen: Tensor, rejected: Tensor, fold: Index, head: str, seed: int) -> tuple[Array, Array]:
    """[N] scores of both sides by heads that did not see their fold, each head's on its own scale of mean 0 and spread 1."""
    scores = np.zeros((2, len(fold)))
    for at in np.unique(fold):
        here, there = torch.from_numpy(fold == at), torch.from_numpy(fold != at)
        fitted = embedding_head.fit(chosen[there], rejected[there], head, seed=seed)
        said = np.stack([fitted.score(x[here]).double().numpy() for x in (chosen, rejected)])
        scores[:, fold == at] = (said - said.mean()) / max(float(said.std()), 1e-12)
    return scores[0], scores[1]


def human_results(run: Run, path: Path, size: Size) -> dict[str, Any]:
    """Human pairs: the split, what was left out, each head and baseline at each seed."""
    policy = (catalog.tiny() if size.model == "tiny" else catalog.load(size.model)).freeze()
    rows = files.rows(path)
    compared = preference_file.read(rows[: size.human or len(rows)], policy)
    pairs = {"chosen": compared.pairs.chosen, "rejected": compared.pairs.rejected}
    states = {name: embedded(policy, b, run.folder / "states") for name, b in pairs.items()}
    turns = [formats.first_turn(p.prompt) for p in compared.said]
    number = {turn: i for i, turn in enumerate(dict.fromkeys(turns))}
    cluster = np.array([number[turn] for turn in turns])
    lengths = np.stack([b.action.sum(-1).double().numpy() for b in pairs.values()], axis=1)
    longer = right(lengths[:, 0] - lengths[:, 1])
    out: dict[str, Any] = {
        "data": dict(compared.counts),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "first_turns": len(number),
        "longer": of_turns(longer, cluster),
        "seeds": {},
    }
    for seed in range(size.human_seeds):
        grouped, by_row = folds(turns, size.folds, seed), folds([str(i) for i in range(len(turns))], size.folds, seed)
        crossed = sum(len({int(f) for f in grouped[cluster == g]}) > 1 for g in range(len(number)))
        found: dict[str, Any] = {"first_turns_in_two_folds": crossed}
        for name, fold, head in (("linear", grouped, "linear"), ("mlp", grouped, "mlp"), ("leaky", by_row, "linear")):
            begun = time.perf_counter()
            c, r = out_of_fold(states["chosen"], states["rejected"], fold, head, seed)
            won = right(c - r)
            table = Scored(c, r, lengths, cluster, np.arange(len(c)), np.zeros(len(c)))
            found[name] = {
                "accuracy": of_turns(won, cluster),
                "over_longer": less(by_cluster(won, cluster), by_cluster(longer, cluster)),
                "cross_prompt": pair_figures.cross_prompt(table),
                "length": pair_figures.length_bias(table),
                "seconds": round(time.perf_counter() - begun, 2),
            }
        out["seeds"][str(seed)] = found
    return out


# ------------------------------------------------------------ verdicts


def verdicts(found: Mapping[str, Any]) -> dict[str, bool]:
    """Each threshold that was measured."""
    out: dict[str, bool] = {}
    if "sentiment" in found:
        part = found["sentiment"]
        mine = [arms["tuned same"] for arms in part["samples"].values()]
        out["held_out"] = part["held_out"]["tuned same"]["same"]["low"] > 0.5
        out["samples"] = all(above(m["spearman_pooled"], 0) for m in mine)
        out["cross"] = all(above(m["cross_prompt"], 0.5) for m in mine)
    if "human" in found:
        out["human"] = all(above(seed["linear"]["over_longer"], 0) for seed in found["human"]["seeds"].values())
    return out


def above(interval: Mapping[str, Any], value: float) -> bool:
    """Whether the whole interval is above a value; one that is absent is not."""
    return bool("low" in interval and interval["low"] > value)


def in_words(found: Mapping[str, Any]) -> list[str]:
    """What was found, as sentences."""
    out: list[str] = []
    if "sentiment" in found:
        part = found["sentiment"]
        for kind, words in (("same", "one prompt"), ("cross", "two prompts")):
            ours, best = part["held_out"]["tuned same"][kind], part["held_out"]["gold"][kind]
            out.append(
                f"Held-out preferences between responses to {words}: right on {ours['mean']:.0%} ({ours['low']:.0%} to "
                f"{ours['high']:.0%}); gold itself on {best['mean']:.0%}, `longer` on "
                f"{part['held_out']['longer'][kind]['mean']:.0%}."
            )
        for name, d in part["differences"].items():
            out.append(f"{name[0].upper()}{name[1:]}: {difference(d)}.")
        for seed, arms in part["samples"].items():
            m = arms["tuned same"]
            rho = " / ".join(f"{m[f'spearman_{k}'].get('mean', float('nan')):.2f}" for k in ("within", "pooled"))
            out.append(
                f"Own samples, seed {seed}: concordant with gold on {m['same_prompt'].get('mean', float('nan')):.0%} of pairs of "
                f"one prompt and {m['cross_prompt'].get('mean', float('nan')):.0%} of pairs of two (difference "
                f"{difference(m['difference'])}); Spearman within / in all {rho}."
            )
    if "human" in found:
        part = found["human"]
        seeds = list(part["seeds"].values())
        shares = {
            name: float(np.mean([s[name]["accuracy"]["mean"] for s in seeds])) for name in ("linear", "mlp", "leaky")
        }
        crossed = float(np.mean([s["linear"]["cross_prompt"]["mean"] for s in seeds]))
        out.append(
            f"Human pairs ({part['data']['pairs']} pairs, {part['first_turns']} first turns, mean of {len(seeds)} seeds): "
            f"linear head {shares['linear']:.1%}, MLP {shares['mlp']:.1%}, `longer` {part['longer']['mean']:.1%}; split by row "
            f"instead of by first turn the linear head would claim {shares['leaky']:.1%}."
        )
        out.append(
            f"A chosen answer outscores a rejected one to another question in {crossed:.1%}; nobody compared these."
        )
    return out


def difference(found: Mapping[str, Any]) -> str:
    """A difference with its verdict."""
    if "low" not in found:
        return f"no interval ({found['absent']})"
    side = int(found["low"] > 0) - int(found["high"] < 0)
    words = {1: "significantly more", 0: "no significant difference", -1: "significantly less"}[side]
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}], {words}"


def rounded(value: Any) -> Any:
    """Figures to four places."""
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def show(found: Mapping[str, Any]) -> None:
    """The held-out table, the sentences, the thresholds."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if "sentiment" in found:
        table = Table(title="Held-out preferences ranked right [95 %]", title_justify="left")
        for name in ("", "one prompt", "two prompts"):
            table.add_column(name, justify="left" if not name else "right")
        for arm, kinds in found["sentiment"]["held_out"].items():
            table.add_row(arm, *(f"{k['mean']:.3f} [{k['low']:.3f}, {k['high']:.3f}]" for k in kinds.values()))
        console.print(table)
    for line in found["verdict"]:
        console.print(line, highlight=False)
    for name, passed in found["passed"].items():
        console.print(f"{'passed' if passed else 'FAILED'}: {name}, {THRESHOLDS[name]}", highlight=False)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--data", type=Path, metavar="FILE", help="human preferences; without it only sentiment is done")
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the sentiment part")
    out.add_argument("--part", choices=("all", "sentiment", "human"), default="all")
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    out.add_argument("--fresh", action="store_true", help="begin everything anew")
    args: argparse.Namespace = out.parse_args(argv)
    if args.part == "human" and args.data is None:
        out.error("the human part needs --data FILE")
    size, prefix = (QUICK, "reward-ranking-quick") if args.quick else (FULL, "reward-ranking")
    line = common.command()
    results: dict[str, Any] = {
        "command": line.replace(shlex.quote(str(args.data)), "FILE") if args.data else line,
        "size": "quick" if args.quick else "full",
        **common.machine(),
        "settings": asdict(size),
        "thresholds": THRESHOLDS,
        "minutes": 0.0,
    }
    begun = time.monotonic()

    def opened(name: str, seed: int) -> Run:
        folder = args.runs / f"{prefix}-{name}"
        again = args.fresh and (folder / "config.json").exists()
        return Run.open(folder, asdict(size), seed, resume=not again, overwrite=again)

    def record(name: str, work: Callable[[], dict[str, Any]]) -> None:
        results[name] = rounded(work())
        results["minutes"] = round((time.monotonic() - begun) / 60, 2)
        results["passed"], results["verdict"] = verdicts(results), in_words(results)
        common.write(args.json, results)

    if args.part != "human":
        seeds: dict[int, dict[str, Any]] = {}
        for seed in args.seeds[:1] if args.quick else args.seeds:
            with opened(f"seed-{seed}", seed) as run:
                seeds[seed] = one_seed(run, size)
            record("sentiment", lambda: sentiment_results(seeds))
    if args.part != "sentiment" and args.data is not None:
        with opened("human", 0) as run:
            record("human", lambda: human_results(run, args.data, size))
    show(results)
    return results


if __name__ == "__main__":
    main()
