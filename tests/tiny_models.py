"""Small models of many architectures with random weights, and word tokenizers of any size: what the tests run on.

A model here has the parts of a large one (grouped heads, learned or rotary positions, windows, capped logits) and
about 50 thousand parameters or fewer, so that every test of the decoder and the policy can be run on each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Prompt

# A second thread has nothing to do on models of this size but wait for the first.
torch.set_num_threads(1)

VOCABULARY = 61
EOS = 0

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, Callable[[dict[str, Any]], PretrainedConfig]] = {
    "llama": lambda k: LlamaConfig(**{**_GROUPED, **k}),
    "gpt2": lambda k: GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **k}),
    "qwen2": lambda k: Qwen2Config(**{**_GROUPED, **k}),
    "gemma2": lambda k: Gemma2Config(
        **{**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, **k}
    ),
    "mistral": lambda k: MistralConfig(**{**_GROUPED, "sliding_window": 5, **k}),
    "neox": lambda k: GPTNeoXConfig(**{**_SHAPE, "rotary_pct": 0.5, **k}),
    "phi": lambda k: PhiConfig(**{**_SHAPE, **k}),
}


def tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Words `w1`, `w2`, ... between spaces, token 0 being the end of the text."""
    words = {"<eos>": EOS, **{f"w{i}": i for i in range(1, vocabulary)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")


def tiny(
    name: str = "llama", vocabulary: int = VOCABULARY, seed: int = 0, spread: float = 0.3, **changes: Any
) -> Policy:
    """A policy of this architecture with random weights.

    Args:
        spread: standard deviation of the weights: large enough here for attention and logits to be far from uniform.
        changes: settings of the architecture's config.
    """
    words = {"vocab_size": vocabulary, "eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": EOS}
    config = ARCHITECTURES[name]({**words, "tie_word_embeddings": True, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0.0, spread)
    return Policy(model.float(), tokenizer(vocabulary), name=name, compute="float32")


def prompt(*ids: int, row: int = 0, **columns: Any) -> Prompt:
    """A prompt of the given tokens."""
    return Prompt(tuple(ids), " ".join(f"w{i}" for i in ids), row, columns)


def batch(rows: list[tuple[list[int], list[int]]], pad: int = EOS, **columns: list[Any]) -> Batch:
    """A batch from (prefix, response) pairs; a response that ends in EOS ended by itself."""
    return Batch.build(
        [prompt(*p, row=i, **{k: v[i] for k, v in columns.items()}) for i, (p, _) in enumerate(rows)],
        [r for _, r in rows],
        texts=[" ".join(f"w{i}" for i in r) for _, r in rows],
        ended=[bool(r) and r[-1] == EOS for _, r in rows],
        pad=pad,
    )


def ragged(count: int = 6, seed: int = 0, longest: int = 12, vocabulary: int = VOCABULARY) -> Batch:
    """Rows of many lengths with random tokens; every second response ends in EOS."""
    rng = torch.Generator().manual_seed(seed)

    def some(length: int) -> list[int]:
        return torch.randint(1, vocabulary, (length,), generator=rng).tolist()

    rows = []
    for i in range(count):
        prefix, response = (int(x) for x in torch.randint(1, longest, (2,), generator=rng))
        rows.append((some(prefix), some(response) + ([EOS] if i % 2 else [])))
    return batch(rows)
