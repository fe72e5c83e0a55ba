"""A GGUF checkpoint, dequantised into a Hugging Face model in float32.

GGUF is the file format of llama.cpp: metadata, then tensors in blocks of a few bits a weight. Three things stand
between it and a model one can train: names, blocks, and the order of the rows of two matrices. A Llama checkpoint in
GGUF has the query and key rows of each head reordered, because llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a
head where Hugging Face rotates (i, i + d/2):

    gguf[2i] = hf[i],   gguf[2i + 1] = hf[i + d/2]      for each head of width d

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor

from tokenmdp.models import fetch
from tokenmdp.models.gguf_tokenizer import build_tokenizer

CONVERSION = 1  # raise it when the conversion changes: directories converted by an older one are then made anew


@dataclass(frozen=True)
class _Family:
    """What one architecture name of the format means in Hugging Face terms.

    Attributes:
        config, model: the names of the Hugging Face classes.
        reordered: whether query and key rows are stored in llama.cpp's pairwise order.
    """

    config: str
    model: str
    reordered: bool


FAMILIES = {
    "llama": _Family("LlamaConfig", "LlamaForCausalLM", reordered=True),
    "qwen2": _Family("Qwen2Config", "Qwen2ForCausalLM", reordered=False),
}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def load_gguf(path: Path | str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The model and the tokenizer of a GGUF file, weights dequantised to float32.

    Raises:
        ValueError: not a GGUF file, or an architecture, a tensor or a rotary scaling that is not known here.
    """
    path = Path(path)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}): fetch it again") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    family = _family(metadata, path)
    state = _state_dict(reader, metadata, family, path)
    config = _config(metadata, family, state, path)
    loaded: Any = getattr(transformers, family.model).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"{path} does not hold the tensors of a {metadata['general.architecture']} model: {wrong}")
    tokenizer = build_tokenizer(metadata, config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{path} has {len(tokenizer)} tokens and {config.vocab_size} embeddings: each token needs one")
    return model, tokenizer


def converted(
    path: Path | str, folder: Path | str
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """`load_gguf`, kept as a Hugging Face directory in `folder`: the first call converts, later ones load.

    The directory gets its name when it is whole; a conversion that is killed leaves nothing under it.

    Raises:
        ValueError: as `load_gguf`.
        OSError: the folder cannot be written, or what is in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetch.sweep(folder.parent)
        with tempfile.TemporaryDirectory(prefix=fetch.PARTIAL, dir=folder.parent) as partial:
            model, tokenizer = load_gguf(path)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _name_whole(Path(partial), folder)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the reader says of a damaged file, the remedy is one
        raise OSError(
            f"the converted model in {folder} cannot be read ({error}): delete that folder, it is made anew"
        ) from error
    return model, tokenizer


def _name_whole(partial: Path, folder: Path) -> None:
    """Move a finished directory to its name; another process may have been faster, with an equal result."""
    inside = partial / "whole"
    inside.mkdir()
    for file in [f for f in partial.iterdir() if f != inside]:
        shutil.move(file, inside / file.name)
    try:
        os.rename(inside, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _family(metadata: Mapping[str, Any], path: Path) -> _Family:
    architecture = metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise ValueError(
            f"{path} holds a model of architecture {architecture!r}; {', '.join(FAMILIES)} are known here: use the "
            "model's Hugging Face directory or hub id instead"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise ValueError(
            f"{path} holds a mixture of {metadata[f'{architecture}.expert_count']} experts; only dense models are "
            "known here"
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"{path} stretches its rotary positions ({scaling}); only plain ones are known here: use the Hugging "
            "Face directory"
        )
    return FAMILIES[architecture]


def _state_dict(reader: gguf.GGUFReader, metadata: Mapping[str, Any], family: _Family, path: Path) -> dict[str, Tensor]:
    """Float32 weights under Hugging Face names."""
    architecture = metadata["general.architecture"]
    heads = metadata[f"{architecture}.attention.head_count"]
    kv_heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    state = {}
    for tensor in reader.tensors:
        name = _hugging_face_name(tensor.name, path)
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(np.array(value, dtype=np.float32, copy=True))
        if family.reordered and ".self_attn.q_proj." in name:
            weight = undo_pairs(weight, heads)
        elif family.reordered and ".self_attn.k_proj." in name:
            weight = undo_pairs(weight, kv_heads)
        state[name] = weight
    return state


def _hugging_face_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    found = _BLOCK.fullmatch(name)
    if found is None or found[2] not in _INNER:
        raise ValueError(
            f"{path} holds a tensor {name!r} that is not known here, so the model would be computed wrongly without "
            "it: use the model's Hugging Face directory or hub id instead"
        )
    return f"model.layers.{found[1]}.{_INNER[found[2]]}.{found[3]}"


def undo_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows (or biases) of each head from llama.cpp's pairwise order back to Hugging Face's halves.

    Args:
        weight: [heads · d, ...]; row 2i of a head goes to i, row 2i + 1 to i + d/2.
    """
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _config(
    metadata: Mapping[str, Any], family: _Family, state: Mapping[str, Tensor], path: Path
) -> transformers.PretrainedConfig:
    """The Hugging Face configuration, from metadata and, where they know better, the tensors' shapes."""
    architecture = metadata["general.architecture"]

    def of(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(
                f"{path} has no metadata {architecture}.{key}, so its model cannot be built: it is not a whole file"
            )
        return value

    heads = of("attention.head_count")
    head_dim = state["model.layers.0.self_attn.q_proj.weight"].shape[0] // heads
    if of("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"{path} rotates {of('rope.dimension_count')} of {head_dim} dimensions a head; only models that rotate "
            "all are known here"
        )
    extra: dict[str, Any] = {}
    if architecture == "llama":
        extra = {
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in state,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in state,
            "head_dim": head_dim,
        }
    made: transformers.PretrainedConfig = getattr(transformers, family.config)(
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=of("attention.head_count_kv", heads),
        max_position_embeddings=of("context_length"),
        rms_norm_eps=_shortest(of("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": _shortest(of("rope.freq_base", 10000.0))},
        tie_word_embeddings="lm_head.weight" not in state,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        **extra,
    )
    return made


def _shortest(value: float) -> float:
    """The decimal that was meant: the file keeps 1e-5 as a float32, 9.99999975e-06."""
    return float(str(np.float32(value)))
