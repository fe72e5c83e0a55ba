"""The body of a language model: tokens in, hidden states out; which of its weights train; how roles share memory.

Policy, reference, reward model and critic are the same body with a different head. `twin` gives a second role its own
modules while every weight that will not train stays one tensor in memory.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenmdp.types import Read

if TYPE_CHECKING:
    from peft import PeftModel

SMALL = 2_000_000  # parameters below which converting or packing weights costs more than it saves
PACK_FROM = 8  # passes: packing costs about what four save
TRAIN = re.compile(r"all|none|head|top-[1-9]\d*|lora-[1-9]\d*")


def keep_freed_blocks() -> None:
    """Ask glibc to keep large freed blocks: logits are allocated and freed at every step, and faulting their pages in
    again costs a tenth of a rollout. Elsewhere than glibc nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 1 << 30), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(parameter, value)


def bfloat16_units(device: torch.device) -> str:
    """What multiplies bfloat16 matrices in hardware there; empty for nothing.

    Tiles (AMX) take about a seventh of the time of float32, dot products of pairs (AVX512-BF16) a third. Without either,
    a product on a CPU is emulated, up to a hundred times slower than float32.
    """
    if device.type == "cuda":
        return "GPU" if torch.cuda.is_bf16_supported() else ""
    units = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    found = [name for name, asked in units.items() if device.type == "cpu" and getattr(torch.cpu, asked, bool)()]
    return found[0] if found else ""


def compute_dtype(compute: str, device: torch.device, parameters: int | None = None) -> torch.dtype:
    """The type matrix products run in: `auto` takes bfloat16 where the machine has units for it and the model is large
    enough to gain by them, else float32.

    Args:
        parameters: how many the model has; None is for many.

    Raises:
        ValueError: for anything but auto, float32, bfloat16.
    """
    if compute == "float32":
        return torch.float32
    if compute == "bfloat16":
        return torch.bfloat16
    if compute != "auto":
        raise ValueError(f"compute is {compute!r}; it must be auto, float32 or bfloat16")
    large = parameters is None or parameters >= SMALL
    return torch.bfloat16 if large and bfloat16_units(device) else torch.float32


