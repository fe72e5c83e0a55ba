"""Rollouts: our engine (`Policy.sample`) against `transformers`' `generate`, in one run, taking turns.

    python bench/rollout.py --json docs/results/rollout.json

Both sides draw at temperature 1 from the whole vocabulary, in the same compute type. In the rows that do not say
otherwise nothing stops at an end-of-text token, so both sides produce the same number of tokens. `generate` runs as its
users would run it for speed: its own cache, `sdpa` attention, several samples of a prompt through
`num_return_sequences`, and, where matrix products are bfloat16, a model whose weights were converted to bfloat16
beforehand. Our side also returns the log-probability of every token it drew.

The unit is response tokens a second, prompts read included; with stopping only tokens up to the end of each response
count.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import common
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.types import Prompt

QUESTIONS = (
    "Name one colour.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Is the sun a star? Answer yes or no.",
    "Give me three words that rhyme with cat.",
    "Who wrote Hamlet?",
    "Say hello in Spanish.",
    "What do bees make, and why do people like it?",
)


@dataclass(frozen=True)
class Shape:
    """One row of the bench."""

    prompts: int
    samples: int  # responses a prompt
    new_tokens: int
    prompt_tokens: int = 48
    stop: bool = False  # at an end-of-text token; the prompts are then questions, whose answers end

    @property
    def name(self) -> str:
        rows = f"{self.prompts * self.samples} rows x {self.new_tokens} new tokens"
        what = (
            f"{self.prompts} prompts x {self.samples} samples"
            if self.samples > 1
            else f"{self.prompts} distinct prompts"
        )
        return f"{rows}, {what}, " + ("rows leave at EOS" if self.stop else f"{self.prompt_tokens}-token prompts")


def shapes(quick: bool) -> list[Shape]:
    """The rows: the shape of RLHF first."""
    new = 16 if quick else 64
    return [Shape(8, 8, new), Shape(64, 1, new), Shape(2, 8, new), Shape(8, 8, new, stop=True)]


def prompts_of(shape: Shape, policy: Policy) -> list[Prompt]:
    """Questions where responses shall end; random tokens, all of one length, where only the work counts."""
    if shape.stop:
        chat = bool(policy.tokenizer.chat_template)
        asked = [QUESTIONS[i % len(QUESTIONS)] for i in range(shape.prompts)]
        return [policy.prompt([{"role": "user", "content": q}] if chat else q, row=i) for i, q in enumerate(asked)]
    allowed = torch.tensor([i for i in range(len(policy.tokenizer)) if i not in policy.tokenizer.all_special_ids])
    picked = allowed[
        torch.randint(len(allowed), (shape.prompts, shape.prompt_tokens), generator=torch.Generator().manual_seed(0))
    ]
    return [Prompt(tuple(ids), policy.decode(ids), row=i) for i, ids in enumerate(picked.tolist())]


def peer_model(policy: Policy) -> Any:
    """The same model for `generate`: its weights in the type our side computes in."""
    if policy.backbone.compute == torch.float32:
        return policy.model
    model: Any = copy.deepcopy(policy.model)
    return model.to(policy.backbone.compute)


def ours(policy: Policy, prompts: Sequence[Prompt], shape: Shape) -> Callable[[], float]:
    """One rollout of our engine; gives the tokens it drew."""
    sampling = Sampling(max_new_tokens=shape.new_tokens, stop_at_eos=shape.stop)
    rng = torch.Generator().manual_seed(1)

    def run() -> float:
        return float(policy.sample(prompts, shape.samples, sampling, rng).action.sum())

    return run


def peer(policy: Policy, model: Any, prompts: Sequence[Prompt], shape: Shape) -> Callable[[], float]:
    """One `generate` call; gives the tokens it drew, up to the end of each response."""
    width = max(len(p.ids) for p in prompts)
    tokens = torch.tensor(
        [[policy.eos_ids[0]] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=policy.device
    )
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=policy.device)
    # generate() fills a missing eos_token_id from the model, so "never" is an id that no logit stands for
    ends = list(policy.eos_ids) if shape.stop else [policy.model.config.vocab_size]

    def run() -> float:
        with torch.inference_mode():
            out = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=shape.new_tokens,
                num_return_sequences=shape.samples,
                eos_token_id=ends,
                pad_token_id=policy.eos_ids[0],
            )
        return float(useful(out[:, width:], ends))

    return run


def useful(response: Tensor, ends: Sequence[int]) -> int:
    """Tokens up to and with the first end of each row."""
    end = torch.isin(response, torch.tensor(list(ends), device=response.device))
    return int((end.cumsum(-1) - end.long() == 0).sum())


def measure(policy: Policy, runs: int, quick: bool) -> dict[str, Any]:
    """All rows.

    Raises:
        RuntimeError: a side did not do the work of a row whose work is fixed.
    """
    rows: dict[str, Any] = {}
    model = peer_model(policy)
    for shape in shapes(quick):
        prompts = prompts_of(shape, policy)
        sides = {"ours": ours(policy, prompts, shape), "peer": peer(policy, model, prompts, shape)}
        if not shape.stop:
            want = shape.prompts * shape.samples * shape.new_tokens
            sides = {name: exactly(want, name, run) for name, run in sides.items()}
        rates = common.alternate(sides, runs, shape.name)
        rows[shape.name] = common.row(rates["ours"], rates["peer"], "tokens/s")
    return rows


def exactly(want: int, name: str, run: Callable[[], float]) -> Callable[[], float]:
    """The same run, refusing a rate that stands for other work."""

    def checked() -> float:
        got = run()
        if got != want:
            raise RuntimeError(
                f"{name} drew {got:.0f} tokens where {want} were asked for: the two sides cannot be compared"
            )
        return got

    return checked


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    common.model_flags(out)
    args: argparse.Namespace = out.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    policy = catalog.load(args.model, compute=args.compute).freeze()
    runs = common.runs_of(args)
    rows = measure(policy, runs, args.quick)
    rows["_meta"] = {**common.meta(policy, runs), "paths": policy.paths}
    common.write(args.json, rows)
    common.show(f"rollouts, {policy.name}, {rows['_meta']['compute']}", rows, "Policy.sample", "generate")
    return rows


if __name__ == "__main__":
    main()
