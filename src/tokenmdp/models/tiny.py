"""The tiny test model: a Llama of 77 thousand parameters that learns in seconds, and tokenizers small enough to read.

It has all that a large model has (several layers, grouped key-value heads, rotary positions, end and beginning tokens),
so what is tested on it is tested on the code that runs the large one.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenmdp.models.policy import Policy

_EOS, _BOS, _UNKNOWN = "<eos>", "<bos>", "<unk>"
_CONTEXT = 512


def tiny(texts: Sequence[str] | None = None, vocabulary: int = 2000, seed: int = 0) -> Policy:
    """The tiny model, untrained.

    Args:
        texts: where the tokenizer learns its words from; without them a token is a character (printable ASCII and the
            newline).
        vocabulary: the most tokens a learnt tokenizer may have.
        seed: of the random weights. Torch's own generator is neither read nor moved.

    Raises:
        ValueError: texts that hold nothing, or a vocabulary that cannot hold the 256 bytes and the special tokens.
    """
    tokenizer = characters() if texts is None else words(texts, vocabulary)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights of its own, which are replaced below
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # matrices; norms keep their ones
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return Policy(model, tokenizer, name="tiny", compute="float32")


def characters() -> transformers.PreTrainedTokenizerFast:
    """One token a character: printable ASCII and the newline; anything else is `<unk>`."""
    alphabet = [c for c in string.printable if c.isprintable() or c == "\n"]
    vocabulary = {token: i for i, token in enumerate([_EOS, _BOS, _UNKNOWN, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrapped(tokenizer, unk_token=_UNKNOWN)


def words(texts: Sequence[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE learnt from texts: frequent words become tokens, any other text is spelled; decoding is exact."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not any(text.strip() for text in texts):
        raise ValueError(
            f"the {len(texts)} texts to learn words from are empty: give some text, or None for the character tokenizer"
        )
    if vocabulary < len(alphabet) + 2:
        raise ValueError(
            f"vocabulary is {vocabulary}; {len(alphabet)} bytes and 2 special tokens need {len(alphabet) + 2}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_EOS, _BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer, **special: str) -> transformers.PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in (_EOS, _BOS, *special.values())]
    )
    build: Callable[..., transformers.PreTrainedTokenizerFast] = (
        transformers.PreTrainedTokenizerFast
    )  # its constructor carries no types
    return build(
        tokenizer_object=tokenizer,
        eos_token=_EOS,
        bos_token=_BOS,
        pad_token=_EOS,
        model_max_length=_CONTEXT,
        clean_up_tokenization_spaces=False,
        **special,
    )