class Backbone:
    """A Hugging Face model used for its hidden states.

    Attributes:
        model: the Hugging Face model (causal, or sequence classification), always in evaluation mode: dropout would
            make the learner's log-probabilities differ from the sampler's.
        body: the part that maps tokens to hidden states.
        peft: the PEFT wrapper when LoRA adapters train, else None.
        compute: the type matrix products run in; weights stay float32.
        small: whether the model has fewer than `SMALL` parameters.
        train_spec: which weights train, as given to `twin`.
    """

    def __init__(self, model: transformers.PreTrainedModel, compute: str = "auto") -> None:
        self.model = model.eval()
        self.peft: PeftModel | None = None
        self.train_spec = "all"
        self.body: nn.Module = model.base_model
        self.device = next(model.parameters()).device
        parameters = sum(p.numel() for p in model.parameters())
        self.small = parameters < SMALL
        self.compute = compute_dtype(compute, self.device, parameters)
        self._divisible: bool | None = None
        self._originals: dict[int, nn.Parameter] = {}  # while weights are `converted`: what each was made from

    def autocast(self) -> torch.autocast:
        """The context every forward pass of this model runs in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16)

    @contextmanager
    def converted(self, passes: int = 1) -> Iterator[None]:
        """Linear layers hold their weights as products want them while this lasts, each made so once; the same numbers.

        * In the compute type. Left alone, autocast converts a frozen weight at every use, and in inference mode every
          weight at every use: a rollout would convert the whole model again at every token. Weights that train keep
          their gradient: while gradients are recorded they are left to autocast.
        * In inference mode on a CPU also in blocks (`_packed`): the few rows of a token are multiplied by weights that
          come from memory, and laying each out anew is a fifth of that.

        Args:
            passes: how many passes will be made; blocks are not worth their making for fewer than `PACK_FROM`.
        """
        many = passes >= PACK_FROM and not self.small and torch.is_inference_mode_enabled()
        packs = many and _can_pack(self.compute, self.device)
        made: dict[int, nn.Parameter] = {}
        blocked: dict[int, Tensor] = {}
        swapped: list[tuple[nn.Module, nn.Parameter]] = []
        replaced: list[nn.Module] = []
        try:
            for layer in self.model.modules() if packs or self.compute != torch.float32 else ():
                weight = layer.weight if isinstance(layer, nn.Linear | transformers.pytorch_utils.Conv1D) else None
                if not isinstance(weight, nn.Parameter) or (torch.is_grad_enabled() and weight.requires_grad):
                    continue
                if packs and type(layer) is nn.Linear and weight.dtype in (torch.float32, self.compute):
                    if id(weight) not in blocked:
                        blocked[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.compute))
                    vars(layer)["forward"] = _packed(blocked[id(weight)], layer.bias, self.compute)
                    replaced.append(layer)
                elif weight.dtype != self.compute != torch.float32:
                    if id(weight) not in made:
                        made[id(weight)] = nn.Parameter(weight.detach().to(self.compute), requires_grad=False)
                    swapped.append((layer, weight))
                    layer.weight = made[id(weight)]
                    self._originals[id(layer.weight)] = weight
            yield
        finally:
            for layer in replaced:
                del vars(layer)["forward"]  # its class's own is seen again
            for layer, weight in swapped:
                self._originals.pop(id(layer.weight), None)
                layer.weight = weight

    def hidden(self, tokens: Int[Tensor, "B L"], read: Read | None = None) -> Float[Tensor, "B L D"]:
        """Hidden states of right-padded rows, `hidden[b, t]` after reading `tokens[b, :t + 1]`.

        No attention mask is needed: attention is causal and padding is on the right, so no real position can see it.

        Args:
            read: what the first blocks made of the same tokens; used if they are this model's blocks.
        """
        with self.autocast(), self.given(read, tokens):
            return self.body(input_ids=tokens, use_cache=False).last_hidden_state

    # -- frozen first blocks are read once for all roles

    @torch.no_grad()
    def read(self, tokens: Int[Tensor, "B L"], count: int) -> Read:
        """What the first `count` ≥ 1 blocks make of the tokens.

        Policy, reference, reward model and critic that train their top blocks hold the same first blocks, and nothing
        in these changes while they learn: one reading of the `frozen_blocks` serves them all, and every update of a
        phase, where the body is `divisible`.
        """
        found: list[Tensor] = []

        def stop(block: nn.Module, given: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Enough

        handle = blocks(self.body)[count - 1].register_forward_hook(stop)
        try:
            with self.autocast(), contextlib.suppress(_Enough):
                self.body(input_ids=tokens, use_cache=False)
        finally:
            handle.remove()
        return Read(found[0], tokens, count, self._weights(count))

    @contextmanager
    def given(self, read: Read | None, tokens: Int[Tensor, "B L"]) -> Iterator[None]:
        """While this lasts the first blocks are not run: what they made of the tokens is given. Does nothing where
        `read` is None, is of other tokens, or went through other weights or through these before they changed.
        """
        if read is None or not self._made(read, tokens):
            yield
            return
        stack = blocks(self.body)
        kept = list(stack[: read.blocks])
        try:
            for i, block in enumerate(kept):
                stack[i] = _Known(block, read.states)
            yield
        finally:
            for i, block in enumerate(kept):
                stack[i] = block

    def frozen_blocks(self) -> int:
        """How many blocks come before the first in which something trains; 0 if what comes before the blocks trains."""
        try:
            stack = blocks(self.body)
        except ValueError:
            return 0
        embedding = self.model.get_input_embeddings()
        if any(p.requires_grad for p in embedding.parameters()):
            return 0
        trains = [i for i, block in enumerate(stack) if any(p.requires_grad for p in block.parameters())]
        return trains[0] if trains else len(stack)

    @torch.no_grad()
    def divisible(self) -> bool:
        """Whether blocks given what came before them go on as if they had been run; a few tokens show it, once.

        They do not where a body carries more from block to block than one tensor.
        """
        if self._divisible is None:
            probe = torch.arange(1, 9, device=self.device).view(2, 4) % self.model.config.vocab_size
            try:
                whole = self.hidden(probe)
                half = self.hidden(probe, self.read(probe, max(1, len(blocks(self.body)) // 2)))
                self._divisible = bool(torch.equal(whole, half))
            except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
                self._divisible = False
        return self._divisible

    def _made(self, read: Read, tokens: Int[Tensor, "B L"]) -> bool:
        ours = self._weights(read.blocks)
        return (
            len(ours) == len(read.weights)
            and all(a is b and m == n for (a, m), (b, n) in zip(ours, read.weights, strict=True))
            and torch.equal(read.tokens, tokens)
        )

    def _weights(self, count: int) -> tuple[tuple[Tensor, int], ...]:
        """What the first blocks and all that comes before and beside them hold, each with how often it was changed in
        place. Held by a `Read`, none of them can be freed and its place taken by another.
        """
        later = [*blocks(self.body)[count:], *_final_norms(self.body)]
        after = {id(p) for module in later for p in module.parameters()}
        first = (self._originals.get(id(p), p) for p in self.body.parameters() if id(p) not in after)
        return tuple((p, p._version) for p in first)

    def freeze(self) -> None:
        """No weight of this model trains from here on: it is what twins are measured against, and may be shared.

        LoRA adapters that trained become part of the weights, so that a twin starts from them.
        """
        self._fold()
        self.model.requires_grad_(False)
        self.train_spec = "none"

    def twin(self, train: str) -> Backbone:
        """A copy with modules of its own in which only `train` trains; all other weights are shared with this one, now
        frozen.

        Args:
            train: `all`; `top-N`, the last N blocks and the final norm; `lora-R`, LoRA adapters of rank R on every
                linear layer; `head` or `none`, nothing of the body.

        Raises:
            ValueError: naming the value and the accepted forms; or for more blocks than the model has.
        """
        if not TRAIN.fullmatch(train):
            raise ValueError(
                f"train is {train!r}; it must be all, top-N (blocks), lora-R (rank), head or none, such as top-8 or lora-16"
            )
        self.freeze()
        own = {id(p) for p in _chosen(self.body if train != "all" else self.model, train)}
        memo = {id(p): p for p in self.model.parameters() if id(p) not in own}
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model, memo)
        other.body = other.model.base_model
        other.train_spec = train
        if train.startswith("lora-"):
            from peft import LoraConfig, get_peft_model

            rank = int(train.removeprefix("lora-"))
            # peft fills adapters from torch's global generator; a fixed seed inside a fork leaves that generator as it
            # was
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=None)
                other.peft = get_peft_model(other.body, config)
            other.model.eval()
        else:
            for parameter in _chosen(other.body if train != "all" else other.model, train):
                parameter.requires_grad_(True)
        return other

    def merged(self) -> transformers.PreTrainedModel:
        """A plain copy of the model, LoRA adapters folded into its weights: what is written to disk."""
        other = copy.deepcopy(self)
        other._fold()
        return other.model

    def _fold(self) -> None:
        if self.peft is None:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in self.body.modules():
            if isinstance(layer, BaseTunerLayer):
                # Its weight is shared with the model this is a twin of: fold into a copy.
                base: Any = layer.get_base_layer()
                base.weight = nn.Parameter(base.weight.detach().clone())
        self.peft.merge_and_unload()
        self.peft = None

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that train, by name: what an optimiser steps and a checkpoint holds."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 over all weights: two models print the same one if and only if they are
        equal.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _packed(blocked: Tensor, bias: Tensor | None, compute: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The forward of a linear layer whose weight lies in oneDNN's own blocks."""
    product = torch.ops.mkldnn._linear_pointwise.default
    bias = None if bias is None else bias.to(compute)

    def forward(x: Tensor) -> Tensor:
        return product(x.to(compute), blocked, bias, "none", [], "")

    return forward


