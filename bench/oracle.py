"""Every gradient estimator of the policy-gradient family against the enumerated truth.

    python bench/oracle.py --json docs/results/oracle.json

A GPT-2 with four tokens has 40 responses of up to three, so the truth ∇E[score] is a finite sum, and so is the mean
and the variance of an estimator: over all 40 responses, over all 123,410 groups of four, over all 672,400 pairs of
pairs from two prompts. Nothing is sampled; all is in float64. The estimators are the library's own functions; what is
summed is a loss's coefficient on ∇ log π(a | s), an action at a time, and the Gram matrix of the 52 such gradients
turns coefficients into lengths and angles of gradients.

    bias      ‖mean − truth‖ / ‖truth‖, as the estimator comes
    off       the same at the best scale, which a learning rate could repair: the sine of the angle to the truth, and
              all of it (100 %) where the mean points away from the truth
    cosine    of the mean gradient and the truth
    noise     variance a response, Σ over parameters, in units of the squared truth, once the mean is scaled to be as
              long along the truth as the truth itself: how many responses a gradient needs; 1e9 where it points
              away, that is, no number

Each seed has its own policy, sampler, reference and critic; figures are medians over seeds. The same command writes the
page with the tables, estimators.md, in the folder above the JSON file's, unless --page says where.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import common
import oracle_page
from oracle_toy import (
    EOS,
    PROMPTS,
    H,
    TokenLoss,
    Toy,
    V,
    alone,
    figures,
    grouped,
    groups,
    judge,
    logp_of,
    model_of,
    moved,
    toy_of,
)
from tokenmdp.functional import credit, kl, policy_loss, returns
from tokenmdp.testing.exact import Exact, expectation, gradient

STALE = (1, 4, 16)
CLIP, CLIP_HIGH, CISPO_HIGH, GSPO_CLIP = 0.2, 0.28, 4.0, 3e-4


# -- the estimators ------------------------------------------------------------------------------------------------------


def flat(toy: Toy, rows: Tensor, function: Callable[..., Tensor]) -> Tensor:
    """A function of flat scores and groups, on every group: [M, k]."""
    M, k = rows.shape
    return function(toy.score[rows.reshape(-1)], torch.arange(M).repeat_interleave(k)).reshape(M, k)


def group_relative(score: Tensor, group: Tensor) -> Tensor:
    return returns.scaled(returns.centred(score, group), returns.spread(score, group))


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    return policy_loss.reinforce(logp, advantage)


def greedy_score(toy: Toy) -> float:
    """What the response of most likely tokens earns, in a toy of one prompt."""
    world, logp = toy.worlds[0], toy.logp.detach()
    by_action = {
        world.actions[int(a)]: float(x) for a, x in zip(toy.action.flatten(), logp.flatten(), strict=True) if a >= 0
    }
    response: tuple[int, ...] = ()
    while len(response) < H and (not response or response[-1] != EOS):
        response = max(((*response, a) for a in range(V)), key=lambda r: by_action[r])
    return judge(response)


def on_policy(toy: Toy, k: int) -> dict[str, dict[str, float]]:
    """Baselines, scales and weights, on groups of k responses of the policy itself."""
    rows, probability = groups(toy.p, k)
    plain = toy.slopes(reinforce, (1.0,))
    score = toy.score[rows]
    others = flat(toy, rows, returns.leave_one_out)
    advantages = {
        "no baseline": score,
        "greedy response (ReMax)": score - greedy_score(toy),
        "leave one out (RLOO)": others,
        "group mean (Dr. GRPO)": flat(toy, rows, returns.centred),
        "group mean and spread (GRPO)": flat(toy, rows, group_relative),
    }
    found = {name: figures(toy, grouped(toy, rows, probability, a, plain), k) for name, a in advantages.items()}
    # Σ_t w[b, t] ℓ[b, t] with one advantage a row: what a row's tokens weigh together is all that differs.
    length = toy.length
    weigh: dict[str, Callable[[Tensor], Tensor]] = {
        "per slot": lambda n: torch.full(n.shape, 1 / (k * H), dtype=torch.float64),
        "per token": lambda n: (1 / length[n].sum(1, keepdim=True)).expand(n.shape),
        "per sequence": lambda n: 1 / (k * length[n]),
    }
    for name, w in weigh.items():
        found[f"leave one out, {name}"] = figures(toy, grouped(toy, rows, probability, others, plain, w), k)
    return found


def two_prompts(toy: Toy) -> dict[str, dict[str, float]]:
    """Two responses to each of two prompts, one of which is easier."""
    half = len(toy.worlds[0])
    first, p_first = groups(toy.p[:half], 2)
    second, p_second = groups(toy.p[half:], 2)
    rows = torch.cat([first.repeat_interleave(len(second), 0), half + second.repeat(len(first), 1)], 1)
    probability = (p_first[:, None] * p_second).reshape(-1)
    plain = toy.slopes(reinforce, (1.0,))

    def by_prompt(score: Tensor, group: Tensor) -> Tensor:
        return returns.leave_one_out(score, 2 * group + torch.arange(len(group)) % 4 // 2)

    advantages = {
        "two prompts: no baseline": toy.score[rows],
        "two prompts: other rows of the batch": flat(toy, rows, returns.leave_one_out),
        "two prompts: other rows of the prompt (RLOO)": flat(toy, rows, by_prompt),
    }
    return {name: figures(toy, grouped(toy, rows, probability, a, plain), 4) for name, a in advantages.items()}


def critics(toy: Toy, seed: int) -> dict[str, dict[str, float]]:
    """PPO's advantages at its first update, from one response: λ, and a critic that errs by half a score's spread."""
    world, batch = toy.worlds[0], toy.worlds[0].batch
    reward = credit.last(toy.score, batch.action)
    exact = world.values(toy.logp.detach(), reward).value
    draw = torch.Generator().manual_seed(seed)
    error = torch.randn(len(world.states), generator=draw, dtype=torch.float64)
    size = 0.5 * float((toy.p @ (toy.score - toy.p @ toy.score).square()).sqrt())
    wrong = exact + torch.where(batch.action, size * error[world.state], 0.0)
    found = {}
    for name, value in (("exact critic", exact), ("imperfect critic", wrong)):
        for lam in (1.0, 0.95, 0.5, 0.0):
            advantage, _ = returns.gae(reward, value, batch.action, 1.0, lam)
            c = toy.spread(advantage)
            found[f"GAE λ = {lam:g}, {name}"] = figures(toy, alone(toy, c), 1)
    return found


def stale(model: GPT2LMHeadModel, k: int, steps: Sequence[int], rate: float) -> dict[str, dict[str, float]]:
    """Groups drawn from the policy as it was some updates ago, the updates being Adam's on the true gradient."""
    policy = copy.deepcopy(model)
    world = Exact(PROMPTS[0], V, H, eos=EOS)
    score, old = world.score(judge), logp_of(world, model).detach()
    p_old = world.probability(old)
    optimiser = torch.optim.Adam(policy.parameters(), lr=rate)
    rows, probability = groups(p_old, k)
    found: dict[str, dict[str, float]] = {}
    for step in range(1, max(steps) + 1):
        optimiser.zero_grad()
        (-expectation(world.probability(logp_of(world, policy)), score)).backward()
        optimiser.step()
        if step in steps:
            toy = toy_of(policy, PROMPTS[:1])
            distance = float(world.kl(old, toy.logp.detach()))
            for name, (function, slopes) in ratios(toy, old).items():
                advantage = flat(toy, rows, function)
                row = figures(toy, grouped(toy, rows, probability, advantage, slopes), k)
                found[f"{step} update{'s' * (step > 1)}: {name}"] = {**row, "kl": distance}
    return found


