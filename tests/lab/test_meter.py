"""The meter against the enumerated truth, and what it says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drift_world import PROMPT, Cloner, expert
from tokenmdp import growth
from tokenmdp.experts import Worked
from tokenmdp.lab import meter
from tokenmdp.lab.report import meter_page
from tokenmdp.models import tiny
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import drift
from tokenmdp.types import Batch, Prompt

LENGTHS = [2, 4, 8, 16]
ERROR = 0.03
PROMPTS = [Prompt(PROMPT.ids, PROMPT.text, row, PROMPT.columns) for row in range(24)]


def measured(kind: str, folder: Path, samples: int = 50) -> meter.Measured:
    """The cloner against the exact expert: 24 prompts that are all the same."""
    student: Any = Cloner(ERROR)
    cfg = meter.Config(max_new_tokens=LENGTHS[-1], samples=samples, chunk=10)
    with Run.open(folder, {}, 0) as run:
        return meter.measure(cfg, student, meter.Exact(expert(kind), student), PROMPTS, run)


@pytest.mark.parametrize(
    ("kind", "truth"),
    [("narrow", growth.worst_case(ERROR, LENGTHS)), ("recoverable", ERROR * np.asarray(LENGTHS))],
)
def test_costs_and_exponents_are_those_of_the_enumeration(kind: str, truth: Any, tmp_path: Path) -> None:
    found = meter.summary([measured(kind, tmp_path / "run")], LENGTHS)
    for name in meter.KINDS:
        # 1,200 responses: four standard errors of a count below 16 whose spread is below that of one mistake for ever
        cost = np.array([c["mean"] for c in found["cost"][name]])
        error = 4 * np.sqrt(truth * np.asarray(LENGTHS) / 1200)
        np.testing.assert_array_less(np.abs(cost - truth), error + 1e-9)
    if kind == "recoverable":  # the chance of a mistake is the same in every state: nothing varies
        np.testing.assert_allclose(cost_of(found, "distance"), truth, rtol=1e-6)
        assert found["exponent"]["distance"]["mean"] == pytest.approx(1.0)
        assert "low" not in found["exponent"]["distance"]
    else:
        slope = found["exponent"]["distance"]
        assert slope["low"] < float(growth.exponent(LENGTHS, truth)[0]) < slope["high"]
        assert slope["low"] > 1.3
        assert found["exponent"]["mistakes"]["low"] > 1.3
    # In the expert's states the error is exact, and its own responses hold no mistake.
    assert found["error"]["shown_states"] == {"mean": pytest.approx(ERROR, rel=1e-6)}
    assert found["teachers_own_mistakes_a_step"] == {"mean": 0.0}
    assert found["worst_case"]["cost"] == pytest.approx(growth.worst_case(ERROR, LENGTHS), rel=1e-5)
    assert found["worst_case"]["bound_cloning"][-1] == pytest.approx(256 * ERROR, rel=1e-5)
    assert found["still_going"] == [1.0] * 4


def cost_of(found: dict[str, Any], kind: str) -> list[float]:
    return [row["mean"] for row in found["cost"][kind]]


def test_a_run_that_was_finished_is_read_again(tmp_path: Path) -> None:
    first = measured("narrow", tmp_path / "a", samples=2)
    again = meter.Measured.of(json.loads(json.dumps(first.plain())))
    for kind in meter.KINDS:
        np.testing.assert_array_equal(first.own[kind], again.own[kind])
    assert meter.summary([first], LENGTHS) == meter.summary([again], LENGTHS)


def test_several_seeds_are_one_summary(tmp_path: Path) -> None:
    students = [measured("narrow", tmp_path / str(s), samples=4) for s in range(3)]
    both = meter.summary(students, LENGTHS, shared_prompts=True)
    alone = [meter.summary([m], LENGTHS) for m in students]
    assert cost_of(both, "mistakes") == pytest.approx(np.mean([cost_of(s, "mistakes") for s in alone], axis=0))
    with pytest.raises(TypeError, match="say shared_prompts"):
        meter.summary(students, LENGTHS)
    # A mistake more or less is much for two prompts, but no cost is below 0.
    few = [
        meter.Measured(
            {kind: cost[:2] for kind, cost in m.own.items()},
            {kind: cost[:2] for kind, cost in m.shown.items()},
            m.going[:2],
            m.shown_going[:2],
        )
        for m in students
    ]
    assert meter.summary(few, LENGTHS, shared_prompts=True)["cost"]["mistakes"][-1]["low"] == 0.0
    # Copies of one student on the same prompts are no new evidence of its cost.
    copies = meter.summary([students[0]] * 3, LENGTHS, shared_prompts=True)
    widths = [np.ptp([found["cost"]["mistakes"][-1][end] for end in ("low", "high")]) for found in (copies, alone[0])]
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_a_teacher_model_is_compared_state_by_state(tmp_path: Path) -> None:
    student, teacher = (tiny.tiny(seed=seed).freeze() for seed in (0, 1))
    guide = meter.Model(teacher, student)
    prompts = [student.prompt(text, row) for row, text in enumerate(("ab", "c"))]
    batch = student.sample(prompts, 2, Sampling(5), torch.Generator().manual_seed(0))
    found = meter.costs(student, guide, batch, temperature=0.7)
    for row in range(len(batch)):
        for t in batch.action[row].nonzero()[:, 0].tolist():
            read = batch.tokens[row : row + 1, :t]
            ours, theirs = (torch.softmax(p.model(read).logits[0, -1] / 0.7, -1) for p in (student, teacher))
            assert float(found["distance"][row, t]) == pytest.approx(float((ours - theirs).abs().sum() / 2), abs=1e-5)
            assert float(found["mistakes"][row, t]) == float(theirs.argmax() != batch.tokens[row, t])
        assert float(found["distance"][row][~batch.action[row]].sum()) == 0
    # Against itself a student has no distance anywhere, and its own favourite is not always what it samples.
    cfg = meter.Config(max_new_tokens=8, samples=2, lengths=2)
    with Run.open(tmp_path / "run", {}, 0) as run:
        same = meter.summary([meter.measure(cfg, student, meter.Model(student, student), prompts, run)], [4, 8])
    assert cost_of(same, "distance") == [0.0, 0.0]
    assert same["exponent"]["distance"]["mean"] is None
    assert same["error"]["ratio"]["mean"] is None
    assert same["teachers_own_mistakes_a_step"]["mean"] > 0.5  # near uniform over a hundred characters
    assert "cannot be told" in meter.words(same, "a", "b", False)[0]
    assert "No cost was seen" in meter_page.render(same, ["nothing"], "a against a")
    assert json.loads(json.dumps(same, allow_nan=False)) == same


def test_other_vocabularies_and_silent_experts_are_refused() -> None:
    student = tiny.tiny()
    with pytest.raises(ValueError, match="different vocabularies"):
        meter.Model(tiny.tiny(["words to learn tokens from, some of them"], vocabulary=280), student)
    shown = drift.load(student, horizon=4, noise=0.0, count=26).demonstrations
    assert shown is not None
    guide = meter.Exact(Worked(shown), student)
    batch = student.sample(list(shown.prompts[:2]), 1, Sampling(4), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="answers wherever the student gets to"):
        meter.costs(student, guide, batch, 1.0)


def test_an_expert_that_ends_its_answer_is_followed_to_there() -> None:
    student = tiny.tiny()
    task = drift.load(student, horizon=3)
    prompts = list(task.train[:2])

    class Brief:
        """Says `#` and ends."""

        name = "brief"

        def __call__(self, batch: Batch) -> Any:
            assert task.expert is not None
            told = task.expert(batch)
            first = batch.action & (batch.action.cumsum(1) == 1)
            return type(told)(torch.where(batch.action & ~first, student.eos_ids[0], told.token), told.known)

    found = meter.Exact(Brief(), student).respond(prompts, 4, Sampling(6), torch.Generator())
    assert len(found) == 2
    assert found.ended.tolist() == [True, True]
    assert found.action.sum(-1).tolist() == [2, 2]


def figures(slope: dict[str, Any], going: float = 1.0) -> dict[str, Any]:
    cost = [{"mean": 0.1 * T, "low": 0.09 * T, "high": 0.11 * T} for T in (4, 8)]
    one = {"mean": 0.1, "low": 0.05, "high": 0.2}
    return {
        "lengths": [4, 8],
        "cost": {"distance": cost, "mistakes": cost},
        "exponent": {"distance": slope, "mistakes": slope},
        "error": {"own_states": one, "shown_states": one, "ratio": one},
        "worst_case": {"cost": [0.9, 3.0], "exponent": 1.7, "bound_cloning": [1.6, 6.4], "linear": [0.4, 0.8]},
        "still_going": [1.0, going],
        "by_step": {"own": [0.1] * 8, "shown": [0.1] * 8},
    }


def test_the_words_follow_the_interval() -> None:
    cases = (
        ({"mean": 1.8, "low": 1.6, "high": 2.0}, "errors compound"),
        ({"mean": 1.1, "low": 0.9, "high": 1.3}, "no sign of compounding"),
        ({"mean": 0.5, "low": 0.4, "high": 0.6}, "errors do not compound"),
        ({"mean": 1.8}, "cannot be told"),
    )
    for slope, said in cases:
        words = meter.words(figures(slope), "student", "teacher", True)
        assert said in words[0]
        assert words[-3:] == list(meter.PROMISES)
        assert not any("reach step" in line for line in words)
    assert any("50% of the responses reach step 8" in w for w in meter.words(figures(cases[0][0], 0.5), "s", "t", True))


def test_the_page_escapes_and_shows() -> None:
    page = meter_page.render(figures({"mean": 1.8, "low": 1.6, "high": 2.0}), ["it <grows>"], "<b>me</b>")
    assert "it &lt;grows&gt;" in page
    assert "<b>me</b>" not in page
    assert page.count('<svg class="chart"') == 2
    assert "worst case" in page
    assert "0.800 (0.72 to 0.88)" in page


def test_the_verb_from_end_to_end(tmp_path: Path) -> None:
    cfg = meter.Config(student="tiny", prompts="drift:recoverable", most=4, samples=2, max_new_tokens=8, lengths=3)
    with Run.open(tmp_path / "run", {}, 0) as run:
        found = run.finish(meter.main(cfg, run))
    assert found["lengths"] == [2, 4, 8]
    assert (tmp_path / "run" / "meter.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4
    # It knows nothing: each step is a mistake, until it says by chance that it is over.
    assert found["cost"]["distance"][0]["mean"] == pytest.approx(2 * 0.98, abs=0.15)
    assert found["still_going"][-1] < 0.9
    assert any("reach step 8" in line for line in found["verdict"])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    with (
        Run.open(tmp_path / "none", {}, 0) as run,
        pytest.raises(ValueError, match="no exact expert to ask: name a teacher model by --teacher"),
    ):
        meter.main(meter.Config(student="tiny", prompts=str(prompts)), run)


@pytest.mark.parametrize(("changes", "message"), [({"lengths": 1}, "lengths=1"), ({"temperature": 0.0}, "positive")])
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meter.Config(**changes)
