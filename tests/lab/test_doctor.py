"""The doctor's checks are silent on what is well, and each finds the fault that is planted for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import batch, prompt, tiny
from tokenmdp import cli
from tokenmdp.lab import checks
from tokenmdp.lab.checks import Finding, Patient
from tokenmdp.models import tiny as tiny_policies
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.tasks import data
from tokenmdp.types import Batch, Reward, Score

SAMPLING = Sampling(max_new_tokens=6)


def share(completions: list[str], **_: Any) -> list[float]:
    return [text.count("3") / 10 for text in completions]


def patient(policy: Policy | None = None, reward: Reward | None = None, **more: Any) -> Patient:
    policy = policy or tiny("llama", spread=0.3)
    prompts = [prompt(i, i + 1, row=i) for i in range(1, 7)]
    b = policy.sample(prompts, 3, SAMPLING, torch.Generator().manual_seed(0))
    reward = reward or FunctionReward(share, name="share")
    return Patient(policy.freeze(), prompts, b, 1.0, "all", SAMPLING, reward, reward(b), **more)


def status(found: Finding | None) -> str:
    assert found is not None
    return found.status


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_a_well_patient_fails_nothing(architecture: str) -> None:
    found = checks.look(patient(tiny(architecture, spread=0.3)))
    assert [one for one in found if one.status == "fail"] == []
    assert {"sampler and learner, T = 1", "sampler and learner, T = 0.7", "micro-batches", "score of a row"} <= {
        one.check for one in found
    }


class Drops(Policy):
    """What dropout left on would do: the learner's numbers change from call to call."""

    def evaluate(self, *args: Any, **more: Any) -> dict[str, torch.Tensor]:
        found = super().evaluate(*args, **more)
        return {name: x * (1 + 0.3 * torch.rand(x.shape)) for name, x in found.items()}


def test_a_learner_that_is_not_one_function_is_found() -> None:
    well = tiny("llama", spread=0.3)
    ill = patient(Drops(well.model, well.tokenizer, compute="float32"))
    assert [one.status for one in checks.sampler_and_learner(ill)] == ["fail", "fail"]
    assert status(checks.neighbours(ill)) == "fail"
    assert status(checks.start_is_reference(ill)) == "fail"
    assert status(checks.micro_batches(ill)) == "fail"


class Padded(Policy):
    """Padding that is seen: a row's numbers depend on how long its neighbours are."""

    def evaluate(self, batch: Batch, *args: Any, **more: Any) -> dict[str, torch.Tensor]:
        found = super().evaluate(batch, *args, **more)
        return {name: x * (1 + 0.05 * batch.tokens.shape[1]) for name, x in found.items()}


def test_padding_that_counts_is_found() -> None:
    well = tiny("llama", spread=0.3)
    ill = patient(Padded(well.model, well.tokenizer, compute="float32"))
    lengths = [[1], [1, 2, 3], [4, 5, 6, 7, 8], [2, 3]]
    ragged = replace(ill, sampled=batch([([9], row) for row in lengths]))
    assert status(checks.neighbours(ragged)) == "fail"
    assert status(checks.neighbours(replace(ragged, policy=well))) == "pass"


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}MARK\n{% endfor %}"


@pytest.mark.parametrize(("mark", "found"), [("<eos>", "pass"), ("<bos>", "fail"), ("", "fail")])
def test_a_turn_must_end_by_an_end(mark: str, found: str) -> None:
    policy = tiny_policies.tiny()
    policy.tokenizer.chat_template = TEMPLATE.replace("MARK", mark)
    asked = [policy.prompt("2+2="), policy.prompt("1+1=")]
    b = policy.sample(asked, 2, SAMPLING, torch.Generator().manual_seed(0))
    one = Patient(policy.freeze(), asked, b, 1.0, "all", SAMPLING)
    assert status(checks.end_of_turn(one)) == found
    assert status(checks.template_used(one)) == "warn"  # plain text, although there is a template
    chats = [policy.prompt([{"role": "user", "content": "2+2="}])]
    assert status(checks.template_used(replace(one, prompts=chats))) == ("warn" if mark == "" else "pass")
    policy.tokenizer.chat_template = None
    assert status(checks.end_of_turn(one)) == "pass"
    assert status(checks.template_used(one)) == "pass"


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("MARK", " <eos>"),  # a blank before the end
        TEMPLATE.replace("m['content']", "m['content'] | upper").replace("MARK", "<eos>"),
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE.replace("MARK", "<eos>"),
    ],
    ids=["blank", "capitals", "system"],
)
def test_a_template_with_habits_is_read_all_the_same(template: str) -> None:
    policy = tiny_policies.tiny()
    policy.tokenizer.chat_template = template
    asked = [policy.prompt("2+2=")]
    one = Patient(policy.freeze(), asked, policy.sample(asked, 2, SAMPLING, torch.Generator()), 1.0, "all", SAMPLING)
    assert status(checks.end_of_turn(one)) == "pass"
    assert status(checks.template_used(one)) == "warn"


