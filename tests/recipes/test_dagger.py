"""DAgger: who acts, what is asked and paid for, and that it mends what cloning cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny_imitation import Counting, build_dagger, taught
from tiny_models import EOS, batch, prompt, tiny
from tiny_recipes import policy, responses
from tokenmdp.experts import Advice, Queried, Worked
from tokenmdp.ledger import Ledger
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import dagger, sft
from tokenmdp.run import Run
from tokenmdp.testing.exact import Exact
from tokenmdp.types import Batch

SAMPLING = Sampling(max_new_tokens=5)
PROMPTS = [prompt(a, b) for a in (1, 4, 9) for b in (2, 6)]


def mixed(beta: float, expert: Queried, n: int = 1, seed: int = 0) -> tuple[Batch, Advice]:
    return dagger.mixed(policy(), expert, PROMPTS, n, beta, SAMPLING, torch.Generator().manual_seed(seed))


def test_alone_the_learner_acts_as_ever_and_nobody_is_asked() -> None:
    expert = Queried(Counting(), Ledger())
    b, advice = mixed(0.0, expert, n=2)
    want = policy().sample(PROMPTS, 2, SAMPLING, torch.Generator().manual_seed(0))
    assert torch.equal(b.tokens, want.tokens)
    assert not bool(advice.known.any())
    assert expert.ledger.paid == {}


def test_where_the_expert_always_acts_its_path_is_taken_and_each_state_paid_once() -> None:
    expert = Queried(Counting(), Ledger())
    b, advice = mixed(1.0, expert)
    assert torch.equal(advice.known, b.action)
    assert torch.equal(advice.token, torch.where(b.action, b.tokens, 0))
    assert b.tokens[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert b.texts[0].split() == ["w3", "w4", "w5", "w6", "w7"]
    assert b.length.tolist() == [7] * 6
    assert b.logp_mu is None
    assert expert.ledger.paid == {"queries": 30}


def test_an_expert_may_end_a_response_and_go_on_where_the_learner_ended() -> None:
    class Stopping(Counting):
        """Ends after a third token; says 3 before."""

        def __call__(self, batch: Batch) -> Advice:
            step = batch.action.new_zeros(batch.action.shape).long()
            for row, p in enumerate(batch.prompts):
                step[row, len(p.ids) :] = torch.arange(batch.tokens.shape[1] - len(p.ids))
            return Advice(torch.where(batch.action, torch.where(step < 2, 3, EOS), 0), batch.action)

    b, _ = mixed(1.0, Queried(Stopping(), Ledger()), n=3)
    assert [row[2:5] for row in b.tokens.tolist()] == [[3, 3, EOS]] * 18
    assert b.length.tolist() == [5] * 18
    assert bool(b.ended.all())


def test_worked_answers_act_on_their_path_alone() -> None:
    known = Worked(batch([([1, 2], [3, 3, 3, 3, 3])]))  # of one prompt, the others' rows are the learner's
    b, advice = mixed(1.0, Queried(known, Ledger()))
    alone = policy().sample(PROMPTS, 1, SAMPLING, torch.Generator().manual_seed(0))
    assert b.tokens[0, 2:].tolist() == [3] * 5
    for row in range(1, 6):
        n = int(b.length[row])
        assert torch.equal(b.tokens[row, :n], alone.tokens[row, :n])
    assert advice.known.sum(1).tolist() == [5, 0, 0, 0, 0, 0]


def test_the_mixture_is_the_enumerated_one() -> None:
    """Every response of a four-token model: its share among many mixed rollouts is that of π_i at every step."""
    model, beta, H = tiny("llama", vocabulary=4), 0.4, 2

    class Third(Counting):
        def __call__(self, batch: Batch) -> Advice:
            return Advice(torch.where(batch.action, 3, 0), batch.action)

    world = Exact((1, 2), 4, H, eos=EOS)
    with torch.no_grad():
        logp = model.evaluate(world.batch)["logp"]
    acts = (world.batch.tokens == 3) & world.batch.action
    step = torch.where(world.batch.action, (1 - beta) * logp.exp() + beta * acts, 1.0)
    want = step.prod(1)
    assert float(want.sum()) == pytest.approx(1.0, abs=1e-5)
    n = 2000
    rng = torch.Generator().manual_seed(0)
    expert = Queried(Third(), Ledger())
    b, _ = dagger.mixed(model, expert, [prompt(1, 2)], n, beta, Sampling(max_new_tokens=H), rng)
    rows = [tuple(t[2:k]) for t, k in zip(b.tokens.tolist(), b.length.tolist(), strict=True)]
    names = [tuple(t[2:k]) for t, k in zip(world.batch.tokens.tolist(), world.batch.length.tolist(), strict=True)]
    for name, p in zip(names, want.tolist(), strict=True):
        # Four standard errors of a share of n
        assert abs(rows.count(name) / n - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-9, name


def test_a_budget_ends_the_asking_and_not_the_learning(tmp_path: Path) -> None:
    cfg, pieces = build_dagger(queries=50, demonstrations=0, steps=5)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        _, figures = dagger.train(cfg, *pieces, run=run)
    assert figures["queries"] == 50
    assert pieces[1].asked == 50  # each answer paid for was asked for once, and no other


def test_demonstrations_are_paid_for_too(tmp_path: Path) -> None:
    cfg, pieces = build_dagger(steps=1, mixture=0.0, demonstrations=12, queries=0)
    task = pieces[2]
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        _, figures = dagger.train(cfg, *pieces, run=run)
    assert figures["queries"] == int(task.demonstrations.action.sum()) + pieces[1].asked
    cfg, pieces = build_dagger(demonstrations=13)
    with (
        Run.open(tmp_path / "more", config={}, seed=0) as run,
        pytest.raises(ValueError, match="13 demonstrations asked for, and the task liking has 12"),
    ):
        dagger.train(cfg, *pieces, run=run)


def score(model: Policy, expert: Counting) -> float:
    """How often it does what the expert would, along its own responses."""
    b = model.sample(list(taught().held_out) * 4, 2, SAMPLING, torch.Generator().manual_seed(5))
    return float((expert(b).token == b.tokens)[b.action].float().mean())


def test_it_learns_what_the_expert_does_where_the_learner_gets_to(tmp_path: Path) -> None:
    cfg, pieces = build_dagger(
        steps=4, prompts=10, updates=10, rows=16, learning_rate=1e-2, queries=200, demonstrations=0, micro_tokens=400
    )
    with Run.open(tmp_path / "dagger", config={}, seed=0) as run:
        trained, _ = dagger.train(cfg, *pieces, run=run)
    # As many labels of one path, again and again: what follows on other words was never shown.
    cloned = sft.Config(steps=40, rows=16, learning_rate=1e-2, micro_tokens=400, evaluate_every=40)
    demonstrations = batch([([1, 2], [3, 4, 5, 6, 7])] * 40)
    with Run.open(tmp_path / "sft", config={}, seed=0) as run:
        clone, _ = sft.train(cloned, policy(), demonstrations, demonstrations.select([0]), run)
    assert score(trained, Counting()) > 0.85
    assert score(clone, Counting()) < 0.75


def test_what_a_config_cannot_mean_is_said() -> None:
    for wrong, message in (
        ({"mixture": 1.5}, r"mixture=1\.5"),
        ({"decay": -0.1}, r"decay=-0\.1"),
        ({"rows": 0}, "rows=0"),
        ({"queries": -1}, "queries=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            dagger.Config(**wrong)


def test_main_asks_the_tasks_expert_or_a_teacher(tmp_path: Path) -> None:
    settings = {
        "model": "tiny", "task": "reversal", "steps": 1, "prompts": 2, "updates": 1, "rows": 2, "max_new_tokens": 5,
        "learning_rate": 1e-3,
    }  # fmt: skip
    with Run.open(tmp_path / "own", config={}, seed=0) as run:
        found = dagger.main(dagger.Config(**settings), run)
        assert "asked is the answer" in (tmp_path / "own" / "log.txt").read_text()
    assert found["queries"] > 0
    assert "trained_minus_start" in found["held_out"]
    with Run.open(tmp_path / "teacher", config={}, seed=0) as run:
        dagger.main(dagger.Config(**settings, teacher="tiny"), run)
    assert "asked is teacher" in (tmp_path / "teacher" / "log.txt").read_text()
    assert (tmp_path / "teacher" / "model" / "model.safetensors").exists()


def test_the_losses_gradient_is_that_of_the_experts_actions() -> None:
    """At a state, −∇ log π(a*): not that of the token that was taken."""
    model = policy().twin("all")
    b = responses(3, 0.5, 0)
    action = Counting()(b).token
    by_other = replace(b, tokens=b.tokens.clone())
    (-model.evaluate(by_other, of=action)["logp"].sum()).backward()
    found = torch.cat([p.grad.flatten() for _, p in model.trained() if p.grad is not None])
    model.model.zero_grad()
    logits = model.model(input_ids=b.tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    (-(logits.gather(2, action[:, 1:, None])[..., 0] * b.action[:, 1:]).sum()).backward()
    want = torch.cat([p.grad.flatten() for _, p in model.trained() if p.grad is not None])
    assert torch.allclose(found, want, atol=1e-4)
