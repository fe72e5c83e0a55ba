"""The tokenizer of a GGUF file against byte-pair encoding written out in plain Python from its description."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterable
from itertools import pairwise

import gguf
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenmdp.models import catalog, fetch
from tokenmdp.models.gguf_tokenizer import build_tokenizer

Encode = Callable[[str], list[int]]

# GPT-2's pattern, as published with its encoder (Radford et al. 2019, encoder.py).
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "In 2007, 12 of the 345 films cost $1,000,000 -- about 20% (or 7/8) more. Don't they'll say: it's x² + y³ = 4½!",
    "Ｆｕｌｌ ｗｉｄｔｈ １２３ and Arabic ٣٤٥, Roman Ⅳ, circled ①②, superscripts ¹²³ and a fraction ⅞.",
    "  two spaces,   three, a tab\tand\n\n\nthree newlines\r\nand one more \n end  ",
    "naïve façade Ångström déjà vu, 日本語のテキスト, 한국어, Россия, مرحبا بالعالم, שלום, हिन्दी, ไทย",
    "emoji 🙂👍🏽🇺🇸 and ❤️, e\u0301 combining, zero\u200bwidth, nbsp\u00a0here, \u2028 line, \ufeff mark",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>",
    "def f(x1, x22):\n    return x1 ** 2  # 10e-3\n<br /><br />&amp; 'quoted' \"double\" `code`",
    "a1b2c3 1a2b3c 007 1 2 3 12:34:56 2024-01-31 +1 (555) 010-9999 v1.2.3",
    "",
    " ",
    "\n",
    "9",
]


def byte_letters() -> dict[int, str]:
    """GPT-2's spelling of bytes as printable characters: printable Latin-1 is itself, the rest count up from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def reference(
    vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], special: list[str], digits: bool
) -> Encode:
    """Encoding as SmolLM2's tokenizer.json says: added tokens, each numeral alone, GPT-2's pieces, merges by rank.

    A byte that is no token is dropped, as the published file has no unknown token.
    """
    letters = byte_letters()
    rank = {pair: i for i, pair in enumerate(merges)}
    added = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")

    def numerals_apart(text: str) -> list[str]:
        parts, run = [], ""
        for c in text:
            if digits and unicodedata.category(c).startswith("N"):
                parts += [run, c] if run else [c]
                run = ""
            else:
                run += c
        return [*parts, run] if run else parts

    def merged(piece: str) -> list[int]:
        symbols = [letters[b] for b in piece.encode() if letters[b] in vocabulary]
        while True:
            ranked = [(rank[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in rank]
            if not ranked:
                return [vocabulary[s] for s in symbols]
            _, i = min(ranked)  # the earliest merge, and of equals the leftmost
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for part in added.split(text):
            if part in special:
                ids.append(vocabulary[part])
                continue
            for stretch in numerals_apart(part):
                for piece in GPT2.findall(stretch):
                    ids += merged(piece)
        return ids

    return encode


def metadata_of(vocabulary: dict[str, int], merges: list[tuple[str, str]], rule: str) -> dict[str, object]:
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="module")
def learnt() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with a trap: merges that join digits ("20", " 1"), which the single-digit rule never uses."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def both(learnt: tuple[dict[str, int], list[tuple[str, str]]]) -> tuple[Encode, PreTrainedTokenizerFast]:
    """The reference and ours on the learnt vocabulary."""
    vocabulary, merges = learnt
    ours = build_tokenizer(metadata_of(vocabulary, merges, "smollm"), 128)
    return reference(vocabulary, merges, SPECIAL, digits=True), ours


@pytest.mark.parametrize("rule", ["smollm", "gpt-2"])
def test_equal_to_the_reference_on_the_corpus(learnt: tuple[dict[str, int], list[tuple[str, str]]], rule: str) -> None:
    vocabulary, merges = learnt
    ours = build_tokenizer(metadata_of(vocabulary, merges, rule), 128)
    want = reference(vocabulary, merges, SPECIAL, digits=rule == "smollm")
    for text in CORPUS:
        assert ours(text)["input_ids"] == want(text)
        assert ours.decode(want(text), skip_special_tokens=False) == text


def test_the_trap_is_one(learnt: tuple[dict[str, int], list[tuple[str, str]]]) -> None:
    vocabulary, merges = learnt
    with_digits, without = (build_tokenizer(metadata_of(vocabulary, merges, rule), 128) for rule in ("smollm", "gpt-2"))
    differ = [text for text in CORPUS if with_digits(text)["input_ids"] != without(text)["input_ids"]]
    assert len(differ) >= 4, "without the single-digit split these texts would be other tokens"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_equal_to_the_reference_on_any_text(both: tuple[Encode, PreTrainedTokenizerFast], text: str) -> None:
    want, ours = both
    # Three implementations of Unicode meet here: only characters of the oldest tables are sure to be alike to all.
    known = "".join(c for c in text if unicodedata.ucd_3_2_0.category(c) != "Cn")
    ids = ours(known)["input_ids"]
    assert ids == want(known)
    assert ours.decode(ids, skip_special_tokens=False) == known


def test_qwen2_and_llama3_rules_by_hand() -> None:
    letters = byte_letters()
    alphabet = {letter: 3 + i for i, letter in enumerate(letters.values())}
    vocabulary = {t: i for i, t in enumerate(SPECIAL)} | alphabet
    space = letters[0x20]
    merges = [("1", "2"), ("12", "3"), ("123", "4"), (space, "a"), ("'", "S"), ("C", "A"), ("!", letters[0x0A])]
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(merges)}

    def pieces(rule: str, text: str) -> list[str]:
        tokenizer = build_tokenizer(metadata_of(vocabulary, merges, rule), 128)
        return [t.replace(space, "_").replace(letters[0x0A], "/") for t in tokenizer.tokenize(text)]

    # Digits: one by one, up to three, or as many as come. Only GPT-2 keeps sign and newline apart; only it minds case.
    assert pieces("qwen2", "1234 a!\n") == ["1", "2", "3", "4", "_a", "!/"]
    assert pieces("llama-bpe", "1234 a!\n") == ["123", "4", "_a", "!/"]
    assert pieces("gpt-2", "1234 a!\n") == ["1234", "_a", "!", "/"]
    assert pieces("smollm", "1234 a!\n") == ["1", "2", "3", "4", "_a", "!", "/"]
    assert pieces("qwen2", "A'S") == ["A", "'S"]
    assert pieces("gpt-2", "A'S") == ["A", "'", "S"]
    # Qwen2 composes what can be composed: e + acute accent becomes é, two bytes.
    tokenizer = build_tokenizer(metadata_of(vocabulary, merges, "qwen2"), 128)
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]


