"""What training gained, judged where it did not train: the start and the trained policy side by side on held-out prompts.

    gain = E_prompts [ E score(y ~ π) − E score(y ~ π_start) ],      paired by prompt
    KL   = E Σ_t KL( π_T(· | s_t) ‖ π_start,T(· | s_t) ),            exact at every state visited, nats a response
    distinct-2 of a prompt: different pairs of neighbouring tokens / pairs,   over its responses: 1 is no repetition

Both policies answer the same prompts, at the temperature T. Top-k and top-p decide which states are visited and do not
enter the KL there: it is that of the whole distributions. Greedy responses (T = 0) have no finite KL; in their states that of
T = 1 is given. Intervals resample prompts, not responses: responses to one prompt are no independent evidence about the next
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenmdp import stats
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward, Score

PROMPTS, ANSWERS, SHOWN = 64, 4, 8
COLLAPSED = 0.5  # share of the start's distinct-2 below which it is a warning


def held_out(
    start: Policy,
    trained: Policy,
    reward: Reward,
    task: Task,
    sampling: Sampling,
    run: Run,
    gold: Reward | None = None,
) -> dict[str, object]:
    """Answer the task's held-out prompts with both policies; the first responses go to samples.jsonl.

    At most 64 prompts are asked, with 4 responses each. A prompt counts if each policy got a verdict on it.

    Args:
        reward: what trained the policy; it judges where nobody else does.
        sampling: as in training.
        gold: a judge that nothing was trained on.

    Returns:
        `held_out`: who judged, the number of prompts (and how many of those asked are learned on, how many are left out
        and how many responses had no verdict, start's and trained's, where any), scores of start and trained, their paired
        difference with its 95 % interval (and, where gold judged, that of the reward), the KL in nats a response, the share
        of clipped responses, and the mean length (tokens) and distinct-2 of both: a policy that says one thing to everything
        has a high score and nothing else. Where the task holds nothing out, or no prompt got verdicts, that is said in place of figures.
    """
    prompts = list(task.held_out)[:PROMPTS]
    if start.fingerprint() == trained.fingerprint():
        run.note("warning: the trained policy is its start, weight for weight: no step had anything to learn from")
    if not prompts:
        return {"held_out": f"the task {task.name} holds no prompts out: nothing to judge on"}
    if seen := task.learned(prompts):
        run.note(
            f"warning: {seen} of the {len(prompts)} prompts judged are among those that {task.name} gives to learn on: what was "
            "gained there may be learned by heart"
        )
    with run.progress(2 * ANSWERS * len(prompts), "judging on held-out prompts", "responses") as bar:
        answers = [policy.sample(prompts, ANSWERS, sampling, run.rng, bar.advance) for policy in (start, trained)]
    by, promises = gold or reward, [reward(b) for b in answers]
    scores = promises if gold is None else [gold(b) for b in answers]
    for arm, b, score, promise in zip(("start", "trained"), answers, scores, promises, strict=True):
        for row in range(0, min(len(b), SHOWN * ANSWERS), ANSWERS):
            run.sample(b, row, arm, proxy=promise.at(row), **({} if gold is None else {"gold": score.at(row)}))
    before, after = _paired(scores)
    if not len(before):
        return {"held_out": f"{by.name} gave no verdict on any of the {len(prompts)} held-out prompts"}
    T = sampling.temperature or 1.0
    divergence = in_parts(lambda part: {"kl": trained.kl_to(start, part, T)}, answers[1])["kl"]
    nats = divergence.sum(-1).double().cpu().numpy().reshape(-1, ANSWERS).mean(1)
    gain = _interval(after - before)
    promised = None if gold is None else _promised(reward, gold, promises, gain, run)
    varied = [_distinct(b) for b in answers]
    told = ~(np.isnan(varied[0]) | np.isnan(varied[1]))
    if told.any() and varied[1][told].mean() < COLLAPSED * varied[0][told].mean():
        run.note(
            f"warning: responses to one prompt repeat each other: distinct-2 fell from {varied[0][told].mean():.2f} to "
            f"{varied[1][told].mean():.2f}; look at samples.jsonl before you believe the score"
        )
    return {
        "held_out": {
            "judge": by.name,
            "prompts": len(before),
            **({"prompts_learned_on": seen} if seen else {}),
            **_left_out(scores, len(prompts) - len(before), run),
            "score_start": _interval(before),
            "score_trained": _interval(after),
            "trained_minus_start": gain,
            **({} if promised is None else {"proxy_trained_minus_start": promised}),
            "kl_nats": _interval(nats),
            "clipped_ratio": float((~answers[1].ended).double().mean()),
            **{
                f"mean_length_{arm}": float(b.action.sum(-1).double().mean())
                for arm, b in zip(("start", "trained"), answers, strict=True)
            },
            **(
                {
                    "distinct_2_start": _interval(varied[0][told]),
                    "distinct_2_trained": _interval(varied[1][told]),
                    "distinct_2_change": _interval(varied[1][told] - varied[0][told]),
                }
                if told.any()
                else {}
            ),
        }
    }


def _promised(
    reward: Reward, gold: Reward, promises: Sequence[Score], gain: dict[str, float], run: Run
) -> dict[str, float] | None:
    """What the reward that was optimised says was gained; where gold does not see it, that is said."""
    before, after = _paired(promises)
    if not len(before):
        return None
    found = _interval(after - before)
    if found.get("low", 0.0) > 0 and not gain.get("low", 0.0) > 0:
        fell = gain.get("high", 0.0) < 0
        told = (
            f"FELL by {-gain['mean']:.3g} [{-gain['high']:.3g}, {-gain['low']:.3g}]: what was learned is what the first overlooks"
            if fell
            else f"did not significantly ({gain['mean']:+.3g}): what was learned may be what the first overlooks"
        )
        run.note(
            f"warning: {reward.name}, which was optimised, rose by {found['mean']:.3g} [{found['low']:.3g}, {found['high']:.3g}], "
            f"and {gold.name} {told}"
        )
    return found


def _left_out(scores: Sequence[Score], prompts: int, run: Run) -> dict[str, Any]:
    """How many responses and prompts are in no figure; nothing where all are."""
    missing = [int((~score.verdict).sum()) for score in scores]
    if not any(missing):
        return {}
    run.note(
        f"warning: no verdict on {missing[0]} of {len(scores[0].verdict)} responses of the start and {missing[1]} of "
        f"the trained policy: they are in no score, and {prompts} prompts are left out"
    )
    return {"prompts_left_out": prompts, "no_verdict_start": missing[0], "no_verdict_trained": missing[1]}


def _distinct(b: Batch) -> np.ndarray[Any, Any]:
    """[P] distinct-2 of each prompt's responses, as tokens without the one that ends them; NaN where none has two."""
    rows = [b.tokens[i][b.action[i]].tolist() for i in range(len(b))]
    said = [row[:-1] if ended else row for row, ended in zip(rows, b.ended.tolist(), strict=True)]
    found = []
    for at in range(0, len(said), ANSWERS):
        part = said[at : at + ANSWERS]
        found.append(stats.distinct_n(part, 2) if max(map(len, part)) > 1 else float("nan"))
    return np.array(found)


def _interval(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean and 95 % interval over prompts; the mean alone where prompts do not differ and resampling says nothing."""
    if len(values) < 2 or np.ptp(values) == 0:
        return {"mean": float(values.mean()), "n": len(values)}
    return stats.bootstrap_mean(values)._asdict()


def _paired(scores: Sequence[Score]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The mean scores before and after, of the prompts that got a verdict both times."""
    before, after = (by_prompt(score, ANSWERS) for score in scores)
    both = ~(np.isnan(before) | np.isnan(after))
    return before[both], after[both]


def by_prompt(score: Score, answers: int) -> np.ndarray[Any, Any]:
    """[P] the mean score of each prompt's `answers` responses, over those with a verdict; NaN where none has one: no
    verdict is no score.
    """
    kept = score.verdict.cpu().view(-1, answers)
    value = score.value.double().cpu().view(-1, answers)
    return np.asarray((torch.where(kept, value, 0.0).sum(-1) / kept.sum(-1)).numpy())
