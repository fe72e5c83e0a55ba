"""Credit schemes by name: each is its equation on what it reads, needs what it says, and conserves what it must."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS, batch, prompt, ragged, tiny, tokenizer
from tokenmdp.functional import credit, returns
from tokenmdp.models import tree
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards import assign, attention, steps
from tokenmdp.rewards.assign import Branch, Shaped
from tokenmdp.rewards.attention import attention_of
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.rewards.mixture import Mixture
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.rewards.step_model import StepRewardModel
from tokenmdp.types import Batch, Score

SAMPLING = Sampling(max_new_tokens=6)


def verifier() -> FunctionReward:
    def liked(completions: list[str], **_: Any) -> list[float | None]:
        return [None if "w9" in c.split() else float(c.split().count("w3")) for c in completions]

    return FunctionReward(liked, name="liked", max_missing=1.0)


def model_of(policy: Policy, pool: str = "last", seed: int = 0) -> RewardModel:
    reward = RewardModel.from_policy(policy, "head", pool)
    with torch.no_grad():
        reward.head.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed))
    return reward


@pytest.fixture(params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return tiny(request.param, vocabulary=12, spread=0.3)


@pytest.fixture
def sampled(policy: Policy) -> Batch:
    return policy.sample([prompt(1, 2), prompt(5), prompt(4, 6, 7)], 2, SAMPLING, torch.Generator().manual_seed(0))


def assigned(spec: str, reward: Any, policy: Policy, b: Batch, outcome: torch.Tensor | None = None) -> torch.Tensor:
    """Token rewards under a scheme, of all that rows are paid unless told otherwise."""
    scheme = assign.load(spec, reward, policy, SAMPLING)
    assert scheme.name == spec
    paid = scheme.paid(b, reward(b))
    given = paid.value if outcome is None else outcome
    return scheme(b, paid, given, policy, torch.Generator().manual_seed(1))


# -- by name ---------------------------------------------------------------------------------------------------------


def test_attention_shares_the_score_as_the_reward_model_looked(policy: Policy, sampled: Batch) -> None:
    reward = model_of(policy)
    looked = attention_of(reward, sampled)
    value = reward(sampled).value
    torch.testing.assert_close(
        assigned("attention", reward, policy, sampled), credit.attention(value, sampled.action, looked)
    )
    torch.testing.assert_close(
        assigned("attention@0.25", reward, policy, sampled), credit.attention(value, sampled.action, looked, 0.25)
    )


def test_shaped_pays_the_rise_of_the_reward_models_score(policy: Policy, sampled: Batch) -> None:
    """Against the reward model itself, asked of every prefix alone."""
    reward = model_of(policy)
    reward.shift, reward.scale = 0.3, 2.0
    found = assigned("shaped", reward, policy, sampled)
    for i in range(len(sampled)):
        positions = sampled.action[i].nonzero()[:, 0].tolist()
        said = [float(reward(batch([(sampled.tokens[i, :t].tolist(), [])])).value) for t in positions]
        whole = float(reward(sampled).value[i])
        want = [*(b - a for a, b in itertools.pairwise(said)), whole - said[-1]]
        assert found[i, positions].tolist() == pytest.approx(want, abs=1e-5)
        assert float(found[i].sum()) == pytest.approx(whole - said[0], abs=1e-5)


@pytest.mark.parametrize("spec", ["shaped", "branch:2"])
def test_potentials_are_discounted_as_the_returns_are(spec: str, policy: Policy, sampled: Batch) -> None:
    """The return of a row is less by the potential of its start, whatever its length."""
    reward, gamma = model_of(policy), 0.8
    score = reward(sampled)
    scheme = assign.load(spec, reward, policy, SAMPLING, gamma)
    given = scheme(sampled, score, score.value, policy, torch.Generator().manual_seed(1))
    plain = returns.discounted(credit.last(score.value, sampled.action), sampled.action, gamma)
    if isinstance(scheme, Branch):
        potential = scheme.values(sampled, score.verdict, policy, torch.Generator().manual_seed(1))
    else:
        assert isinstance(scheme, Shaped)
        with torch.no_grad():
            potential = scheme.critic.value(scheme.critic.states(sampled), sampled)
    found = returns.discounted(given, sampled.action, gamma)
    torch.testing.assert_close(found, plain - torch.where(sampled.action, potential, 0.0), rtol=1e-4, atol=1e-5)


def test_another_reward_may_lend_its_attention_and_its_potential(
    policy: Policy, sampled: Batch, tmp_path: Path
) -> None:
    """The verifier's score, spread by a reward model in a folder."""
    reward = model_of(policy)
    reward.save(tmp_path / "rm")
    value = verifier()(sampled).value
    found = assigned(f"attention:{tmp_path / 'rm'}@0.5", verifier(), policy, sampled)
    torch.testing.assert_close(found, credit.attention(value, sampled.action, attention_of(reward, sampled), 0.5))
    critic = reward.critic("none")
    with torch.no_grad():
        potential = critic.value(critic.states(sampled), sampled)
    found = assigned(f"shaped:{tmp_path / 'rm'}", verifier(), policy, sampled)
    torch.testing.assert_close(found, credit.shaped(value, sampled.action, potential), rtol=1e-4, atol=1e-5)