def test_user_defined_tokens_are_whole_but_stay_in_the_text() -> None:
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, "<think>", *byte_letters().values()])}
    metadata = metadata_of(vocabulary, [], "gpt-2")
    metadata["tokenizer.ggml.token_type"] = [3, 3, 3, 4, *[1] * 256]
    tokenizer = build_tokenizer(metadata, 128)
    ids = tokenizer("<think>a<|im_end|>")["input_ids"]
    assert ids == [3, vocabulary["a"], 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"


def test_beginning_of_text_is_added_where_the_file_says_so() -> None:
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *byte_letters().values()])}
    metadata = metadata_of(vocabulary, [], "gpt-2")
    plain = build_tokenizer(metadata, 128)("a")["input_ids"]
    assert plain == [vocabulary["a"]]
    begun = build_tokenizer({**metadata, "tokenizer.ggml.add_bos_token": True}, 128)
    assert begun("a")["input_ids"] == [1, *plain]
    assert begun("a", add_special_tokens=False)["input_ids"] == plain


def test_what_is_not_known_is_an_error_that_names_it() -> None:
    metadata = metadata_of({t: i for i, t in enumerate([*SPECIAL, *byte_letters().values()])}, [], "tekken")
    with pytest.raises(ValueError, match=r"pre-tokenizer is 'tekken'; known are gpt-2, gpt2, smollm, llama-bpe, qwen2"):
        build_tokenizer(metadata, 128)
    with pytest.raises(ValueError, match=r"type 'bert'; gpt2 \(byte-level BPE\)"):
        build_tokenizer({**metadata, "tokenizer.ggml.model": "bert"}, 128)


