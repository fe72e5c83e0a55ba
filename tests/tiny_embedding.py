"""Small runs of reward models on frozen embeddings, and an encoder of random numbers with a few dozen words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BertConfig, BertModel

from tiny_models import tokenizer
from tiny_recipes import policy, preferences
from tokenmdp.models.embedding import Encoder, OwnBody
from tokenmdp.recipes import embedding_reward


def encoder(seed: int = 0, **settings: Any) -> Encoder:
    """A BERT of two layers whose words are those of the tiny models."""
    words = tokenizer(61)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
    return Encoder(model, words, "bert", **{"max_tokens": 24, **settings})


def build_embedding_reward(**changes: Any) -> tuple[embedding_reward.Config, Sequence[Any]]:
    cfg = embedding_reward.Config(**{"cache": "none", "micro_tokens": 60, **changes})
    return cfg, (OwnBody(policy().freeze()), preferences(60), preferences(20, seed=7))


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {"embedding_reward": build_embedding_reward}
