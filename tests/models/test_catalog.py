"""Models by name: directories, adapters, GGUF files, and names that lead nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.tiny import tiny

IDS = torch.tensor([[5, 17, 23, 42, 8]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny(seed=1).save(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def copied(saved: Path, to: Path) -> Path:
    to.mkdir()
    for file in saved.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_tiny_by_name() -> None:
    assert catalog.load("tiny").fingerprint() == tiny().fingerprint()
    model, tokenizer = catalog.load_model("Tiny")
    assert isinstance(model, LlamaForCausalLM)
    assert tokenizer.chat_template is None


def test_a_directory_gives_the_policy_that_was_saved(saved: Path) -> None:
    policy = catalog.load(saved, device="cpu")
    assert policy.fingerprint() == tiny(seed=1).fingerprint()
    assert policy.name == "base"
    assert policy.encode("1+2=") == tiny().encode("1+2=")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}


def test_an_adapter_is_folded_into_its_base(saved: Path, tmp_path: Path) -> None:
    base = tiny(seed=1).model
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    want = logits(wrapped)
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=str(saved))
    policy = catalog.load(folder, device="cpu")
    torch.testing.assert_close(logits(policy.model), want, atol=1e-5, rtol=1e-5)
    assert (logits(base) - logits(tiny(seed=1).model)).abs().max() > 0.1, "the adapter does something"
    assert not any("lora" in name for name, _ in policy.model.named_parameters())

    change(folder / "adapter_config.json", base_model_name_or_path="tiny")  # the base is a catalog name
    assert logits(catalog.load_model(folder)[0]).shape == want.shape
    change(folder / "adapter_config.json", base_model_name_or_path=".")
    with pytest.raises(ValueError, match="names itself as its base"):
        catalog.load(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=str(saved))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapters"):
        catalog.load(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tinyy", "did you mean tiny?"),
        ("./nowhere/model", "there is no model at"),
        ("/nowhere/model", "there is no model at"),
        ("someone/some-model", "no directory here, nor is it a hub id that could be reached"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_was_tried(name: str, words: str) -> None:
    with pytest.raises(
        ValueError, match="a model is one of smollm2-135m-instruct, tiny, a Hugging Face directory"
    ) as caught:
        catalog.load(name)
    assert words in str(caught.value)


def test_a_folder_without_a_model_says_where_one_is(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"without config\.json.*did you mean .*base\?"):
        catalog.load(saved.parent)


def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(\.bin\) are not read"):
        catalog.load(folder)


def test_missing_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "m")
    change(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lack model\.layers\.2.*they would be random numbers"):
        catalog.load(folder)


def test_a_reward_model_is_no_policy(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    model.save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match="is a LlamaForSequenceClassification, not a causal language model"):
        catalog.load(tmp_path / "rm")


def test_a_model_without_an_end_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "m")
    change(folder / "config.json", eos_token_id=None)
    change(folder / "generation_config.json", eos_token_id=None)
    change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match=r"no end-of-text token.*set tokenizer\.eos_token"):
        catalog.load(folder)
    change(folder / "config.json", eos_token_id=5000)
    with pytest.raises(ValueError, match="ends its texts with token 5000, but has 99 tokens"):
        catalog.load(folder)


def test_a_tokenizer_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "m")
    tiny(["some words to learn"], 300).tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="tokens and 99 embeddings"):
        catalog.load(folder)


def test_a_text_that_would_begin_twice_is_refused() -> None:
    policy = tiny()
    catalog.check_beginning(policy)
    policy.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    catalog.check_beginning(policy)
    policy.tokenizer.chat_template = "{{ bos_token }}" + policy.tokenizer.chat_template
    with pytest.raises(ValueError, match="a chat given to tiny starts with <bos> twice"):
        catalog.check_beginning(policy)


def test_compute_is_passed_on(saved: Path) -> None:
    assert isinstance(catalog.load(saved, compute="float32"), Policy)
    with pytest.raises(ValueError, match="compute is 'float16'"):
        catalog.load(saved, compute="float16")