def ratios(toy: Toy, old: Tensor) -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
    """What may be done about staleness: the advantage, and what a response then adds to the gradient."""
    action = toy.mask
    whole = (toy.logp.detach() - old).sum(1, keepdim=True).exp()
    losses: dict[str, TokenLoss] = {
        "no ratio": reinforce,
        "ratio of the response": lambda x, a: policy_loss.reinforce(x, whole * a),
        "ratio of the token": lambda x, a: policy_loss.ppo_clip(x, old, a, None)[0],
        f"clip {CLIP}": lambda x, a: policy_loss.ppo_clip(x, old, a, CLIP)[0],
        f"clip {CLIP} and {CLIP_HIGH} (DAPO)": lambda x, a: policy_loss.ppo_clip(x, old, a, CLIP, CLIP_HIGH)[0],
        "GSPO without its clip": lambda x, a: policy_loss.gspo(x, old, a, action, None)[0],
        f"GSPO, clip {GSPO_CLIP:g}": lambda x, a: policy_loss.gspo(x, old, a, action, GSPO_CLIP)[0],
        f"CISPO, weight at most {1 + CISPO_HIGH:g}": lambda x, a: policy_loss.cispo(x, old, a, None, CISPO_HIGH)[0],
        "CISPO, weight at most 1.2": lambda x, a: policy_loss.cispo(x, old, a, None, 0.2)[0],
    }
    found = {name: (returns.leave_one_out, toy.slopes(loss)) for name, loss in losses.items()}
    return {**found, f"GRPO: clip {CLIP}, group mean and spread": (group_relative, found[f"clip {CLIP}"][1])}


