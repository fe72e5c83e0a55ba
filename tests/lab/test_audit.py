"""The audit: silent where text and tokens are one, and it finds each way in which they are not, planted one at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenmdp.lab import audit
from tokenmdp.models.policy import Policy
from tokenmdp.run import Run
from tokenmdp.types import Batch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = (
    "{% for m in messages %}{{ '<' if m.role == 'user' else '>' }}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def policy(merges: bool = False, template: str = TEMPLATE) -> Policy:
    """A model with random weights that reads letters, and `ab` as one token too where there are merges."""
    words = {
        token: i for i, token in enumerate(["<eos>", *LETTERS, "<", ">", "?", " ", "ab"][: None if merges else -1])
    }
    tokenizer = Tokenizer(models.BPE(words, [("a", "b")] if merges else [], unk_token="?", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)
    made.chat_template = template
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, eos_token_id=0, bos_token_id=None, **shape)
    return Policy(LlamaForCausalLM(config), made).freeze()


def one(p: Policy, content: str, ids: list[int], ended: bool = False, stops: tuple[str, ...] = ()) -> dict[str, Any]:
    """What becomes of one response to a chat of one message."""
    messages = ({"role": "user", "content": content},)
    query = audit.Query("kind", p.prompt(messages), messages)
    text = p.response_text(query.prompt.ids, ids)
    b = Batch.build([query.prompt], [ids], texts=[text], ended=[ended], logp_mu=[[0.0] * len(ids)])
    return audit.looked_at(p, [query], b, stops, 1.0)[0]


def test_where_every_letter_is_a_token_nothing_changes() -> None:
    p = policy()
    spelled = p.encode("abc")
    row = one(p, "ca", [*spelled, 0], ended=True, stops=("bc",))
    assert not any(row[name] for name in audit.RATES)
    assert row["stop"] is False
    assert one(p, "ca", spelled, stops=("x",))["stop"] is None


def test_letters_that_would_merge_are_read_again_as_one() -> None:
    p = policy(merges=True)
    a, b, ab = (p.tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "ab"))
    assert p.encode("ab") == [ab]
    row = one(p, "c", [a, b])
    assert (row["reread"], row["joined"], row["next turn"]) == (True, True, True)
    row = one(p, "c", [ab, a])
    assert (row["reread"], row["joined"], row["next turn"]) == (False, False, False)


def test_a_merge_across_the_border_of_prompt_and_response() -> None:
    p = policy(merges=True)
    b = p.tokenizer.convert_tokens_to_ids("b")
    query = audit.Query("kind", p.prompt("ca"))
    batch = Batch.build([query.prompt], [[b]], texts=["b"], ended=[False], logp_mu=[[0.0]])
    row = audit.looked_at(p, [query], batch, (), 1.0)[0]
    assert (row["reread"], row["joined"], row["next turn"]) == (False, True, None)


def test_a_template_that_changes_a_reply_is_found_and_one_that_refuses_asks_nothing() -> None:
    stripping = policy(template=TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}"))
    ids = stripping.encode(" ab")
    assert one(stripping, "c", ids)["next turn"] is True
    assert one(stripping, "c", stripping.encode("ab"))["next turn"] is False
    refusing = policy(template=TEMPLATE + "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}")
    assert one(refusing, "c", ids)["next turn"] is None


def test_a_stop_string_inside_a_token() -> None:
    p = policy(merges=True)
    ab, c = (p.tokenizer.convert_tokens_to_ids(t) for t in ("ab", "c"))
    assert one(p, "x", [c, ab, c], stops=("b",))["stop"] is True
    assert one(p, "x", [c, ab, c], stops=("ab",))["stop"] is False
    assert one(p, "x", [c, ab, c], stops=("abc", "b"))["stop"] is False, "the first in the text counts"


def test_text_that_spells_a_special_token() -> None:
    p = policy()
    assert audit.special_tokens(p) == ["<eos>"]
    p.tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    p.tokenizer.add_special_tokens({"unk_token": "?"})
    assert audit.special_tokens(p) == ["<eos>", "<turn>"], "a question mark is one in pieces, too"
    p.tokenizer.add_special_tokens({"unk_token": "<turn>"})
    assert audit.special_tokens(p) == ["<eos>", "<turn>"], "some models name a mark of theirs as the unknown token"


def test_the_verb_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy(merges=True).save(tmp_path / "model")
    rows = [
        {"prompt": "abc", "kind": "plain"},
        {"prompt": [{"role": "user", "content": "cab"}], "kind": "chats"},
        {"prompt": "b"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = audit.Config(str(tmp_path / "model"), str(tmp_path / "q.jsonl"), samples=40, max_new_tokens=12)
    with Run.open(tmp_path / "run", {}, 0) as run:
        found = audit.main(cfg, run)
    lines = [json.loads(line) for line in (tmp_path / "run/audit.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["responses"]) for line in lines] == [
        ("plain", 40),
        ("chats", 40),
        ("yours", 40),
        ("all", 120),
    ]
    assert "next turn" in lines[1]
    assert "next turn" not in lines[0]
    assert 0 < lines[-1]["reread"]["mean"] == found["reread"] < 0.7
    assert "other tokens when their text is read again" in found["verdict"]
    assert "can spell <eos>" in found["verdict"]
    assert "chats" in capsys.readouterr().out
    none = {"mean": 0.0, "low": 0.0, "high": 0.3}
    nothing = "Nothing changed on the way through text in 9 responses to these queries (95 %: up to 30% may)."
    assert audit.in_words({"responses": 9, "reread": none, "next turn": none}, []) == nothing
    assert audit.in_words({"responses": 9, "reread": none}, []).endswith("the template refuses a second turn.")


def test_greedy_responses_to_a_named_task_have_no_paths_apart(tmp_path: Path) -> None:
    policy(merges=True).save(tmp_path / "model")
    cfg = audit.Config(str(tmp_path / "model"), "copying", samples=2, max_new_tokens=3, temperature=0.0)
    with Run.open(tmp_path / "run", {}, 0) as run:
        audit.main(cfg, run)
    lines = [json.loads(line) for line in (tmp_path / "run/audit.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["copying", "all"]
    assert lines[0]["responses"] == 2 * 26, "each letter once"
    assert lines[0]["paths"] is None


def test_a_kind_is_shown_as_it_is_written() -> None:
    rows = [{"kind": "[/x]", "prompt": i, **dict.fromkeys(audit.RATES, False), "paths": 0.1} for i in range(3)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(audit.table(audit.measured(rows), "[/y]"))
    said = console.export_text()
    assert "[/x]" in said
    assert "[/y]: what changes" in said


def test_a_stop_may_be_written_with_backslash_n_and_kinds_may_be_untold() -> None:
    p = policy()
    row = audit.Query("kind", p.prompt("c"))
    ids = p.encode("ab")
    batch = Batch.build([row.prompt], [ids], texts=["ab"], ended=[False], logp_mu=[[0.0] * len(ids)])
    assert audit.looked_at(p, [row], batch, (r"\n",), 1.0)[0]["stop"] is None, "no line break in it"


@pytest.mark.parametrize(("kind", "shown"), [(None, "yours"), ("", "yours"), ("all", "all, yours"), (3, "3")])
def test_kinds_of_queries(tmp_path: Path, kind: object, shown: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "ab", "kind": kind}))
    [query] = audit.asked(audit.Config(task=str(tmp_path / "q.jsonl")), policy())
    assert query.kind == shown


def test_settings_that_ask_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no empty string"):
        audit.Config(stops=("",))
    with pytest.raises(ValueError, match="samples=0"):
        audit.Config(samples=0)


def test_our_own_kinds_are_chats_where_there_is_a_template() -> None:
    p = policy()
    queries = audit.asked(audit.Config(), p)
    assert {q.kind for q in queries} == set(audit.KINDS)
    assert all(q.messages for q in queries)
    p.tokenizer.chat_template = None
    assert not any(q.messages for q in audit.asked(audit.Config(), p))
