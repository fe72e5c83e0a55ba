"""The rollout engine: many responses from few prefixes, fast, with the model's own modules.

The model runs as transformers wrote it; only its attention is exchanged, through the library's own registry, for one
that reads a preallocated slab of keys and values:

    columns   0 ........ P − 1 | P, P + 1, ...        prefixes end at column P − 1 (padded on the left),
    row b     ..prefix of b....| its response          so every row writes its next token into one column

* A prefix is read once for all its samples, and what several prefixes begin with once for all of them (`stems`); then
  keys and values are copied to the rows (`shared prefill`). So the states along one row cost no more than the row.
* Keys and values of grouped heads are never repeated: the query heads of a group become query rows of one product.
* Rows that ended leave: when enough have, the slab is compacted, so the last long responses do not pay for the short
  ones.
* One uniform number a token, drawn beforehand (`sampling.draw`), makes a row's response independent of its neighbours.

`slow` is the twin without any of it, a full forward pass at every token: the tests hold `fast` against it, and a model
for which `objection` finds one (a body that keeps other state than keys and values, an attention with extra
terms) is decoded by it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenmdp.models import stems
from tokenmdp.models.parts import FORWARD_TOKENS
from tokenmdp.models.sampling import Sampling, draw

if TYPE_CHECKING:
    from tokenmdp.models.policy import Policy

SLAB_TOKENS = 24_576  # columns x rows a slab may hold: 1.1 GB of float32 keys and values for the embedded 135M model
COMPACT_BELOW = 0.75  # share of live rows under which finished ones are moved out
# What some attentions add to the plain one: capped scores, sinks, position biases. They may be too small to see on a
# few probe tokens.
_EXTRA_TERMS = ("softcap", "s_aux", "position_bias", "block_indices", "indices")


@dataclass
class Drawn:
    """One response: its tokens, their log-probabilities under the sampling distribution, and whether it ended by
    itself.
    """

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    ended: bool = False


class Slab:
    """Keys and values of all layers; the object transformers calls the cache.

    While `reading` it hands the fresh keys and values back and keeps them for `spread`; afterwards `update` writes the
    one new column and answers with all columns up to it.
    """

    is_compileable = False

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype  # of what is kept; None keeps what the model gives
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.reading = True
        self.column = 0
        self.sees: Tensor | None = None  # [trees, 1, N, N] which states a state sees while reading; None: all before it
        self.mask: Tensor | None = (
            None  # [rows, 1, 1, columns] added to the scores; None when all prefixes have one length
        )

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.reading:
            self.keys[layer_idx], self.values[layer_idx] = key, value
            return key, value
        keys, values, column = self.keys[layer_idx], self.values[layer_idx], self.column
        keys[:, :, column : column + 1] = key
        values[:, :, column : column + 1] = value
        return keys[:, :, : column + 1], values[:, :, : column + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.reading else self.column

    def spread(self, forest: stems.Forest, source: Tensor, columns: int) -> None:
        """Give every row the keys and values of its prefix, right-aligned, with room for `columns` in all.

        Args:
            forest: what was read.
            source: [rows] the prefix of each row.
        """
        lengths, rows = forest.length, len(source)
        P = int(lengths.max())
        ragged = bool((lengths != P).any())
        # column c of a prefix of length n holds its position c − (P − n)
        position = torch.arange(P, device=lengths.device)[None] - (P - lengths)[:, None]
        node, tree = forest.node.gather(1, position.clamp(min=0))[source], forest.tree[source][:, None]
        for store in (self.keys, self.values):
            for layer, read in store.items():
                # Empty, not zeros: no column is read before it is written.
                slab = read.new_empty((rows, read.shape[1], columns, read.shape[3]), dtype=self.dtype or read.dtype)
                slab[:, :, :P] = read[tree, :, node].transpose(1, 2)
                store[layer] = slab
        if ragged:
            visible = torch.ones((rows, columns), dtype=torch.bool, device=lengths.device)
            visible[:, :P] = (position >= 0)[source]
            self.mask = torch.zeros((rows, 1, 1, columns), device=lengths.device).masked_fill_(
                ~visible[:, None, None], float("-inf")
            )
        self.reading, self.column = False, P

    def keep(self, rows: Tensor) -> None:
        """Only these rows (in increasing order) go on; they move to the front of the memory the slab already has."""
        for store in (self.keys, self.values):
            for layer, slab in store.items():
                slab[: len(rows), :, : self.column] = slab[rows, :, : self.column]
                store[layer] = slab[: len(rows)]
        if self.mask is not None:
            self.mask = self.mask[rows]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls instead of its own attention while the engine runs.

    query [rows, heads, T, d]; key, value [rows, key heads, columns, d]. Prefixes are read T at a time; T = 1 decodes.
    """
    refused = [name for name in _EXTRA_TERMS if others.get(name) is not None]
    if refused:
        raise ValueError(f"this attention has {', '.join(refused)}, which the slab does not know: decode it by `slow`")
    rows, heads, T, width = query.shape
    groups = heads // key.shape[1]
    slab = _state.slab
    assert slab is not None, "set while the engine runs"
    if slab.reading:
        sees = slab.sees
        if sliding_window is not None and sliding_window < T:
            # How far back a state is on the way to another: those seen from there less those seen from here.
            seen = torch.ones((1, 1, T, T), dtype=torch.bool, device=query.device).tril() if sees is None else sees
            depth = seen.sum(-1)
            sees = seen & (depth[..., :, None] - depth[..., None, :] < sliding_window)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=sees, is_causal=sees is None, scale=scaling, enable_gqa=groups > 1
        )
        return out.transpose(1, 2), None
    mask = slab.mask
    start = 0 if sliding_window is None else max(0, key.shape[2] - sliding_window)
    mask = None if mask is None else mask[..., start : key.shape[2]].to(query.dtype)
    grouped = query.view(rows, key.shape[1], groups, width)
    out = scaled_dot_product_attention(grouped, key[:, :, start:], value[:, :, start:], attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


class _State:
    """The slab being decoded: attention modules receive keys and values, but not the cache that holds the mask."""

    slab: Slab | None = None


_state = _State()


def _slab_for(policy: Policy) -> Slab:
    """An empty slab in the type attention computes in.

    Rotated keys leave the model in float32; kept so, autocast would convert the whole slab again at every token.
    """
    return Slab(torch.bfloat16 if policy.backbone.compute == torch.bfloat16 else None)


@contextmanager
def _slab_attention(policy: Policy, slab: Slab) -> Iterator[None]:
    config = policy.model.config
    before = config._attn_implementation
    transformers.AttentionInterface.register("tokenmdp_slab", _attention)  # again changes nothing
    policy.model.set_attn_implementation("tokenmdp_slab")
    _state.slab = slab
    try:
        yield
    finally:
        _state.slab = None
        policy.model.set_attn_implementation(before)


def _step(policy: Policy, tokens: Tensor, positions: Tensor, slab: Slab) -> Tensor:
    """Hidden states of the tokens given, with the slab before them."""
    body = policy.backbone.body
    given = {_cache_name(type(body).forward): slab}
    return body(input_ids=tokens, position_ids=positions, use_cache=True, **given).last_hidden_state


@functools.cache
def _cache_name(forward: Callable[..., Any]) -> str:
    """What a body calls its keys and values: newer releases of transformers say `cache`."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _read(policy: Policy, prefixes: Sequence[Sequence[int]], slab: Slab) -> tuple[Tensor, stems.Forest]:
    """Read every state once. Returns the last hidden state of each prefix, and where the slab has it."""
    forest = stems.plant(prefixes).to(policy.device)
    slab.sees = forest.sees
    hidden = _step(policy, forest.tokens, forest.position, slab)
    ends = forest.node.gather(1, forest.length[:, None] - 1)[:, 0]
    return hidden[forest.tree, ends], forest


def ahead(policy: Policy, prefixes: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Logits of the token after each prefix, some prefixes at a time: their numbers and [those, V]. What prefixes begin
    with alike is read once.
    """
    parts: list[list[int]] = [[]]
    for longest, family in stems.by_length(prefixes):
        if parts[-1] and (len(parts[-1]) + len(family)) * longest > FORWARD_TOKENS:
            parts.append([])
        parts[-1] += family
    for part in parts:
        slab = _slab_for(policy)
        with _slab_attention(policy, slab):
            last, _ = _read(policy, [prefixes[i] for i in part], slab)
            logits = policy.project(last).float()
        yield part, logits


def fast(
    policy: Policy,
    prefixes: Sequence[Sequence[int]],
    n: int,
    uniform: Float[Tensor, "B H"],
    sampling: Sampling,
    advance: Callable[[int], None] | None = None,
) -> list[Drawn]:
    """`n` responses to each prefix through the slab; row b·n + j is sample j of prefix b and uses `uniform[b·n + j]`.

    Equal to `slow` up to the rounding of the model's own arithmetic.
    """
    return fork(policy, prefixes, [sampling.max_new_tokens] * len(prefixes), n, uniform, sampling, advance)


def fork(
    policy: Policy,
    states: Sequence[Sequence[int]],
    horizons: Sequence[int],
    n: int,
    uniform: Float[Tensor, "B H"],
    sampling: Sampling,
    advance: Callable[[int], None] | None = None,
) -> list[Drawn]:
    """`n` continuations of each state; row s·n + j is sample j of state s and uses `uniform[s·n + j]`.

    What states begin with alike is read once for all of them, unless they do not fit one slab: then once a slab. Equal to
    `slow` on the states, each with its own horizon, up to the rounding of the model's own arithmetic.

    Args:
        states: prefixes, one token long at least.
        horizons: the most tokens that may follow each.
        sampling: its `max_new_tokens` is not read.
    """
    drawn = [Drawn() for _ in range(len(states) * n)]
    # States of one tree stay together, trees of like length share a slab; each slab is bounded in memory.
    order = [i for _, family in stems.by_length(states) for i in family]
    start = 0
    while start < len(order):
        end, length, horizon = start + 1, len(states[order[start]]), horizons[order[start]]
        while end < len(order):
            length, horizon = max(length, len(states[order[end]])), max(horizon, horizons[order[end]])
            if (end + 1 - start) * n * (length + horizon) > SLAB_TOKENS:
                break
            end += 1
        part = order[start:end]
        some = n if len(part) > 1 else max(1, SLAB_TOKENS // (length + horizon))  # one state may have too many samples
        for samples in (range(n)[k : k + some] for k in range(0, n, some)):
            rows = [i * n + j for i in part for j in samples]
            _decode_part(
                policy,
                [states[i] for i in part],
                [horizons[i] for i in part],
                len(samples),
                uniform[rows],
                sampling,
                [drawn[r] for r in rows],
                advance,
            )
        start = end
    return drawn


def _decode_part(
    policy: Policy,
    states: Sequence[Sequence[int]],
    horizons: Sequence[int],
    n: int,
    uniform: Tensor,
    sampling: Sampling,
    drawn: list[Drawn],
    advance: Callable[[int], None] | None,
) -> None:
    device, slab = policy.device, _slab_for(policy)
    source = torch.arange(len(states), device=device).repeat_interleave(n)
    limit = torch.tensor(horizons, device=device)[source]
    eos = torch.tensor(policy.eos_ids, device=device)
    with _slab_attention(policy, slab):
        last, forest = _read(policy, states, slab)
        slab.spread(forest, source, int(forest.length.max()) + int(limit.max()))
        logits = policy.project(last)[source].float()
        position, live = (
            forest.length[source],
            torch.arange(len(drawn), device=device),
        )  # live: which row of `drawn` each slab row is
        done = torch.zeros(len(drawn), dtype=torch.bool, device=device)
        for t in range(int(limit.max())):
            token, logp = draw(logits, uniform[live, t], sampling)
            finished_before = done.tolist()
            for row, a, lp, gone in zip(live.tolist(), token.tolist(), logp.tolist(), finished_before, strict=True):
                if not gone:
                    drawn[row].tokens.append(a)
                    drawn[row].logp.append(lp)
            over = ~done & (limit[live] == t + 1)
            if sampling.stop_at_eos:
                ended = torch.isin(token, eos) & ~done
                for row in live[ended].tolist():
                    drawn[row].ended = True
                over = over | ended
            done = done | over
            if advance is not None and bool(over.any()):
                advance(int(over.sum()))
            if bool(done.all()):
                break
            if float((~done).float().mean()) < COMPACT_BELOW:
                kept = (~done).nonzero()[:, 0]
                slab.keep(kept)
                live, position, token, done = live[kept], position[kept], token[kept], done[kept]
            hidden = _step(policy, token[:, None], position[:, None], slab)
            slab.column += 1
            # Finished rows that still stand in the slab may be past the context: what they read does not matter.
            position = (position + 1).clamp(max=policy.context - 1)
            logits = policy.project(hidden[:, -1]).float()


def slow(
    policy: Policy,
    prefixes: Sequence[Sequence[int]],
    n: int,
    uniform: Float[Tensor, "B H"],
    sampling: Sampling,
    advance: Callable[[int], None] | None = None,
) -> list[Drawn]:
    """The same responses by a full forward pass over each row at every token: no cache, no padding, no sharing."""
    drawn = [Drawn() for _ in range(len(prefixes) * n)]
    for row, one in enumerate(drawn):
        prefix = list(prefixes[row // n])
        for t in range(sampling.max_new_tokens):
            tokens = torch.tensor([prefix + one.tokens], device=policy.device)
            logits = policy.model(input_ids=tokens, use_cache=False).logits[:, -1].float()
            token, logp = draw(logits, uniform[row, t : t + 1], sampling)
            one.tokens.append(int(token))
            one.logp.append(float(logp))
            if sampling.stop_at_eos and int(token) in policy.eos_ids:
                one.ended = True
                break
        if advance is not None:
            advance(1)
    return drawn


def ahead_slow(policy: Policy, prefixes: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """As `ahead`, by a full forward pass over each prefix."""
    for i, prefix in enumerate(prefixes):
        tokens = torch.tensor([list(prefix)], device=policy.device)
        yield [i], policy.model(input_ids=tokens, use_cache=False).logits[:, -1].float()


def _odd_window(policy: Policy) -> bool:
    """Whether the model looks back through a window of its own kind, which the few tokens of `objection` would not fill.

    The slab knows `sliding_window`; any other window that is shorter than the context is left to `slow`.
    """
    known = ("sliding_window", "max_window_layers", "use_sliding_window")
    return any(
        "window" in name and name not in known and type(value) is int and 0 < value < policy.context
        for name, value in policy.model.config.to_dict().items()
    )


def objection(policy: Policy) -> str:
    """Why the slab does not give this model's own logits, tried on ragged prefixes and a few tokens after them; empty
    where it gives them.

    The tolerance is 1e-3 of the logits' spread in float32, 5e-2 in bfloat16. Any error the exchange of attention
    causes in the model's code is a reason.
    """
    if not policy.head_is_linear():
        return "its logits are more than a linear layer on its last states"
    if _odd_window(policy):
        return "it looks back through a window of its own kind"
    size = int(policy.model.config.vocab_size)
    prefixes = [[(7 * i + 3 * j + 1) % size for i in range(length)] for j, length in enumerate((5, 8, 3))]
    prefixes.append([*prefixes[1][:6], 1, 2])  # most of another one: both are read as a tree
    following = [[(11 * j + 5 * t + 2) % size for t in range(3)] for j in range(len(prefixes))]
    tolerance = 1e-3 if policy.backbone.compute == torch.float32 else 5e-2
    try:
        with torch.inference_mode(), policy.backbone.autocast():
            whole = [policy.model(input_ids=torch.tensor([p + f], device=policy.device), use_cache=False).logits[0].float()
                     for p, f in zip(prefixes, following, strict=True)]  # fmt: skip
            slab, source = _slab_for(policy), torch.arange(len(prefixes), device=policy.device)
            with _slab_attention(policy, slab):
                last, forest = _read(policy, prefixes, slab)
                slab.spread(forest, source, int(forest.length.max()) + len(following[0]))
                position, seen = forest.length, [policy.project(last).float()]
                for t in range(len(following[0])):
                    token = torch.tensor([[f[t]] for f in following], device=policy.device)
                    seen.append(policy.project(_step(policy, token, position[:, None], slab)[:, -1]).float())
                    slab.column, position = slab.column + 1, position + 1
    except Exception as fault:  # whatever a model's code raises when these are exchanged; `slow` needs neither
        return f"with its attention exchanged it raises {fault!r:.160}"
    ours = torch.stack(seen, dim=1)
    for b, prefix in enumerate(prefixes):
        want = whole[b][len(prefix) - 1 :]
        off = float((ours[b] - want).abs().max() / (want.max() - want.min()))
        if not off <= tolerance:
            return f"the slab's logits are off by {off:.1g} of their spread, where rounding explains {tolerance:g}"
    return ""
