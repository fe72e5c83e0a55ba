"""Reward from demonstrations alone: what tells them from the start's own responses to the same prompts.

    min_φ  − ½ E log σ( r_φ(x, y_demonstrated) ) − ½ E log σ( −r_φ(x, y_sampled) )                  classifier
    min_φ  − E log σ( r_φ(x, y_demonstrated) − r_φ(x, y_sampled) )                                  bradley_terry

Nobody compares anything: demonstrations are taken to be better than what the start says by itself. The best classifier
is the closed form

    r*(x, y) = log π_demonstrator(y | x) − log π_start(y | x)

and so is the best Bradley-Terry reward, up to a number a prompt. With the samples of an SFT model as the demonstrations
(`from_sft`) both terms can be computed, and a learned reward is worth its training only where it does better than that,
or costs less to ask. The figures stand beside the closed form wherever an SFT model is given.

Source: Sun & van der Schaar 2024, "Inverse-RLignment" (samples of the SFT model against initial samples); the best
    classifier: Goodfellow et al. 2014, proposition 1.
Differs: one response of the start for each demonstration, to the same prompt and under the same horizon, so that neither
    prompts nor lengths give the two sides away; the score is not normalised afterwards: its unit is nats, as that of the
    closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import stats, tasks
from tokenmdp.functional import preference, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards.log_ratio import LogRatio
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Pairs, Reward

SETTING = "inverse_rl"
OBJECTIVES = {"classifier": preference.both_sides, "bradley_terry": preference.bradley_terry}


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the start: whose samples are the other side, and the body of the reward
    data: str = "demonstrations.jsonl"  # text | messages | prompt, completion: a file or a hub id
    task: str = ""  # a task's name, as in `arithmetic`: its own demonstrations, and not `data`
    sft: str = ""  # a model cloned from the demonstrations: its closed form stands beside
    from_sft: bool = False  # its samples are the demonstrations: the closed form is then exact
    objective: str = "classifier"  # classifier | bradley_terry
    epochs: int = 1  # passes over the demonstrations; more than one overfits soon
    rows: int = 16  # demonstrations a step, and as many samples
    learning_rate: float = 5e-5  # highest; decays linearly to 0
    head_learning_rate: float = 1e-3  # of the head, which starts at zero
    warmup: int = 3  # steps over which the rates rise
    train: str = "all"  # what of the body trains: all | top-N blocks | lora-R rank | head (nothing but the head)
    pool: str = "last"  # what the head reads: last (what other tools expect) | mean (better with few demonstrations)
    centring: float = 0.0  # weight of the squared sum of a pair's scores, which Bradley-Terry leaves open
    max_new_tokens: int = 24  # the horizon: longer demonstrations are cut there, samples end there
    held_out: float = 0.1  # share of the demonstrations never trained on
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        if min(self.epochs, self.rows) < 1 or not self.centring >= 0:
            raise ValueError(
                f"epochs={self.epochs}, rows={self.rows}, centring={self.centring}: the first two are counts, at least 1, the "
                "last is a weight, at least 0"
            )
        if self.from_sft and not self.sft:
            raise ValueError("from_sft=True, but sft names no model: give the one whose samples are the demonstrations")


def train(
    cfg: Config, start: Policy, pairs: Pairs, held_out: Pairs, run: Run, closed: Reward | None = None
) -> tuple[RewardModel, dict[str, object]]:
    """Fit the reward; returns it with its held-out figures.

    Args:
        start: whose body the reward sits on; frozen.
        pairs, held_out: demonstrations as `chosen`, the start's responses to the same prompts as `rejected`.
        closed: the closed form, to stand beside.

    Raises:
        ValueError: every demonstration equals its sample: there is nothing to tell apart.
    """
    check_sides(pairs, run)
    reward = RewardModel.from_policy(start, cfg.train, cfg.pool, name="demo_reward")
    per_epoch = -(-len(pairs) // cfg.rows)
    steps = cfg.epochs * per_epoch
    learner = Learner(
        reward,
        cfg.learning_rate,
        rates={f"{reward.head_name}.": cfg.head_learning_rate},
        steps=steps,
        warmup=min(cfg.warmup, steps),
        schedule="linear",
        tokens=cfg.micro_tokens,
    )

    def loss(part: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        score = reward.last(Batch.concat([part.chosen, part.rejected]))
        shown, sampled = score.split(len(part))
        value = OBJECTIVES[cfg.objective](shown, sampled) + cfg.centring * preference.centring(shown, sampled)
        return value, {
            "rewards/accuracies": preference.ranked_right(shown, sampled),
            "rewards/margins": shown - sampled,
            "rewards/chosen": shown,
            "rewards/rejected": sampled,
        }

    for step in run.steps(steps, learner, title="reward from demonstrations", setting=SETTING):
        epoch, at = divmod(step, per_epoch)
        # An epoch's order depends on the seed and the epoch alone, so a resumed run draws the same one.
        shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(run.seed * 1_000_003 + epoch))
        part = pairs.select(shuffled[at * cfg.rows : (at + 1) * cfg.rows])
        run.log(step, learner.step(loss, part, weights.per_row(len(part))), headline=("loss", "rewards/accuracies"))
    reward.backbone.freeze()
    return reward, judge(reward, held_out, closed)


def check_sides(pairs: Pairs, run: Run) -> None:
    """Say how many pairs have equal sides.

    Raises:
        ValueError: all of them.
    """
    same = int(data.alike(pairs).sum())
    if same == len(pairs):
        raise ValueError(
            f"all {same} demonstrations equal the start's own samples: there is nothing to tell apart. Has the start been "
            "cloned from them already? Then give the model it was cloned from"
        )
    if same:
        run.note(f"{same} of {len(pairs)} demonstrations equal the start's own sample: they say nothing")


def judge(reward: RewardModel, pairs: Pairs, closed: Reward | None = None) -> dict[str, object]:
    """Held-out pairs: accuracy with its interval, calibration of σ(r) as the chance of a demonstration, and the closed
    form beside it: its accuracy, and the rank correlation over the responses of both sides, with an interval
    that resamples prompts, where there are at least three of them.
    """
    both = Batch.concat([pairs.chosen, pairs.rejected])
    score = reward(both).value.double().cpu()
    ece, table = stats.calibration(torch.sigmoid(score).numpy(), (torch.arange(len(both)) < len(pairs)).numpy())
    figures: dict[str, object] = {
        **_accuracy(score, pairs, ""),
        "n_pairs": len(pairs),
        "ece": ece,
        "calibration": table,
    }
    figures["same_sides"] = int(data.alike(pairs).sum())
    if closed is None:
        return figures
    known = closed(both)
    truth = known.value.double().cpu()
    figures |= _accuracy(truth, pairs, "closed_")
    judged = known.verdict.cpu()
    prompts = [both.prompts[row].ids for row in judged.nonzero()[:, 0].tolist()]
    if len(set(prompts)) > 2 and len(score[judged].unique()) > 1 and len(truth[judged].unique()) > 1:
        found = stats.spearman(score[judged].numpy(), truth[judged].numpy(), cluster=prompts)
        figures |= {"closed_spearman": found.mean, "closed_spearman_ci": [found.low, found.high]}
    return figures


def _accuracy(score: Tensor, pairs: Pairs, name: str) -> dict[str, object]:
    """How often the first half's scores beat those of the second, row by row; equal ones count one half.

    Pairs of one prompt are a cluster.
    """
    right = preference.ranked_right(*score.split(len(pairs))).double().cpu().numpy()
    found = stats.clustered_wilson(right, [p.ids for p in pairs.chosen.prompts])
    return {f"{name}accuracy": found.mean, f"{name}accuracy_ci": [found.low, found.high]}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the start and the demonstrations, answer their prompts, train, save the reward to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    cloned = catalog.load(cfg.sft).freeze() if cfg.sft else None
    closed = None if cloned is None else LogRatio(cloned, start)
    known = tasks.load(cfg.task, start).demonstrations if cfg.task else None
    if cfg.task and known is None:
        raise ValueError(f"the task {cfg.task} has no demonstrations: give a file with some by --data")
    shown = known if known is not None else data.demonstrations(files.rows(cfg.data), start, cfg.max_new_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens)
    with run.progress(len(shown) * (1 + cfg.from_sft), "answering the demonstrations' prompts", "responses") as bar:
        sampled = start.sample(shown.prompts, 1, sampling, run.rng, bar.advance)
        if cfg.from_sft and cloned is not None:
            shown = cloned.sample(shown.prompts, 1, sampling, run.rng, bar.advance)
    if int(shown.action.sum(-1).max()) > cfg.max_new_tokens:
        raise ValueError(
            f"a demonstration has {int(shown.action.sum(-1).max())} tokens, the samples have at most "
            f"{cfg.max_new_tokens}: length alone would tell them apart; raise max_new_tokens"
        )
    learned, kept = data.split(Pairs(shown, sampled, torch.zeros(len(shown))), cfg.held_out, run.rng)
    run.note(f"{len(learned)} demonstrations, {len(kept)} held out; start {start.name} {start.fingerprint()}")
    reward, figures = train(cfg, start, learned, kept, run, closed)
    reward.save(run.folder / "model")
    return {**figures, "model": str(run.folder / "model")}
