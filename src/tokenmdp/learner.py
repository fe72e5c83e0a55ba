"""The learner: one optimiser step from an unreduced loss and its weights, whatever the micro-batches.

    θ ← Adam(θ, g),   g = clip( Σ_micro ∇ Σ_{b,t} weight[b,t] · loss[b,t] )

Weights are computed by the recipe over the whole batch, so cutting the batch differently (by a token budget, into one
row each, over several processes) adds up to the same gradient. Nothing here averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenmdp import parallel
from tokenmdp.models.parts import cut, micro_batches
from tokenmdp.types import Data, Loss


class Trainable(Protocol):
    """What a learner trains: a policy, a reward model, a critic."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient is NaN or infinite; no weight was changed."""


class Learner:
    """Adam on the weights that train.

    Args:
        module: what trains.
        learning_rate: Adam's step size at its highest.
        rates: step sizes of the weights whose names begin so, in place of `learning_rate`.
        steps: planned optimiser steps, for the schedule; 0 keeps the rate constant.
        warmup: steps over which the rate rises linearly from 0.
        schedule: `constant`, or `linear` decay to 0 over `steps`.
        weight_decay: decoupled (Loshchilov & Hutter 2019, alg. 2).
        clip_norm: largest 2-norm of the whole gradient; 0 does not clip.
        tokens: padded positions in a micro-batch, the knob of memory; it cannot change the gradient.

    Raises:
        ValueError: nothing trains, or a value is outside its range.
    """

    def __init__(
        self,
        module: Trainable,
        learning_rate: float,
        *,
        rates: Mapping[str, float] | None = None,
        steps: int = 0,
        warmup: int = 0,
        schedule: str = "constant",
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
        tokens: int = 2048,
    ) -> None:
        named = list(module.trained())
        if not named:
            raise ValueError("no weight trains: take a twin of the model with train='all', 'top-N' or 'lora-R' first")
        for what, rate in {
            "learning_rate": learning_rate,
            **{f"rates[{k!r}]": v for k, v in (rates or {}).items()},
        }.items():
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"{what}={rate}: a step size must be positive and finite; to freeze weights choose `train`"
                )
        if tokens < 1 or not clip_norm >= 0:
            raise ValueError(
                f"tokens={tokens}, clip_norm={clip_norm}: the first must be positive, the second at least 0"
            )
        if min(steps, warmup) < 0 or not 0 <= weight_decay < math.inf:
            raise ValueError(
                f"steps={steps}, warmup={warmup}, weight_decay={weight_decay}: each must be at least 0 and finite; "
                "0 is no schedule, no warmup, no decay"
            )
        if schedule not in ("constant", "linear"):
            raise ValueError(f"schedule is {schedule!r}; it must be constant or linear")
        if schedule == "linear" and steps < 1:
            raise ValueError("schedule=linear decays over `steps` optimiser steps; say how many there will be")
        self.named = dict(named)
        self.learning_rate, self.steps, self.warmup, self.schedule = learning_rate, steps, warmup, schedule
        self.clip_norm, self.tokens = clip_norm, tokens
        self.taken = 0
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.named.values())
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named:
            own = [rate for prefix, rate in (rates or {}).items() if name.startswith(prefix)]
            groups.setdefault(own[0] if own else learning_rate, []).append(parameter)
        self.highest = list(groups)
        self.optimiser = torch.optim.AdamW(
            [{"params": members, "lr": rate} for rate, members in groups.items()],
            betas=(0.9, 0.95),
            weight_decay=weight_decay,
            fused=fused,
        )

    def share(self) -> float:
        """The schedule: what share of the highest learning rate the next step takes."""
        rise = min(1.0, (self.taken + 1) / self.warmup) if self.warmup else 1.0
        fall = max(0.0, 1 - self.taken / self.steps) if self.schedule == "linear" else 1.0
        return min(rise, fall)

    @property
    def warning(self) -> str:
        """What a run says of it when its steps are over; empty where all is well."""
        if self.taken >= self.warmup:
            return ""
        return f"the learning rate was still rising after {self.taken} optimiser steps: warmup={self.warmup} takes that many"

    def step(self, loss: Loss, data: Data, weight: Tensor, **columns: Tensor) -> dict[str, float]:
        """Take one optimiser step on Σ weight · loss.

        Args:
            loss: called as `loss(part, **columns of the part)`; gives the unreduced loss, shaped like `weight`, and
                unreduced metrics of the same shape, each reported as Σ weight · metric.
            data: a `Batch` or `Pairs`.
            weight: [B, L] or [B], computed over the whole batch.
            columns: [B, L], [B, L, D] or [B] arrays that belong to the rows of `data`; cut along with it.

        Returns:
            `loss`, `grad_norm` (before clipping), `learning_rate`, and the metrics.

        Raises:
            NonFiniteLoss: naming the rows; weights and optimiser are as they were.
        """
        totals = self.gradient(loss, data, weight, **columns)
        parameters = [p for p in self.named.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            self.optimiser.zero_grad(set_to_none=True)
            raise NonFiniteLoss(
                f"the gradient's norm is {float(norm)} at optimiser step {self.taken}; no weight was changed: lower the learning "
                "rate, or hold the reward within bounds (`ppo` has score_clip)"
            )
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        share = self.share()
        for group, highest in zip(self.optimiser.param_groups, self.highest, strict=True):
            group["lr"] = share * highest
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.taken += 1
        return {**totals, "grad_norm": float(norm), "learning_rate": share * self.learning_rate}

    def gradient(self, loss: Loss, data: Data, weight: Tensor, **columns: Tensor) -> dict[str, float]:
        """Accumulate the gradient of Σ weight · loss into the parameters, without stepping; returns the weighted
        sums.
        """
        here = next(iter(self.named.values())).device
        weight, columns = weight.to(here), {name: column.to(here) for name, column in columns.items()}
        totals: dict[str, Tensor] = {}
        for rows in micro_batches(data.cost, self.tokens):
            part = data.select(rows)
            value, metrics = loss(part, **{k: cut(v, rows, part) for k, v in columns.items()})
            w = cut(weight, rows, part).to(value.dtype)
            if value.shape != w.shape:
                raise ValueError(
                    f"the loss has shape {tuple(value.shape)}, its weight {tuple(w.shape)}: a loss is unreduced, one value a weight"
                )
            used = w != 0
            weighted = torch.where(used, w * value, torch.zeros_like(value))
            if not bool(torch.isfinite(weighted).all()):
                self.optimiser.zero_grad(set_to_none=True)
                bad = rows[(~torch.isfinite(weighted)).reshape(len(rows), -1).any(-1)].tolist()
                raise NonFiniteLoss(
                    f"the loss is not finite on rows {bad[:8]} of the batch at optimiser step {self.taken}; no weight was changed: "
                    "lower the learning rate, or look at these rows' scores and log-probabilities"
                )
            weighted.sum().backward()
            for name, metric in {"loss": value, **metrics}.items():
                measured = torch.where(used, w * metric.detach().to(w.dtype), torch.zeros_like(w)).sum().double()
                totals[name] = totals.get(name, torch.zeros_like(measured)) + measured
        for parameter in self.named.values():
            if parameter.grad is not None:
                parameter.grad = parallel.world.sum(parameter.grad)
        return {name: float(parallel.world.sum(total)) for name, total in totals.items()}

    # -- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Weights that train and Adam's moments, by name."""
        out: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            out[f"weight/{name}"] = parameter.detach()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                out[f"adam/{key}/{name}"] = value
        return out

    def scalars(self) -> dict[str, Any]:
        """Optimiser steps taken."""
        return {"taken": self.taken}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on exactly where `tensors` and `scalars` were taken.

        Raises:
            ValueError: naming a weight the checkpoint lacks or whose shape differs.
        """
        for name, parameter in self.named.items():
            saved = tensors.get(f"weight/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ValueError(
                    f"the checkpoint has {'no weight' if saved is None else f'shape {tuple(saved.shape)}'} for {name} "
                    f"{tuple(parameter.shape)}: it belongs to another model or another `train`; start a new run folder"
                )
            parameter.copy_(saved)
            state = {
                key: tensors[f"adam/{key}/{name}"].clone().to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam/{key}/{name}" in tensors
            }
            if state:
                self.optimiser.state[parameter] = state
        self.taken = int(scalars["taken"])
