"""What a policy says of given responses, what it samples, and how it is written down."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tiny_models import ARCHITECTURES, EOS, VOCABULARY, batch, prompt, ragged, tiny, tokenizer
from tokenmdp.functional import kl
from tokenmdp.models import policy as policy_module
from tokenmdp.models.policy import Policy, eos_ids
from tokenmdp.models.sampling import Sampling
from tokenmdp.testing.exact import Exact, expectation
from tokenmdp.types import Batch


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def policy(request: pytest.FixtureRequest) -> Policy:
    """Rotary and learned positions; and a model that alters its logits after the output layer."""
    return tiny(request.param)


@pytest.fixture
def double(policy: Policy) -> Policy:
    policy.model.double()
    return policy


def all_logits(policy: Policy, b: Batch) -> torch.Tensor:
    """Logits of the distribution each token was drawn from, by the model's own forward pass over whole rows."""
    with torch.no_grad():
        logits = policy.model(input_ids=b.tokens, use_cache=False).logits
    return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], dim=1)


def masked(x: torch.Tensor, b: Batch) -> torch.Tensor:
    return torch.where(b.action, x, torch.zeros_like(x))


def by_definition(policy: Policy, b: Batch, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    logp = torch.log_softmax(all_logits(policy, b) / temperature, -1)
    return {
        "logp": masked(logp.gather(2, b.tokens[..., None])[..., 0], b),
        "entropy": masked(-(logp.exp() * logp).sum(-1), b),
    }


# -- evaluate
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_action_only_logits_equal_all_logits(double: Policy, temperature: float) -> None:
    b = ragged()
    found = double.evaluate(b, ("logp", "entropy"), temperature)
    for name, want in by_definition(double, b, temperature).items():
        assert found[name].dtype == torch.float64
        assert torch.allclose(found[name], want, rtol=0, atol=1e-12)


def test_action_only_logits_equal_all_logits_in_float32(policy: Policy) -> None:
    b = ragged()
    assert torch.allclose(policy.evaluate(b)["logp"], by_definition(policy, b)["logp"], atol=1e-5)


def test_models_that_scale_their_logits_are_recognised() -> None:
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=8.0, eos_token_id=EOS, bos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    scaled = Policy(GraniteForCausalLM(config).double(), tokenizer(), compute="float32")
    b = ragged()
    assert torch.allclose(scaled.evaluate(b)["logp"], by_definition(scaled, b)["logp"], atol=1e-12)
    assert scaled.paths["logits"].startswith("all positions")
    plain = tiny("llama")
    plain.evaluate(b)
    assert plain.paths["logits"] == "action positions only"


def test_a_cap_that_only_grown_weights_reach_is_honoured() -> None:
    """How logits are computed is chosen once, on the first weights; training then makes logits large."""
    small = tiny("gemma2", spread=0.01, attn_logit_softcapping=None)
    b = ragged()
    small.evaluate(b)
    with torch.no_grad():
        small.model.get_output_embeddings().weight.mul_(2000)
    assert float(all_logits(small, b).abs().max()) > 10
    assert torch.allclose(small.evaluate(b)["logp"], by_definition(small, b)["logp"], atol=1e-4)


def test_padding_company_and_order_do_not_matter(double: Policy) -> None:
    # gemma2's attention takes the softmax in float32 whatever the model's type.
    atol = 1e-6 if double.name == "gemma2" else 1e-12
    b = ragged()
    logp = double.evaluate(b)["logp"]
    wide = dataclasses.replace(
        b,
        tokens=torch.nn.functional.pad(b.tokens, (0, 9), value=7),
        action=torch.nn.functional.pad(b.action, (0, 9)),
    )
    assert torch.allclose(double.evaluate(wide)["logp"][:, : logp.shape[1]], logp, rtol=0, atol=atol)
    order = [3, 0, 5, 1]
    part = b.select(order)
    assert torch.allclose(double.evaluate(part)["logp"], logp[order][:, : part.tokens.shape[1]], rtol=0, atol=atol)
    for i in range(len(b)):
        alone = double.evaluate(b.select([i]))["logp"][0]
        assert torch.allclose(alone, logp[i, : len(alone)], rtol=0, atol=atol)


def test_padding_company_and_order_hardly_matter_in_float32(policy: Policy) -> None:
    b = ragged()
    logp = policy.evaluate(b)["logp"]
    for i in range(len(b)):
        alone = policy.evaluate(b.select([i]))["logp"][0]
        assert torch.allclose(alone, logp[i, : len(alone)], rtol=1e-6, atol=3e-6)


def test_what_lies_in_the_padding_is_never_read(policy: Policy) -> None:
    b = ragged()
    other = torch.where(b.real, b.tokens, torch.full_like(b.tokens, 13))
    assert not torch.equal(other, b.tokens)
    assert torch.equal(policy.evaluate(dataclasses.replace(b, tokens=other))["logp"], policy.evaluate(b)["logp"])


def test_results_are_zero_outside_the_actions(policy: Policy) -> None:
    b = ragged()
    for value in policy.evaluate(b, ("logp", "entropy")).values():
        assert torch.equal(value != 0, b.action)


def test_an_end_that_equals_the_padding_is_an_action_like_any_other(policy: Policy) -> None:
    """pad = eos: the EOS of an ended response has a log-probability and a gradient; the padding after it has
    neither.
    """
    b = batch([([3, 4], [5, EOS]), ([3, 4], [5, 6, 7, 8])])
    logp = policy.evaluate(b)["logp"]
    assert (logp[0] != 0).tolist() == [False, False, True, True, False, False]
    logp[0, 3].backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in policy.model.parameters())