def test_implicit_adds_the_log_ratio_of_the_preferred_policy(policy: Policy, sampled: Batch, tmp_path: Path) -> None:
    preferred = tiny(policy.name, vocabulary=12, seed=5)
    preferred.save(tmp_path / "dpo")
    reward = verifier()
    found = assigned(f"implicit:{tmp_path / 'dpo'}@0.4", reward, policy, sampled)
    with torch.no_grad():
        ratio = preferred.evaluate(sampled)["logp"] - policy.evaluate(sampled)["logp"]
    score = reward(sampled)
    want = credit.last(score.value, sampled.action) + torch.where(score.verdict[:, None], 0.4 * ratio, 0.0)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_process_pays_every_step(policy: Policy, sampled: Batch, tmp_path: Path) -> None:
    """As the recipe's own reward, besides what its steps make of the row; and lent from a folder, beside a verifier."""
    model = StepRewardModel(model_of(policy), delimiter="w3")
    model.save(tmp_path / "prm")
    said = model(sampled)
    assert said.steps is not None
    own = assigned("process", model, policy, sampled)
    torch.testing.assert_close(own, said.steps + credit.last(said.value, sampled.action))
    given = said.value + said.steps.sum(1) - 1
    penalised = assigned("process", model, policy, sampled, given)
    torch.testing.assert_close(penalised, own + credit.last(-torch.ones(len(sampled)), sampled.action))
    judged = verifier()(sampled)
    found = assigned(f"process:{tmp_path / 'prm'}", verifier(), policy, sampled)
    steps_ = torch.where(judged.verdict[:, None], said.steps, 0.0)
    torch.testing.assert_close(found, steps_ + credit.last(judged.value, sampled.action))
    with pytest.raises(ValueError, match="this reward says nothing of steps or tokens"):
        assigned("process", verifier(), policy, sampled)


def test_branch_pays_what_a_token_did_to_the_value(policy: Policy, sampled: Batch) -> None:
    reward = verifier()
    score = reward(sampled)
    found = assigned("branch:3", reward, policy, sampled)
    at = [r.nonzero()[:, 0].tolist() if ok else [] for r, ok in zip(sampled.action, score.verdict, strict=True)]
    futures = tree.branch(policy, sampled, at, 3, SAMPLING, torch.Generator().manual_seed(1))
    worth = reward(futures.batch)
    assert any(at)
    for i, positions in enumerate(at):
        if not positions:
            assert not bool(found[i].any())
            continue
        mine = futures.parent == i
        value = []
        for t in positions:
            here = mine & (futures.at == t) & worth.verdict
            value.append(float(worth.value[here].mean()) if bool(here.any()) else (value[-1] if value else 0.0))
        want = [b - a for a, b in zip(value, [*value[1:], float(score.value[i])], strict=True)]
        assert found[i, positions].tolist() == pytest.approx(want, abs=1e-6)
        assert float(found[i].sum()) == pytest.approx(float(score.value[i]) - value[0], abs=1e-5)


def test_branching_counts_what_it_draws_and_draws_nothing_for_rows_without_a_verdict(policy: Policy) -> None:
    b = batch([([1, 2], [9, 4, 5]), ([1, 2], [3, EOS])])  # w9: no verdict
    reward = verifier()
    scheme = assign.load("branch:4", reward, policy, SAMPLING)
    score = reward(b)
    found = scheme(b, scheme.paid(b, score), score.value, policy, torch.Generator().manual_seed(0))
    assert found[0].tolist() == [0.0] * b.tokens.shape[1]
    # two states, at most 6 and 5 tokens to the horizon, 4 futures each
    assert 8 <= scheme.drawn <= 4 * (6 + 5)
    only = b.select([0])
    scheme(only, reward(only), torch.zeros(1), policy, torch.Generator())
    assert scheme.drawn == 0