def test_a_chat_whose_marks_are_plain_text_is_a_chat() -> None:
    policy = tiny_policies.tiny()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}=={% endif %}"
    )
    chats = [policy.prompt([{"role": "user", "content": "2+2"}]), policy.prompt([{"role": "user", "content": "1+2"}])]
    b = policy.sample(chats, 2, SAMPLING, torch.Generator())
    one = Patient(policy.freeze(), chats, b, 1.0, "all", SAMPLING)
    assert status(checks.template_used(one)) == "pass"
    assert status(checks.template_used(replace(one, prompts=[policy.prompt("2+2=")]))) == "warn"


def test_a_template_that_refuses_a_chat_is_an_error_that_says_so() -> None:
    policy = tiny_policies.tiny()
    policy.tokenizer.chat_template = "{{ raise_exception('I want a system message') }}"
    with pytest.raises(
        ValueError, match=r"refuses the messages of row 3 \(roles user\): TemplateError: I want a system message"
    ):
        policy.prompt([{"role": "user", "content": "2+2="}], row=3)
    asked = [policy.prompt("2+2=")]
    one = Patient(policy.freeze(), asked, policy.sample(asked, 2, SAMPLING, torch.Generator()), 1.0, "all", SAMPLING)
    assert status(checks.end_of_turn(one)) == "warn"


def test_weights_of_zero_have_no_gradient() -> None:
    policy = tiny("llama")
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.zero_()
    found = checks.ending_learned(patient(policy))
    assert status(found) == "fail"
    assert "has no gradient in what would train (all)" in found.says


def test_a_masked_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(checks.ending_learned(patient())) == "pass"
    real = data.demonstrations

    def masked(*args: Any) -> Batch:  # as masks made by `ids != pad` do where pad is the end
        b = real(*args)
        return replace(b, action=b.action & (b.tokens != 0))

    monkeypatch.setattr(data, "demonstrations", masked)
    found = checks.ending_learned(patient())
    assert status(found) == "fail"
    assert "masked" in found.says


def test_a_slow_path_and_a_short_horizon_are_worth_a_line() -> None:
    well = patient()
    assert status(checks.path_taken(well)) == "pass"
    slow = patient(tiny("gemma2", final_logit_softcapping=None))
    assert status(checks.path_taken(slow)) == "warn"
    assert status(checks.horizon(well)) == "warn"  # 61 words, near uniform: hardly any response ends in six
    ended = batch([([1], [2, 0]), ([1], [3, 0])])
    assert (
        status(checks.horizon(replace(well, sampled=replace(ended, ended=torch.ones(2, dtype=torch.bool))))) == "pass"
    )


# -- data ---------------------------------------------------------------------------------------------------------------


def test_cut_data_and_longer_winners_are_found() -> None:
    policy = tiny_policies.tiny().freeze()
    rows = [{"prompt": "1+1=", "chosen": "2" * (3 + i % 2), "rejected": "3"} for i in range(10)]
    one = replace(patient(), policy=policy, data=data.pairs(rows, policy, 4), max_tokens=4)
    assert status(checks.preferences(one)) == "warn"
    found = checks.cut_data(one)
    assert found is not None
    assert (found.status, found.figure) == ("warn", "5 of 20 responses (25.0%) were cut at max_tokens=4")
    even = [{"prompt": "1+1=", "chosen": "2" * (1 + i % 2), "rejected": "3" * (2 - i % 2)} for i in range(10)]
    one = replace(one, data=data.pairs(even, policy, 9), max_tokens=9)
    assert [status(checks.preferences(one)), status(checks.cut_data(one))] == ["pass", "pass"]
    short = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    found = checks.preferences(replace(one, data=data.pairs(short, policy, 9)))
    assert found is not None
    assert (found.status, found.figure) == ("warn", "100% of winners are shorter, 0 of 10 pairs are alike")
    same = [{**row, "rejected": row["chosen"]} for row in rows]
    assert status(checks.preferences(replace(one, data=data.pairs(same, policy, 9)))) == "fail"
    assert status(checks.preferences(replace(one, data=data.pairs([*even, *same[:3]], policy, 9)))) == "warn"
    assert checks.preferences(patient()) is None  # nothing was given


# -- rewards ------------------------------------------------------------------------------------------------------------


