"""DPO and its kin: their gradient against enumeration, where they start, that they learn, and the falling chosen."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS, batch, prompt, tiny
from tiny_preferences import build_dpo
from tiny_recipes import preferences
from tokenmdp import stats
from tokenmdp.functional import preference, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import dpo
from tokenmdp.run import Run
from tokenmdp.testing.exact import Exact, gradient, row_gradients
from tokenmdp.types import Batch, Pairs

Trained = tuple[Policy, dict[str, Any], list[dict[str, float]], str]


def run_it(folder: Path, pairs: Pairs, **changes: Any) -> Trained:
    """Train on the pairs; the policy, its figures, the metrics and what the run said."""
    cfg, (start, _) = build_dpo(**{"steps": 20, "rows": 16, "evaluate_every": 10, "micro_tokens": 4000, **changes})
    with Run.open(folder, config={}, seed=0) as run:
        policy, figures = dpo.train(cfg, start, pairs, run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return policy, figures, lines, (folder / "log.txt").read_text()


@pytest.fixture(scope="module", params=["sigmoid", "robust", "ipo", "simpo", "orpo"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Trained]:
    changes: dict[str, Any] = {"simpo": {"beta": 2.0}, "robust": {"label_smoothing": 0.1}}.get(request.param, {})
    changes["learning_rate"] = 5e-3
    return request.param, run_it(
        tmp_path_factory.mktemp("dpo") / "run", preferences(120), loss=request.param, **changes
    )


def test_at_the_start_nothing_is_preferred_yet(learned: tuple[str, Trained]) -> None:
    """Policy and reference are one: implicit rewards 0, every pair a tie, loss log 2 (ipo: (1 / 2β)²)."""
    name, (_, figures, lines, _) = learned
    assert lines[0]["logps/chosen"] < 0
    if name in dpo.WITHOUT_REFERENCE:
        # Their reward is β times the mean log-probability of a token, and says something from the start.
        assert lines[0]["rewards/chosen"] < 0
        return
    assert lines[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["rewards/accuracies"] == 0.5
    assert lines[0]["loss"] == pytest.approx(25.0 if name == "ipo" else math.log(2), rel=1e-5)
    assert figures["margin_before"] == pytest.approx(0, abs=1e-6)


def test_it_learns_the_preference(learned: tuple[str, Trained]) -> None:
    _, (_, figures, lines, _) = learned
    assert figures["accuracy"] > 0.75
    assert figures["low"] < figures["accuracy"] <= figures["high"]
    assert figures["margin"] > figures["margin_before"]
    assert (
        figures["logp_chosen"] - figures["logp_chosen_before"]
        > figures["logp_rejected"] - figures["logp_rejected_before"]
    )
    # the last measurement of the run is that of the trained policy
    assert lines[-1]["held_out/accuracies"] == figures["accuracy"]
    assert lines[-1]["held_out/logps/rejected"] == figures["logp_rejected"]
    margins = [line["rewards/chosen"] - line["rewards/rejected"] for line in lines]
    assert margins == pytest.approx([line["rewards/margins"] for line in lines], abs=1e-5)


def test_the_reference_is_the_start_its_hash_is_said_and_it_stays(learned: tuple[str, Trained]) -> None:
    _, (policy, figures, _, said) = learned
    _, (start, _) = build_dpo()
    assert figures["reference"] == start.fingerprint()
    assert f"reference llama {start.fingerprint()}; policy starts as {start.fingerprint()}" in said
    assert policy.fingerprint() != start.fingerprint()


def test_every_variant_is_a_valid_setting() -> None:
    found = {name: dpo.Config(**preset) for name, preset in dpo.VARIANTS.items()}
    assert {name: cfg.loss for name, cfg in found.items()} == {
        "ipo": "ipo",
        "cdpo": "sigmoid",
        "simpo": "simpo",
        "orpo": "orpo",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "dpo"}, "loss is 'dpo'; it must be one of sigmoid, robust, ipo, simpo, orpo"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"rows": 0}, "each is a count, at least 1"),
        ({"margin": -1.0, "loss": "simpo"}, "margin at least 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "loss=ipo does not smooth labels"),
    ],
)
def test_settings_outside_their_range_are_errors(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"must|label|count") as caught:
        dpo.Config(**changes)
    assert words in str(caught.value)


def test_pairs_with_equal_sides_are_skipped_and_counted(tmp_path: Path) -> None:
    pairs = preferences(30)
    same = Pairs(pairs.chosen.select(range(4)), pairs.chosen.select(range(4)), torch.zeros(4))
    both = Pairs(
        Batch.concat([pairs.chosen, same.chosen]), Batch.concat([pairs.rejected, same.rejected]), torch.zeros(34)
    )
    _, figures, _, said = run_it(tmp_path / "run", both, steps=1)
    assert figures["equal_pairs"] == 4
    assert "4 skipped: their two sides are the same response" in said
    with pytest.raises(ValueError, match="in all 4 pairs chosen and rejected are the same response"):
        run_it(tmp_path / "none", same)


def test_from_a_file_of_pairs_to_a_saved_policy(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i % 7}:", "chosen": "yes" * (1 + i % 3), "rejected": "no"} for i in range(21)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    cfg = dpo.Config(model="tiny", data=str(tmp_path / "pairs.jsonl"), steps=2, rows=4, max_tokens=6)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        figures = dpo.main(cfg, run)
    assert catalog.load(str(figures["model"])).fingerprint() == figures["fingerprint"] != figures["reference"]
    assert figures["n_pairs"] == 3, "a tenth of seven prompts is one, with three pairs"


# -- the falling chosen -------------------------------------------------------------------------------------------------


def alike(count: int) -> Pairs:
    """Pairs that differ in one word, five random words being the same: what pushes one side down drags the other."""
    rng = torch.Generator().manual_seed(0)
    shared = torch.randint(1, 12, (count, 5), generator=rng).tolist()
    sides = [batch([([1 + i % 7, 2], [*s, word, EOS]) for i, s in enumerate(shared)]) for word in (4, 5)]
    return Pairs(*sides, torch.zeros(count))


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_chosen_responses_that_fall_are_found_and_explained(tmp_path: Path, loss: str) -> None:
    """Trained too hard on pairs that are nearly the same, DPO lowers both sides; ORPO, which clones the chosen, does not."""
    _, figures, lines, said = run_it(tmp_path / "run", alike(120), loss=loss, steps=40, learning_rate=1e-2)
    assert figures["accuracy"] == 1
    fell = figures["logp_chosen"] < figures["logp_chosen_before"]
    assert figures["falling_chosen"] is fell is (loss == "sigmoid")
    assert ("the held-out chosen responses became less likely" in said) is fell
    if fell:
        assert figures["falling_chosen_why"] in said
        assert f"by {figures['logp_chosen_before'] - figures['logp_chosen']:.3g} nats" in said
        assert figures["chosen_fell_low"] < figures["chosen_fell"] <= figures["chosen_fell_high"]
        # both curves are there to see it
        assert lines[-1]["held_out/logps/chosen"] == figures["logp_chosen"]


def test_pairs_of_one_prompt_are_one_cluster() -> None:
    """Forty pairs of forty prompts have Wilson's interval; each there five times, they are no more than they were."""
    cfg, pairs = dpo.Config(), preferences(40)
    asked = tuple(prompt(1 + i % 8, 1 + i // 8) for i in range(40))
    own = Pairs(replace(pairs.chosen, prompts=asked), replace(pairs.rejected, prompts=asked), pairs.margin)
    rng = torch.Generator().manual_seed(0)
    now, before = ((torch.randn(40, generator=rng), torch.randn(40, generator=rng)) for _ in range(2))
    once = dpo.judge(cfg, before, now, own)
    assert (once["low"], once["high"]) == pytest.approx(stats.wilson(40 * once["accuracy"], 40)[1:])
    copies = [i for i in range(40) for _ in range(5)]
    five = [(side[0][copies], side[1][copies]) for side in (before, now)]
    often = dpo.judge(cfg, *five, own.select(copies))
    for low, high in (("low", "high"), ("chosen_fell_low", "chosen_fell_high")):
        assert often[high] - often[low] == pytest.approx(once[high] - once[low], rel=0.1)


def test_the_explanation_needs_both_a_fall_and_a_growing_margin() -> None:
    chosen, rejected, none = torch.tensor([-3.0, -1.0]), torch.tensor([-9.0, -9.0]), torch.tensor([-2.0, -2.0])
    cfg, pairs = dpo.Config(), preferences(2)

    def why(now: tuple[torch.Tensor, torch.Tensor]) -> str:
        return dpo.explain(dpo.judge(cfg, (none, none), now, pairs))

    assert why((chosen, rejected)) == "", "one fell by 1, one rose by 1: on average none"
    said = why((chosen - 1, rejected))
    assert "by 1 nats on average and in 50% of the pairs" in said
    assert "the margin grew by 0.6" in said, "0.1 · ((−3 + 2) − (−9 + 2))"
    assert why((rejected, chosen)) == "", "the margin shrank: that is not this pattern"


# -- the gradient -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_dpo_against_enumeration() -> None:
    """∇ = −β Σ w σ(r̂_rejected − r̂_chosen) (∇ log π(chosen) − ∇ log π(rejected)), over all pairs of a toy's responses.

    (Rafailov et al. 2023, the equation after 7.) Log-probabilities and their gradients by the model's own forward pass
    over the enumerated responses; the recipe's side by `Policy.evaluate`, the loss and the learner, in micro-batches.
    """
    reference = tiny("gpt2", vocabulary=4)
    reference.model.double()
    policy = reference.twin("all")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in policy.trained():
            weight.add_(0.1 * torch.randn(weight.shape, generator=rng, dtype=torch.float64))
    world = Exact((1, 2), 4, 2, eos=EOS)
    parameters = [p for _, p in policy.trained()]

    def logp(model: Policy) -> torch.Tensor:
        return world.logp(lambda tokens: model.model(input_ids=tokens, use_cache=False).logits).sum(1)

    N, beta = len(world), 0.5
    first, second = torch.tensor([(i, j) for i in range(N) for j in range(N) if i != j]).T
    weight = torch.sigmoid(torch.randn(len(first), generator=rng, dtype=torch.float64))
    now, ref = logp(policy), logp(reference).detach()
    gradients = row_gradients(now, parameters)
    reward = beta * (now - ref).detach()
    pull = weight * beta * torch.sigmoid(reward[second] - reward[first])
    want = -(pull[:, None] * (gradients[first] - gradients[second])).sum(0)

    cfg = dpo.Config(beta=beta)
    pairs = Pairs(world.batch.select(first), world.batch.select(second), torch.zeros(len(first)))

    def loss(part: Pairs, chosen_ref: torch.Tensor, rejected_ref: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        sides = policy.evaluate(Batch.concat([part.chosen, part.rejected]))["logp"].sum(-1).split(len(part))
        return dpo.compare(cfg, sides, (chosen_ref, rejected_ref), part)[0], {}

    learner = Learner(policy, 1.0, tokens=200)
    learner.gradient(loss, pairs, weight, chosen_ref=ref[first], rejected_ref=ref[second])
    found = torch.cat([torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters])
    assert float(want.norm()) > 1e-3
    assert float((found - want).norm()) < 1e-9 * float(want.norm())

    # and the best policy there is for a reward has no gradient at all
    tilted, _ = world.optimum(world.conditional(ref.exp()), world.score(lambda r: float(sum(r))), beta)
    sides = (tilted.log()[first].requires_grad_(), tilted.log()[second].requires_grad_(), ref[first], ref[second])
    score = world.score(lambda r: float(sum(r)))
    preferred = torch.sigmoid(score[first] - score[second])
    both = torch.stack(torch.autograd.grad((preferred * preference.dpo(*sides, beta)).sum(), sides[:2]))
    pull_of = torch.zeros(N, dtype=torch.float64).index_add(0, first, both[0]).index_add(0, second, both[1])
    assert float(pull_of.abs().max()) < 1e-12


def test_the_mean_over_pairs_is_what_is_minimised() -> None:
    """The learner's gradient with `per_row` is that of the average loss, whatever the micro-batches."""
    policy = tiny("gpt2", vocabulary=12).twin("all")
    policy.model.double()
    pairs, cfg = preferences(6), dpo.Config(loss="orpo")
    parameters = [p for _, p in policy.trained()]

    def loss(part: Pairs) -> tuple[torch.Tensor, dict[str, Any]]:
        sides = policy.evaluate(Batch.concat([part.chosen, part.rejected]))["logp"].sum(-1).split(len(part))
        return dpo.compare(cfg, sides, sides, part)[0], {}

    want = gradient(loss(pairs)[0].mean(), parameters)
    Learner(policy, 1.0, tokens=1).gradient(loss, pairs, weights.per_row(6, dtype=torch.float64))
    found = torch.cat([torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters])
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