# -- KL ------------------------------------------------------------------------------------------------------------------


def divergences(toy: Toy, reference: GPT2LMHeadModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Estimators of KL(π ‖ ref) from responses of π: as values of a response, and as losses to differentiate."""
    world, logp = toy.worlds[0], toy.logp
    ref, fixed = logp_of(world, reference).detach(), logp.detach()
    truth = float(world.kl(fixed, ref))
    estimators = {"k1": kl.reverse_k1, "k2": kl.reverse_k2, "k3": kl.reverse_k3}
    values = {}
    for name, estimate in estimators.items():
        x = estimate(fixed, ref).sum(1)
        mean = float(toy.p @ x)
        values[name] = {
            "truth": truth,
            "bias": (mean - truth) / truth,
            "deviation": float(toy.p @ (x - mean).square()) ** 0.5 / truth,
            "negative": float(toy.p @ (x < 0).double()),
        }
    targets = {
        "KL(π ‖ ref) at the visited states": gradient((toy.p[:, None] * world.kl_at(logp, ref)).sum(), toy.parameters),
        "KL(ref ‖ π) at the visited states": gradient((toy.p[:, None] * world.kl_at(ref, logp)).sum(), toy.parameters),
        "KL(π ‖ ref) of responses": gradient(world.kl(logp, ref), toy.parameters),
    }
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "k1 in the loss": lambda x: kl.reverse_k1(x, ref),
        "k2 in the loss": lambda x: kl.reverse_k2(x, ref),
        "k3 in the loss, as published": lambda x: kl.reverse_k3(x, ref),
        "k1 with the ratio, in the loss": lambda x: kl.reverse_k1_off(x, ref, fixed),
        "k3 with the ratio, in the loss": lambda x: kl.reverse_k3_off(x, ref, fixed),
        "k1 in the reward": lambda x: (fixed - ref).sum(1, keepdim=True) * x,
    }
    slopes = {}
    for name, loss in losses.items():
        x = fixed.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x).sum(), x)
        c = toy.spread(slope)
        mean, square = alone(toy, c)
        own = mean @ toy.jacobian
        length = float(own.norm())
        variance = square - length**2
        slopes[name] = {
            **{t: float((own - want).norm() / want.norm()) for t, want in targets.items()},
            "noise": variance / float(targets["KL(π ‖ ref) of responses"].square().sum()),
        }
    return values, slopes


# -- all of it -----------------------------------------------------------------------------------------------------------


def measure(seed: int, k: int, steps: Sequence[int], rate: float) -> dict[str, dict[str, dict[str, float]]]:
    """Every table for one seed; with groups of two, which are for a quick look, without the pairs of pairs."""
    reference = model_of(seed)
    model = moved(reference, seed + 1000)
    toy = toy_of(model, PROMPTS[:1])
    values, slopes = divergences(toy, reference)
    return {
        "on_policy": {**on_policy(toy, k), **({} if k == 2 else two_prompts(toy_of(model, PROMPTS)))},
        "critic": critics(toy, seed),
        "stale": stale(model, k, steps, rate),
        "kl_value": values,
        "kl_gradient": slopes,
    }


def gathered(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median over seeds of every figure, and each seed's."""
    return {
        table: {
            row: {
                name: {"median": rounded(statistics.median(all_)), "all": [rounded(x) for x in all_]}
                for name in found[0][table][row]
                for all_ in [[f[table][row][name] for f in found]]
            }
            for row in found[0][table]
        }
        for table in found[0]
    }


def rounded(x: float) -> float:
    """Five digits, and rounding error of a zero as zero."""
    return 0.0 if abs(x) < 1e-7 else float(f"{x:.5g}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    out.add_argument("--page", type=Path, metavar="FILE", help="where the page goes; without it see above")
    args: argparse.Namespace = out.parse_args(argv)
    seeds, k, steps = (args.seeds[:1], 2, STALE[:1]) if args.quick else (args.seeds, 4, STALE)
    rate = 1e-4
    results: dict[str, Any] = {
        "command": common.command(),
        "versions": common.versions(),
        "seeds": seeds,
        "vocabulary": V,
        "horizon": H,
        "group": k,
        "stale_updates": list(steps),
        "stale_learning_rate": rate,
        "tables": gathered([measure(seed, k, steps, rate) for seed in seeds]),
    }
    common.write(args.json, results)
    page = args.page or (args.json.parent.parent / "estimators.md" if args.json else None)
    if page is not None:
        page.write_text(oracle_page.page(results), encoding="utf-8")
    for line in oracle_page.tables(results):
        print(line)
    return results


if __name__ == "__main__":
    main()
