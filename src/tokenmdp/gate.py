"""What must hold before anything was learned: sampler, learner and reference are one policy, in numbers too.

    sampler and learner   mean of |log π(a_t | s_t) − log μ(a_t | s_t)| over a phase's tokens: rounding and nothing else
    reference             max of |log π − log π_ref|: 0, for the weights are the same and are read in the same way
    ratio                 π / π_old in the first update: 1

A sampler that is another policy than the learner (a temperature or top-p on one side only, dropout, weights that were not
passed on) makes every gradient one of another problem, and no curve shows it. So the first phase is measured and not
trusted; the second is measured again, for only after an update could the sampler's weights be stale. Where a sampler is
behind on purpose, phases are counted in which it has just caught up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tokenmdp.functional import measures
from tokenmdp.models.policy import Policy
from tokenmdp.run import Run
from tokenmdp.types import Batch

# What rounding explains, several times over: in bfloat16 the embedded model's two paths differ by .03 nats a token.
ROUNDING = {"float64": 1e-4, "float32": 1e-2, "bfloat16": 0.2, "float16": 0.1}
RATIO = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
CUT = 0.5  # share of responses cut at the horizon from which it is worth a line


def explained(limits: Mapping[str, float], compute: str) -> float:
    """What rounding explains of a figure, by the type of the matrix products; of a type not listed, as of bfloat16."""
    return limits.get(compute, limits["bfloat16"])


class NotOnePolicy(RuntimeError):
    """Sampler, learner and reference differ where nothing was learned yet: what would follow is no such method."""


def due(step: int) -> bool:
    """Whether a phase is one that is measured."""
    return step <= 1


def check(
    step: int,
    run: Run,
    policy: Policy,
    b: Batch,
    logp: Float[Tensor, "B L"],
    logp_ref: Float[Tensor, "B L"] | None = None,
    ratio: float | None = None,
) -> None:
    """Measure a run's first two phases, and keep it in gate.jsonl; phases after them are not looked at.

    Args:
        step: the phase, from 0; of a sampler that is refreshed now and then, how often it was.
        policy: what learns.
        b: what was sampled in this phase.
        logp: log-probabilities of its tokens under the weights that sampled, by the learner's own path, nats.
        logp_ref: the same under the reference, where that is what the policy starts as.
        ratio: the mean ratio in the phase's first update, where the method has one and its sampler is the policy.

    Raises:
        NotOnePolicy: a figure is beyond what rounding explains, before anything was learned from it that a checkpoint
            holds.
    """
    if not due(step):
        return
    compute = policy.paths["compute"]
    difference = measures.sampler_difference(b, logp)
    found: dict[str, Any] = {
        "step": step,
        "sampler_learner_mean_difference": difference.get("sampling/sampling_logp_difference/mean"),
        "sampler_learner_max_difference": difference.get("sampling/sampling_logp_difference/max"),
        "ratio_first_update": ratio,
        "kl_reference": None if step or logp_ref is None else float(((logp - logp_ref) * b.action).abs().max()),
        "compute": compute,
        "paths": dict(policy.paths),
    }
    odd = {name for name, x in found.items() if isinstance(x, float) and not math.isfinite(x)}
    run.append("gate.jsonl", {name: str(x) if name in odd else x for name, x in found.items()})  # JSON has no NaN
    if step == 0:
        tell(run, policy, b)
    wrong = []
    apart, rounding = found["sampler_learner_mean_difference"], explained(ROUNDING, compute)
    if apart is not None and not apart <= rounding:
        wrong.append(
            f"sampler and learner differ by {apart:.3g} nats a token on average, where rounding in {compute} explains "
            f"{rounding:g}: look for a temperature, top-k or top-p on one side only, dropout, or stale weights"
        )
    if found["kl_reference"] is not None and not found["kl_reference"] <= rounding:
        wrong.append(
            f"the policy differs from its reference by up to {found['kl_reference']:.3g} nats a token before the first "
            "update: they must be the same weights, read in the same way"
        )
    if ratio is not None and not abs(ratio - 1) <= explained(RATIO, compute):
        wrong.append(
            f"the mean ratio in the first update is {ratio:.6g} and not 1: the learner's path is not one function"
        )
    if wrong:
        raise NotOnePolicy(f"phase {step}: {'; '.join(wrong)}")


def tell(run: Run, policy: Policy, b: Batch) -> None:
    """Say which path a run's first rollout took, and whether the horizon cut it."""
    run.note("; ".join(f"{name}: {way}" for name, way in policy.paths.items()))
    cut = float((~b.ended).float().mean())
    if cut > CUT:
        run.note(
            f"{cut:.0%} of the first phase's responses were cut at {int(b.action.sum(-1).max())} tokens before they ended: "
            "raise max_new_tokens unless that is meant; a reward that reads the end of an answer never sees it"
        )
