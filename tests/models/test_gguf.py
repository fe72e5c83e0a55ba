"""Reading GGUF files: small ones written here, and the embedded model where it is in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tokenmdp.models import catalog, fetch
from tokenmdp.models.gguf import converted, load_gguf, undo_pairs

HEADS, KV_HEADS, WIDTH, VOCABULARY = 4, 2, 64, 260


def byte_tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny_model(family: str, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": tied,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: a zero bias would hide a lost one
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores them, written out: row i of a head goes to 2i, row i + d/2 to 2i + 1."""
    out = np.empty_like(weight)
    d = weight.shape[0] // heads
    for h in range(heads):
        for i in range(d // 2):
            out[h * d + 2 * i] = weight[h * d + i]
            out[h * d + 2 * i + 1] = weight[h * d + i + d // 2]
    return out


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def write(
    path: Path,
    model: PreTrainedModel,
    family: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra_tensor: str | None = None,
    **metadata: str,
) -> Path:
    """A GGUF file of a model, matrices quantised as `kind`. The model's weights become what the file holds."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if family == "llama" else "qwen2")
    writer.add_token_list(["<end>", "<start>", "<pad>", *byte_tokens(), "ab"])
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    tied = model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = parameter.numpy().copy()
        quantised = kind != gguf.GGMLQuantizationType.F32 and stored.ndim == 2
        if quantised:  # blocks lie along a row, so that rows of blocks can be reordered as rows of numbers are
            shape = stored.shape
            stored = gguf.quants.quantize(stored, kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind).reshape(shape)))
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = in_pairs(stored, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if quantised else None)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_float_file_gives_back_the_model_it_came_from(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(family, tied)
    before = torch.get_rng_state()
    read, tokenizer = load_gguf(write(tmp_path / "m.gguf", model, family))
    assert torch.equal(torch.get_rng_state(), before), "reading draws no random numbers"
    assert torch.equal(logits(read), logits(model))
    assert read.config.tie_word_embeddings is tied
    assert (read.config.rms_norm_eps, read.config.rope_parameters["rope_theta"]) == (1e-5, 5000.0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0", "F16", "BF16"])
def test_blocks_are_dequantised_to_float32(tmp_path: Path, kind: str) -> None:
    model = tiny_model("llama")
    read, _ = load_gguf(write(tmp_path / "m.gguf", model, "llama", gguf.GGMLQuantizationType[kind]))
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert torch.equal(logits(read), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equal_to_what_transformers_makes_of_the_same_file(tmp_path: Path, family: str) -> None:
    path = write(tmp_path / "m.gguf", tiny_model(family), family, gguf.GGMLQuantizationType.Q8_0)
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ours, _ = load_gguf(path)
    torch.testing.assert_close(logits(ours), logits(peer), atol=1e-5, rtol=1e-5)


def test_row_order_by_hand() -> None:
    # One head of width 4: the file's rows 0 1 2 3 are Hugging Face's rows 0 2 1 3.
    rows = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    assert undo_pairs(rows, 1).flatten().tolist() == [0, 1, 2, 3]
    # Two heads keep to themselves, and a bias is reordered as a matrix is.
    assert undo_pairs(torch.tensor([0.0, 2, 1, 3, 4, 6, 5, 7]), 2).tolist() == list(range(8))


def test_the_converted_directory_is_made_once_and_whole(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write(tmp_path / "m.gguf", model, "llama")
    folder = tmp_path / "converted" / "m"
    first, tokenizer = converted(path, folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["m"], "nothing unfinished is left beside it"
    path.unlink()
    second, again = converted(path, folder)
    assert torch.equal(logits(first), logits(second))
    text = "ab 12\n<end>é"
    assert tokenizer(text)["input_ids"] == again(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_a_damaged_conversion_names_its_folder_and_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    converted(write(tmp_path / "m.gguf", tiny_model("llama"), "llama"), folder)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(OSError, match="delete that folder"):
        converted(tmp_path / "m.gguf", folder)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tiny_model("llama"), "llama", extra_tensor="blk.0.strange.weight")
    with pytest.raises(ValueError, match=r"blk\.0\.strange\.weight"):
        converted(path, tmp_path / "out" / "m")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_not_known_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"'falcon'; llama, qwen2 are known"):
        load_gguf(write(tmp_path / "a.gguf", model, "falcon"))
    with pytest.raises(ValueError, match="stretches its rotary positions \\(yarn\\)"):
        load_gguf(write(tmp_path / "b.gguf", model, "llama", llama__rope__scaling__type="yarn"))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        load_gguf(write(tmp_path / "c.gguf", model, "llama", extra_tensor="rope_freqs.weight"))
    (tmp_path / "d.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        load_gguf(tmp_path / "d.gguf")


# -- the embedded model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Path:
    if not fetch.is_cached(catalog.SMOLLM2) and not os.environ.get("TOKENMDP_TEST_EMBEDDED"):
        pytest.skip("the embedded model is not in the cache; set TOKENMDP_TEST_EMBEDDED=1 to fetch it (98 MB)")
    return fetch.fetch(*catalog.SMOLLM2)


def test_embedded_logits_equal_the_dequantised_reference(embedded: Path) -> None:
    # The sizes SmolLM2-135M-Instruct is published with, written here by hand: they do not come from the file.
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    peer = LlamaForCausalLM.from_pretrained(
        embedded.parent,
        gguf_file=embedded.name,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    assert {(type(p), p.dtype) for p in peer.parameters()} == {(torch.nn.Parameter, torch.float32)}, "dequantised"
    ours, _ = catalog.load_model("smollm2-135m-instruct")
    ids = torch.randint(0, 49152, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peer(ids).logits, atol=1e-5, rtol=1e-5)
    theirs = peer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
    for name in ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "head_dim"):
        assert getattr(ours.config, name) == getattr(config, name)
    assert (ours.config.bos_token_id, ours.config.eos_token_id, ours.config.pad_token_id) == (1, 2, 2)


def test_embedded_model_continues_as_a_language_model_does(embedded: Path) -> None:
    model, tokenizer = catalog.load_model("smollm2-135m-instruct")
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
