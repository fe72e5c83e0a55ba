"""A chooser on disk: a table of numbers and a JSON file; nothing that is read back can run code.

chooser.json          prompts, the best constant one, the gain, which proxy, vocabularies; a hash of all of it and of the numbers
chooser.safetensors   what the proxy and its features learned
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tokenmdp.models.trees import Trees
from tokenmdp.prompting import sentences
from tokenmdp.prompting.choose import Chooser
from tokenmdp.prompting.features import Embed, Features
from tokenmdp.prompting.proxy import Boosted, Constant, Crossed, Logistic, Proxy
from tokenmdp.prompting.stacked import Stacked
from tokenmdp.stats import Interval

FILES = ("chooser.json", "chooser.safetensors")
KINDS: dict[str, type] = {"constant": Constant, "logistic": Logistic, "boosted": Boosted, "stacked": Stacked}
WEIGHTS = ("intercept", "common", "own", "count")  # of a stack


def save(chooser: Chooser, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a fitted chooser.

    Args:
        about: what it was fitted on, for people: a log's name, hash and size.

    Raises:
        ValueError: its proxy is of a kind that is not kept.
    """
    told, learned = _parts(chooser.proxy)
    facts: dict[str, Any] = {
        "about": dict(about),
        "prompts": chooser.prompts,
        "prompt_ids": chooser.prompt_ids,
        "constant": chooser.constant,
        "gain": None if chooser.gain is None else chooser.gain._asdict(),
        "abstains": chooser.abstains,
        "upsilon": told,
    }
    arrays = {"charge": chooser.charge, "worth": chooser.worth, **_over("upsilon.", learned)}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()
    }  # a copy: members share
    save_file(tensors, folder / FILES[1])
    facts["sha256"] = _hash(facts, folder)
    (folder / FILES[0]).write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")


def _hash(facts: Mapping[str, Any], folder: Path) -> str:
    """Of everything that is kept, so that a file that was cut, edited or exchanged is noticed."""
    told = json.dumps({name: fact for name, fact in facts.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(told.encode() + (folder / FILES[1]).read_bytes()).hexdigest()


def load(folder: Path, embed: Embed | None = None) -> tuple[Chooser, dict[str, Any]]:
    """The chooser in a folder or in its `model/`, as a run's, and what it was fitted on.

    Args:
        embed: the sentence model it was fitted with; None for the one that is named there.

    Raises:
        ValueError: the folder holds no chooser, a damaged one, or one whose sentence model is neither given nor named.
    """
    folder = folder if (folder / FILES[0]).is_file() else folder / "model"
    if not all((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} holds no chooser ({' and '.join(FILES)}): make one with `tokenmdp prompts fit`")
    try:
        facts = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        whole = facts["sha256"] == _hash(facts, folder)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{folder} is damaged or was changed by hand ({' or '.join(FILES)}): fit the chooser again")
    if embed is None and facts["about"].get("sentences"):
        embed = sentences.embedder(str(facts["about"]["sentences"]))
    arrays = {name: tensor.numpy() for name, tensor in load_file(folder / FILES[1]).items()}
    chooser = Chooser(KINDS[facts["upsilon"]["kind"]])
    chooser.prompts, chooser.prompt_ids = tuple(facts["prompts"]), tuple(facts["prompt_ids"])
    chooser.constant, chooser.abstains = int(facts["constant"]), bool(facts["abstains"])
    chooser.gain = None if facts["gain"] is None else Interval(**facts["gain"])
    chooser.charge, chooser.worth = arrays["charge"], arrays["worth"]
    chooser.proxy = _made(facts["upsilon"], _under("upsilon.", arrays), embed)
    return chooser, facts["about"]


def _parts(proxy: Proxy) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A fitted proxy as what JSON can say and as numbers.

    Raises:
        ValueError: it is of a kind that is not kept.
    """
    kind = next((name for name, known in KINDS.items() if type(proxy) is known), None)
    if kind is None:
        raise ValueError(f"a {type(proxy).__name__} cannot be kept: fit one of {', '.join(KINDS)}")
    facts: dict[str, Any] = {"kind": kind}
    arrays: dict[str, NDArray[Any]] = {}
    if isinstance(proxy, Constant):
        facts |= {"overall": proxy.overall, "means": proxy.means}
    if isinstance(proxy, Crossed):
        facts["names"] = proxy.names
        for side, features in (("query", proxy.query_side), ("prompt", proxy.prompt_side)):
            facts[side] = features.facts()
            arrays |= _over(f"{side}.", features.arrays())
    if isinstance(proxy, Logistic):
        facts["bias"] = proxy.bias
        arrays["weight"] = proxy.weight
    if isinstance(proxy, Boosted):
        arrays |= _over("trees.", {name: tensor.numpy() for name, tensor in proxy.model.arrays().items()})
    if isinstance(proxy, Stacked):
        facts |= {"names": proxy.names, "members": []}
        arrays |= {name: getattr(proxy, name) for name in WEIGHTS}
        for number, member in enumerate(proxy.proxies):
            told, learned = _parts(member)
            facts["members"].append(told)
            arrays |= _over(f"{number}.", learned)
    return facts, arrays


def _made(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], embed: Embed | None) -> Proxy:
    """The proxy of `_parts`."""
    found: Proxy = KINDS[facts["kind"]]()
    if isinstance(found, Constant):
        found.overall, found.means = float(facts["overall"]), dict(facts["means"])
    if isinstance(found, Crossed | Stacked):
        found.names = {str(name): int(at) for name, at in facts["names"].items()}
    if isinstance(found, Crossed):
        found.query_side, found.prompt_side = (_features(side, facts, arrays, embed) for side in ("query", "prompt"))
    if isinstance(found, Logistic):
        found.weight, found.bias = arrays["weight"], float(facts["bias"])
    if isinstance(found, Boosted):
        found.model = Trees(**{name: torch.from_numpy(array) for name, array in _under("trees.", arrays).items()})
    if isinstance(found, Stacked):
        for name in WEIGHTS:
            setattr(found, name, arrays[name])
        found.proxies = [_made(told, _under(f"{n}.", arrays), embed) for n, told in enumerate(facts["members"])]
    return found


def _features(side: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], embed: Embed | None) -> Features:
    if "embedding" in facts[side]["kinds"] and embed is None:
        raise ValueError(f"the chooser reads the {side} by embeddings: give the sentence model it was fitted with")
    return Features.restored(facts[side], _under(f"{side}.", arrays), embed)


def _over(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {prefix + name: array for name, array in arrays.items()}


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
