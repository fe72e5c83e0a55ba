"""Which weights train, which are shared, and that a twin starts equal and never touches its original."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from tiny_models import ARCHITECTURES, VOCABULARY, ragged, tiny
from tokenmdp.learner import Learner
from tokenmdp.models import backbone as backbone_module
from tokenmdp.models.backbone import Backbone, blocks, compute_dtype
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.types import Batch

SPECS = ["all", "top-1", "lora-4"]


@pytest.fixture(params=["llama", "gpt2", "neox"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return tiny(request.param)


def improve(policy: Policy, batch: Batch, steps: int = 2) -> None:
    """A few steps of imitation at a rate that changes every weight visibly."""
    learner = Learner(policy, 1e-2)
    for _ in range(steps):
        learner.step(lambda part: (-policy.evaluate(part)["logp"], {}), batch, batch.action.float())


def storages(backbone: Backbone) -> dict[str, int]:
    return {name.replace(".base_layer", ""): p.data_ptr() for name, p in backbone.model.named_parameters()}


@pytest.mark.parametrize("train", SPECS)
def test_a_twin_starts_bit_equal(policy: Policy, train: str) -> None:
    b = ragged()
    assert torch.equal(policy.twin(train).evaluate(b)["logp"], policy.evaluate(b)["logp"])


@pytest.mark.parametrize("train", SPECS)
def test_training_a_twin_never_changes_the_original(policy: Policy, train: str) -> None:
    b = ragged()
    before, print_before = policy.evaluate(b)["logp"], policy.fingerprint()
    twin = policy.twin(train)
    improve(twin, b)
    assert not torch.equal(twin.evaluate(b)["logp"], before)
    assert torch.equal(policy.evaluate(b)["logp"], before)
    assert policy.fingerprint() == print_before != twin.fingerprint()


def test_all_shares_nothing_and_trains_everything(policy: Policy) -> None:
    twin = policy.twin("all")
    assert not set(storages(twin.backbone).values()) & set(storages(policy.backbone).values())
    assert all(p.requires_grad for p in twin.model.parameters())
    assert not any(p.requires_grad for p in policy.model.parameters())


def test_tied_embeddings_stay_tied_in_a_twin() -> None:
    for train in SPECS:
        twin = tiny("llama").twin(train)
        assert twin.model.get_output_embeddings().weight is twin.model.get_input_embeddings().weight


def test_top_trains_the_last_blocks_and_the_final_norm_and_shares_the_rest(policy: Policy) -> None:
    twin = policy.twin("top-1")
    last = {id(p) for p in blocks(twin.backbone.body)[-1].parameters()}
    trained = dict(twin.trained())
    assert last < {id(p) for p in trained.values()}
    outside = [name for name, p in trained.items() if id(p) not in last]
    assert outside
    assert all(name.rsplit(".", 2)[-2] in ("norm", "ln_f", "final_layer_norm") for name in outside)
    theirs, ours = storages(policy.backbone), storages(twin.backbone)
    assert {name for name in ours if ours[name] != theirs[name]} == set(trained)


def test_adapters_share_every_weight_of_the_original(policy: Policy) -> None:
    twin = policy.twin("lora-4")
    theirs, ours = storages(policy.backbone), storages(twin.backbone)
    assert {name: ours[name] for name in theirs} == theirs
    assert set(ours) - set(theirs) == set(dict(twin.trained()))
    assert all("lora_" in name and p.shape[0 if "lora_A" in name else 1] == 4 for name, p in twin.trained())


@pytest.mark.parametrize("train", ["head", "none"])
def test_a_twin_without_training_body_shares_all_of_it(policy: Policy, train: str) -> None:
    twin = policy.twin(train)
    assert list(twin.trained()) == []
    assert storages(twin.backbone) == storages(policy.backbone)


def test_making_adapters_leaves_torchs_own_random_stream_alone(policy: Policy) -> None:
    before = torch.get_rng_state()
    a, b = policy.twin("lora-2"), policy.twin("lora-2")
    assert torch.equal(torch.get_rng_state(), before)
    for (_, x), (_, y) in zip(a.trained(), b.trained(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("train", ["none", *SPECS])
def test_a_twin_of_trained_adapters_starts_from_them(policy: Policy, train: str, tmp_path: Path) -> None:
    b = ragged()
    first = policy.twin("lora-2")
    improve(first, b)
    want = first.evaluate(b)["logp"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns when adapters are laid upon adapters
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        second = first.twin(train)
    assert torch.allclose(second.evaluate(b)["logp"], want, atol=1e-5)
    assert torch.equal(second.evaluate(b)["logp"], first.evaluate(b)["logp"])
    assert torch.allclose(policy.evaluate(b)["logp"], tiny(policy.name).evaluate(b)["logp"]), "the first of all changed"


@pytest.mark.parametrize("train", ["none", "all", "top-1", "lora-2"])
def test_what_is_written_has_no_adapters(policy: Policy, train: str) -> None:
    b = ragged()
    first = policy.twin("lora-2")
    improve(first, b)
    twin = first.twin(train)
    plain = twin.backbone.merged()
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in tiny(policy.name).model.named_parameters()]
    loaded = Policy(plain, policy.tokenizer, compute="float32")
    assert torch.allclose(loaded.evaluate(b)["logp"], twin.evaluate(b)["logp"], atol=1e-5)


@pytest.mark.parametrize("train", ["", "top", "top-0", "lora-0", "top-x", "everything", "lora-4 "])
def test_an_unknown_spec_is_named(train: str) -> None:
    with pytest.raises(ValueError, match="it must be all, top-N"):
        tiny("llama").twin(train)


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'top-9', but the model has 2 blocks"):
        tiny("llama").twin("top-9")


def test_a_body_without_blocks_says_so() -> None:
    with pytest.raises(ValueError, match="no list of blocks"):
        blocks(nn.Linear(2, 2))


def test_the_fingerprint_sees_one_bit_and_nothing_else(policy: Policy) -> None:
    first = policy.fingerprint()
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert tiny(policy.name).fingerprint() == first
    assert tiny(policy.name, seed=1).fingerprint() != first
    weight = next(policy.model.parameters())
    with torch.no_grad():
        weight.view(torch.int32)[(0,) * weight.dim()] ^= 1
    assert policy.fingerprint() != first


def test_compute_types_are_named_or_refused() -> None:
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) == torch.float32
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    assert compute_dtype("auto", cpu, parameters=77_000) == torch.float32  # on any machine
    assert compute_dtype("bfloat16", cpu, parameters=77_000) == torch.bfloat16
    with pytest.raises(ValueError, match="compute is 'float16'"):
        compute_dtype("float16", cpu)


# -- bfloat16: what the weights are while a pass runs
# ---------------------------------------------------------------------------------------------------------------


def in_bfloat16(policy: Policy) -> Policy:
    return Policy(policy.model, policy.tokenizer, name=policy.name, compute="bfloat16")


def test_weights_converted_once_give_the_numbers_of_autocast(policy: Policy) -> None:
    low, tokens = in_bfloat16(policy), ragged().tokens
    with torch.inference_mode(), low.backbone.autocast():
        plain = low.model(input_ids=tokens, use_cache=False).logits
        with torch.no_grad(), low.backbone.converted():
            once = low.model(input_ids=tokens, use_cache=False).logits
    assert once.dtype == torch.bfloat16
    assert torch.equal(once, plain)


def test_converted_weights_go_back_whatever_happens(policy: Policy) -> None:
    low = in_bfloat16(policy)
    before = {name: id(p) for name, p in low.model.named_parameters()}
    seen = set()

    def interrupted() -> None:
        with torch.no_grad(), low.backbone.converted():
            seen.add(low.model.get_output_embeddings().weight.dtype)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == {torch.bfloat16}
    assert {name: id(p) for name, p in low.model.named_parameters()} == before
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_weights_that_train_keep_their_gradient_in_bfloat16(policy: Policy) -> None:
    low = in_bfloat16(policy).twin("top-1")
    b = ragged()
    low.evaluate(b)["logp"].sum().backward()
    trained = [p for p in low.model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
    assert any(bool(p.grad.any()) for p in trained if p.grad is not None)


def test_float32_leaves_every_weight_alone(policy: Policy) -> None:
    before = {name: id(p) for name, p in policy.model.named_parameters()}
    with policy.backbone.converted():
        assert {name: id(p) for name, p in policy.model.named_parameters()} == before


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_packed_weights_give_the_numbers_of_plain_ones(
    policy: Policy, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a large model does in inference mode, done to a small one."""
    monkeypatch.setattr(backbone_module, "SMALL", 0)
    made = Policy(policy.model, policy.tokenizer, name=policy.name, compute=compute)
    if not backbone_module._can_pack(made.backbone.compute, made.device):
        pytest.skip(f"this machine does not pack {compute} weights")
    tokens, linear = ragged().tokens, [m for m in made.model.modules() if type(m) is torch.nn.Linear]
    with torch.inference_mode(), made.backbone.autocast():
        plain = made.model(input_ids=tokens, use_cache=False).logits.float()
        with made.backbone.converted(passes=1):
            assert not any("forward" in vars(layer) for layer in linear)
        with made.backbone.converted(passes=64):
            assert all("forward" in vars(layer) for layer in linear)
            packed = made.model(input_ids=tokens, use_cache=False).logits.float()
        assert not any("forward" in vars(layer) for layer in linear)
    assert torch.allclose(packed, plain, atol=1e-5 if compute == "float32" else 0.02 * float(plain.abs().max()))
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    made.backbone.twin("all")  # a copy after it can still be made and trained
    made.twin("top-1").evaluate(ragged())["logp"].sum().backward()


