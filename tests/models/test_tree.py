"""Tree rollouts: equal to plain sampling from each prefix, one reading a parent, whole responses that know where they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from scipy import stats

from tiny_models import EOS, VOCABULARY, batch, prompt, tiny
from tokenmdp.functional import credit, returns
from tokenmdp.models import decode, tree
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.models.tree import Branches
from tokenmdp.testing.exact import Exact
from tokenmdp.types import Batch

MANY_ENDS = tuple(range(0, VOCABULARY, 5))
PROMPTS = [prompt(5, 6, 7), prompt(8, 9, 10, 11, 12, 13, 14), prompt(15)]
SAMPLING = Sampling(max_new_tokens=8, temperature=0.9, top_k=40, top_p=0.95)


@pytest.fixture(params=["llama", "gpt2", "mistral"])
def policy(request: pytest.FixtureRequest) -> Policy:
    """Rotary and learned positions, and a window of five tokens. Rows end early and late.

    In float64, so that both sides find the same tokens in the nucleus: in float32 a sum of 0.9500001 is in it or not by
    its rounding.
    """
    made = tiny(request.param)
    made.model.double()
    made.eos_ids = MANY_ENDS
    return made


def responses(policy: Policy, n: int = 2) -> Batch:
    return policy.sample(PROMPTS, n, SAMPLING, torch.Generator().manual_seed(0))


def every_action(b: Batch) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in b.action]


def plain(policy: Policy, b: Batch, k: int, uniform: torch.Tensor) -> list[decode.Drawn]:
    """What `sample`'s slow twin draws from each prefix on its own, with the same uniform numbers."""
    states = [(i, t) for i, positions in enumerate(every_action(b)) for t in positions]
    found = []
    with torch.inference_mode():
        for s, (i, t) in enumerate(states):
            left = replace(SAMPLING, max_new_tokens=SAMPLING.max_new_tokens - int(b.action[i, :t].sum()))
            found += decode.slow(policy, [b.tokens[i, :t].tolist()], k, uniform[s * k : (s + 1) * k], left)
    return found


def assert_equals_plain(found: Branches, b: Batch, twins: list[decode.Drawn]) -> None:
    assert len(found.batch) == len(twins)
    assert found.batch.logp_mu is not None
    for i, d in enumerate(twins):
        parent, t, length = int(found.parent[i]), int(found.at[i]), int(found.batch.length[i])
        assert found.batch.tokens[i, :t].tolist() == b.tokens[parent, :t].tolist()
        assert found.batch.tokens[i, t:length].tolist() == d.tokens
        assert bool(found.batch.ended[i]) == d.ended
        assert found.batch.logp_mu[i, t:length].tolist() == pytest.approx(d.logp, abs=1e-5)


