"""A policy π(a | s): prefixes to distributions over the next token.

Two verbs carry everything: `sample` draws responses (the rollout engine is `decode.py`) and `evaluate` says what the
policy makes of given ones. The one-position shift of a language model, logits at t − 1 for the token at t, happens in
`evaluate` and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from tokenmdp import mdp
from tokenmdp.functional import kl
from tokenmdp.models import decode
from tokenmdp.models.backbone import Backbone
from tokenmdp.models.decode import Drawn
from tokenmdp.models.parts import in_parts
from tokenmdp.models.sampling import Sampling
from tokenmdp.types import Batch, Prompt, Read

_LOGIT_ROWS = 512  # positions projected to the vocabulary at a time: 512 x 49,152 float32 logits are 100 MB


class Policy:
    """A causal language model with its tokenizer.

    Attributes:
        backbone: the model's body, shared by `twin`s where it does not train.
        tokenizer: the model's tokenizer.
        name: what to call it in tables.
        eos_ids: the tokens that end a response.
        context: the most positions a row may have.
        paths: how this policy computes, in words ("rollouts: KV slab", ...); a run writes them down.

    Raises:
        ValueError: when the model has no end-of-text token: nothing could ever end.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str = "policy",
        compute: str = "auto",
    ):
        self.backbone = Backbone(model, compute)
        self.tokenizer = tokenizer
        self.name = name
        self.eos_ids = eos_ids(model, tokenizer)
        self.context = context(model)
        self.paths: dict[str, str] = {"compute": str(self.backbone.compute).removeprefix("torch.")}
        self._opening: tuple[int, ...] | None = None
        self._linear_head: bool | None = None
        self._slab: bool | None = None

    # -- who trains

    def twin(self, train: str, name: str | None = None) -> Policy:
        """A policy that starts equal to this one and trains `train` (see `Backbone.twin`); this one is frozen from
        here on.
        """
        other = copy.copy(self)
        other.backbone = self.backbone.twin(train)
        other.paths = dict(self.paths)
        other.name = name or self.name
        return other

    def freeze(self) -> Policy:
        """This policy, no longer training: a reference."""
        self.backbone.freeze()
        return self

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The weights that train, by name."""
        return self.backbone.trained()

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def model(self) -> transformers.PreTrainedModel:
        return self.backbone.model

    # -- text

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens added.

        Raises:
            ValueError: the text holds half a surrogate pair, which no encoding can write.
        """
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(
                f"the text {text[:40]!r} holds a lone surrogate, which is no character: repair or drop the row"
            )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by itself: the beginning-of-text token of Llama and Gemma, which were
        trained on nothing without it; for many others nothing.
        """
        if self._opening is None:
            plain = self.encode("a")
            whole = list(self.tokenizer("a")["input_ids"])
            ends = [at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain]
            self._opening = tuple(whole[: ends[0]]) if ends else ()
        return self._opening

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, as a reward reads it: without the tokens that begin, end and pad a text, and with every
        other special token, such as those that some models think between. No space is tidied away.
        """
        silent = {*self.eos_ids, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}
        shown = [token for token in ids if token not in silent]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def prompt(
        self, text: str | Sequence[Mapping[str, str]], row: int = 0, columns: Mapping[str, Any] | None = None
    ) -> Prompt:
        """A prompt from plain text, or from chat messages through the tokenizer's own template.

        Raises:
            ValueError: messages were given and the tokenizer has no chat template; or the prompt leaves no room in the
                context.
        """
        if isinstance(text, str):
            ids, shown = self.encode(text), text
            if tuple(ids[: len(self.opening)]) != self.opening:  # unless the text already begins with it
                ids = [*self.opening, *ids]
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
        else:
            if not self.tokenizer.chat_template:
                raise ValueError(
                    f"row {row} holds chat messages, but the tokenizer of {self.name} has no chat template: give plain text, "
                    "or a tokenizer whose chat_template is set"
                )
            shown = self.chat(text, f"row {row}", begin_reply=True)
            ids = self.encode(shown)
        if len(ids) >= self.context:
            raise ValueError(
                f"the prompt of row {row} has {len(ids)} tokens, the context of {self.name} is {self.context} and a response "
                "needs room too: shorten or drop the row"
            )
        return Prompt(tuple(ids), shown, row, dict(columns or {}))

    def chat(self, messages: Sequence[Mapping[str, str]], where: str = "a chat", begin_reply: bool = False) -> str:
        """Chat messages as the tokenizer's template writes them, with `begin_reply` up to where a reply would begin.

        Raises:
            ValueError: the template refuses them, such as one that wants a system message first.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=begin_reply
                )
            )
        except Exception as fault:  # a template is a program of somebody else's: it may raise, or fail, in any way
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise ValueError(
                f"the chat template of {self.name} refuses the messages of {where} (roles {roles}): {type(fault).__name__}: "
                f"{fault}; give them as the template wants them"
            ) from None

    def response_text(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """What the response adds to the prompt's text (a word tokenizer's joining space included)."""
        before, whole = self.decode(prompt), self.decode([*prompt, *response])
        return whole[len(before) :] if whole.startswith(before) else self.decode(response)

    # -- the policy

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        rng: torch.Generator,
        advance: Callable[[int], None] | None = None,
    ) -> Batch:
        """`n` responses to each prompt, side by side: rows b·n … b·n + n − 1 answer prompt b and share its `group`.

        `logp_mu` of the result is exact for the distribution sampled (temperature, top-p and top-k included). A
        response's tokens depend on its own row of uniform numbers, not on its neighbours or on how rows are batched.

        Args:
            advance: called with a number of finished rows, for a progress bar.

        Raises:
            ValueError: no prompts, n below 1, or a prompt that with the response would not fit the context.
            OutOfSetting: inside a setting without dynamics.
        """
        mdp.touch("dynamics")
        if not prompts or n < 1:
            raise ValueError(f"asked for {n} samples of {len(prompts)} prompts: both must be at least 1")
        for p in prompts:
            if len(p.ids) + sampling.max_new_tokens > self.context:
                raise ValueError(
                    f"the prompt of row {p.row} has {len(p.ids)} tokens; with max_new_tokens={sampling.max_new_tokens} that "
                    f"exceeds the context of {self.name}, {self.context}: shorten one or the other"
                )
        uniform = torch.rand((len(prompts) * n, sampling.max_new_tokens), generator=rng, dtype=torch.float64)
        engine = self.engine()
        passes = sampling.max_new_tokens
        with torch.inference_mode(), self.backbone.autocast(), self.backbone.converted(passes):
            drawn = engine(self, [p.ids for p in prompts], n, uniform.to(self.device), sampling, advance)
        rows = [p for p in prompts for _ in range(n)]
        return Batch.build(
            rows,
            [d.tokens for d in drawn],
            texts=[self.response_text(p.ids, d.tokens) for p, d in zip(rows, drawn, strict=True)],
            ended=[d.ended for d in drawn],
            group=[i for i in range(len(prompts)) for _ in range(n)],
            logp_mu=[d.logp for d in drawn],
            pad=self.eos_ids[0],
        ).to(self.device)

    def engine(self) -> Callable[..., list[Drawn]]:
        """The rollout engine that is right for this model."""
        if self._slab is None:
            why = decode.objection(self)
            self._slab = not why
            self.paths["rollouts"] = (
                f"full forward pass at every token, slow: {why}" if why else "KV slab, shared prefill"
            )
        return decode.fast if self._slab else decode.slow

    def read(self, batch: Batch) -> Batch:
        """The same batch with what this policy's frozen first blocks make of it, where it has any.

        Every model that shares those blocks (the reference, a reward model or critic on the same body) then starts
        where they end, and so does every update on this batch. The results are the same.
        """
        count = self.backbone.frozen_blocks()
        if count == 0 or not self.backbone.divisible():
            self.paths["frozen blocks"] = "none to share"
            return batch
        parts: list[Read] = []

        def states(part: Batch) -> dict[str, Tensor]:
            parts.append(self.backbone.read(part.tokens, count))
            return {"states": parts[-1].states}

        with self.backbone.converted():
            known = in_parts(states, batch)["states"]
        self.paths["frozen blocks"] = f"the first {count} read once a batch, for all roles"
        return replace(batch, read=Read(known, batch.tokens, count, parts[0].weights))

    def evaluate(
        self,
        batch: Batch,
        want: Sequence[str] = ("logp",),
        temperature: float = 1.0,
        of: Int[Tensor, "B L"] | None = None,
    ) -> dict[str, Float[Tensor, "B L"]]:
        """What this policy makes of a batch, token-aligned and zero outside `batch.action`.

        Args:
            want: any of `logp`, log π(a_t | s_t) in nats; `entropy`, H(π(· | s_t)) in nats (no gradient); `logit`, that
                of the token taken, and `log_z`, log Σ_a exp of all logits there (their difference is `logp`).
            temperature: logits are divided by it first; 1 is the policy itself.
            of: the tokens that `logp` and `logit` are of, in the same states, such as those an expert would have
                taken; None for those that were taken.

        Raises:
            ValueError: an unknown want.
        """
        unknown = set(want) - {"logp", "entropy", "logit", "log_z"}
        if unknown:
            raise ValueError(f"want has {sorted(unknown)}; it may hold logp, entropy, logit and log_z")
        where = batch.action.nonzero(as_tuple=True)
        chosen = (batch.tokens if of is None else of)[where]
        found: dict[str, list[Tensor]] = {name: [] for name in want}
        with self.backbone.converted():
            for piece, logits in self._action_logits(batch):
                logits = logits / temperature if temperature != 1.0 else logits
                taken = chosen[piece][:, None]
                if "logit" in found:
                    found["logit"].append(logits.gather(1, taken)[:, 0])
                if "log_z" in found:
                    found["log_z"].append(logits.logsumexp(-1))
                if not {"logp", "entropy"} & set(want):
                    continue
                logp = torch.log_softmax(logits, dim=-1)
                if "logp" in found:
                    found["logp"].append(logp.gather(1, taken)[:, 0])
                if "entropy" in found:
                    with torch.no_grad():
                        found["entropy"].append(-(logp.exp() * logp).sum(-1))
        blank = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
        return {
            name: blank.to(parts[0].dtype).index_put(where, torch.cat(parts)) if parts else blank
            for name, parts in found.items()
        }

    @torch.no_grad()
    def best(self, batch: Batch) -> Int[Tensor, "B L"]:
        """The most likely token in the state before each action; 0 elsewhere."""
        with self.backbone.converted():
            parts = [logits.argmax(-1) for _, logits in self._action_logits(batch)]
        out = torch.zeros_like(batch.tokens)
        return out.index_put(batch.action.nonzero(as_tuple=True), torch.cat(parts)) if parts else out

    def divergence(
        self,
        other: Policy,
        batch: Batch,
        measure: Callable[[Float[Tensor, "N V"], Float[Tensor, "N V"]], Float[Tensor, "N"]] = kl.exact,
        temperature: float = 1.0,
    ) -> Float[Tensor, "B L"]:
        """How far the two policies' distributions lie apart at every action position, over the whole vocabulary.

        The gradient is this policy's; the other is read as a constant.

        Args:
            measure: of this policy's logits and the other's; the default is KL(π ‖ other) in nats, and
                `functional.imitation` has more.
            temperature: both policies' logits are divided by it first.

        Raises:
            ValueError: the two vocabularies differ in size.
        """
        parts = []
        with self.backbone.converted(), other.backbone.converted():
            given = other._action_logits(batch)
            for _, ours in self._action_logits(batch):
                with torch.no_grad():
                    _, theirs = next(given)
                if ours.shape != theirs.shape:
                    raise ValueError(
                        f"{self.name} has {ours.shape[-1]} tokens and {other.name} {theirs.shape[-1]}: a divergence needs "
                        "one vocabulary"
                    )
                if temperature != 1.0:
                    ours, theirs = ours / temperature, theirs / temperature
                parts.append(measure(ours, theirs))
        out = torch.zeros(
            batch.tokens.shape, dtype=parts[0].dtype if parts else torch.float32, device=batch.tokens.device
        )
        return out.index_put(batch.action.nonzero(as_tuple=True), torch.cat(parts)) if parts else out

    @torch.no_grad()
    def kl_to(self, reference: Policy, batch: Batch, temperature: float = 1.0) -> Float[Tensor, "B L"]:
        """KL(π_T(· | s_t) ‖ π_ref,T(· | s_t)) at every action position, exact over the vocabulary, in nats.

        Summed along responses drawn from π_T it is the Rao-Blackwellised, unbiased estimate of the KL between the two
        distributions over responses (chain rule).

        Args:
            temperature: T, that of the responses, above 0: both policies' logits are divided by it first.

        Raises:
            ValueError: the two vocabularies differ in size.
        """
        return self.divergence(reference, batch, temperature=temperature)

    @torch.no_grad()
    def next_mass(self, prompts: Sequence[Prompt], sets: Sequence[Sequence[int]]) -> Float[Tensor, "S N"]:
        """[S, N] the probability that the token after a prompt is one of a set, for S sets and N prompts, on the CPU.

        What a model answers where one token is the answer, a letter or yes, without generating.

        Raises:
            ValueError: no prompt, no set, or an empty one.
        """
        if not prompts or not sets or not all(sets):
            raise ValueError(f"{len(prompts)} prompts and {len(sets)} sets of tokens: one of each at least, none empty")
        out = torch.zeros(len(sets), len(prompts))
        with torch.inference_mode(), self.backbone.autocast(), self.backbone.converted():
            parts = decode.ahead if self.engine() is decode.fast else decode.ahead_slow
            for part, logits in parts(self, [p.ids for p in prompts]):
                p = logits.softmax(-1).cpu()
                out[:, part] = torch.stack([p[:, list(ids)].sum(1) for ids in sets])
        return out

    def _action_logits(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """Float32 (or wider) logits of the states in which actions were taken, a slice of action positions at a time.

        Only those positions are projected to the vocabulary: the shift by one is here.
        """
        rows, at = batch.action.nonzero(as_tuple=True)
        if batch.tokens.shape[1] > self.context:
            raise ValueError(
                f"rows of {batch.tokens.shape[1]} tokens exceed the context of {self.name}, {self.context}: take shorter "
                "responses, or a model that reads as far"
            )
        if self._linear_head is None:
            self._linear_head = self.head_is_linear()
            self.paths["logits"] = (
                "action positions only" if self._linear_head else "all positions (the model alters its logits)"
            )
        if self._linear_head:
            states = self.backbone.hidden(batch.tokens, batch.read)[rows, at - 1]
        else:
            with self.backbone.autocast(), self.backbone.given(batch.read, batch.tokens):
                states = self.model(input_ids=batch.tokens, use_cache=False).logits[rows, at - 1]
        for start in range(0, len(rows), _LOGIT_ROWS):
            piece = slice(start, min(start + _LOGIT_ROWS, len(rows)))
            logits = self.project(states[piece]) if self._linear_head else states[piece]
            yield piece, logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    def project(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Hidden states to logits through the model's output layer."""
        with self.backbone.autocast():
            return self.model.get_output_embeddings()(hidden)

    @torch.no_grad()
    def head_is_linear(self) -> bool:
        """Whether output layer ∘ body is the model: some models cap or scale their logits after it.

        Its config says so, or a few tokens show it. Tokens alone would not do: a cap is invisible while logits are
        small.
        """
        settings = self.model.config.to_dict().items()
        if any(
            "logit" in name and not name.startswith("attn") and isinstance(v, float) and v != 1 for name, v in settings
        ):
            return False
        probe = torch.arange(1, 7, device=self.device)[None] % self.model.config.vocab_size
        with self.backbone.autocast():
            whole = self.model(input_ids=probe, use_cache=False).logits[0].float()
        if bool(whole.isnan().any()):
            raise ValueError(
                f"{self.name} gives NaN for every text: its weights are damaged or diverged, take another checkpoint"
            )
        ours = self.project(self.backbone.hidden(probe)[0]).float()
        return bool(torch.allclose(ours, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())))

    # -- on disk

    def save(self, folder: Path | str) -> None:
        """Write a Hugging Face directory (safetensors and tokenizer); LoRA adapters are folded in."""
        model = self.model if self.backbone.peft is None else self.backbone.merged()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def publish(self, folder: Path) -> dict[str, str]:
        """Freeze this policy, which folds adapters into it, and save it: what a run that trained it ends with.

        Returns:
            `model`, the folder, and `fingerprint`, which is that of what the folder holds.
        """
        self.freeze().save(folder)
        return {"model": str(folder), "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Hash of the weights (see `Backbone.fingerprint`)."""
        return self.backbone.fingerprint()


def context(model: transformers.PreTrainedModel) -> int:
    """The most positions a row may have.

    Long-rope models read a row with other rotations once any row beside it is longer than the length they were first
    trained on, so a row's numbers would depend on its neighbours: rows stay below that length.
    """
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [scaling, *(v for v in scaling.values() if isinstance(v, Mapping))]  # one a kind of layer, in some models
    for kind in kinds:
        if str(kind.get("rope_type", kind.get("type", ""))) in ("longrope", "dynamic"):
            first = kind.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            longest = min(longest, int(first or longest))
    return longest


def eos_ids(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's and those the generation config adds.

    Raises:
        ValueError: when there is none.
    """
    found: list[int] = []
    generation = getattr(model, "generation_config", None)
    for source in (
        tokenizer.eos_token_id,
        getattr(generation, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
    ):
        for token in source if isinstance(source, list | tuple) else [source]:
            if token is not None and int(token) not in found:
                found.append(int(token))
    if not found:
        raise ValueError(
            "the model has no end-of-text token, so no response could ever end: set tokenizer.eos_token (and train the model to "
            "produce it), or eos_token_id in its config"
        )
    return tuple(found)
