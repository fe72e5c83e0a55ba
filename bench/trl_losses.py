"""TRL's own loss methods, fed with given tensors.

A loss of TRL's is a method of a trainer: it reads a few settings of the trainer and what a model answers. Here the
method itself is called, on a trainer that holds these settings and was never built (no data, no optimiser), with a
model that answers the given log-probabilities. So the numbers are those of the installed code, not of a formula
written down a second time.

Arrays are token-aligned as everywhere here: `logp[b, t]` belongs to token t, position 0 is never an action. TRL's are
one position shorter, which is arranged in here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PROMPT = 1  # position 0 of every row: the state before the first action


class Model:
    """Answers what it was told to, and is in training.

    Args:
        answer: the output for given input ids.
    """

    training = True
    is_gradient_checkpointing = False

    def __init__(self, answer: Callable[[Tensor], Any] = lambda ids: None) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        return self.answer(input_ids)


def never_built(kind: type, model: Model, **settings: Any) -> Any:
    """A trainer with these settings and nothing else."""
    one_process = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    trainer = object.__new__(kind)
    common = {
        "model": model,
        "ref_model": None,
        "accelerator": one_process,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(trainer).update({**common, **settings})
    return trainer


def read(logp: Tensor) -> Any:
    """What TRL's patched models return: log-probabilities of the next token, and what is only logged."""
    shifted = logp[:, 1:]
    nothing = torch.zeros_like(shifted)
    return SimpleNamespace(log_probs=shifted, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def inputs_of(action: Tensor, marker: int = 0) -> dict[str, Tensor]:
    """Rows of one token id, which tells the model which rows are asked for."""
    ids = torch.full(action.shape, marker)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": action.long()}


# -- pairs and labels ---------------------------------------------------------------------------------------------------


def dpo(logp: Tensor, action: Tensor, ref: Tensor, loss: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """`DPOTrainer._compute_loss`: rows are the chosen ones, then the rejected ones; `ref` [2B] is of whole responses."""
    trainer = never_built(
        DPOTrainer,
        Model(lambda _: read(logp)),
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=True,
    )
    chosen, rejected = ref.chunk(2)
    batch = {**inputs_of(action), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return trainer._compute_loss(trainer.model, batch, False)


def cpo(
    chosen: Tensor, rejected: Tensor, loss: str, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0
) -> Tensor:
    """`CPOTrainer.cpo_loss`: [B] of what it is given as log-probabilities of the two sides."""
    settings = {"loss_type": loss, "beta": beta, "label_smoothing": label_smoothing, "simpo_gamma": gamma, "alpha": 0.0}
    return never_built(CPOTrainer, Model(), **settings).cpo_loss(chosen, rejected)[0]


def orpo_odds(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`ORPOTrainer.odds_ratio_loss`: [B], of mean log-probabilities; TRL subtracts it, so its sign is turned here."""
    return -never_built(ORPOTrainer, Model(), beta=beta).odds_ratio_loss(chosen, rejected)[0]


def orpo(logits: Tensor, tokens: Tensor, action: Tensor, real: Tensor, beta: float) -> Tensor:
    """`ORPOTrainer.get_batch_loss_metrics`: the whole loss, from logits; rows as in `dpo`."""
    trainer = never_built(
        ORPOTrainer,
        Model(lambda _: SimpleNamespace(logits=logits)),
        beta=beta,
        is_encoder_decoder=False,
        padding_value=0,
    )
    labels = torch.where(action, tokens, torch.full_like(tokens, -100))
    batch = {}
    for side, part in (("chosen", slice(None, len(tokens) // 2)), ("rejected", slice(len(tokens) // 2, None))):
        batch[f"{side}_input_ids"], batch[f"{side}_labels"] = tokens[part], labels[part]
        batch[f"{side}_attention_mask"] = real[part].long()
    return trainer.get_batch_loss_metrics(trainer.model, batch)[0]


def kto(
    logp: Tensor,
    action: Tensor,
    ref: Tensor,
    label: Tensor,
    wrong: Tensor,
    wrong_ref: Tensor,
    beta: float,
    desirable: float,
    undesirable: float,
) -> Tensor:
    """`KTOTrainer._compute_loss`; `wrong` holds the log-probabilities of mismatched responses."""
    trainer = never_built(
        KTOTrainer,
        Model(lambda ids: read(wrong if int(ids[0, 0]) else logp)),
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        calculate_KL=True,
        precompute_ref_logps=True,
    )
    others = {f"KL_{name}": x for name, x in inputs_of(action, 1).items()}
    batch = {**inputs_of(action), **others, "label": label, "ref_logps": ref, "ref_KL_logps": wrong_ref}
    return trainer._compute_loss(trainer.model, batch, False)


def reward(chosen: Tensor, rejected: Tensor, margin: Tensor | None, centring: float | None) -> Tensor:
    """`RewardTrainer.compute_loss`."""
    scores = torch.cat([chosen, rejected])[:, None]
    trainer = never_built(
        RewardTrainer,
        Model(lambda _: SimpleNamespace(logits=scores)),
        args=SimpleNamespace(center_rewards_coefficient=centring),
    )
    ids = torch.ones((len(scores), 1), dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, **({} if margin is None else {"margin": margin})}
    return trainer.compute_loss(trainer.model, batch)


# -- policy gradients ---------------------------------------------------------------------------------------------------


def completions(logp: Tensor, action: Tensor) -> dict[str, Tensor]:
    """Prompts of one token, and completions that take the rest of the row."""
    rest = torch.zeros_like(action[:, 1:], dtype=torch.long)
    prompt = torch.zeros((len(logp), PROMPT), dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": rest,
        "completion_mask": action[:, 1:].long(),
    }


def grpo(
    logp: Tensor,
    action: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    loss: str,
    level: str = "token",
    clip: float = 0.2,
    clip_high: float = 0.2,
    kl: float = 0.0,
    logp_ref: Tensor | None = None,
    horizon: int = 1,
    accumulate: int = 1,
    tokens: int | None = None,
) -> Tensor:
    """`GRPOTrainer._compute_loss`, of one of `accumulate` micro-batches.

    Args:
        loss: grpo, bnpo, dr_grpo, dapo or cispo.
        level: of the importance weight: token or sequence.
        tokens: action tokens of all micro-batches, which dapo and cispo divide by; None where this is all.
    """
    trainer = never_built(
        GRPOTrainer,
        Model(),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=accumulate),
        loss_type=loss,
        importance_sampling_level=level,
        beta=kl,
        epsilon_low=clip,
        epsilon_high=clip_high,
        max_completion_length=horizon,
        current_gradient_accumulation_steps=accumulate,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp[:, 1:], torch.zeros_like(logp[:, 1:]), None),
    )
    batch = {
        **completions(logp, action),
        "old_per_token_logps": logp_old[:, 1:],
        "advantages": advantage,
        "num_items_in_batch": torch.tensor(float(action.sum() if tokens is None else tokens)),
    }
    if logp_ref is not None:
        batch["ref_per_token_logps"] = logp_ref[:, 1:]
    return trainer._compute_loss(trainer.model, batch)


def rloo(logp: Tensor, action: Tensor, logp_old: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    """`RLOOTrainer._compute_loss`."""
    trainer = never_built(
        RLOOTrainer,
        Model(),
        epsilon_low=clip,
        epsilon_high=clip,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp[:, 1:], torch.zeros_like(logp[:, 1:]), None),
    )
    batch = {**completions(logp, action), "old_logps": (logp_old * action).sum(1), "advantages": advantage}
    return trainer._compute_loss(trainer.model, batch)


def advantages(
    score: Tensor,
    samples: int,
    scale: str | None,
    action: Tensor,
    logp: Tensor | None = None,
    logp_ref: Tensor | None = None,
    kl: float = 0.0,
) -> Tensor:
    """The advantages that `_generate_and_score_completions` of GRPO (`scale` group, batch or none) or RLOO (None) makes.

    Args:
        score: [B], a NaN for a response without a verdict.
        samples: responses a prompt, neighbours in `score`.
        logp, logp_ref: of RLOO's KL penalty, taken off the score with weight `kl`.
    """
    drawn = [[1] * int(n) for n in action[:, 1:].sum(1)]
    prompts = [[1]] * len(score)
    texts = [""] * len(score)
    longest = max(map(len, drawn))

    def look(model: Any, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        found = logp_ref if model == "reference" else logp
        found = torch.zeros_like(action, dtype=score.dtype) if found is None else found
        return found[:, 1 : 1 + longest], None, None

    trainer = never_built(
        RLOOTrainer if scale is None else GRPOTrainer,
        Model(),
        args=SimpleNamespace(
            per_device_train_batch_size=len(score),
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            gradient_checkpointing_kwargs=None,
        ),
        beta=kl,
        num_generations=samples,
        num_iterations=1,
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["score"],
        reward_clip_range=None,
        normalize_advantages=False,
        scale_rewards=scale,
        multi_objective_aggregation="sum_then_normalize",
        mask_truncated_completions=False,
        pad_to_multiple_of=None,
        environment_factories=None,
        environments=None,
        tools=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _logs={
            "prompt": [],
            "completion": [],
            "rewards": defaultdict(list),
            "advantages": [],
            "extra": defaultdict(list),
        },
        _pending_extra_logs={},
        _pending_metrics={},
        _get_per_token_logps_and_entropies=look,
        _calculate_rewards=lambda *_: score[:, None],
        _generate=lambda _: (
            (prompts, drawn, texts) if scale is None else (prompts, drawn, None, texts, None, {}, None, None)
        ),
    )
    trainer.ref_model = "reference" if kl else None
    made = trainer._generate_and_score_completions([{"prompt": ""}] * len(score))
    return made["advantages"]