def test_positions_are_projected_a_slice_at_a_time(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    b = ragged()
    whole = policy.evaluate(b, ("logp", "entropy"))
    monkeypatch.setattr(policy_module, "_LOGIT_ROWS", 7)
    for name, value in policy.evaluate(b, ("logp", "entropy")).items():
        assert torch.allclose(value, whole[name], atol=1e-5)


def test_gradients_reach_the_weights_through_log_probabilities_only(policy: Policy) -> None:
    found = policy.evaluate(ragged(), ("logp", "entropy"))
    assert found["logp"].requires_grad
    assert not found["entropy"].requires_grad


def test_a_batch_without_actions_gives_zeros(policy: Policy) -> None:
    b = batch([([1, 2, 3], []), ([4, 5], [])])
    assert torch.equal(policy.evaluate(b)["logp"], torch.zeros(2, 3))
    assert torch.equal(policy.kl_to(policy, b), torch.zeros(2, 3))


def test_the_mass_of_next_tokens_is_that_of_each_summed(policy: Policy) -> None:
    asked = [policy.prompt(text, i) for i, text in enumerate(("1+1=", "a longer one, 12+30="))]
    first, both = policy.next_mass(asked, [[5], [5, 7]])
    for token, mass in ((5, first), (7, both - first)):
        batch = Batch.build(asked, [[token]] * 2, texts=[""] * 2, ended=[False] * 2, pad=policy.eos_ids[0])
        logp = policy.evaluate(batch)["logp"].sum(1)
        torch.testing.assert_close(mass, logp.exp().detach(), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="none empty"):
        policy.next_mass(asked, [[]])


def test_an_unknown_want_is_named(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"\['value'\]; it may hold logp, entropy, logit and log_z"):
        policy.evaluate(ragged(2), ("logp", "value"))


# -- divergence
# -------------------------------------------------------------------------------------------------------------


def test_the_divergence_from_itself_is_exactly_zero(policy: Policy) -> None:
    b = ragged()
    assert torch.equal(policy.kl_to(policy, b), torch.zeros_like(b.action, dtype=torch.float32))
    assert torch.equal(policy.twin("all").kl_to(policy, b), torch.zeros_like(b.action, dtype=torch.float32))


def test_the_divergence_is_the_sum_over_the_vocabulary(double: Policy) -> None:
    other, b = tiny(double.name, seed=1), ragged()
    other.model.double()
    p, q = (torch.log_softmax(all_logits(m, b), -1) for m in (double, other))
    want = masked((p.exp() * (p - q)).sum(-1), b)
    found = double.kl_to(other, b)
    assert torch.allclose(found, want, rtol=0, atol=1e-12)
    assert bool((found[b.action] > 0).all())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_along_responses_divergences_add_up_to_that_of_whole_responses(temperature: float) -> None:
    """The chain rule, with every response of a four-token model enumerated."""
    policy, other = tiny("llama", vocabulary=4), tiny("llama", vocabulary=4, seed=1)
    policy.model.double()
    other.model.double()
    world = Exact((1, 2), 4, 3, eos=EOS)
    with torch.no_grad():
        logp, logp_other = (m.evaluate(world.batch, temperature=temperature)["logp"] for m in (policy, other))
    along = expectation(world.probability(logp), policy.kl_to(other, world.batch, temperature).sum(1))
    assert float(along) == pytest.approx(float(world.kl(logp, logp_other)), abs=1e-12)


def test_two_vocabularies_have_no_divergence() -> None:
    with pytest.raises(ValueError, match="61 tokens and llama 59: a divergence needs one vocabulary"):
        tiny("llama").kl_to(tiny("llama", vocabulary=59), batch([([1, 2], [3, 4])]))


def test_the_divergence_has_this_policys_gradient_and_none_of_the_others(double: Policy) -> None:
    """Against the definition, by the model's own forward pass; of another measure, at a temperature."""
    other, b = tiny(double.name, seed=1), ragged(3)
    other.model.double()
    double.divergence(other, b, kl.forward_exact, temperature=0.7).sum().backward()
    found = {n: p.grad.clone() for n, p in double.model.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in other.model.parameters())
    double.model.zero_grad()
    p = torch.log_softmax(double.model(input_ids=b.tokens, use_cache=False).logits[:, :-1] / 0.7, -1)
    q = torch.log_softmax(all_logits(other, b)[:, 1:] / 0.7, -1)
    torch.where(b.action[:, 1:], (q.exp() * (q - p)).sum(-1), 0.0).sum().backward()
    for name, weight in double.model.named_parameters():
        assert weight.grad is not None, name
        assert torch.allclose(found[name], weight.grad, rtol=1e-4, atol=1e-6), name


# -- what else might have been taken
# ------------------------------------------------------------------------------------


def test_other_tokens_can_be_judged_in_the_same_states(policy: Policy) -> None:
    b = ragged()
    logp, best = torch.log_softmax(all_logits(policy, b), -1), policy.best(b)
    assert torch.equal(best, torch.where(b.action, logp.argmax(-1), 0))
    found = policy.evaluate(b, ("logp", "logit", "log_z"), of=best)
    assert torch.allclose(found["logp"], masked(logp.amax(-1), b), atol=1e-5)
    assert torch.allclose(found["logit"] - found["log_z"], found["logp"], atol=1e-5)
    same = policy.evaluate(b, of=b.tokens)["logp"]
    assert torch.equal(same, policy.evaluate(b)["logp"])


# -- sample
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_and_the_learner_agree(name: str, temperature: float) -> None:
    policy = tiny(name)
    prompts = [prompt(5, 6, 7), prompt(8), prompt(9, 10, 11, 12, 13, 14)]
    sampling = Sampling(max_new_tokens=4, temperature=temperature)
    b = policy.sample(prompts, 2, sampling, torch.Generator().manual_seed(0))
    assert b.logp_mu is not None
    assert torch.allclose(policy.evaluate(b, temperature=temperature)["logp"], b.logp_mu, atol=2e-5)


def test_samples_of_one_prompt_stand_side_by_side() -> None:
    policy = tiny("llama")
    prompts = [prompt(5, 6, 7, row=40, answer="x"), prompt(8, row=41, answer="y")]
    b = policy.sample(prompts, 3, Sampling(max_new_tokens=5), torch.Generator().manual_seed(0))
    assert b.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert [p.row for p in b.prompts] == [40] * 3 + [41] * 3
    assert b.prompts[4].columns["answer"] == "y"
    for i, p in enumerate(b.prompts):
        assert tuple(b.tokens[i, : len(p.ids)].tolist()) == p.ids
        assert not b.action[i, : len(p.ids)].any()
        response = b.tokens[i][b.action[i]].tolist()
        assert b.texts[i] == policy.response_text(p.ids, response)
        assert bool(b.ended[i]) == (response[-1] == EOS)
    assert len(set(b.texts)) > 2, "samples of one prompt are drawn independently"


def test_one_seed_one_batch() -> None:
    policy, prompts = tiny("llama"), [prompt(5, 6, 7), prompt(8)]

    def draw(seed: int) -> Batch:
        return policy.sample(prompts, 2, Sampling(max_new_tokens=6), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0).tokens, draw(0).tokens)
    assert draw(0).texts != draw(1).texts


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    policy, rng = tiny("llama"), torch.Generator()
    long = prompt(*range(1, 61), row=12)
    assert len(policy.sample([long], 1, Sampling(max_new_tokens=4), rng)) == 1
    with pytest.raises(
        ValueError, match=r"row 12 has 60 tokens; with max_new_tokens=5 that exceeds the context of llama, 64"
    ):
        policy.sample([long], 1, Sampling(max_new_tokens=5), rng)


