"""A second device where there is none: tensors that lie on the CPU and behave as if they lay on a GPU.

Inside `Elsewhere()`, what is moved to `GPU`, or made there, carries a mark, and so does whatever is computed from it. Reading
its `device` says `cuda:0`; computing with it and a tensor that lies here raises, as a GPU would, and so does `.numpy()`. The
figures are the CPU's own, to the last bit.

As on a GPU it is allowed: a number of no dimensions from here beside tensors there; an index from here into a tensor there;
`copy_` between the two. Not seen are kernels that only a GPU has, its memory and its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenmdp.models.backbone import Backbone
from tokenmdp.types import Batch, Pairs, Score

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_DEVICE, _IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_CROSSES = ("copy_", "set_", "_has_compatible_shallow_copy_type")
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_INDEXES = (Tensor.__getitem__, Tensor.__setitem__)


class DifferentDevices(RuntimeError):
    """A tensor of there met one of here."""


def away(x: Tensor) -> bool:
    """Whether a tensor lies there."""
    return bool(getattr(x, "lies_there", False))


def send(thing: Any, seen: set[int] | None = None) -> None:
    """Put there what a recipe is given: the weights of models and what batches hold, wherever they are in `thing`."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        for tensor in [*thing.parameters(), *thing.buffers()]:
            tensor.lies_there = True  # type: ignore[attr-defined]
    if isinstance(thing, Backbone):
        thing.device = GPU
    if isinstance(thing, Batch | Pairs | Score):
        for tensor in _tensors(list(vars(thing).values())):
            tensor.lies_there = True  # type: ignore[attr-defined]
    if isinstance(thing, Tensor):
        thing.lies_there = True  # type: ignore[attr-defined]
    if isinstance(thing, list | tuple):
        for part in thing:
            send(part, seen)
    elif type(thing).__module__.split(".")[0] in ("tokenmdp", "tiny_recipes") or hasattr(thing, "backbone"):
        for part in vars(thing).values() if hasattr(thing, "__dict__") else ():
            send(part, seen)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, Sequence) and not isinstance(x, str | bytes | torch.Size):
        for value in x:
            yield from _tensors(value)


def _device(x: Any) -> torch.device | None:
    """What an argument says about where to."""
    if isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda"):
        x = torch.device(x)
    return x if isinstance(x, torch.device) and x.type != "meta" else None  # what is nowhere stays nowhere


class Elsewhere(TorchFunctionMode):
    """While this lasts there is a second device."""

    def __enter__(self) -> Elsewhere:
        # The one way to a tensor that no mode hears of: a parameter made of another's data, as a deep copy is.
        self._subclass = Tensor._make_subclass

        def made(cls: type[Tensor], data: Tensor, *more: Any, **given: Any) -> Tensor:
            out = self._subclass(cls, data, *more, **given)
            out.lies_there = away(data)  # type: ignore[attr-defined]
            return out

        Tensor._make_subclass = staticmethod(made)  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        Tensor._make_subclass = self._subclass  # type: ignore[method-assign]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func == _DEVICE:
            return GPU if away(args[0]) else func(*args)
        if func == _SET_DATA:  # how a module moves
            args[0].lies_there = away(args[1])
            return func(*args)
        if func == _IS_CUDA:
            return away(args[0])
        name = getattr(func, "__name__", str(func))
        if name == "numpy" and away(args[0]):
            raise TypeError("can't convert a tensor of there to numpy: use Tensor.cpu() first")
        target, args = self._target(func, list(args), given)
        there = self._met(func, name, args, given) if target is None else target.type == "cuda"
        if there and isinstance(given.get("generator"), torch.Generator):
            raise DifferentDevices(f"{name}: a generator of here cannot draw there")
        made = func(*args, **given)
        for out in _tensors(made):
            if away(out) != there:
                if target is not None and any(out is x for x in _tensors(args)):  # nothing was copied, and a move does
                    out = made = out.clone()
                out.lies_there = there  # type: ignore[attr-defined]
        return made

    def _target(self, func: Any, args: list[Any], given: dict[str, Any]) -> tuple[torch.device | None, list[Any]]:
        """Where the result is asked to lie, if anything says so; `args` and `given` then ask for here."""
        if func is Tensor.cpu:
            return CPU, args
        target = None
        if (asked := _device(given.get("device"))) is not None:
            target, given["device"] = asked, CPU
        if func is Tensor.to:
            for i, x in enumerate(args[1:], 1):
                if (found := _device(x)) is not None:
                    target, args[i] = found, CPU
                elif isinstance(x, Tensor):
                    target = GPU if away(x) else CPU
        return target, args

    def _met(self, func: Any, name: str, args: Sequence[Any], given: Mapping[str, Any]) -> bool:
        """Whether what is computed here lies there; refuses a mixture."""
        if name in _CROSSES:
            return away(args[0])
        asked = [args[0], *args[2:]] if func in _INDEXES else [args, given]  # an index may come from here
        found = list(_tensors(asked))
        if func is Tensor.__getitem__ and not away(args[0]):
            found = list(_tensors(args))
        there = [x for x in found if away(x)]
        here = [x for x in found if not away(x) and x.dim() > 0]
        if there and here:
            raise DifferentDevices(
                f"{name}: {tuple(there[0].shape)} lies there and {tuple(here[0].shape)} here: move one of them"
            )
        return bool(there)
