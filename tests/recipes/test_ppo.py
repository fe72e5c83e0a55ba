"""PPO: what must hold before the first update, that it improves the score, and what it does with missing verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_policy_gradient import build_grpo, build_reinforce
from tiny_recipes import LIKED, build_ppo, liked_share, liking_reward_model, policy, task
from tokenmdp.functional import measures, policy_loss
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import grpo, ppo, reinforce
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Score


def run_ppo(folder: Path, seed: int = 0, **changes: Any) -> tuple[Policy, Policy, list[dict[str, float]]]:
    """The trained policy, its reference, and the metrics of a small run; `reward` and `critic` may be exchanged."""
    exchanged = {k: changes.pop(k) for k in ("reward", "critic") if k in changes}
    cfg, (reference, critic, reward, prompts) = build_ppo(**changes)
    with Run.open(folder, config={}, seed=seed) as run:
        trained, _ = ppo.train(
            cfg, reference, exchanged.get("critic", critic), exchanged.get("reward", reward), prompts, run
        )
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- step 0 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "top-1", "lora-2"])
def test_before_the_first_update_the_ratio_is_1_and_the_divergence_0(train: str) -> None:
    """Exactly, bit for bit: the policy is the reference."""
    reference = policy()
    trained = reference.twin(train)
    b = trained.sample(list(task().train), 1, Sampling(max_new_tokens=6), torch.Generator().manual_seed(0))
    with torch.no_grad():
        logp_old, logp_ref = trained.evaluate(b)["logp"], reference.evaluate(b)["logp"]
    logp = trained.evaluate(b)["logp"]
    assert torch.equal((logp - logp_old).exp(), torch.ones_like(logp))
    assert torch.equal(logp_old, logp_ref)
    assert torch.equal(trained.kl_to(reference, b), torch.zeros_like(logp))
    loss, clipped = policy_loss.ppo_clip(logp, logp_old, b.action.float())
    assert torch.equal(loss, -b.action.float())
    assert not clipped.any()
    assert b.logp_mu is not None
    assert float((logp - b.logp_mu).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("train", ["all", "lora-2"])
def test_the_gate_of_a_run_measures_it(train: str, tmp_path: Path) -> None:
    """Log-probabilities are compared across micro-batches here, so the ratio may differ from 1 by rounding."""
    _, _, lines = run_ppo(tmp_path / "run", steps=1, train=train)
    gate = json.loads((tmp_path / "run" / "gate.jsonl").read_text().splitlines()[0])
    assert gate["kl_reference"] == 0.0
    assert lines[0]["objective/kl"] == 0.0
    assert gate["ratio_first_update"] == pytest.approx(1, abs=1e-5)
    assert gate["sampler_learner_max_difference"] < 1e-5
    assert lines[0]["sampling/sampling_logp_difference/max"] == gate["sampler_learner_max_difference"]
    assert gate["paths"]["rollouts"].startswith("KV slab")


# -- learning ---------------------------------------------------------------------------------------------------------------


LEARNING = {"samples": 4, "epochs": 2, "learning_rate": 5e-3, "kl_target": 0.0, "micro_tokens": 800}


def scores(trained: Policy, seed: int = 5) -> torch.Tensor:
    """The reward of four responses to every held-out prompt and some training ones."""
    prompts = [*task().held_out, *task().train[:15]]
    b = trained.sample(prompts, 4, Sampling(max_new_tokens=5), torch.Generator().manual_seed(seed))
    return torch.tensor(liked_share(list(b.texts)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": "lora-4", "learning_rate": 1e-2},
        {"gamma": 0.95, "lam": 0.8, "truncation": 0.1, "temperature": 1.3},
    ],
    ids=["plain", "lora", "discounted"],
)
def test_it_improves_the_score_beyond_chance(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {**LEARNING, "steps": 8, "prompts": 16, "kl": 0.01}
    trained, reference, lines = run_ppo(tmp_path / "run", **{**settings, **changes})
    before, after = scores(reference), scores(trained)
    error = float((before.var() / len(before) + after.var() / len(after)).sqrt())
    assert float(after.mean() - before.mean()) > 5 * error
    assert lines[-1]["objective/scores"] > lines[0]["objective/scores"] + 0.1
    assert lines[-1]["objective/kl"] > 0.1, "it has moved away from the reference"
    b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(1))
    assert float((b.tokens[b.action] == LIKED).float().mean()) > 0.2


def test_a_heavy_penalty_keeps_it_at_the_reference(tmp_path: Path) -> None:
    moved = {}
    for kl in (0.0, 3.0):
        settings = {**LEARNING, "steps": 6, "prompts": 8, "epochs": 1}
        trained, reference, _ = run_ppo(tmp_path / str(kl), kl=kl, **settings)
        b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(1))
        moved[kl] = float(trained.kl_to(reference, b).sum(1).mean())
    assert moved[3.0] < 0.4 * moved[0.0]


@pytest.mark.parametrize("critic_train", ["head", "all"])
def test_the_critic_learns_to_foresee_the_return(critic_train: str, tmp_path: Path) -> None:
    """From a reward model that knows nothing of this reward; the policy hardly moves."""
    critic = liking_reward_model().critic(critic_train)
    _, _, lines = run_ppo(
        tmp_path / "run",
        critic=critic,
        **{**LEARNING, "steps": 8, "prompts": 8, "samples": 2, "learning_rate": 1e-6, "critic_learning_rate": 3e-2},
    )
    first, last = lines[0]["loss/value_avg"], sum(line["loss/value_avg"] for line in lines[-3:]) / 3
    assert last < 0.5 * first


def test_the_reference_never_changes(tmp_path: Path) -> None:
    _, reference, _ = run_ppo(tmp_path / "run")
    assert reference.fingerprint() == policy().fingerprint()


# -- verdicts ---------------------------------------------------------------------------------------------------------------


def every_second(completions: list[str], **_: Any) -> list[float | None]:
    return [share if i % 2 else None for i, share in enumerate(liked_share(completions))]


def test_rows_without_a_verdict_are_counted_and_leave_the_loss(tmp_path: Path) -> None:
    reward = FunctionReward(every_second, name="half", max_missing=1.0)
    _, _, lines = run_ppo(tmp_path / "run", reward=reward)
    assert [line["no_verdict"] for line in lines] == [4.0] * 3


def test_the_critic_does_not_learn_from_rows_without_a_verdict(tmp_path: Path) -> None:
    """Where there is a verdict the return is 1, and the critic starts at 0: ½ (0 − 1)², whatever the other rows are."""

    def ones(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0 if i % 2 else None for i in range(len(completions))]

    reward = FunctionReward(ones, name="ones", max_missing=1.0)
    _, _, lines = run_ppo(tmp_path / "run", reward=reward, steps=1, minibatches=1, lam=1.0)
    assert lines[0]["loss/value_avg"] == pytest.approx(0.5, abs=1e-5)


def test_without_any_verdict_nothing_is_learned(tmp_path: Path) -> None:
    reward = FunctionReward(lambda completions, **_: [None] * len(completions), name="none", max_missing=1.0)
    trained, reference, lines = run_ppo(tmp_path / "run", reward=reward)
    assert trained.fingerprint() == reference.fingerprint()
    assert [line["no_verdict"] for line in lines] == [8.0] * 3


class ByToken:
    """A reward a token, whose sum is the value."""

    name = "per_token"

    def __call__(self, batch: Batch) -> Score:
        token = torch.where(batch.action & (batch.tokens == LIKED), 0.2, 0.0)
        return Score(token.sum(1), torch.ones(len(batch), dtype=torch.bool), token)


def test_rewards_a_token_are_used_where_they_are_given(tmp_path: Path) -> None:
    trained, reference, _ = run_ppo(tmp_path / "run", reward=ByToken(), **LEARNING, steps=5, prompts=12)
    assert float(scores(trained).mean()) > float(scores(reference).mean()) + 0.2


# -- pieces -----------------------------------------------------------------------------------------------------------------


def test_the_penalty_is_steered_by_hand_worked_numbers() -> None:
    """Target 2: a KL of 2.2 is 10 % above, so β grows by 1 %; errors are clipped at ±20 %, so by at most 2 %."""
    beta = ppo.KLCoefficient(0.5, 2.0)
    for kl, want in ((2.2, 0.5 * 1.01), (8.0, 0.5 * 1.01 * 1.02), (0.0, 0.5 * 1.01 * 1.02 * 0.98)):
        beta.update(kl)
        assert beta.value == pytest.approx(want)
    other = ppo.KLCoefficient(0.1, 2.0)
    other.restore({}, beta.scalars())
    assert other.value == beta.value
    fixed = ppo.KLCoefficient(0.5, 0.0)
    fixed.update(100.0)
    assert fixed.value == 0.5


def test_explained_variance_by_hand() -> None:
    """Returns 1, 3 around 2 have variance 1; errors 0, 1 have variance ¼; what has no weight does not count."""
    return_, value = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1.0, 2.0, -7.0])
    weight = torch.tensor([0.5, 0.5, 0.0])
    assert measures.explained_variance(value, return_, weight) == pytest.approx(0.75)
    assert measures.explained_variance(return_, return_, weight) == pytest.approx(1)
    assert measures.explained_variance(value, torch.ones(3), weight) == 0.0


def test_the_sampler_difference_looks_at_actions_only() -> None:
    b = policy().sample(list(task().train[:3]), 1, Sampling(max_new_tokens=4), torch.Generator().manual_seed(0))
    assert b.logp_mu is not None
    off = torch.where(b.action, b.logp_mu + 0.25, torch.full_like(b.logp_mu, 7.0))
    found = measures.sampler_difference(b, off)
    assert found == pytest.approx({f"sampling/sampling_logp_difference/{k}": 0.25 for k in ("mean", "max")})


def test_without_chance_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0.*: take one above 0"):
        ppo.Config(temperature=0.0)


# -- options ----------------------------------------------------------------------------------------------------------------


def scored(factor: float) -> FunctionReward:
    """The share of liked words, times a factor: another unit of the same wish."""
    return FunctionReward(lambda completions, **_: [factor * x for x in liked_share(completions)], name="scaled")


def test_scores_are_held_within_bounds_for_learning_and_reported_as_they_are(tmp_path: Path) -> None:
    _, _, lines = run_ppo(tmp_path / "run", steps=1, reward=scored(1000.0), score_clip=0.5, kl=0.0, kl_target=0.0)
    assert lines[0]["objective/scores"] > 1
    assert 0 < lines[0]["objective/rlhf_reward"] <= 0.5


def test_divided_by_their_spread_rewards_have_no_unit(tmp_path: Path) -> None:
    """Ten times the score, the same critic's loss; without the division a hundred times."""

    def losses(whiten: bool) -> list[float]:
        changes = {"steps": 1, "kl": 0.0, "kl_target": 0.0, "whiten_rewards": whiten, "lam": 1.0}
        runs = [run_ppo(tmp_path / f"{whiten}-{f}", reward=scored(f), **changes)[2] for f in (1.0, 10.0)]
        return [lines[0]["loss/value_avg"] for lines in runs]

    small, large = losses(whiten=True)
    assert large == pytest.approx(small, rel=1e-4)
    small, large = losses(whiten=False)
    assert large > 50 * small