# -- frozen first blocks are read once
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(ARCHITECTURES))
def learner_and_start(request: pytest.FixtureRequest) -> tuple[Policy, Policy]:
    """A policy that trains its top block, moved away from its start; both share the first block."""
    start = tiny(request.param)
    policy = start.twin("top-1")
    improve(policy, ragged(seed=3), steps=1)
    return policy, start


def runs_of_the_first_block(policy: Policy, work: Callable[[], object]) -> int:
    ran: list[None] = []
    handle = blocks(policy.backbone.body)[0].register_forward_hook(lambda *_: ran.append(None))
    work()
    handle.remove()
    return len(ran)


def test_what_was_read_changes_no_result_and_is_not_read_again(learner_and_start: tuple[Policy, Policy]) -> None:
    policy, start = learner_and_start
    b = ragged()
    known = policy.read(b)
    assert known.read is not None
    for model in (policy, start):
        want, found = (model.evaluate(x, ("logp", "entropy")) for x in (b, known))
        for name in want:
            assert torch.equal(found[name], want[name])
        assert runs_of_the_first_block(model, lambda model=model: model.evaluate(b)) == 1
        assert runs_of_the_first_block(model, lambda model=model: model.evaluate(known)) == 0
    rows = torch.tensor([4, 1])
    assert torch.allclose(
        policy.evaluate(known.select(rows))["logp"], policy.evaluate(b.select(rows))["logp"], rtol=0, atol=1e-5
    )


