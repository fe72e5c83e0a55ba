"""The gate stops a run whose sampler, learner and reference are not one policy; each fault is planted here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiny_models import prompt, tiny
from tokenmdp import gate
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.types import Batch


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(tmp_path / "run", config={}, seed=0) as opened:
        yield opened


def sampled(policy: Policy, sampling: Sampling | None = None) -> Batch:
    sampling = sampling or Sampling(max_new_tokens=8)
    return policy.sample([prompt(i, i + 1) for i in range(1, 9)], 4, sampling, torch.Generator().manual_seed(0))


@torch.no_grad()
def logp(policy: Policy, b: Batch) -> torch.Tensor:
    return policy.evaluate(b)["logp"]


def lines(run: Run) -> list[dict[str, object]]:
    path = run.folder / "gate.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_one_policy_passes_and_the_paths_are_said(run: Run):
    policy = tiny("llama")
    b = sampled(policy)
    for step in range(4):
        gate.check(step, run, policy, b, logp(policy, b), logp(policy, b), ratio=1.0)
    found = lines(run)
    assert [line["step"] for line in found] == [0, 1]  # later phases are not looked at
    assert found[0]["kl_reference"] == 0.0
    said = (run.folder / "log.txt").read_text()
    assert "rollouts: KV slab, shared prefill" in said
    assert "were cut at 8 tokens before they ended" in said  # with 61 near-equal words hardly any response ends


@pytest.mark.parametrize(
    "sampling",
    [Sampling(8, temperature=0.5), Sampling(8, temperature=2.0), Sampling(8, top_k=5), Sampling(8, top_p=0.5)],
    ids=["cooler", "hotter", "top-k", "top-p"],
)
@pytest.mark.parametrize("step", [0, 1])
def test_a_sampler_with_settings_of_its_own_is_stopped(run: Run, sampling: Sampling, step: int):
    policy = tiny("llama", spread=0.5)
    b = sampled(policy, sampling)
    with pytest.raises(gate.NotOnePolicy, match="sampler and learner differ by"):
        gate.check(step, run, policy, b, logp(policy, b), logp(policy, b))
    assert len(lines(run)) == 1  # what was measured is kept


def test_stale_weights_are_stopped_after_the_first_update(run: Run):
    policy = tiny("llama", spread=0.5)
    b = sampled(policy)
    gate.check(0, run, policy, b, logp(policy, b), logp(policy, b))
    with torch.no_grad():  # an update that did not reach what sampled `b`
        for _, weight in policy.trained():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(gate.NotOnePolicy, match=r"phase 1: .*stale weights"):
        gate.check(1, run, policy, b, logp(policy, b), logp(policy, b))


def test_another_reference_is_stopped(run: Run):
    policy, other = tiny("llama", spread=0.5), tiny("gpt2", spread=0.5)
    b = sampled(policy)
    with pytest.raises(gate.NotOnePolicy, match="differs from its reference by up to"):
        gate.check(0, run, policy, b, logp(policy, b), logp(other, b))


@pytest.mark.parametrize("ratio", [1.2, 0.9, float("nan")])
def test_a_ratio_that_is_not_1_is_stopped(run: Run, ratio: float):
    policy = tiny("llama")
    b = sampled(policy)
    with pytest.raises(gate.NotOnePolicy, match="mean ratio in the first update"):
        gate.check(0, run, policy, b, logp(policy, b), logp(policy, b), ratio)