@pytest.mark.parametrize(("prompts", "n"), [(0, 1), (1, 0)])
def test_nothing_to_sample_is_refused(prompts: int, n: int) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        tiny("llama").sample([prompt(1)] * prompts, n, Sampling(), torch.Generator())


# -- text
# -------------------------------------------------------------------------------------------------------------------


def test_text_and_tokens_are_each_others_image() -> None:
    policy = tiny("llama")
    assert policy.encode("w3 w14 w15") == [3, 14, 15]
    assert policy.decode([3, 14, EOS]) == "w3 w14"
    assert policy.prompt("w3 w4", row=2, columns={"answer": 7}) == prompt(3, 4, row=2, answer=7)


def test_messages_go_through_the_tokenizers_own_template() -> None:
    policy = tiny("llama")
    policy.tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
    )
    found = policy.prompt([{"role": "user", "content": "w5 w6"}])
    assert found.ids == (1, 5, 6, 2)
    assert found.text == "w1 w5 w6 w2"


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ValueError, match="row 3 holds chat messages, but the tokenizer of llama has no chat template"):
        tiny("llama").prompt([{"role": "user", "content": "hello"}], row=3)


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    policy = tiny("llama")
    assert len(policy.prompt(" ".join(["w5"] * 63)).ids) == 63
    with pytest.raises(ValueError, match="row 9 has 64 tokens, the context of llama is 64"):
        policy.prompt(" ".join(["w5"] * 64), row=9)


