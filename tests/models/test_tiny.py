"""The tiny test model and its tokenizers."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tokenmdp.models.tiny import tiny

REVIEWS = ["the film was good and the story was good", "the film was bad, and I don't like it"] * 20


def test_size_and_shape() -> None:
    policy = tiny()
    count = sum(p.numel() for p in policy.model.parameters())
    assert count == 77_312
    config = policy.model.config
    assert (config.hidden_size, config.num_hidden_layers) == (64, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2), (
        "grouped heads are part of what is tested"
    )
    assert policy.eos_ids == (policy.tokenizer.eos_token_id,)


def test_weights_depend_on_the_seed_alone_and_leave_torch_as_it_was() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny(seed=3).fingerprint()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert tiny(seed=3).fingerprint() == first
    assert tiny(seed=4).fingerprint() != first


def test_a_token_is_a_character() -> None:
    policy = tiny()
    printable = string.ascii_letters + string.digits + string.punctuation + " \n"
    ids = policy.encode(printable)
    assert len(ids) == len(set(ids)) == len(printable) == 96
    assert len(policy.tokenizer) == 96 + 3
    assert policy.decode(ids) == printable
    assert policy.decode(policy.encode("  two  spaces\n\nand lines ")) == "  two  spaces\n\nand lines "


def test_other_characters_are_unknown_and_special_tokens_are_not_text() -> None:
    policy = tiny()
    assert policy.encode("é\t") == [policy.tokenizer.unk_token_id] * 2
    assert policy.encode("a<eos>b")[1] == policy.tokenizer.eos_token_id
    assert policy.decode(policy.encode("a<eos>b")) == "ab"


def test_words_are_learnt_and_any_text_comes_back() -> None:
    policy = tiny(REVIEWS, vocabulary=320)
    assert len(policy.encode(" good")) == 1
    assert len(policy.encode(" film")) == 1
    for text in ["the film was good", "  a\tb\n", "naïve 日本 🙂 12%", "xyzzy"]:
        assert policy.decode(policy.encode(text)) == text
    assert len(policy.tokenizer) <= 320


def test_learnt_words_are_the_same_every_time() -> None:
    first, second = tiny(REVIEWS, 300), tiny(REVIEWS, 300)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("texts", [None, REVIEWS])
def test_the_tokenizer_survives_a_folder(tmp_path: Path, texts: list[str] | None) -> None:
    policy = tiny(texts, 300)
    policy.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " the film\n12 + 3 = <eos> don't ~"
    assert again(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
    assert again.decode(policy.encode(text)) == policy.tokenizer.decode(policy.encode(text))
    assert (again.eos_token, again.bos_token, again.pad_token) == ("<eos>", "<bos>", "<eos>")


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="the 2 texts to learn words from are empty"):
        tiny(["", "  "])
    with pytest.raises(ValueError, match="vocabulary is 100; 256 bytes and 2 special tokens need 258"):
        tiny(REVIEWS, vocabulary=100)