def test_branching_between_steps_holds_the_value_inside_a_step(policy: Policy) -> None:
    """Steps end with w4: two of them, so futures are drawn from two states and inside a step no token is paid."""
    b = batch([([1, 2], [3, 5, 4, 6, 7, EOS])])
    reward = verifier()
    scheme = Branch("branch:8/step", reward, 8, "w4", SAMPLING)
    value = scheme.values(b, torch.tensor([True]), policy, torch.Generator().manual_seed(0))[0]
    assert value[2] == value[3] == value[4]
    assert value[5] == value[6] == value[7]
    found = scheme(b, reward(b), reward(b).value, policy, torch.Generator().manual_seed(0))[0]
    want = [0, 0, 0, 0, float(value[5] - value[2]), 0, 0, 1 - float(value[5])]
    assert found.tolist() == pytest.approx(want, abs=1e-6)


class PerToken:
    """A reward a token, whose sum is the score: 0.5, and 1.5 for w3."""

    name = "per_token"

    def __call__(self, b: Batch) -> Score:
        token = torch.where(b.action, 0.5 + (b.tokens == 3), 0.0)
        return Score(token.sum(1), torch.ones(len(b), dtype=torch.bool), token)


def test_a_sum_of_token_rewards_is_shared_out_anew_by_branching(policy: Policy, sampled: Batch) -> None:
    reward = PerToken()
    found = assigned("branch:2", reward, policy, sampled)
    scheme = assign.load("branch:2", reward, policy, SAMPLING)
    assert isinstance(scheme, Branch)
    value = scheme.values(sampled, torch.ones(len(sampled), dtype=torch.bool), policy, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, credit.branch(reward(sampled).value, sampled.action, value))


