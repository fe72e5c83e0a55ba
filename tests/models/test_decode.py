"""The fast rollout engine equals its slow twin, whatever the architecture, the batch, and when rows end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from scipy import stats
from transformers import BloomConfig, BloomForCausalLM

from tiny_models import ARCHITECTURES, EOS, VOCABULARY, prompt, tiny
from tokenmdp.models import decode
from tokenmdp.models.decode import Drawn
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.testing.exact import Exact

UNCAPPED = {"gemma2": {"attn_logit_softcapping": None, "final_logit_softcapping": None}}
PREFIXES = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19, 20, 21, 22, 23, 24]]
MANY_ENDS = tuple(range(0, VOCABULARY, 5))  # a fifth of the vocabulary ends a response: rows leave all the time


def numbers(rows: int, horizon: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((rows, horizon), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def both(policy: Policy, n: int, sampling: Sampling) -> tuple[list[Drawn], list[Drawn]]:
    u = numbers(len(PREFIXES) * n, sampling.max_new_tokens)
    return decode.fast(policy, PREFIXES, n, u, sampling), decode.slow(policy, PREFIXES, n, u, sampling)


def assert_same(ours: Sequence[Drawn], twins: Sequence[Drawn], tolerance: float = 1e-5) -> None:
    assert [d.tokens for d in ours] == [d.tokens for d in twins]
    assert [d.ended for d in ours] == [d.ended for d in twins]
    for a, b in zip(ours, twins, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=tolerance)


@pytest.fixture
def policy() -> Policy:
    return tiny("llama")


Passes = Callable[[Policy], list[tuple[int, int]]]


@pytest.fixture
def passes_of() -> Iterator[Passes]:
    """The shape (rows, tokens) of every forward pass of a policy's body, as they happen."""
    handles = []

    def watched(policy: Policy) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []

        def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            rows, tokens = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape
            seen.append((rows, tokens))

        handles.append(policy.backbone.body.register_forward_pre_hook(watch, with_kwargs=True))
        return seen

    yield watched
    for handle in handles:
        handle.remove()