def test_an_empty_prompt_starts_with_the_beginning_of_the_text_or_is_refused() -> None:
    policy = tiny("llama")
    with pytest.raises(ValueError, match="no tokens"):
        policy.prompt("")
    policy.tokenizer.bos_token = "w9"
    assert policy.prompt("").ids == (9,)


# -- the end of a response
# --------------------------------------------------------------------------------------------------


def test_every_token_that_may_end_a_response_is_known() -> None:
    policy = tiny("llama")
    policy.model.generation_config.eos_token_id = [7, 0]
    policy.model.config.eos_token_id = 9
    assert eos_ids(policy.model, policy.tokenizer) == (0, 7, 9)


def test_a_model_without_an_end_is_refused() -> None:
    plain = tokenizer()
    plain.eos_token = None
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None, **shape))
    with pytest.raises(ValueError, match="no end-of-text token, so no response could ever end"):
        Policy(model, plain)


# -- on disk
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "top-1", "lora-4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_saved_is_what_other_tools_load(name: str, train: str, tmp_path: Path) -> None:
    twin, b = tiny(name).twin(train), ragged()
    with torch.no_grad():
        for _, weight in twin.trained():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    twin.save(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    assert not list(tmp_path.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = Policy(model, AutoTokenizer.from_pretrained(tmp_path), compute="float32")
    assert torch.allclose(loaded.evaluate(b)["logp"], twin.evaluate(b)["logp"], atol=1e-5)
    assert loaded.encode("w3 w4") == [3, 4]
    assert loaded.eos_ids == twin.eos_ids
    if train != "lora-4":
        assert loaded.fingerprint() == twin.fingerprint()
    kind = twin.backbone.peft
    assert (kind is not None) == (train == "lora-4"), "saving must leave the adapters training"


def test_a_prompt_begins_as_the_tokenizer_begins_texts() -> None:
    """Llama and Gemma write a beginning-of-text token before every text; a prompt without it is a state they never saw."""
    policy = tiny("llama")
    assert policy.opening == ()
    begun = tiny("llama")
    begun.tokenizer.bos_token = "w9"
    begun.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w9 $A", special_tokens=[("w9", 9)])
    assert begun.opening == (9,)
    assert begun.prompt("w1 w2").ids == (9, 1, 2)
    assert begun.prompt("w9 w1").ids == (9, 1), "a text that begins with it gets no second one"
    assert begun.prompt("w1 w2").text == "w1 w2"


def test_a_special_token_that_is_no_end_is_read_by_rewards() -> None:
    """Some models think between special tokens; a verifier that never sees them would read the thinking."""
    policy = tiny("llama")
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    assert policy.decode([5, 7, 6, EOS]) == "w5 w7 w6"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tiny("llama").prompt("w1 \ud800")


def test_long_rope_keeps_rows_below_the_length_where_their_neighbours_would_change_them() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=EOS, rope_parameters={**rope, "original_max_position_embeddings": 16},
    )  # fmt: skip
    policy = Policy(LlamaForCausalLM(config).float(), tokenizer(), compute="float32")
    assert policy.context == 16
    with pytest.raises(ValueError, match="exceeds the context"):
        policy.sample([prompt(*range(1, 13))], 1, Sampling(max_new_tokens=8), torch.Generator())


def test_a_model_that_says_nan_is_named() -> None:
    policy = tiny("llama")
    with torch.no_grad():
        next(policy.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="gives NaN for every text: its weights are damaged or diverged"):
        policy.evaluate(ragged())