def test_a_value_may_be_held_near_its_old_value(tmp_path: Path) -> None:
    """After the first update every value has moved further than the range, so the others have nothing to gain."""

    def moved(value_clip: float) -> float:
        cfg, (reference, critic, reward, prompts) = build_ppo(steps=1, epochs=8, value_clip=value_clip)
        before = [w.detach().clone() for _, w in critic.trained()]
        with Run.open(tmp_path / f"{value_clip}", config={}, seed=0) as run:
            ppo.train(cfg, reference, critic, reward, prompts, run)
        return sum(float((w - b).detach().abs().sum()) for b, (_, w) in zip(before, critic.trained(), strict=True))

    assert moved(1e-9) < 0.7 * moved(0.0)


def test_without_a_clip_nothing_is_clipped_and_the_last_update_is_furthest(tmp_path: Path) -> None:
    changes = {"steps": 2, "epochs": 6, "learning_rate": 3e-2}
    _, _, free = run_ppo(tmp_path / "free", clip=0.0, **changes)
    _, _, held = run_ppo(tmp_path / "held", clip=0.05, **changes)
    assert [line["policy/clipfrac_avg"] for line in free] == [0.0, 0.0]
    assert held[0]["policy/clipfrac_avg"] > 0
    assert free[0]["policy/approxkl_last"] > free[0]["policy/approxkl_avg"] > 0


