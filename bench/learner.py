"""The learner: tokens a second of an SFT update and of a PPO update, and what share of the machine's matrix peak they
reach.

    python bench/learner.py --json docs/results/learner.json

An update is `Learner.step` on one batch: forward, backward, clipping, Adam. SFT has the loss on almost every token; PPO
(the actor) on the second half of each row, and only those positions are projected to the vocabulary. `train=top-10`
trains the last ten blocks.

Work is counted where it is done, at each linear layer as it runs: 2·in·out a position forwards, the same again for the
gradient of its weight where that trains, and again for the gradient of its input where that is needed. Attention,
norms, the embedding and Adam take time but count as nothing, so the share is a lower bound. The peak is a 2048-cubed
product of two matrices of the same type in the same run, taking turns with the update. Every row of the batch has one
length: no position is padding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import common
from tokenmdp.functional import imitation, policy_loss, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Loss, Prompt

SIDE = 2048  # of the square matrices whose product is the peak


def batch_of(policy: Policy, rows: int, prefix: int, response: int) -> Batch:
    """Random tokens: the work of a learner does not depend on what it reads."""
    picked = torch.randint(
        policy.model.config.vocab_size, (rows, prefix + response), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return Batch.build(
        [Prompt(tuple(ids[:prefix]), "", row=i) for i, ids in enumerate(picked)],
        [ids[prefix:] for ids in picked],
        texts=[""] * rows,
        ended=[True] * rows,
    )


@contextmanager
def counted(model: nn.Module) -> Iterator[list[float]]:
    """A list whose first number grows by the operations of every linear layer that runs inside."""
    total = [0.0]

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        assert isinstance(layer, nn.Linear)
        positions = inputs[0].numel() // layer.in_features
        backward = torch.is_grad_enabled() * (layer.weight.requires_grad + inputs[0].requires_grad)
        total[0] += 2.0 * layer.in_features * layer.out_features * positions * (1 + backward)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def sft_update(policy: Policy, rows: int, length: int) -> tuple[Loss, Batch, dict[str, Tensor]]:
    """A behaviour-cloning step: the loss on all but the first eight tokens of each row."""

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return imitation.nll(policy.evaluate(part)["logp"]), {}

    return loss, batch_of(policy, rows, 8, length - 8), {}


def ppo_update(policy: Policy, rows: int, length: int) -> tuple[Loss, Batch, dict[str, Tensor]]:
    """The actor's step of PPO: the clipped loss on the second half of each row."""
    data = batch_of(policy, rows, length - length // 2, length // 2)
    with torch.no_grad():
        logp_old = policy.evaluate(data)["logp"]
    advantage = torch.randn(logp_old.shape, generator=torch.Generator().manual_seed(0)).to(logp_old)

    def loss(part: Batch, advantage: Tensor, logp_old: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, clipped = policy_loss.ppo_clip(policy.evaluate(part)["logp"], logp_old, advantage, 0.2)
        return value, {"policy/clipfrac_avg": clipped.to(value.dtype)}

    return loss, data, {"advantage": advantage, "logp_old": logp_old}


def update_once(
    learner: Learner, loss: Loss, data: Batch, weight: Tensor, columns: dict[str, Tensor], work: float
) -> float:
    """One optimiser step; gives its GFLOP."""
    learner.step(loss, data, weight, **columns)
    return work


UPDATES = {"SFT": sft_update, "PPO actor": ppo_update}


def peak_product(policy: Policy, side: int) -> Callable[[], float]:
    """One large product in the type the policy computes in; gives its GFLOP."""
    a = torch.randn(side, side, dtype=policy.backbone.compute, device=policy.device)
    repeats = 8  # long enough to be timed, short beside an update

    def run() -> float:
        for _ in range(repeats):
            torch.mm(a, a)
        return repeats * 2 * side**3 / 1e9

    return run


def measure(start: Policy, runs: int, quick: bool) -> dict[str, Any]:
    """All rows: each update at train=all and at the top ten blocks (or all blocks but one, of a model that has
    fewer)."""
    rows, length = (4, 64) if quick else (16, 112)
    top = min(10, max(1, int(start.model.config.num_hidden_layers) - 1))
    out: dict[str, Any] = {}
    for update, build in UPDATES.items():
        for train in ("all", f"top-{top}"):
            policy = start.twin(train)
            loss, data, columns = build(policy, rows, length)
            learner = Learner(policy, 1e-6)
            weight = weights.per_token(data.action)

            with counted(policy.model) as total:
                learner.step(loss, data, weight, **columns)
            work = total[0] / 1e9
            step = partial(update_once, learner, loss, data, weight, columns, work)
            name = f"{update}, train={train}, {rows} rows x {length} tokens"
            rates = common.alternate(
                {"ours": step, "peer": peak_product(start, SIDE // 2 if quick else SIDE)}, runs, name
            )
            found = common.row(rates["ours"], rates["peer"], "GFLOP/s")
            tokens = float(data.length.sum())
            out[name] = {
                **found,
                "tokens_per_s": round(found["ours"] / work * tokens, 1),
                "gflop_per_token": round(work / tokens, 6),
            }
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    common.model_flags(out)
    args: argparse.Namespace = out.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    start = catalog.load(args.model, compute=args.compute).freeze()
    runs = common.runs_of(args)
    rows = measure(start, runs, args.quick)
    rows["_meta"] = {
        **common.meta(start, runs),
        "peak": f"{SIDE // 2 if args.quick else SIDE}-cubed matrix product",
    }
    common.write(args.json, rows)
    common.show(f"learner, {start.name}, {rows['_meta']['compute']}", rows, "update", "peak", "share")
    for name, r in rows.items():
        if not name.startswith("_"):
            print(f"{name}: {r['tokens_per_s']:,.0f} tokens/s")
    return rows


if __name__ == "__main__":
    main()