def scored(value: Callable[[list[str]], list[float | None]]) -> Patient:
    return patient(reward=FunctionReward(lambda completions, **_: value(completions), name="planted", max_missing=1.0))


def test_missing_verdicts_are_counted() -> None:
    assert status(checks.verdicts(scored(lambda texts: [1.0] * len(texts)))) == "pass"
    some = checks.verdicts(scored(lambda texts: [None if "2" in t else 1.0 for t in texts]))
    assert status(some) == "warn"
    assert status(checks.verdicts(scored(lambda texts: [None] * len(texts)))) == "fail"
    fallen = replace(patient(), score=None, fault="RewardFailure: no connection")
    assert status(checks.verdicts(fallen)) == "fail"
    assert checks.row_by_row(fallen) is None


def test_scores_without_spread_are_found() -> None:
    assert status(checks.spread(patient())) == "pass"
    assert status(checks.spread(scored(lambda texts: [0.5] * len(texts)))) == "fail"
    one = patient()
    assert one.score is not None
    value = torch.zeros_like(one.score.value)
    value[0] = 1.0  # one group of six varies
    assert status(checks.spread(replace(one, score=Score(value, one.score.verdict)))) == "warn"


def test_spread_is_not_told_of_too_little() -> None:
    one = patient()
    assert one.score is not None
    for rows in ([0, 3, 6], [0, 1, 2]):  # a response a prompt; one prompt
        few = replace(one, sampled=one.sampled.select(rows), score=one.score.select(rows))
        found = checks.spread(few)
        assert found is not None
        assert (found.status, found.figure.partition(",")[0]) == ("warn", "not measured")


def test_a_row_without_a_verdict_is_not_asked_alone() -> None:
    """Alone it would be all of its batch, more than may be missing; among others it is one of many."""
    reward = FunctionReward(
        lambda completions, **_: [None if "2" in t else 1.0 for t in completions], name="some", max_missing=0.9
    )
    assert status(checks.row_by_row(patient(reward=reward))) == "pass"


def test_a_score_that_is_the_length_is_found() -> None:
    well = patient()
    b = batch([([1], [2] * (1 + i % 5)) for i in range(30)])
    long = Score.of(b.action.sum(-1).float())
    found = checks.length_bias(replace(well, sampled=b, score=long))
    assert status(found) == "warn"
    other = Score.of((torch.arange(30) * 7 % 11).float())
    assert status(checks.length_bias(replace(well, sampled=b, score=other))) == "pass"
    assert checks.length_bias(replace(well, sampled=b, score=Score.of(torch.ones(30)))) is None


class Ranks:
    """A reward that looks at the neighbours: the rank among the rows it is shown."""

    name = "ranks"

    def __call__(self, b: Batch) -> Score:
        return Score.of(b.action.sum(-1).float().argsort().argsort().float())


def test_a_score_that_depends_on_neighbours_is_found() -> None:
    found = checks.row_by_row(patient(reward=Ranks()))
    assert status(found) == "fail"
    assert found is not None
    assert "a score is of its own row" in found.says


# -- the verb -----------------------------------------------------------------------------------------------------------


def test_the_verb_looks_prints_and_stops_where_something_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"{i}+1=", "chosen": "12", "rejected": "1"}) + "\n" for i in range(8))
    )
    (tmp_path / "graded.py").write_text(
        "def score(completions, **_):\n    return [len(set(c)) / 10 for c in completions]\n"
    )
    line = ["doctor", "--model", "tiny", "--task", "addition", "--data", str(pairs), "--out", str(tmp_path / "run")]
    assert cli.dispatch([*line, "--reward", f"{tmp_path / 'graded.py'}:score"]) == 0
    said = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"preferences", "length of the data", "verdicts"} <= {one["check"] for one in said["checks"]}
    assert said["warnings"] >= 1
    assert "what it means" in capsys.readouterr().out
    reward = tmp_path / "same.py"
    reward.write_text("def score(completions, **_):\n    return [1.0] * len(completions)\n")
    line = ["doctor", "--model", "tiny", "--task", "addition", "--reward", f"{reward}:score"]
    with pytest.raises(ValueError, match=r"1 of \d+ checks failed \(spread of the score"):
        cli.dispatch(line)
    reward.write_text("def score(completions, **_):\n    raise OSError('no connection')\n")
    with pytest.raises(ValueError, match=r"1 of \d+ checks failed \(verdicts: the reward failed"):
        cli.dispatch(line)
    assert "no connection" in capsys.readouterr().out
    with pytest.raises(ValueError, match="train is 'none', which trains nothing of a policy"):
        cli.dispatch([*line, "--train", "none"])
