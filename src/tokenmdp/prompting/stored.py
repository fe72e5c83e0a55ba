"""A chooser on disk: a table of numbers and a JSON file; nothing that is read back can run code.

chooser.json          prompts, the best constant one, the gain, which proxy, vocabularies
chooser.safetensors   what the proxy and its features learned
"""

from __future__ import annotations

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
from tokenmdp.stats import Interval

FILES = ("chooser.json", "chooser.safetensors")
KINDS: dict[str, type] = {"constant": Constant, "logistic": Logistic, "boosted": Boosted}


def save(chooser: Chooser, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a fitted chooser.

    Args:
        about: what it was fitted on, for people: a log's name, hash and size.

    Raises:
        ValueError: its proxy is of a kind that is not kept.
    """
    kind = next((name for name, known in KINDS.items() if type(chooser.proxy) is known), None)
    if kind is None:
        raise ValueError(f"a {type(chooser.proxy).__name__} cannot be kept: fit one of {', '.join(KINDS)}")
    facts: dict[str, Any] = {
        "about": dict(about),
        "proxy": kind,
        "prompts": chooser.prompts,
        "constant": chooser.constant,
        "gain": None if chooser.gain is None else chooser.gain._asdict(),
        "abstains": chooser.abstains,
    }
    arrays: dict[str, NDArray[Any]] = {"charge": chooser.charge}
    proxy = chooser.proxy
    if isinstance(proxy, Constant):
        facts |= {"overall": proxy.overall, "means": proxy.means}
    if isinstance(proxy, Crossed):
        facts["names"] = proxy.names
        for side, features in (("query", proxy.query_side), ("prompt", proxy.prompt_side)):
            facts[f"{side}_features"] = features.facts()
            arrays |= {f"{side}.{name}": array for name, array in features.arrays().items()}
    if isinstance(proxy, Logistic):
        facts["bias"] = proxy.bias
        arrays["weight"] = proxy.weight
    if isinstance(proxy, Boosted):
        arrays |= {f"trees.{name}": tensor.numpy() for name, tensor in proxy.model.arrays().items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    save_file(tensors, folder / FILES[1])
    (folder / FILES[0]).write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path, embed: Embed | None = None) -> tuple[Chooser, dict[str, Any]]:
    """The chooser in a folder or in its `model/`, as a run's, and what it was fitted on.

    Args:
        embed: the sentence model it was fitted with; None for the one that is named there.

    Raises:
        ValueError: the folder holds no chooser, or one whose sentence model is neither given nor named.
    """
    folder = folder if (folder / FILES[0]).is_file() else folder / "model"
    if not all((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} holds no chooser ({' and '.join(FILES)}): make one with `tokenmdp prompts fit`")
    facts = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    if embed is None and facts["about"].get("sentences"):
        embed = sentences.embedder(str(facts["about"]["sentences"]))
    arrays = {name: tensor.numpy() for name, tensor in load_file(folder / FILES[1]).items()}
    chooser = Chooser(KINDS[facts["proxy"]])
    chooser.prompts = tuple(facts["prompts"])
    chooser.constant, chooser.abstains = int(facts["constant"]), bool(facts["abstains"])
    chooser.gain = None if facts["gain"] is None else Interval(**facts["gain"])
    chooser.charge = arrays["charge"]
    chooser.proxy = _proxy(facts, arrays, embed)
    return chooser, facts["about"]


def _proxy(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], embed: Embed | None) -> Proxy:
    found: Proxy = KINDS[facts["proxy"]]()
    if isinstance(found, Constant):
        found.overall, found.means = float(facts["overall"]), dict(facts["means"])
    if isinstance(found, Crossed):
        found.names = {str(name): int(at) for name, at in facts["names"].items()}
        found.query_side, found.prompt_side = (_features(side, facts, arrays, embed) for side in ("query", "prompt"))
    if isinstance(found, Logistic):
        found.weight, found.bias = arrays["weight"], float(facts["bias"])
    if isinstance(found, Boosted):
        found.model = Trees(**{name: torch.from_numpy(array) for name, array in _under("trees.", arrays).items()})
    return found


def _features(side: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], embed: Embed | None) -> Features:
    settings = facts[f"{side}_features"]
    if "embedding" in settings["kinds"] and embed is None:
        raise ValueError(f"the chooser reads the {side} by embeddings: give the sentence model it was fitted with")
    return Features.restored(settings, _under(f"{side}.", arrays), embed)


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