# -- SentencePiece ---------------------------------------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *"▁abcdehlnorstw.", "▁t", "he", "▁the", "er"]
PIECES += [
    "▁w",
    "or",
    "ld",
    "▁wor",
    "▁world",
    "the",
    "hel",
    "lo",
    "▁hel",
    "▁hello",
    "ll",
    "ell",
    "st",
    "est",
    "es",
    "▁▁",
]
SCORES = [0.0] * 259 + [-1000.0 - i for i in range(15)] + [-float(i) for i in range(1, len(PIECES) - 273)]


def sentence_piece() -> PreTrainedTokenizerFast:
    return build_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": PIECES,
            "tokenizer.ggml.scores": SCORES,
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
        128,
    )


def best_neighbours_first(text: str) -> list[int]:
    """SentencePiece's own procedure: join, again and again, the neighbours whose union has the highest score."""
    score = dict(zip(PIECES, SCORES, strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not unions:
            break
        _, i = min(unions)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids: list[int] = []
    for s in symbols:
        ids += [PIECES.index(s)] if s in score else [3 + b for b in s.encode()]
    return ids


@pytest.mark.parametrize(
    "text", ["the world", "hello the best", "  hello", "there", "Zoë 12 é", "rest. wholest helllo", "🙂", "a  b   c"]
)
def test_sentence_piece_equals_its_procedure_and_decodes_back(text: str) -> None:
    tokenizer = sentence_piece()
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == best_neighbours_first(text)
    assert tokenizer(text)["input_ids"] == [1, *best_neighbours_first(text)]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


# -- the embedded model's own vocabulary -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> tuple[PreTrainedTokenizerFast, Encode]:
    if not fetch.is_cached(catalog.SMOLLM2) and not os.environ.get("TOKENMDP_TEST_EMBEDDED"):
        pytest.skip("the embedded model is not in the cache; set TOKENMDP_TEST_EMBEDDED=1 to fetch it (98 MB)")
    _, tokenizer = catalog.load_model("smollm2-135m-instruct")
    fields = gguf.GGUFReader(fetch.fetch(*catalog.SMOLLM2)).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return tokenizer, reference({t: i for i, t in enumerate(tokens)}, pairs, special, digits=True)


def test_embedded_tokenizer_equals_the_reference(
    embedded: tuple[PreTrainedTokenizerFast, Encode],
) -> None:
    tokenizer, want = embedded
    numbers = [f"{a}{sign}{b} = {a * b}" for a in (0, 7, 12, 99, 1234) for b in (3, 50, 777) for sign in "+-*/ .,:²"]
    for text in [*CORPUS, *numbers]:
        ids = tokenizer(text)["input_ids"]
        assert ids == want(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_embedded_tokens_by_hand(embedded: tuple[PreTrainedTokenizerFast, Encode]) -> None:
    tokenizer, _ = embedded
    # After 17 control tokens the printable ASCII characters follow in order: '!' is 17, so '0' is 17 + 48 - 33 = 32.
    assert tokenizer("12+30")["input_ids"] == [33, 34, 27, 35, 32]
    assert tokenizer("<|im_start|>7<|im_end|>")["input_ids"] == [1, 39, 2]
    # A space before a digit is a token of its own, because the digit is cut off first.
    assert tokenizer.tokenize("a 1") == ["a", "Ġ", "1"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_embedded_vocabulary_lacks_six_control_characters(
    embedded: tuple[PreTrainedTokenizerFast, Encode],
) -> None:
    """The published vocabulary has no token for them, and drops them; every other text comes back."""
    tokenizer, want = embedded
    lost = [c for c in map(chr, range(0x250)) if tokenizer.decode(tokenizer(c)["input_ids"]) != c]
    assert lost == ["\x04", "\x06", "\x13", "\x14", "\x16", "\x1d"]
    assert want("\x04") == []