@functools.cache
def _can_pack(compute: torch.dtype, device: torch.device) -> bool:
    """Whether this torch, on this machine, multiplies by packed weights; tried once, on a small product."""
    if device.type != "cpu" or compute not in (torch.float32, torch.bfloat16):
        return False
    x = torch.arange(1.0, 257.0).view(4, 64).sin().to(compute)
    try:
        found = _packed(torch.ops.mkldnn._reorder_linear_weight(x), None, compute)(x)
    except (AttributeError, RuntimeError, NotImplementedError):  # another build, another release, another processor
        return False
    return bool(torch.allclose(found.float(), (x @ x.T).float(), rtol=1e-2, atol=1e-2))


class _Enough(Exception):
    """Raised to leave a forward pass when what was wanted is there."""


class _Known(nn.Module):
    """Stands in for a block whose output is known."""

    def __init__(self, block: nn.Module, states: Tensor) -> None:
        super().__init__()
        self.__dict__["stands_for"] = block  # past nn.Module, which would make it a part of this one
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)  # bodies ask their blocks for a kind of attention


def blocks(body: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a body: its longest list of modules.

    Raises:
        ValueError: when the body has no such list.
    """
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{type(body).__name__} has no list of blocks, so its top ones cannot be named: train all or lora-R instead"
        )
    return max(lists, key=len)


def _chosen(module: nn.Module, train: str) -> list[nn.Parameter]:
    if train == "all":
        return list(module.parameters())
    if not train.startswith("top-"):
        return []
    count, stack = int(train.removeprefix("top-")), blocks(module)
    if count > len(stack):
        raise ValueError(f"train is {train!r}, but the model has {len(stack)} blocks: use top-{len(stack)} or all")
    return [p for m in (*stack[-count:], *_final_norms(module)) for p in m.parameters()]


def _final_norms(body: nn.Module) -> list[nn.Module]:
    """The norm after the last block: beside the blocks, and not that of the embeddings (Bloom has one)."""
    stack = blocks(body)
    beside = next(m for m in body.modules() if any(child is stack for child in m.children()))
    return [
        m for name, m in beside.named_children() if "norm" in type(m).__name__.lower() and "embed" not in name.lower()
    ]


keep_freed_blocks()
