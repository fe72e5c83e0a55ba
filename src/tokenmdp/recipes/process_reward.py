"""Process reward modelling: is this step of a response a good one?

    min_φ  − E_{steps k} [ y_k log p_k + (1 − y_k) log(1 − p_k) ],     p_k = σ( w · h̄_φ(x, y up to the end of step k) )

Labels y come from people, or from resets: the share of futures from the end of a step that end right, or whether any
does. With `outcome` only the last step of each response is learned, whose label is that of the whole response: an
outcome reward model, on the same responses and read at the same places. What the two say of steps is the comparison.

Source: Lightman et al. 2023, section 2.6 (process) and 2.5 (outcome); labels from rollouts: Wang et al. 2023
    (Math-Shepherd), eqs. 2-4; the comparison: Uesato et al. 2022.
Differs: the score is read at the last token of a step, found by position; no token is added for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenmdp import rewards, stats, tasks
from tokenmdp.functional import preference, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards import steps
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.rewards.step_model import StepRewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch

SETTING = "preference_rl"
HEADLINE = ("loss", "accuracy")


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the body the head sits on, and with `futures` the policy that rolls out
    data: str = "steps.jsonl"  # prompt, completions, labels: a file or a hub id; not read with `futures`
    futures: int = 0  # K: rollouts from the end of each step that make its label; 0 reads the labels in `data`
    task: str = "addition"  # with `futures`: prompts, a task's name, a file or a hub id
    reward: str = "addition"  # with `futures`: what says whether a response is right (a score above one half)
    prompts: int = 200  # with `futures`: prompts to answer
    samples: int = 4  # with `futures`: responses a prompt
    max_new_tokens: int = 64  # with `futures`: the horizon H, in tokens
    temperature: float = 1.0  # with `futures`: of sampling
    kind: str = "share"  # with `futures`: a label is the share of futures that end right, or whether `any` does
    delimiter: str = "\n"  # what closes a step; the empty one makes every token a step
    aggregate: str = "min"  # how steps make one score: min | last | product
    outcome: bool = False  # learn from the last step of each response alone: an outcome reward model
    epochs: int = 1  # passes over the responses
    rows: int = 16  # responses a step
    learning_rate: float = 5e-5  # highest; decays linearly to 0
    head_learning_rate: float = 1e-3  # of the head, which starts at zero
    warmup: int = 3  # steps over which the rates rise
    train: str = "all"  # what of the body trains: all | top-N blocks | lora-R rank | head (nothing but the head)
    pool: str = "last"  # what the head reads: the last state, or the mean of the states so far
    held_out: float = 0.1  # share of the prompts whose responses are never trained on
    max_tokens: int = 512  # longer responses are cut there
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient


def train(
    cfg: Config, policy: Policy, batch: Batch, label: Tensor, mask: Tensor, run: Run
) -> tuple[StepRewardModel, dict[str, object]]:
    """Fit the steps' labels; returns the process reward with what it says of the steps it never saw.

    Args:
        policy: whose body the head sits on.
        batch: responses, split by their prompts into what is learned from and what is held out.
        label: [B, L] y at the last token of each step, in [0, 1].
        mask: [B, L] where the steps with a label end.

    Raises:
        ValueError: labels outside [0, 1] or not of the batch's shape, a label on no action, or responses with a labelled
            step to fewer than two prompts.
    """
    _check(batch, label, mask)
    model = StepRewardModel(RewardModel.from_policy(policy, cfg.train, cfg.pool), cfg.delimiter, cfg.aggregate)
    kept = mask.any(dim=1).nonzero()[:, 0]
    if len(kept) < 2:
        cut = f" ({cut} of them are cut off)" if (cut := int((~batch.ended).sum())) else ""
        raise ValueError(f"{len(kept)} of {len(batch)} responses have a labelled step; give at least 2{cut}")
    labelled = replace(batch, group=torch.arange(len(batch), device=batch.tokens.device)).select(kept)
    # By prompt: a held-out response whose siblings are trained on says how well a prompt was learned by heart.
    learned, judged = (part.group for part in data.split(labelled, cfg.held_out, run.rng, by_prompt=True))
    seen = steps.last_of(mask) if cfg.outcome else mask
    per_epoch = -(-len(learned) // cfg.rows)
    count = cfg.epochs * per_epoch
    learner = Learner(
        model,
        cfg.learning_rate,
        rates={f"{model.model.head_name}.": cfg.head_learning_rate},
        steps=count,
        warmup=min(cfg.warmup, count),
        schedule="linear",
        tokens=cfg.micro_tokens,
    )

    def loss(part: Batch, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logit = model.logits(part)
        value = preference.pointwise(logit.flatten(), y.flatten()).view_as(logit)
        return value, {"accuracy": ((logit > 0) == (y > 0.5)).to(value.dtype), "steps_right": (y > 0.5).to(value.dtype)}

    for step in run.steps(count, learner, title="process reward", setting=SETTING):
        epoch, at = divmod(step, per_epoch)
        # An epoch's order depends on the seed and the epoch alone, so a resumed run draws the same one.
        shuffled = torch.randperm(len(learned), generator=torch.Generator().manual_seed(run.seed * 1_000_003 + epoch))
        rows = learned[shuffled[at * cfg.rows : (at + 1) * cfg.rows]]
        part = batch.select(rows)
        L = part.tokens.shape[1]
        metrics = learner.step(loss, part, weights.per_token(seen[rows, :L]), y=label[rows, :L])
        run.log(step, {**metrics, "num_steps": float(seen[rows].sum())}, headline=HEADLINE)
    model.model.backbone.freeze()
    return model, judge(model, batch.select(judged), label[judged], mask[judged])


def judge(model: StepRewardModel, batch: Batch, label: Tensor, mask: Tensor) -> dict[str, object]:
    """What it says of steps: accuracy over steps and over last steps, and how often it finds the first wrong one.

    The first step with p ≤ ½ is taken for the first wrong one; a response without any wrong step is right if no step is
    taken for one. Intervals are 95 %, over prompts: steps of a response, and responses to a prompt, are no independent
    trials.
    """
    L = batch.tokens.shape[1]
    label, mask = label[:, :L], mask[:, :L]
    p = model.probabilities(batch)
    good, said = label > 0.5, p > 0.5
    hit = (good == said) & mask
    prompts = [p.ids for p in batch.prompts]
    of_steps = [prompts[row] for row in mask.nonzero()[:, 0].tolist()]
    found = [_first(~said[b] & mask[b]) == _first(~good[b] & mask[b]) for b in range(len(batch))]

    def rate(right: Tensor, cluster: list[tuple[int, ...]]) -> dict[str, float]:
        return stats.clustered_wilson(right.double().cpu().numpy(), cluster)._asdict()

    ended = batch.ended.cpu()  # what was cut off has no outcome
    last = (hit & steps.last_of(mask)).any(dim=1).cpu()[ended]
    whole = [ids for ids, end in zip(prompts, ended.tolist(), strict=True) if end]
    outcome = {"outcome_accuracy": rate(last, whole)} if whole else {}
    ece, table = stats.calibration(p[mask].double().cpu().numpy(), good[mask].cpu().numpy(), bins=10)
    return {
        "step_accuracy": rate(hit[mask], of_steps),
        **outcome,
        "first_error_found": rate(torch.tensor(found), prompts),
        "n_prompts": len(set(prompts)),
        "n_responses": len(batch),
        "n_steps": int(mask.sum()),
        "ece": ece,
        "calibration": table,
    }


def _check(batch: Batch, label: Tensor, mask: Tensor) -> None:
    if label.shape != batch.tokens.shape or mask.shape != batch.tokens.shape:
        raise ValueError(
            f"labels of shape {tuple(label.shape)} and a mask of {tuple(mask.shape)} for tokens of "
            f"{tuple(batch.tokens.shape)}: one number a token, aligned with it"
        )
    if bool((mask & ~batch.action).any()):
        row = int((mask & ~batch.action).nonzero()[0, 0])
        raise ValueError(f"a step of row {row} ends on a token that is no action: a label belongs to a chosen token")
    wrong = mask & ~((label >= 0) & (label <= 1))
    if bool(wrong.any()):
        row, t = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"the label of the step ending at token {t} of row {row} is {float(label[row, t])}: it must be 0 to 1"
        )


def _first(where: Tensor) -> int:
    """The first position that is True; −1 for none."""
    at = where.nonzero()
    return int(at[0]) if len(at) else -1


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the body and the labels, or make them by resets; train, save the process reward to `model/` in the folder."""
    policy = catalog.load(cfg.model)
    made: dict[str, object] = {}
    if cfg.futures:
        task, reward = tasks.load(cfg.task, policy), rewards.load(cfg.reward, policy)
        sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
        prompts = task.draw(min(cfg.prompts, len(task.train)), run.rng)
        batch = policy.sample(prompts, cfg.samples, sampling, run.rng)
        found = steps.label(batch, policy, reward, cfg.futures, sampling, run.rng, cfg.delimiter, cfg.kind)
        label, mask = found.label, found.mask
        made = {
            "right": int(found.right.sum()),
            "right_with_wrong_steps": int(found.wrong_steps().sum()),
            "responses": len(batch),
            "tokens_drawn_for_labels": found.drawn,
        }
        run.note(f"labels by resets: {made}")
    else:
        batch, label, mask = data.stepwise(files.rows(cfg.data), policy, cfg.max_tokens)
        cut = int((~batch.ended).sum())
        if cut:
            said = "and have no outcome: they are left out" if cfg.outcome else "and their later labels are gone"
            run.note(f"{cut} of {len(batch)} answers were cut at max_tokens={cfg.max_tokens}, {said}")
            mask = mask & (batch.ended[:, None] | (not cfg.outcome))
    if len(label[mask].unique()) == 1:
        alike = f"all {int(mask.sum())} labelled steps are labelled {float(label[mask][0]):g}: there is nothing to tell apart"
        if not cfg.futures:
            raise ValueError(f"{alike}; give right and wrong ones")
        run.note(f"warning: {alike}; give easier or harder prompts, or a better model")  # the futures are paid for
    model, figures = train(cfg, policy, batch, label, mask, run)
    model.save(run.folder / "model")
    return {**figures, **made, "model": str(run.folder / "model")}
