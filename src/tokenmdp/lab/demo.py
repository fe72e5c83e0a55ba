"""The main job: RLHF as online inverse RL, end to end, on controlled sentiment.

    1. behaviour cloning    SFT on movie reviews
    2. offline data         two responses a prefix from the SFT policy; a gold reward draws noisy preferences,
                            which are the labels paid for
    3. inverse RL           a Bradley–Terry reward model on the SFT body
    4. online RL            PPO on the known dynamics, against the reward model, held by a KL to the SFT policy
    5. judgement            SFT, best-of-n and PPO on held-out prefixes, by the gold reward none of them was trained on

Each step is a stage of the run folder: a run killed at any moment goes on with --resume and ends with the same figures.

Source: the task is Ziegler et al. 2019's continuation with a given sentiment; the gold-reward design is Gao et al.
    2023's.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tokenmdp import stats
from tokenmdp.functional import kl, returns
from tokenmdp.lab import report
from tokenmdp.ledger import Ledger
from tokenmdp.models import catalog
from tokenmdp.models.heads import Critic
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import ppo, reward_model, sft
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import Task, sentiment
from tokenmdp.types import Batch, Pairs, Reward


@dataclass(frozen=True)
class Config:
    size: Literal["full", "tiny"] = (
        "full"  # full: the embedded 135M model; tiny: the same steps on the test model in a minute
    )


@dataclass(frozen=True)
class Size:
    """What the two sizes differ in."""

    model: str
    prefix_tokens: int
    sft: sft.Config
    rm: reward_model.Config
    ppo: ppo.Config
    pairs: int  # prefixes with two responses each: the labels paid for
    held_out_pairs: int  # of these, never trained on
    sharpness: float  # β of the labels: P(first preferred) = σ(β (gold₁ − gold₂))
    held_out: int  # prefixes judged
    candidates: int  # responses a held-out prefix: n of best-of-n
    answers: int  # responses a held-out prefix of the PPO policy


SIZES = {
    "full": Size(
        model="smollm2-135m-instruct",
        prefix_tokens=8,
        sft=sft.Config(steps=40, rows=16, learning_rate=1e-4, train="all", evaluate_every=20),
        rm=reward_model.Config(
            epochs=2, rows=16, learning_rate=1e-4, head_learning_rate=5e-3, train="top-10", pool="mean", warmup=4
        ),
        ppo=ppo.Config(steps=16, prompts=16, samples=4, max_new_tokens=24, learning_rate=7e-5, kl=0.07, train="top-10"),
        pairs=1000,
        held_out_pairs=200,
        sharpness=3.0,
        held_out=64,
        candidates=8,
        answers=4,
    ),
    "tiny": Size(
        model="tiny",
        prefix_tokens=6,
        sft=sft.Config(steps=200, rows=32, learning_rate=5e-3, evaluate_every=50, micro_tokens=8192),
        rm=reward_model.Config(
            epochs=3, rows=64, learning_rate=2e-3, head_learning_rate=1e-2, pool="mean", micro_tokens=8192
        ),
        ppo=ppo.Config(
            steps=25,
            prompts=16,
            samples=4,
            max_new_tokens=16,
            learning_rate=1e-3,
            critic_learning_rate=3e-3,
            kl=0.1,
            micro_tokens=8192,
        ),
        pairs=3000,
        held_out_pairs=400,
        sharpness=3.0,
        held_out=64,
        candidates=8,
        answers=4,
    ),
}


class Demo:
    """The five steps on one run folder; each returns what it made, from disk when it was already done."""

    def __init__(self, cfg: Config, run: Run) -> None:
        self.cfg, self.run, self.size = cfg, run, SIZES[cfg.size]
        self.minutes: dict[str, float] = {}
        start, task = sentiment_start(self.size, run)
        self.start: Policy = start
        self.task: Task = task
        assert task.reward is not None, "the sentiment task brings its gold reward"
        self.gold: Reward = task.reward
        self.sampling = Sampling(max_new_tokens=self.size.ppo.max_new_tokens)

    def timed(self, name: str, work: Callable[[Run], dict[str, Any]]) -> tuple[dict[str, Any], Run]:
        """A stage's result: from its folder when it is done, else by doing it; the minutes it took are part of it."""
        stage = self.run.stage(name)
        done = stage.result()
        if done is None:
            begin = time.monotonic()
            done = work(stage)
            done = stage.finish({**done, "minutes": (time.monotonic() - begin) / 60})
        self.minutes[name] = float(done["minutes"])
        return {k: v for k, v in done.items() if k != "minutes"}, stage

    def clone(self) -> tuple[Policy, dict[str, Any]]:
        """Step 1, behaviour cloning."""
        everything = self.task.demonstrations
        assert everything is not None, "the sentiment task brings demonstrations"
        kept = max(32, len(everything) // 20)

        def work(stage: Run) -> dict[str, Any]:
            learned, held_out = everything.select(range(kept, len(everything))), everything.select(range(kept))
            policy, figures = sft.train(self.size.sft, self.start, learned, held_out, stage)
            policy.save(stage.folder / "model")
            return dict(figures)

        done, stage = self.timed("sft", work)
        policy = catalog.load(str(stage.folder / "model")).freeze()
        policy.name = "sft"
        return policy, done

    def label(self, policy: Policy) -> tuple[Pairs, Pairs, dict[str, Any]]:
        """Step 2, offline data: two responses a prefix, one noisy label each; every label is on the ledger."""
        count, chunk = self.size.pairs, 32
        prompts = list(self.task.train[:count])
        if len(prompts) < count:
            raise ValueError(f"{count} labelled prefixes were asked for, the task has {len(prompts)}: lower `pairs`")

        def work(stage: Run) -> dict[str, Any]:
            chunks = [prompts[i : i + chunk] for i in range(0, count, chunk)]
            ledger = Ledger(labels=count)
            for step in stage.steps(len(chunks), ledger, title="offline data"):
                b = policy.sample(chunks[step], 2, self.sampling, stage.rng)
                ledger.pay("labels", len(chunks[step]))
                value = self.gold(b).value
                for i in range(0, len(b), 2):
                    p_first = torch.sigmoid(self.size.sharpness * (value[i] - value[i + 1]))
                    first = bool(torch.rand((), generator=stage.rng) < p_first)
                    sides = [
                        {
                            "ids": b.tokens[j][b.action[j]].tolist(),
                            "text": b.texts[j],
                            "ended": bool(b.ended[j]),
                            "gold": float(value[j]),
                        }
                        for j in ((i, i + 1) if first else (i + 1, i))
                    ]
                    stage.append("pairs.jsonl", {"row": b.prompts[i].row, "chosen": sides[0], "rejected": sides[1]})
                stage.log(step, {"labels_paid": float(ledger.paid["labels"]), "objective/gold": float(value.mean())})
            return {"labels_paid": ledger.paid["labels"]}

        done, stage = self.timed("data", work)
        rows = [json.loads(line) for line in (stage.folder / "pairs.jsonl").read_text().splitlines()]
        by_row = {p.row: p for p in prompts}

        def side(name: str) -> Batch:
            return Batch.build(
                [by_row[r["row"]] for r in rows],
                [r[name]["ids"] for r in rows],
                texts=[r[name]["text"] for r in rows],
                ended=[r[name]["ended"] for r in rows],
                pad=policy.eos_ids[0],
            ).to(policy.device)

        pairs = Pairs(side("chosen"), side("rejected"), torch.zeros(len(rows)))
        agrees = [r["chosen"]["gold"] > r["rejected"]["gold"] for r in rows]
        kept = self.size.held_out_pairs
        done["bayes_accuracy"] = sum(agrees[:kept]) / kept
        return pairs.select(range(kept, len(pairs))), pairs.select(range(kept)), done

    def model_reward(self, policy: Policy, learned: Pairs, held_out: Pairs) -> tuple[RewardModel, dict[str, Any]]:
        """Step 3, inverse RL."""

        def work(stage: Run) -> dict[str, Any]:
            reward, figures = reward_model.train(self.size.rm, policy, learned, held_out, stage)
            reward.save(stage.folder / "model")
            return figures

        done, stage = self.timed("reward_model", work)
        return RewardModel.load(stage.folder / "model", policy), done

    def optimise(self, policy: Policy, reward: RewardModel) -> tuple[Policy, dict[str, Any], Run]:
        """Step 4, online RL on the known dynamics; prefixes are those the labels were paid for and the rest of the
        training part.
        """

        def work(stage: Run) -> dict[str, Any]:
            trained, _ = ppo.train(
                self.size.ppo, policy, reward.critic(self.size.ppo.critic_train), reward, self.task, stage, self.gold
            )
            trained.save(stage.folder / "model")
            return {"fingerprint": trained.fingerprint()}

        done, stage = self.timed("ppo", work)
        trained = catalog.load(str(stage.folder / "model")).freeze()
        trained.name = "ppo"
        return trained, done, stage

    def judge(self, policy: Policy, reward: RewardModel, trained: Policy) -> dict[str, Any]:
        """Step 5: what was learned, on prefixes nothing has seen."""

        def work(stage: Run) -> dict[str, Any]:
            size = self.size
            prompts = list(self.task.held_out[: size.held_out])
            with stage.progress(len(prompts) * (size.candidates + size.answers), "judgement", "responses") as bar:
                before = policy.sample(prompts, size.candidates, self.sampling, stage.rng, bar.advance)
                after = trained.sample(prompts, size.answers, self.sampling, stage.rng, bar.advance)
            gold_b, gold_a = self.gold(before).value, self.gold(after).value
            proxy_b, proxy_a = reward(before).value, reward(after).value
            divergence = in_parts(lambda part: {"kl": trained.kl_to(policy, part)}, after)["kl"]
            write_samples(stage, policy, reward, before, after, gold_b, gold_a, proxy_b, proxy_a, divergence, self.size)
            return figures(
                len(prompts), before, after, gold_b, gold_a, proxy_b, proxy_a, divergence, self.size.candidates
            )

        done, _ = self.timed("judgement", work)
        return done


def sentiment_start(size: Size, run: Run) -> tuple[Policy, Task]:
    """The model the demo starts from, and the task in its tokens."""
    start = catalog.tiny(sentiment.texts(seed=run.seed)) if size.model == "tiny" else catalog.load(size.model)
    return start.freeze(), sentiment.load(start, size.prefix_tokens, size.ppo.max_new_tokens, seed=run.seed)


def figures(
    prompts: int,
    before: Batch,
    after: Batch,
    gold_b: torch.Tensor,
    gold_a: torch.Tensor,
    proxy_b: torch.Tensor,
    proxy_a: torch.Tensor,
    divergence: torch.Tensor,
    candidates: int,
) -> dict[str, Any]:
    """Gold, proxy, KL and diversity of the three arms; intervals resample prefixes, differences are paired by
    prefix.
    """
    gb, ga = gold_b.double().cpu().numpy().reshape(prompts, -1), gold_a.double().cpu().numpy().reshape(prompts, -1)
    pb, pa = proxy_b.double().cpu().numpy().reshape(prompts, -1), proxy_a.double().cpu().numpy().reshape(prompts, -1)
    chosen = pb.argmax(1)
    bon, bon_proxy = gb[np.arange(prompts), chosen], pb[np.arange(prompts), chosen]
    picked = (chosen + candidates * np.arange(prompts)).tolist()
    # The same number of texts in each arm, one a prefix: distinct-n falls with the number of texts.
    one = {
        "sft": [before.texts[i * candidates] for i in range(prompts)],
        "bon": [before.texts[i] for i in picked],
        "ppo": [after.texts[i * (len(after) // prompts)] for i in range(prompts)],
    }
    nats = divergence.sum(-1).double().cpu().numpy().reshape(prompts, -1)
    curve = [
        {
            "n": n,
            "kl": kl.best_of_n_kl(n),
            "gold": stats.best_of_n_curve(pb, gb, n),
            "proxy": stats.best_of_n_curve(pb, pb, n),
        }
        for n in range(1, candidates + 1)
    ]
    spread = float(gb.std())
    return {
        "prompts": prompts,
        "gold_sft": stats.bootstrap_mean(gb.mean(1))._asdict(),
        "gold_bon": {**stats.bootstrap_mean(bon)._asdict(), "n": candidates},
        "gold_ppo": stats.bootstrap_mean(ga.mean(1))._asdict(),
        "ppo_minus_sft": stats.paired_bootstrap(ga.mean(1), gb.mean(1))._asdict(),
        "bon_minus_sft": stats.paired_bootstrap(bon, gb.mean(1))._asdict(),
        "proxy": {"sft": float(pb.mean()), "bon": float(bon_proxy.mean()), "ppo": float(pa.mean())},
        "kl_nats": {"ppo": stats.bootstrap_mean(nats.mean(1))._asdict(), "bon_analytic": kl.best_of_n_kl(candidates)},
        "kl_kind": "exact over the vocabulary at every state visited, summed along responses drawn from the policy",
        "distinct": {arm: [stats.distinct_n(texts, n) for n in (1, 2, 3)] for arm, texts in one.items()},
        "clipped_ratio": {
            "sft": float((~before.ended).double().mean()),
            "bon": float((~before.ended[picked]).double().mean()),
            "ppo": float((~after.ended).double().mean()),
        },
        "mean_length": {
            "sft": float(before.action.sum(-1).double().mean()),
            "bon": float(before.action[picked].sum(-1).double().mean()),
            "ppo": float(after.action.sum(-1).double().mean()),
        },
        "bon_curve": curve,
        "gold_spread_sft": spread,
        "proxy_spread_sft": float(pb.std()),
        "gold_proxy_correlation": {
            "sft": stats.spearman(pb.ravel(), gb.ravel(), cluster=_rows_of(pb))._asdict(),
            "ppo": stats.spearman(pa.ravel(), ga.ravel(), cluster=_rows_of(pa))._asdict(),
        },
    }


def _rows_of(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[P · k] the prompt of each of [P, k] scores: responses to one prompt are no independent trials."""
    return np.repeat(np.arange(len(scores)), scores.shape[1])


def write_samples(
    stage: Run,
    policy: Policy,
    reward: RewardModel,
    before: Batch,
    after: Batch,
    gold_b: torch.Tensor,
    gold_a: torch.Tensor,
    proxy_b: torch.Tensor,
    proxy_a: torch.Tensor,
    divergence: torch.Tensor,
    size: Size,
    shown: int = 12,
) -> None:
    """Responses of the three arms side by side; PPO's with what each token was worth."""
    first = after.select([i * size.answers for i in range(shown)])
    # Value of every prefix by the reward model: differences along a response are each token's reward as the model sees
    # it.
    critic: Critic = reward.critic()
    with torch.no_grad():
        value = critic.value(critic.states(first), first)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    last = first.length - 1
    following[torch.arange(shown), last] = reward(first).value
    # δ_t = V(s_{t+1}) − V(s_t): the potential-based reward, whose λ-weighted sum is the advantage under this critic.
    gained = torch.where(first.action, following - value, torch.zeros_like(value))
    advantage, _ = returns.gae(gained, value * 0, first.action, size.ppo.gamma, size.ppo.lam)
    best = proxy_b.view(-1, size.candidates).argmax(1)
    for i in range(shown):
        arms = (
            ("sft", before, i * size.candidates, gold_b, proxy_b),
            ("best_of_n", before, i * size.candidates + int(best[i]), gold_b, proxy_b),
        )
        for arm, b, j, g, p in arms:
            stage.sample(b, j, arm, gold=float(g[j]), proxy=float(p[j]), kl=None)
        j = i * size.answers
        tokens = []
        for t in first.action[i].nonzero()[:, 0].tolist():
            tokens.append(
                {
                    "text": policy.tokenizer.decode([int(first.tokens[i, t])]),
                    "advantage": float(advantage[i, t]),
                    "kl": float(divergence[j, t]),
                    "reward": float(gained[i, t]),
                }
            )
        figures = {"gold": float(gold_a[j]), "proxy": float(proxy_a[j]), "kl": float(divergence[j].sum())}
        stage.sample(after, j, "ppo", **figures, tokens=tokens)


def ppo_curve(stage: Run, every: int) -> list[dict[str, float]]:
    """Proxy, gold and KL along training, each point the mean of `every` phases."""
    lines = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    names = {"kl": "objective/kl", "gold": "objective/gold", "proxy": "objective/scores"}
    points = []
    for i in range(0, len(lines), every):
        part = lines[i : i + every]
        mean = {short: sum(x[name] for x in part) / len(part) for short, name in names.items()}
        points.append({"step": float(part[-1]["step"]), **mean, "kl": max(mean["kl"], 0.0)})
    return points


def verdict(found: dict[str, Any], curve: list[dict[str, float]], rm: dict[str, Any]) -> list[str]:
    """What the figures say, in words, and what speaks against them; thresholds: an interval that excludes 0 (for the
    reward model's accuracy one half), half of the proxy's gain seen in gold, nine in ten responses cut.
    """
    d, b, nats = found["ppo_minus_sft"], found["bon_minus_sft"], found["kl_nats"]["ppo"]["mean"]
    gap = f"{d['mean']:+.2f} gold (95 % interval {d['low']:+.2f} to {d['high']:+.2f}) at a KL of {nats:.1f} nats a response"
    if d["low"] > 0:
        out = [f"RLHF beat behaviour cloning here: {gap}."]
    elif d["high"] < 0:
        out = [f"RLHF was worse than behaviour cloning here: {gap}."]
    else:
        out = [f"No significant difference between RLHF and behaviour cloning here: {gap}."]
    n = found["gold_bon"]["n"]
    out.append(
        f"Best-of-{n}, which trains nothing, gave {b['mean']:+.2f} ({b['low']:+.2f} to {b['high']:+.2f}) "
        f"at {found['kl_nats']['bon_analytic']:.2f} nats."
    )
    # In units of each reward's own spread over SFT samples, so that the two gains can be compared.
    gained_gold = (found["gold_ppo"]["mean"] - found["gold_sft"]["mean"]) / max(found["gold_spread_sft"], 1e-9)
    gained_proxy = (found["proxy"]["ppo"] - found["proxy"]["sft"]) / max(found["proxy_spread_sft"], 1e-9)
    best = max(curve, key=lambda point: point["gold"])
    if gained_proxy <= 0:
        out.append("The proxy did not rise, so there is nothing for gold to have drifted from.")
    elif gained_gold < 0.5 * gained_proxy:
        out.append(
            f"Proxy and gold drifted apart: the proxy gained {gained_proxy:.2f} of its standard deviations over SFT samples, gold "
            f"{gained_gold:.2f} of its own; training gold was highest at phase {best['step']:.0f}."
        )
    else:
        out.append(
            f"Proxy and gold rose together: the proxy gained {gained_proxy:.2f} of its standard deviations over SFT samples, gold "
            f"{gained_gold:.2f} of its own."
        )
    if rm["low"] <= 0.5:
        out.append(
            f"Beware: the reward model was right on {rm['accuracy']:.0%} of held-out pairs ({rm['low']:.0%} to {rm['high']:.0%}), "
            "which may be a coin's luck."
        )
    if found["clipped_ratio"]["ppo"] > 0.9:
        out.append(
            f"{found['clipped_ratio']['ppo']:.0%} of PPO's responses were cut at the horizon: none of this is about endings."
        )
    out.append(
        f"Gold is the log-odds that a response is positive, by a classifier no stage saw; judged on {found['prompts']} "
        "held-out prefixes."
    )
    return [sentence.replace("-0", "−0").replace(" -", " −") for sentence in out]


def peak_gb() -> float:
    """Largest resident memory of this process so far, GB (10⁹ bytes)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Run (or resume) the five steps; write summary.json and report.html, print the verdict."""
    demo = Demo(cfg, run)
    policy, cloned = demo.clone()
    learned, held_out, labelled = demo.label(policy)
    reward, rm = demo.model_reward(policy, learned, held_out)
    trained, _, ppo_stage = demo.optimise(policy, reward)
    found = demo.judge(policy, reward, trained)
    curve = ppo_curve(ppo_stage, every=max(1, demo.size.ppo.steps // 12))
    gate = json.loads((ppo_stage.folder / "gate.jsonl").read_text().splitlines()[0])
    paid = labelled["labels_paid"]
    summary: dict[str, Any] = {
        "title": "RLHF as online inverse RL: controlled sentiment",
        "command": f"tokenmdp demo --size {cfg.size} --seed {run.seed}",
        "size": cfg.size,
        "seed": run.seed,
        "model": demo.start.name,
        "verdict": verdict(found, curve, rm),
        **found,
        "rm": {**rm, "bayes_accuracy": labelled["bayes_accuracy"]},
        "labels": {
            "paid": paid,
            "ledger": [
                {"what": "comparisons the reward model was trained on", "count": len(learned)},
                {"what": "comparisons held out to judge it", "count": len(held_out)},
            ],
        },
        "ppo_curve": curve,
        "sft": cloned,
        "minutes": {"total": sum(demo.minutes.values()), **demo.minutes},
        "peak_gb": peak_gb(),
        "stages": asdict(demo.size),
        "gate": gate,
    }
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    shutil.copyfile(run.folder / "judgement" / "samples.jsonl", run.folder / "samples.jsonl")
    page = report.build(run.folder)
    for sentence in summary["verdict"]:
        run.note(sentence)
    return headline(summary, page)


def headline(summary: dict[str, Any], page: Path) -> dict[str, object]:
    """The figures printed at the end."""

    def shown(x: dict[str, float]) -> str:
        return f"{x['mean']:.2f}  [{x['low']:.2f}, {x['high']:.2f}]"

    rm = summary["rm"]
    return {
        "gold, SFT": shown(summary["gold_sft"]),
        f"gold, best-of-{summary['gold_bon']['n']}": shown(summary["gold_bon"]),
        "gold, PPO": shown(summary["gold_ppo"]),
        "PPO − SFT, paired": shown(summary["ppo_minus_sft"]),
        "KL, nats a response": shown(summary["kl_nats"]["ppo"]),
        "reward model accuracy": f"{rm['accuracy']:.2f}  [{rm['low']:.2f}, {rm['high']:.2f}]",
        "labels paid": summary["labels"]["paid"],
        "minutes": round(summary["minutes"]["total"], 1),
        "peak GB": round(summary["peak_gb"], 1),
        "report": str(page),
    }