def test_every_scheme_takes_a_score_with_a_baseline_off(policy: Policy, sampled: Batch, tmp_path: Path) -> None:
    """Linear in the outcome: what changes when b is taken off the outcome is how b is shared out, the same each time."""
    reward = model_of(policy)
    reward.save(tmp_path / "rm")
    policy.save(tmp_path / "dpo")
    StepRewardModel(model_of(policy), delimiter="w3").save(tmp_path / "prm")
    value = reward(sampled).value
    names = ["last", "uniform", "attention", "attention@0.5", "shaped", "branch:2"]
    for spec in [*names, f"implicit:{tmp_path / 'dpo'}", f"process:{tmp_path / 'prm'}"]:
        one, two, three = (assigned(spec, reward, policy, sampled, value - c) for c in (0.0, 1.0, 2.0))
        torch.testing.assert_close(one - two, two - three, msg=spec, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((one - two).sum(1), torch.ones(len(sampled)), msg=spec, rtol=1e-4, atol=1e-5)


def test_a_scheme_that_is_a_baseline_gets_no_second_one(policy: Policy, sampled: Batch) -> None:
    """What is left is the score less the value of the state, whatever rows are compared with."""
    reward = FunctionReward(lambda completions, **_: [1.0] * len(completions), name="sure")
    scheme = assign.load("branch:2", reward, policy, SAMPLING)
    paid = scheme.paid(sampled, reward(sampled))

    def compare(total: torch.Tensor) -> torch.Tensor:
        return returns.centred(total, sampled.group)

    found = assign.advantage(scheme, sampled, paid, paid.value, compare, policy, torch.Generator())
    torch.testing.assert_close(found, torch.zeros_like(found), msg="every future is worth 1, and so is the response")
    assert assign.load("shaped", model_of(policy), policy).baseline
    assert not assign.load("uniform", reward, policy).baseline


def test_where_tokens_are_paid_responses_are_compared_at_each_step(policy: Policy) -> None:
    """w3 pays 1.5 and others ½: ahead at each step 2.5, 1, ½ and 2, ½, then ½; what lies behind is charged to nobody."""
    b = replace(batch([([1, 2], [3, 4, 5]), ([6], [3, 7])]), group=torch.zeros(2, dtype=torch.long))
    reward = PerToken()
    scheme = assign.load("last", reward, policy)
    paid = scheme.paid(b, reward(b))

    def compare(total: torch.Tensor) -> torch.Tensor:
        return returns.leave_one_out(total, b.group)

    found = assign.advantage(scheme, b, paid, paid.value, compare, policy, torch.Generator())
    assert found[b.action].tolist() == pytest.approx([0.5, 0.5, 0.0, -0.5, -0.5])
    plain = replace(paid, token=None)
    whole = assign.advantage(scheme, b, plain, plain.value, compare, policy, torch.Generator())
    assert whole[b.action].tolist() == pytest.approx([0.5, 0.5, 0.5, -0.5, -0.5])


def test_late_tokens_are_not_charged_with_what_was_earned_before_them(policy: Policy) -> None:
    """Six steps of about .8 in each of forty responses: the mean advantage is 0 at every step."""
    rng = torch.Generator().manual_seed(0)
    b = batch([([1], [5] * 6) for _ in range(40)])
    b = replace(b, group=torch.arange(40) // 8)
    token = torch.where(b.action, 0.8 + 0.1 * torch.randn(b.tokens.shape, generator=rng), 0.0)
    paid = Score(token.sum(1), torch.ones(40, dtype=torch.bool), token)
    scheme = assign.load("last", PerToken(), policy)

    def compare(total: torch.Tensor) -> torch.Tensor:
        return returns.centred(total, b.group)

    found = assign.advantage(scheme, b, paid, paid.value, compare, policy, rng)
    by_step = returns.at_steps(found, b.action)
    torch.testing.assert_close(by_step.mean(0), torch.zeros(6), atol=1e-5, rtol=0.0)
    assert float(by_step[:, -1].std()) < 0.15, "the last step's own spread"
    torch.testing.assert_close(returns.at_tokens(by_step, b.action), found)


# -- a process reward: what a row is paid in all ------------------------------------------------------------------------


class Steps:
    """A process reward whose every w4 ends a step that is likely good; the score is the weakest step."""

    name = "steps"

    def __call__(self, b: Batch) -> Score:
        closing = b.action & (b.tokens == 4)
        p = torch.where(closing, torch.tensor([0.95, 0.9, 0.8, 0.85, 0.9])[closing.cumsum(1) % 5], 0.0)
        lowest = torch.where(closing, p, 1.0).amin(1)
        return Score(lowest, torch.ones(len(b), dtype=torch.bool), steps=p)


def with_token_rewards() -> Mixture:
    return Mixture([(2.0, Steps()), (1.0, PerToken())])


@pytest.fixture
def stepped() -> Batch:
    """Two prompts, two responses each: of two steps, of five, of three, of one."""
    texts = [[3, 4, 4], [4, 4, 4, 4, 4, EOS], [4, 5, 4, 3, 4], [6, 7, 4]]
    b = batch([([1, 2], text) for text in texts[:2]] + [([5], text) for text in texts[2:]])
    return replace(b, group=torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("reward", [Steps(), with_token_rewards()], ids=["steps", "steps and tokens"])
def test_a_row_is_paid_its_score_whatever_is_said_of_its_steps(
    reward: Any, policy: Policy, stepped: Batch, tmp_path: Path
) -> None:
    """Only `process` pays the steps, once, besides the score: under the others many steps are worth no more than few."""
    model_of(policy).save(tmp_path / "rm")
    score = reward(stepped)
    assert score.steps is not None
    for spec in ["last", "uniform", f"attention:{tmp_path / 'rm'}", f"attention:{tmp_path / 'rm'}@0.5"]:
        paid = assigned(spec, reward, policy, stepped).sum(1)
        torch.testing.assert_close(paid, score.value, msg=f"{spec}: {paid} for {score.value}")
    shaped = assign.load(f"shaped:{tmp_path / 'rm'}", reward, policy)
    assert isinstance(shaped, Shaped)
    with torch.no_grad():
        potential = shaped.critic.value(shaped.critic.states(stepped), stepped)
    first = stepped.action.long().argmax(1)[:, None]
    found = assigned(shaped.name, reward, policy, stepped).sum(1)
    torch.testing.assert_close(found, score.value - potential.gather(1, first)[:, 0])
    branching = assign.load("branch:3", reward, policy, SAMPLING)
    assert isinstance(branching, Branch)
    value = branching.values(stepped, score.verdict, policy, torch.Generator().manual_seed(1))
    found = assigned("branch:3", reward, policy, stepped).sum(1)
    torch.testing.assert_close(found, score.value - value.gather(1, first)[:, 0])
    found = assigned("process", reward, policy, stepped)
    torch.testing.assert_close(found.sum(1), score.value + score.steps.sum(1))


def test_branching_values_a_future_at_its_score(policy: Policy, stepped: Batch) -> None:
    """A score lies in [0, 1]; a future's steps would add up to more."""

    class Sure(Steps):
        def __call__(self, b: Batch) -> Score:
            return replace(super().__call__(b), steps=torch.where(b.action, 0.9, 0.0))

    scheme = assign.load("branch:2", Sure(), policy, SAMPLING)
    assert isinstance(scheme, Branch)
    value = scheme.values(stepped, torch.ones(4, dtype=torch.bool), policy, torch.Generator().manual_seed(0))
    assert float(value[stepped.action].min()) > 0.7
    assert float(value.max()) <= 1.0


@pytest.mark.parametrize("spec", ["last", "uniform", "process"])
def test_group_baselines_are_of_what_rows_are_paid(spec: str, policy: Policy, stepped: Batch) -> None:
    """As in GRPO. By hand for the first prompt: the weakest steps are 0.8 and 0.8, the sums 0.9 + 0.8 and 4.4.

    `last`: both rows 0. `process`: 0.8 + 1.7 and 0.8 + 4.4, so −1.35 and +1.35 at the first token.
    """
    reward = Steps()
    scheme = assign.load(spec, reward, policy)
    paid = scheme.paid(stepped, reward(stepped))
    centred = returns.centred(paid.value, stepped.group, paid.verdict)
    given = scheme(stepped, paid, centred, policy, torch.Generator())
    advantage = returns.discounted(given, stepped.action)
    first = advantage.gather(1, stepped.action.long().argmax(1)[:, None])[:, 0]
    # Second prompt: steps 0.9, 0.8, 0.85 and 0.9; weakest 0.8 and 0.9.
    want = [-1.35, 1.35, 0.775, -0.775] if spec == "process" else [0.0, 0.0, -0.05, 0.05]
    assert first.tolist() == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(first.view(2, 2).sum(1), torch.zeros(2))


def test_the_score_of_a_reward_that_scores_tokens_is_its_tokens(policy: Policy, stepped: Batch) -> None:
    """They are no second signal: `process` pays them once, as they are."""
    found = assigned("process", PerToken(), policy, stepped)
    torch.testing.assert_close(found, PerToken()(stepped).token)


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("atention", "there is no credit scheme 'atention': did you mean attention"),
        ("uniform:2", "there is no credit scheme"),
        ("implicit", "a scheme is one of .*implicit:FOLDER"),
        ("attention", "reads a reward model, and liked is a FunctionReward: .* attention:FOLDER"),
        ("shaped", "reads a reward model, and liked is a FunctionReward: .* shaped:FOLDER"),
        ("attention@1.5", "spreads a part of the score, from 0 to 1"),
        ("branch:0", "write branch:K or branch:K/step"),
        ("branch:x", "write branch:K or branch:K/step"),
        ("branch:2/word", "write branch:K or branch:K/step"),
    ],
)
def test_a_scheme_that_cannot_be_says_why(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign.load(spec, verifier(), tiny(), SAMPLING)


def test_branching_needs_to_know_how_responses_are_drawn() -> None:
    with pytest.raises(ValueError, match=r"must give its sampling to assign\.load"):
        assign.load("branch:2", verifier(), tiny())


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    policy = tiny()
    model_of(policy).save(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"has no tokenmdp_steps\.json, so it is no process reward model"):
        assign.load(f"process:{tmp_path / 'rm'}", verifier(), policy)
    tiny(vocabulary=30).save(tmp_path / "other")
    with pytest.raises(ValueError, match="have different tokenizers"):
        assign.load(f"implicit:{tmp_path / 'other'}", verifier(), policy)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "neox"])
