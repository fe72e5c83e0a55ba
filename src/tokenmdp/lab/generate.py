"""Responses of a model to prompts, through our own rollout engine."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmdp import tasks
from tokenmdp.models import catalog
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run

SCRATCH = True  # a tool: it leaves no run folder behind unless one is asked for


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    prompts: str = ""  # a file or hub id with a `prompt` column; empty answers `prompt`
    prompt: str = "The film was"  # one prompt as plain text
    chat: bool = False  # send `prompt` as a user message through the chat template
    n: int = 1  # responses a prompt
    max_new_tokens: int = 64  # the longest a response may be
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # nucleus mass kept
    top_k: int = 0  # most likely tokens kept; 0 keeps all


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Sample, write samples.jsonl, and print the responses."""
    policy = catalog.load(cfg.model).freeze()
    if cfg.prompts:
        task = tasks.load(cfg.prompts, policy)
        prompts = sorted([*task.train, *task.held_out], key=lambda p: p.row)
    else:
        prompts = [policy.prompt([{"role": "user", "content": cfg.prompt}] if cfg.chat else cfg.prompt)]
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    with run.progress(len(prompts) * cfg.n, "generate", "responses") as bar:
        b = policy.sample(prompts, cfg.n, sampling, run.rng, bar.advance)
    for i, p in enumerate(b.prompts):
        run.sample(b, i, "sample", logp_mu=0.0 if b.logp_mu is None else float(b.logp_mu[i].sum()))
        print(p.text + b.texts[i], end="\n\n")
    return {"responses": len(b), "clipped_ratio": float((~b.ended).float().mean()), **policy.paths}