def test_branches_equal_plain_samples_of_their_prefixes(policy: Policy) -> None:
    b = responses(policy)
    states = int(b.action.sum())
    uniform = torch.rand((3 * states, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = tree.branch(policy, b, every_action(b), 3, SAMPLING, torch.Generator().manual_seed(1))
    assert policy.paths["rollouts"].startswith("KV slab")
    assert_equals_plain(found, b, plain(policy, b, 3, uniform))
    assert len({int(t) for t in found.at}) > 5
    assert 0 < int(found.batch.ended.sum()) < len(found.batch)


def test_a_model_without_the_slab_branches_too() -> None:
    policy = tiny("gemma2")  # capped scores: decoded slowly
    b = policy.sample(PROMPTS[:2], 1, Sampling(max_new_tokens=3), torch.Generator().manual_seed(0))
    found = tree.branch(policy, b, every_action(b), 1, Sampling(max_new_tokens=3), torch.Generator().manual_seed(1))
    assert policy.paths["rollouts"].startswith("full forward pass")
    assert found.batch.logp_mu is not None
    logp = policy.evaluate(found.batch)["logp"].detach()
    assert torch.allclose(logp, found.batch.logp_mu, atol=1e-4)


def test_a_response_that_fills_the_context_branches_everywhere() -> None:
    """Its last state may add one token, the first six: rows that are through stay inside the learned positions."""
    policy = tiny("gpt2")
    b = batch([(list(range(1, 59)), [4, 5, 6, 7, 8, 9])])
    found = tree.branch(policy, b, every_action(b), 2, Sampling(max_new_tokens=6), torch.Generator().manual_seed(0))
    assert int(found.batch.length.max()) == policy.context == 64
    assert found.batch.logp_mu is None, "nobody sampled the parent"


def test_rows_know_their_parent_and_their_state(policy: Policy) -> None:
    b = responses(policy)
    at = [[int(row.nonzero()[0]), int(row.nonzero()[-1])] for row in b.action]
    found = tree.branch(policy, b, at, 2, SAMPLING, torch.Generator().manual_seed(1))
    assert found.parent.tolist() == [i for i in range(len(b)) for _ in range(4)]
    assert found.at.tolist() == [t for pair in at for t in pair for _ in range(2)]
    assert found.batch.group.tolist() == [s for s in range(2 * len(b)) for _ in range(2)]
    assert [p.text for p in found.batch.prompts] == [b.prompts[i].text for i in found.parent.tolist()]
    for i in range(len(found.batch)):
        start, length = len(found.batch.prompts[i].ids), int(found.batch.length[i])
        assert found.batch.action[i].nonzero()[:, 0].tolist() == list(range(start, length))
        assert length - start <= 8, "a future has the horizon that was left"
        assert found.batch.texts[i] == policy.response_text(
            found.batch.prompts[i].ids, found.batch.tokens[i, start:length].tolist()
        )
    assert found.drawn == int((found.batch.length - found.at).sum())


@pytest.fixture
def passes() -> Iterator[tuple[Policy, list[tuple[int, int]]]]:
    policy = tiny("llama")
    seen: list[tuple[int, int]] = []
    policy.engine()

    def watch(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        seen.append((rows, tokens))

    handle = policy.backbone.body.register_forward_pre_hook(watch, with_kwargs=True)
    yield policy, seen
    handle.remove()


def test_a_parent_is_read_once_for_all_its_states(passes: tuple[Policy, list[tuple[int, int]]]) -> None:
    policy, seen = passes
    b = batch([([1, 2, 3], [4, 5, 6, 7]), ([1, 2, 3, 4, 5], [6, 7, 8]), ([9], [8, 7])])
    tree.branch(policy, b, every_action(b), 4, Sampling(max_new_tokens=5, stop_at_eos=False), torch.Generator())
    # Rows are read up to their last state (7 − 1 = 6 and 8 − 1 = 7 tokens); the first is the beginning of the second.
    assert seen[0] == (2, 7)
    assert all(tokens == 1 for _, tokens in seen[1:])
    assert len(seen[1:]) == 4, "the farthest state from its horizon has 5 tokens left; the last one drawn is not read"


def test_forks_are_split_over_slabs(
    passes: tuple[Policy, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, seen = passes
    b = batch([([1, 2, 3], [4, 5, 6, 7]), ([1, 2, 3, 4, 5], [6, 7, 8]), ([9], [8, 7])])
    sampling = Sampling(max_new_tokens=5)
    whole = tree.branch(policy, b, every_action(b), 2, sampling, torch.Generator().manual_seed(0))
    seen.clear()
    monkeypatch.setattr(decode, "SLAB_TOKENS", 40)
    split = tree.branch(policy, b, every_action(b), 2, sampling, torch.Generator().manual_seed(0))
    assert len([1 for _, tokens in seen if tokens > 1]) > 3
    assert torch.equal(split.batch.tokens, whole.batch.tokens)


def test_progress_counts_every_row_once(policy: Policy) -> None:
    b, counted = responses(policy), list[int]()
    found = tree.branch(policy, b, every_action(b), 2, SAMPLING, torch.Generator(), counted.append)
    assert sum(counted) == len(found.batch)


@pytest.mark.parametrize(
    ("at", "k", "horizon", "message"),
    [
        ([[3], []], 0, 8, "k is 0"),
        ([[3]], 1, 8, "positions for 1 rows of 2"),
        ([[], []], 1, 8, "no position to branch from"),
        ([[0], []], 1, 8, "position 0 of row 0 is no action"),
        ([[], [9]], 1, 8, "position 9 of row 1 is no action"),
        ([[4], []], 1, 1, "follows 1 chosen tokens, and max_new_tokens=1 leaves it 0"),
        ([[4], []], 1, 99, "in a context of 64"),
    ],
)
def test_states_that_do_not_exist_are_refused(at: list[list[int]], k: int, horizon: int, message: str) -> None:
    b = batch([([1, 2, 3], [4, 5]), ([1], [2])])
    with pytest.raises(ValueError, match=message):
        tree.branch(tiny(), b, at, k, Sampling(max_new_tokens=horizon), torch.Generator())


HORIZON = 3


def test_the_values_of_branches_are_the_exact_ones() -> None:
    """From the start and from every state of one response of a four-token model: 3,000 futures each, within five standard errors."""
    policy = tiny("llama", vocabulary=4, spread=0.5)
    world = Exact((1, 2), 4, HORIZON, eos=EOS)
    score = world.score(lambda r: r.count(3) - 0.5 * (r[-1] == EOS))
    with torch.no_grad():
        logp = world.logp(lambda t: policy.model(t).logits).double()
    exact = world.values(logp, credit.last(score, world.batch.action)).value
    row = world.responses.index((3, 1, 2))
    b = world.batch.select([row])
    found = tree.branch(
        policy, b, every_action(b), 3000, Sampling(max_new_tokens=HORIZON), torch.Generator().manual_seed(0)
    )
    place = {r: i for i, r in enumerate(world.responses)}
    rows = [place[tuple(found.batch.tokens[i][found.batch.action[i]].tolist())] for i in range(len(found.batch))]
    value = returns.branch(score[rows], found.parent, found.at, b.action)
    spread = float(score.std())
    assert torch.allclose(value, exact[row : row + 1, : value.shape[1]], atol=5 * spread / 3000**0.5)


def test_branches_have_the_exact_conditional_distribution() -> None:
    policy = tiny("llama", vocabulary=4, spread=0.5)
    world = Exact((1, 2), 4, HORIZON, eos=EOS)
    with torch.no_grad():
        p = world.probability(world.logp(lambda t: policy.model(t).logits)).double()
    through = torch.tensor([r[0] == 3 for r in world.responses])
    expected = p[through] / p[through].sum() * 3000
    b = world.batch.select([world.responses.index((3, 1, 2))])
    found = tree.branch(policy, b, [[3]], 3000, Sampling(max_new_tokens=HORIZON), torch.Generator().manual_seed(2))
    seen = Counter(tuple(found.batch.tokens[i][found.batch.action[i]].tolist()) for i in range(3000))
    counts = torch.tensor([seen[r] for r, inside in zip(world.responses, through.tolist(), strict=True) if inside])
    assert int(counts.sum()) == 3000
    kept = expected >= 5
    pooled = [torch.cat([x[kept], x[~kept].sum()[None]]).numpy() for x in (counts.double(), expected)]
    assert float(stats.chisquare(*pooled).pvalue) > 1e-3


def test_an_overruled_row_goes_on_from_the_other_token_as_if_it_had_been_sampled_from_there() -> None:
    policy, sampling = tiny(), Sampling(max_new_tokens=6)
    b = policy.sample([prompt(1, 2), prompt(3), prompt(4, 5, 6)], 1, sampling, torch.Generator().manual_seed(0))
    other = (int(b.tokens[0, 3]) + 1) % 60 + 1
    found = tree.overruled(policy, b, [0, 2], [3, 4], [other, EOS], sampling, torch.Generator().manual_seed(1))
    # Row 1 is as it was; row 2 ends with its second token; row 0 has H − 2 tokens left after its second.
    assert found.tokens[1, : int(b.length[1])].tolist() == b.tokens[1, : int(b.length[1])].tolist()
    assert found.tokens[2, : int(found.length[2])].tolist() == [*b.tokens[2, :4].tolist(), EOS]
    assert bool(found.ended[2])
    assert found.tokens[0, :4].tolist() == [*b.tokens[0, :3].tolist(), other]
    state, left = prompt(*found.tokens[0, :4].tolist()), Sampling(max_new_tokens=4)
    again = policy.sample([state], 1, left, torch.Generator().manual_seed(1))
    assert found.tokens[0, 4 : int(found.length[0])].tolist() == again.tokens[0, 4 : int(again.length[0])].tolist()
    assert bool(found.ended[0]) == bool(again.ended[0])
    assert found.logp_mu is None
    horizon = Sampling(max_new_tokens=int(b.action[1].sum()))
    last = tree.overruled(policy, b, [1], [int(b.length[1]) - 1], [7], horizon, torch.Generator())
    assert last.tokens[1, int(b.length[1]) - 1] == 7  # at the horizon nothing follows, and it has not ended
    assert not bool(last.ended[1])
    assert last.texts[1] == policy.response_text([3], last.tokens[1, 1 : int(last.length[1])].tolist())