def test_a_rows_attention_sums_to_one_whatever_its_neighbours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = model_of(tiny(name))
    b = ragged()
    found = attention_of(reward, b)
    torch.testing.assert_close(found.sum(1), torch.ones(len(b)))
    assert bool((found >= 0).all())
    assert not bool(found[~b.real].any())
    monkeypatch.setattr(attention, "CELLS", 1)  # every row on its own
    torch.testing.assert_close(attention_of(reward, b), found, rtol=1e-4, atol=1e-6)


def test_the_attention_is_the_softmax_of_the_last_layers_scores() -> None:
    """GPT-2 by hand: its last block's queries and keys, the mean over its four heads."""
    reward = model_of(tiny("gpt2"))
    body: Any = reward.backbone.body
    b = batch([([1, 2, 3], [4, 5])])
    block = body.h[-1]
    with torch.no_grad():
        states = body(input_ids=b.tokens, output_hidden_states=True).hidden_states[-2]
        query, key, _ = block.attn.c_attn(block.ln_1(states)).split(32, dim=2)
    heads = [(key[0, :, 8 * h : 8 * h + 8] @ query[0, -1, 8 * h : 8 * h + 8] / 8**0.5).softmax(0) for h in range(4)]
    torch.testing.assert_close(attention_of(reward, b)[0], torch.stack(heads).mean(0))


