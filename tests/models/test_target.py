"""Copies that follow, and logits read as soft Q."""

from __future__ import annotations

import pytest
import torch

from tiny_models import ragged, tiny
from tokenmdp.models import soft
from tokenmdp.models.target import Target


def test_it_goes_the_share_of_the_way_by_hand() -> None:
    """From 0 to 1 by a fifth: 0.2, then 0.2 + 0.2 · 0.8 = 0.36; a rate of 1 arrives."""
    start = tiny()
    policy, slow = start.twin("all"), start.twin("all")
    target = Target(slow, policy)
    with torch.no_grad():
        for side, value in ((slow, 0.0), (policy, 1.0)):
            for _, weight in side.trained():
                weight.fill_(value)
    for want in (0.2, 0.36):
        target.follow(0.2)
        assert all(torch.allclose(w, torch.full_like(w, want)) for _, w in slow.trained())
    target.follow(1.0)
    assert all(torch.equal(w, torch.ones_like(w)) for _, w in slow.trained())


@pytest.mark.parametrize("train", ["all", "top-1", "lora-2"])
def test_it_is_the_source_from_the_beginning_and_is_put_back_by_a_checkpoint(train: str) -> None:
    start = tiny()
    policy, slow = start.twin(train), start.twin(train)
    with torch.no_grad():
        for _, weight in policy.trained():
            weight.add_(0.1)
    target = Target(slow, policy)
    kept = {name: weight.clone() for name, weight in target.tensors().items()}
    assert all(torch.equal(kept[name], weight) for name, weight in policy.trained())
    with torch.no_grad():
        for _, weight in policy.trained():
            weight.add_(0.1)
    target.follow(0.5)
    assert not all(torch.equal(kept[name], weight) for name, weight in slow.trained())
    target.restore(kept, target.scalars())
    assert all(torch.equal(kept[name], weight) for name, weight in slow.trained())


def test_a_copy_of_something_else_is_refused() -> None:
    start = tiny()
    with pytest.raises(ValueError, match="differ"):
        Target(start.twin("lora-2"), start.twin("lora-4"))
    with pytest.raises(ValueError, match="rate=0"):
        Target(start.twin("all"), start.twin("all")).follow(0.0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_are_soft_q_by_their_definition(name: str) -> None:
    """Q − V = β log π/π_ref, V = β log Σ π_ref exp(Q/β); by the models' own forward passes. Gemma 2 caps its logits."""
    reference, b, beta = tiny(name), ragged(4), 0.3
    policy = tiny(name, seed=1)
    with torch.no_grad():
        z = reference.evaluate(b, soft.WANT)
        found = soft.values(policy, b, z["logit"], z["log_z"], beta)
        logp, logp_ref = policy.evaluate(b)["logp"], reference.evaluate(b)["logp"]
        ours, theirs = (m.model(input_ids=b.tokens, use_cache=False).logits[:, :-1] for m in (policy, reference))
    every = theirs.log_softmax(-1) + (ours - theirs)  # log π_ref + Q/β, before each token but the first
    value = torch.where(b.action[:, 1:], beta * every.logsumexp(-1), 0.0)
    assert torch.allclose(found["value"][:, 1:], value, atol=1e-4)
    assert torch.allclose(found["q"] - found["value"], beta * (logp - logp_ref), atol=1e-4)
    assert not found["q"][~b.action].any()


def test_a_policy_that_has_not_moved_has_no_value() -> None:
    reference, b = tiny(), ragged(4)
    policy = reference.twin("all")
    with torch.no_grad():
        z = reference.evaluate(b, soft.WANT)
    found = soft.values(policy, b, z["logit"], z["log_z"], 0.3)
    assert float(found["q"].abs().max()) == 0
    assert float(found["value"].abs().max()) == 0
    assert found["q"].requires_grad