def test_gradients_are_those_of_a_full_pass(learner_and_start: tuple[Policy, Policy]) -> None:
    policy, _ = learner_and_start
    b = ragged()
    found = []
    for batch_ in (b, policy.read(b)):
        policy.evaluate(batch_)["logp"].sum().backward()
        found.append([p.grad for _, p in policy.trained()])
        policy.model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, c) for a, c in zip(*found, strict=True) if a is not None and c is not None)
    assert any(bool(g.any()) for g in found[1] if g is not None)


def test_another_models_reading_is_not_used() -> None:
    b = ragged()
    policy, stranger = tiny("llama").twin("top-1"), tiny("llama", seed=5)
    known = policy.read(b)
    assert torch.equal(stranger.evaluate(known)["logp"], stranger.evaluate(b)["logp"])
    assert not torch.equal(stranger.evaluate(known)["logp"], policy.evaluate(b)["logp"])


@pytest.mark.parametrize("train", ["all", "lora-4", "top-2"])
def test_where_every_block_trains_nothing_is_read(train: str) -> None:
    b = ragged()
    assert tiny("llama").twin(train).read(b) is b


def test_rewards_and_critics_on_the_same_body_use_it() -> None:
    start, b = tiny("llama"), ragged()
    policy, reward = start.twin("top-1"), RewardModel.from_policy(start, "top-1", pool="mean")
    with torch.no_grad():
        reward.head.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    critic = reward.critic("head")
    known = policy.read(b)
    assert torch.equal(reward(known).value, reward(b).value)
    assert torch.equal(critic.states(known), critic.states(b))


@torch.no_grad()
def test_a_reading_is_of_these_tokens_and_of_these_weights() -> None:
    """Weights changed in place, other tokens, other weights beside the blocks: each is read anew."""
    b = ragged()
    for change in ("weights", "loaded", "tokens", "positions"):
        start = tiny("gpt2")
        policy = start.twin("top-1")
        known = policy.read(b)
        if change == "weights":
            next(blocks(policy.backbone.body)[0].parameters()).add_(1.0)
        elif change == "loaded":
            policy.model.load_state_dict(tiny("gpt2", seed=9).model.state_dict())
        elif change == "tokens":
            known = replace(known, tokens=(b.tokens + 1) % VOCABULARY)
        else:
            policy.backbone.body.wpe.weight = torch.nn.Parameter(
                policy.backbone.body.wpe.weight + 1.0, requires_grad=False
            )
        fresh = replace(known, read=None)
        assert torch.equal(policy.evaluate(known)["logp"], policy.evaluate(fresh)["logp"]), change


def test_in_bfloat16_the_reading_is_shared_too() -> None:
    start = in_bfloat16(tiny("llama"))
    policy, b = start.twin("top-1"), ragged()
    known = policy.read(b)
    for model in (policy, start):
        assert torch.equal(model.evaluate(known)["logp"], model.evaluate(b)["logp"])
        assert runs_of_the_first_block(model, lambda model=model: in_parts(model.evaluate, known)) == 0


def test_the_norm_after_the_blocks_trains_with_them_and_that_of_the_embeddings_does_not() -> None:
    words = {"vocab_size": VOCABULARY, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    shape = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    opt = OPTForCausalLM(OPTConfig(max_position_embeddings=64, **shape, **words))
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **words))
    for model, final, embedding in ((opt, "final_layer_norm", "embed"), (bloom, "ln_f", "word_embeddings_layernorm")):
        names = [
            n for n, _ in Policy(model.float(), tiny("llama").tokenizer, compute="float32").twin("top-1").trained()
        ]
        assert any(final in name for name in names)
        assert not any(embedding in name for name in names)
