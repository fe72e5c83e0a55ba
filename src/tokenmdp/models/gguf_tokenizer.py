"""The tokenizer inside a GGUF file, rebuilt as a fast tokenizer.

A GGUF file carries the vocabulary and only the *name* of the rule that cuts text into pieces before merging. The rules
are written out here; a name that is not here is an error, because a neighbouring rule gives almost the same tokens and
silently another model.

Two vocabularies exist: byte-level BPE with a list of merges (`gpt2`), and SentencePiece BPE with a score a token
(`llama`), whose merges are recovered from the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_CONTROL, _USER_DEFINED = (
    3,
    4,
)  # token types of the GGUF format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)

# The patterns of the models' own tokenizer.json files. They differ in contractions (Llama 3: any case) and digits (1 or
# up to 3).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2}
_GPT2 = ("gpt-2", "gpt2")
PRE_TOKENIZERS = (*_GPT2, "smollm", *_SPLITS)


def build_tokenizer(metadata: Mapping[str, Any], context: int) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer a GGUF file's metadata describes, with its special tokens and chat template.

    Args:
        metadata: the file's fields, by name.
        context: the most positions the model takes.

    Raises:
        ValueError: a vocabulary type or a pre-tokenizer that is not known here, named with those that are.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata)
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata)
    else:
        raise ValueError(
            f"the file's vocabulary is of type {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece BPE) are known"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    _mark_added(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", ()), byte_level=kind == "gpt2")
    special = {
        f"{role}_token": tokens[metadata[key]]
        for role, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in metadata
    }
    # llama.cpp starts a SentencePiece vocabulary with BOS unless the file says no, a byte-level one only if it says so.
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
        )
    build: Callable[..., transformers.PreTrainedTokenizerFast] = (
        transformers.PreTrainedTokenizerFast
    )  # its constructor carries no types
    wrapped = build(tokenizer_object=tokenizer, model_max_length=context, clean_up_tokenization_spaces=False, **special)
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE: bytes are spelled as printable characters, the named rule cuts, merges apply in file order."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges: list[str] = metadata["tokenizer.ggml.merges"]
    rule = metadata.get("tokenizer.ggml.pre")
    if rule not in PRE_TOKENIZERS:
        raise ValueError(
            f"the file's pre-tokenizer is {rule!r}; known are {', '.join(PRE_TOKENIZERS)}. Another rule would cut "
            "text differently from what the model was trained on: use the model's Hugging Face directory instead"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    whole_words = rule == "llama-bpe"  # Llama 3 takes a piece that is a token as it is, before any merge
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, ignore_merges=whole_words)
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    if _SPLITS.get(rule) == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(rule: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in _GPT2:
        return gpt2
    if rule == "smollm":
        # Every digit alone first: without it "x²" and other mixtures of digits and signs merge across the digit.
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentence_piece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE as Llama 2 publishes it: a space is ▁, unknown characters fall back to their bytes."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = _merges_of(tokens, metadata["tokenizer.ggml.scores"])
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_of(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Merges that build what SentencePiece builds by joining, at each step, the neighbours whose union scores highest.

    Every way to cut a token into two tokens is a merge of that token's score. Llama's scores are all different, so ties
    are only between cuts of one token; there the lower ids come first.
    """
    rank = {token: i for i, token in enumerate(tokens)}
    cuts = [
        (-score, rank[token[:at]], rank[token[at:]])
        for token, score in zip(tokens, scores, strict=True)
        for at in range(1, len(token))
        if token[:at] in rank and token[at:] in rank
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(cuts)]


def _mark_added(tokenizer: Tokenizer, tokens: list[str], types: Any, byte_level: bool) -> None:
    """Control tokens become special; user-defined ones are matched whole in text but stay visible when decoded."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for token, kind in zip(tokens, types, strict=False):
        if kind == _CONTROL and (not byte_level or set(token) <= alphabet):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