def test_the_reward_models_own_attention_is_put_back(policy: Policy) -> None:
    reward = model_of(policy)
    body: Any = reward.backbone.body
    b = ragged(vocabulary=12)
    before, said = body.config._attn_implementation, reward(b).value
    assert before != "eager"
    attention_of(reward, b)
    assert body.config._attn_implementation == before
    assert torch.equal(reward(b).value, said)
    broken = Batch.build(b.prompts[:1], [[10**6]], texts=[""], ended=[False])  # a token the model has not
    with pytest.raises(IndexError):
        attention_of(reward, broken)
    assert body.config._attn_implementation == before
    assert policy.model.config._attn_implementation == before


# -- steps ------------------------------------------------------------------------------------------------------------


def test_steps_end_where_a_delimiter_is_complete() -> None:
    words = tokenizer()
    b = batch([([4, 4], [5, 4, 6, 7, 4, 8]), ([1], [5, 4, EOS]), ([1], [4, 4, 2]), ([1], []), ([1], [EOS])])
    found = [row.nonzero()[:, 0].tolist() for row in steps.ends(b, words, "w4")]
    # "5 4 | 6 7 4 | 8"; the end of the text is part of no step; a delimiter alone is a step; no action, no step; nothing
    # but the end is one step
    assert found == [[3, 6, 7], [2], [1, 2, 3], [], [1]]
    assert [row.nonzero()[:, 0].tolist() for row in steps.last_of(steps.ends(b, words, "w4"))] == [
        [7],
        [2],
        [3],
        [],
        [1],
    ]
    assert torch.equal(steps.ends(b, words, ""), b.action)


def test_step_labels_are_the_share_of_futures_that_end_right() -> None:
    """Right: no w5 before the end. A response with w5 in step one cannot end right; one without it may."""

    def clean(completions: list[str], **_: Any) -> list[float | None]:
        return [None if "w9" in c.split() else float("w5" not in c.split()) for c in completions]

    policy, reward = tiny(vocabulary=12, spread=0.1), FunctionReward(clean, name="clean")
    b = batch([([1], [5, 4, 3, 4, 2]), ([1], [3, 4, 5, 2]), ([1], [3, 4, 2]), ([1], [3, 9])])
    sampling = Sampling(max_new_tokens=5)
    found = steps.label(b, policy, reward, 64, sampling, torch.Generator().manual_seed(0), "w4")
    assert found.mask[0].nonzero()[:, 0].tolist() == [2, 4, 5]
    assert found.label[0].tolist() == [0.0] * 6
    assert found.mask[1].nonzero()[:, 0].tolist() == [2, 4]
    assert float(found.label[1, 4]) == 0.0, "the last step's label is the outcome"
    # Three tokens are left after step one; nearly uniform over twelve words, each avoids w5 11 times in 12, and w9
    # (no verdict, not counted) makes that 10 of 11: 0.75 and the ends of texts make it more.
    assert 0.6 < float(found.label[1, 2]) < 0.95
    assert found.right.tolist() == [False, False, True, False]
    assert found.verdict.tolist() == [True, True, True, False]
    assert not bool(found.mask[3].any()), "no verdict, no label"
    assert found.drawn > 64
    hard = steps.label(b, policy, reward, 64, sampling, torch.Generator().manual_seed(0), "w4", "any")
    assert set(hard.label[hard.mask].tolist()) == {0.0, 1.0}
    assert torch.equal(hard.label > 0, found.label > 0)
    with pytest.raises(ValueError, match="kind is 'most'"):
        steps.label(b, policy, reward, 1, sampling, torch.Generator(), kind="most")


def test_right_answers_with_wrong_steps_are_counted() -> None:
    right = torch.tensor([True, True, False])
    mask = torch.tensor([[False, True, True]] * 3)
    label = torch.tensor([[0.0, 0.9, 1.0], [0.0, 0.1, 1.0], [0.0, 0.1, 0.0]])
    labels = steps.StepLabels(label, mask, right, torch.ones(3, dtype=torch.bool), 0)
    assert labels.wrong_steps().tolist() == [False, True, False]
    assert labels.wrong_steps(0.05).tolist() == [False, False, False]