# -- a reference of its own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce"])
def test_a_second_round_is_measured_to_the_first_start(name: str, tmp_path: Path) -> None:
    """The policy starts elsewhere: its KL is above 0 before anything is learned, and a heavy price pulls it back."""
    recipe, build = {"ppo": (ppo, build_ppo), "grpo": (grpo, build_grpo), "reinforce": (reinforce, build_reinforce)}[
        name
    ]
    first = policy().freeze()
    moved = first.twin("all")
    with torch.no_grad():
        for _, weight in moved.trained():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    cfg, pieces = build(steps=1, prompts=8)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        recipe.train(cfg, first, *pieces[1:], run, start=moved.freeze())
    (line,) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["objective/kl"] > 0.05
    gate = json.loads((tmp_path / "run" / "gate.jsonl").read_text().splitlines()[0])
    assert gate["kl_reference"] is None
    assert gate["sampler_learner_mean_difference"] < 1e-5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kl": 0.0, "kl_target": 6.0}, "kl=0 stays 0"),
        ({"score_clip": -1.0}, r"score_clip=-1\.0"),
        ({"truncation": -0.5}, r"truncation=-0\.5"),
    ],
)
def test_settings_that_do_nothing_or_harm_are_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ppo.Config(**changes)  # type: ignore[arg-type]