@pytest.fixture
def passes(policy: Policy, passes_of: Passes) -> list[tuple[int, int]]:
    return passes_of(policy)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fast_equals_slow(name: str) -> None:
    """Ragged prefixes, one of a single token; longer than the windows of gemma2 (6) and mistral (5)."""
    policy = tiny(name, **UNCAPPED.get(name, {}))
    assert not decode.objection(policy)
    assert_same(*both(policy, 2, Sampling(max_new_tokens=8, temperature=0.9, top_k=40, top_p=0.95)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_fast_equals_slow_while_rows_leave(name: str) -> None:
    policy = tiny(name)
    policy.eos_ids = MANY_ENDS
    ours, twins = both(policy, 4, Sampling(max_new_tokens=10))
    assert sum(d.ended for d in ours) > 3
    assert len({len(d.tokens) for d in ours}) > 2
    assert_same(ours, twins)


@pytest.mark.parametrize(
    "capped",
    [{}, {"final_logit_softcapping": None}, {"attn_logit_softcapping": None}],
    ids=["both", "attention only", "logits only"],
)
def test_capped_scores_are_recognised_and_decoded_slowly(capped: dict[str, None]) -> None:
    policy = tiny("gemma2", **capped)
    assert decode.objection(policy)
    sampling = Sampling(max_new_tokens=4)
    b = policy.sample([prompt(*p) for p in PREFIXES], 1, sampling, torch.Generator().manual_seed(0))
    assert policy.paths["rollouts"].startswith("full forward pass")
    assert b.logp_mu is not None
    assert torch.allclose(policy.evaluate(b)["logp"], b.logp_mu, atol=1e-5)


@pytest.mark.parametrize(
    "weak", [{"final_logit_softcapping": None}, {"attn_logit_softcapping": None}], ids=["attention", "logits"]
)
def test_a_cap_too_weak_to_see_on_the_first_weights_is_recognised_all_the_same(weak: dict[str, None]) -> None:
    """Training makes scores larger; the path is chosen once, so it must not depend on how large they are today."""
    assert decode.objection(tiny("gemma2", spread=0.01, **weak))


def test_positions_in_the_attention_scores_are_recognised() -> None:
    """Bloom adds a bias to its scores that the slab's attention never receives."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, eos_token_id=EOS)
    other = tiny("llama")
    policy = Policy(BloomForCausalLM(config).float(), other.tokenizer, compute="float32")
    assert "with its attention exchanged it raises" in decode.objection(policy)
    policy.engine()
    assert policy.paths["rollouts"].startswith("full forward pass at every token, slow: with its attention exchanged")


def test_finished_rows_leave(policy: Policy, passes: list[tuple[int, int]]) -> None:
    policy.eos_ids = MANY_ENDS
    sampling = Sampling(max_new_tokens=12)
    with torch.inference_mode():
        drawn = decode.fast(policy, PREFIXES, 8, numbers(32, 12), sampling)
    rows = [r for r, t in passes if t == 1]
    assert rows == sorted(rows, reverse=True)
    for t, present in enumerate(rows):  # the pass that prepares token t + 2 of each response
        live = sum(len(d.tokens) > t + 1 for d in drawn)
        assert live <= present <= live / decode.COMPACT_BELOW
    assert rows[-1] < 16


def test_a_prefix_is_read_once_for_all_its_samples(policy: Policy, passes: list[tuple[int, int]]) -> None:
    with torch.inference_mode():
        decode.fast(policy, PREFIXES, 8, numbers(32, 3), Sampling(max_new_tokens=3))
    assert passes[0] == (len(PREFIXES), max(map(len, PREFIXES)))
    assert [t for _, t in passes[1:]] == [1, 1]  # the last token drawn is not read


def test_slabs_are_split_by_their_size(
    policy: Policy, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, u = Sampling(max_new_tokens=6), numbers(12, 6)
    with torch.inference_mode():
        whole = decode.fast(policy, PREFIXES, 3, u, sampling)
        passes.clear()
        monkeypatch.setattr(decode, "SLAB_TOKENS", 60)
        split = decode.fast(policy, PREFIXES, 3, u, sampling)
    # Sorted by length, prefixes of 1 and 3 tokens share a slab: 2 x 3 rows x (3 + 6) columns = 54; the others are
    # alone.
    assert [rows for rows, tokens in passes if (rows, tokens) in ((2, 3), (1, 7), (1, 9))] == [2, 1, 1]
    assert_same(split, whole)


def test_samples_of_one_prefix_are_split_too(
    policy: Policy, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, u = Sampling(max_new_tokens=6), numbers(20, 6)
    with torch.inference_mode():
        whole = decode.fast(policy, PREFIXES[:1], 20, u, sampling)
        passes.clear()
        monkeypatch.setattr(decode, "SLAB_TOKENS", 60)
        split = decode.fast(policy, PREFIXES[:1], 20, u, sampling)
    columns = len(PREFIXES[0]) + 6
    assert max(rows for rows, tokens in passes if tokens == 1) == 60 // columns
    assert_same(split, whole)


def test_a_response_does_not_depend_on_its_neighbours(policy: Policy) -> None:
    policy.eos_ids = MANY_ENDS
    sampling, u = Sampling(max_new_tokens=8, temperature=1.2), numbers(8, 8)
    order = [2, 0, 3, 1]
    rows = [2 * i + j for i in order for j in range(2)]
    with torch.inference_mode():
        whole = decode.fast(policy, PREFIXES, 2, u, sampling)
        moved = decode.fast(policy, [PREFIXES[i] for i in order], 2, u[rows], sampling)
        alone = [decode.fast(policy, [PREFIXES[i // 2]], 1, u[i : i + 1], sampling)[0] for i in range(8)]
    assert_same(moved, [whole[r] for r in rows])
    assert_same(alone, whole)


def test_greedy_decoding_needs_no_luck(policy: Policy) -> None:
    sampling = Sampling(max_new_tokens=5, temperature=0)
    with torch.inference_mode():
        a = decode.fast(policy, PREFIXES, 1, numbers(4, 5, seed=1), sampling)
        b = decode.fast(policy, PREFIXES, 1, numbers(4, 5, seed=2), sampling)
        tokens = list(PREFIXES[0])
        for _ in range(5):
            tokens.append(int(policy.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert_same(a, b)
    assert a[0].tokens == tokens[3:]
    assert a[0].logp == [0.0] * 5


def test_ended_and_truncated_are_told_apart(policy: Policy) -> None:
    policy.eos_ids = MANY_ENDS
    drawn, _ = both(policy, 16, Sampling(max_new_tokens=4))
    for d in drawn:
        assert d.ended == (d.tokens[-1] in MANY_ENDS)
        assert not set(d.tokens[:-1]) & set(MANY_ENDS)
        assert d.ended or len(d.tokens) == 4
    assert any(d.ended and len(d.tokens) == 4 for d in drawn), "an end at the very horizon is an end"


def test_an_end_is_an_ordinary_token_when_asked(policy: Policy) -> None:
    policy.eos_ids = MANY_ENDS
    ours, twins = both(policy, 2, Sampling(max_new_tokens=6, stop_at_eos=False))
    assert {len(d.tokens) for d in ours} == {6}
    assert not any(d.ended for d in ours)
    assert_same(ours, twins)


@pytest.mark.parametrize("engine", [decode.fast, decode.slow])
@pytest.mark.parametrize("stop", [True, False])
def test_progress_counts_every_row_once(policy: Policy, engine: object, stop: bool) -> None:
    policy.eos_ids = MANY_ENDS
    counted: list[int] = []
    with torch.inference_mode():
        engine(policy, PREFIXES, 3, numbers(12, 5), Sampling(max_new_tokens=5, stop_at_eos=stop), counted.append)
    assert sum(counted) == 12


def test_the_models_own_attention_is_put_back(policy: Policy) -> None:
    before = policy.model.config._attn_implementation
    b = policy.sample([prompt(3, 4)], 2, Sampling(max_new_tokens=3), torch.Generator().manual_seed(0))
    assert policy.model.config._attn_implementation == before
    assert policy.paths["rollouts"].startswith("KV slab")
    with torch.no_grad():
        policy.backbone.body.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        policy.sample([prompt(3, 4)], 2, Sampling(max_new_tokens=3), torch.Generator().manual_seed(0))
    assert policy.model.config._attn_implementation == before
    assert len(b) == 2


HORIZON = 3


@pytest.fixture(scope="module")
def world() -> tuple[Policy, Exact, torch.Tensor]:
    """A model of four tokens and the exact probability of each of its 40 responses."""
    policy = tiny("llama", vocabulary=4, spread=0.5)
    exact = Exact((1, 2), 4, HORIZON, eos=EOS)
    with torch.no_grad():
        probability = exact.probability(exact.logp(lambda t: policy.model(t).logits))
    return policy, exact, probability


def p_value(exact: Exact, probability: torch.Tensor, responses: list[tuple[int, ...]]) -> float:
    """Of a chi-square test that the responses were drawn from the exact distribution; rare ones are pooled."""
    seen = Counter(responses)
    assert set(seen) <= set(exact.responses)
    counts = torch.tensor([seen[r] for r in exact.responses], dtype=torch.float64)
    expected = probability.double() / probability.double().sum() * len(responses)
    rare = expected < 5
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]).numpy() for x in (counts, expected)]
    return float(stats.chisquare(*pooled).pvalue)


def test_responses_have_their_exact_distribution(world: tuple[Policy, Exact, torch.Tensor]) -> None:
    policy, exact, probability = world
    b = policy.sample([prompt(1, 2)], 4000, Sampling(max_new_tokens=HORIZON), torch.Generator().manual_seed(3))
    responses = [tuple(b.tokens[i][b.action[i]].tolist()) for i in range(len(b))]
    assert p_value(exact, probability, responses) > 1e-3


def test_a_forked_continuation_has_the_distribution_of_an_unforked_one(
    world: tuple[Policy, Exact, torch.Tensor],
) -> None:
    """Every response is cut after its first token and continued from there; nothing may have changed."""
    policy, exact, probability = world
    rng = torch.Generator().manual_seed(4)
    whole = policy.sample([prompt(1, 2)], 3000, Sampling(max_new_tokens=HORIZON), rng)
    first = whole.tokens[:, 2].tolist()
    forks = [a for a in first if a != EOS]
    rest = policy.sample([prompt(1, 2, a) for a in forks], 1, Sampling(max_new_tokens=HORIZON - 1), rng)
    continued = [(a, *rest.tokens[i][rest.action[i]].tolist()) for i, a in enumerate(forks)]
    ended = [(EOS,) for a in first if a == EOS]
    assert p_value(exact, probability, ended + continued) > 1e-3


def test_many_forks_of_one_state_follow_its_conditional_distribution(world: tuple[Policy, Exact, torch.Tensor]) -> None:
    policy, exact, probability = world
    through = torch.tensor([r[0] == 3 for r in exact.responses])
    conditional = torch.where(through, probability, torch.zeros_like(probability))
    rest = policy.sample(
        [prompt(1, 2, 3)], 3000, Sampling(max_new_tokens=HORIZON - 1), torch.Generator().manual_seed(5)
    )
    continued = [(3, *rest.tokens[i][rest.action[i]].tolist()) for i in range(len(rest))]
    assert p_value(exact, conditional, continued) > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_in_bfloat16_the_slab_holds_bfloat16_and_the_learner_agrees(architecture: str) -> None:
    """bfloat16 has 8 bits of fraction: a logit near 1 is known to 2⁻⁸, and the two paths may round apart by a few of these."""
    plain = tiny(architecture)
    policy = Policy(plain.model, plain.tokenizer, compute="bfloat16")
    slab = decode._slab_for(policy)
    assert slab.dtype == torch.bfloat16
    drawn = policy.sample(
        [prompt(*p) for p in PREFIXES], 3, Sampling(max_new_tokens=8), torch.Generator().manual_seed(0)
    )
    assert drawn.logp_mu is not None
    seen = policy.evaluate(drawn)["logp"].detach()
    assert float((seen - drawn.logp_mu).abs().max()) < 0.05


STEMS = [
    [5, 6, 7, 8, 9, 10],
    [5, 6, 7, 8, 11, 12, 13],
    [5, 6, 7, 8, 11, 12, 14],
    [5, 6, 7, 8, 9, 10, 2],
    [8, 9, 10, 11],
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_prefixes_begin_with_alike_is_read_once(architecture: str, passes_of: Passes) -> None:
    policy = tiny(architecture, **UNCAPPED.get(architecture, {}))
    if policy.engine() is decode.slow:
        pytest.skip("this architecture is decoded by the slow path")
    seen = passes_of(policy)
    u, sampling = numbers(2 * len(STEMS), 6), Sampling(max_new_tokens=6, stop_at_eos=False)
    with torch.inference_mode():
        ours = decode.fast(policy, STEMS, 2, u, sampling)
        assert seen[0] == (2, 11)  # 4 + 2 + 1 + 3 + 1 states and a line of 4, for 31 tokens
        assert_same(ours, decode.slow(policy, STEMS, 2, u, sampling))


def test_a_window_of_another_kind_is_left_to_the_slow_path() -> None:
    """The few tokens that `objection` tries would not fill it."""
    policy = tiny("llama")
    assert not decode.objection(policy)
    policy.model.config.keep_window_size = 12
    assert decode.objection(policy) == "it looks back through a window of its own kind"
