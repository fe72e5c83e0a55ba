"""The verbs: fit, choose and evaluate, on logs with and without something to find, and no language model in sight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_choose import FEW, PROMPTS, log_of

from tokenmdp.lab.prompts import choose, evaluate, fit
from tokenmdp.models.policy import Policy
from tokenmdp.prompting import log as logs
from tokenmdp.prompting import stacked, stored
from tokenmdp.prompting.choose import Chooser
from tokenmdp.run import Run


@pytest.fixture(autouse=True)
def calls_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks a language model here is found out."""

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("a language model was asked")

    monkeypatch.setattr(Policy, "sample", asked)
    monkeypatch.setattr(Policy, "evaluate", asked)


def written(folder: Path, strength: float) -> Path:
    logs.write(log_of(strength), folder / "trials.jsonl")
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"query": q, "query_id": i}) + "\n" for i, q in enumerate(FEW))
    )
    return folder / "trials.jsonl"


@pytest.mark.parametrize("kind", ["constant", "logistic", "boosted", "logistic+boosted"])
def test_what_is_kept_says_what_was_fitted(tmp_path: Path, kind: str) -> None:
    log = log_of(0.8)
    chooser = Chooser(stacked.named(kind), abstain=False, cost=[0.5, 1.0], price=0.1).fit(log)
    stored.save(chooser, tmp_path / "kept", {"log": "here"})
    again, about = stored.load(tmp_path / "kept")
    assert about == {"log": "here"}
    new = [*FEW, "something else entirely", *log.queries[:50]]
    np.testing.assert_allclose(again.value(new), chooser.value(new), atol=1e-6)
    assert again.choose(new).tolist() == chooser.choose(new).tolist()
    assert (again.prompts, again.constant, again.gain) == (chooser.prompts, chooser.constant, None)


@pytest.mark.parametrize("damage", ["cut", "edited", "exchanged", "not json", "a list"])
def test_a_damaged_chooser_is_noticed(tmp_path: Path, damage: str) -> None:
    chooser = Chooser(stacked.named("constant"), abstain=False).fit(log_of(0.8))
    stored.save(chooser, tmp_path, {})
    facts, numbers = (tmp_path / name for name in stored.FILES)
    if damage == "cut":
        numbers.write_bytes(numbers.read_bytes()[:-9])
    elif damage == "exchanged":
        stored.save(
            Chooser(stacked.named("constant"), abstain=False, cost=[1.0, 2.0], price=1.0).fit(log_of(0.8)),
            tmp_path / "b",
            {},
        )
        numbers.write_bytes((tmp_path / "b" / stored.FILES[1]).read_bytes())
    else:
        facts.write_text(
            {"edited": facts.read_text().replace("nature", "stones"), "not json": "{", "a list": "[]"}[damage]
        )
    with pytest.raises(ValueError, match="is damaged or was changed by hand"):
        stored.load(tmp_path)


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a TwoTower cannot be kept"):
        stored.save(Chooser(stacked.named("two-tower"), abstain=False).fit(log_of(0.5)), tmp_path, {})
    with pytest.raises(ValueError, match="holds no chooser"):
        stored.load(tmp_path)


@pytest.mark.parametrize(("strength", "abstains"), [(0.8, False), (0.0, True)])
def test_fit_then_choose(tmp_path: Path, strength: float, abstains: bool) -> None:
    trials = written(tmp_path, strength)
    with Run.open(tmp_path / "fit", {}, 0) as run:
        found = fit.main(fit.Config(trials=str(trials), proxy="logistic"), run)
    assert found["abstains"] is abstains
    cfg = choose.Config(model=str(tmp_path / "fit"), queries=str(tmp_path / "queries.jsonl"), calls=1)
    with Run.open(tmp_path / "choose", {}, 0) as run:
        made = choose.main(cfg, run)
    rows = [json.loads(line) for line in (tmp_path / "choose/choices.jsonl").read_text().splitlines()]
    assert [row["query_id"] for row in rows] == ["0", "1"]
    if abstains:
        assert made["share_best_constant"] == 1.0
    else:
        assert [row["prompts"] for row in rows] == [[PROMPTS[0]], [PROMPTS[1]]]


def test_evaluate_says_whether_choosing_pays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = written(tmp_path, 0.8)
    with Run.open(tmp_path / "run", {}, 0) as run:
        found = evaluate.main(
            evaluate.Config(trials=str(trials), proxies="constant,logistic", choice="logistic", folds=3), run
        )
    assert found["verdict"].startswith("Choosing a prompt per query pays here")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["choices"]["abstaining"]["over_constant"]["low"] > 0
    assert summary["choices"]["oracle"]["reward"]["mean"] >= summary["choices"]["logistic"]["reward"]["mean"]
    assert (
        summary["prediction"]["constant"]["auc_within_prompt"]
        < 0.6
        < summary["prediction"]["logistic"]["auc_within_prompt"]
    )
    assert "over the best constant" in capsys.readouterr().out
    page = (tmp_path / "run/report.html").read_text()
    assert "Where the choice changed the answer" in page
    assert all(text in page for text in PROMPTS)
    rows = summary["by_cluster"]
    assert sum(row["queries"] for row in rows) == summary["facts"]["queries"]
    assert {row["after"] - row["before"] for row in summary["changed"]} == {1.0, -1.0}
    assert 0 < summary["moved"]["both_tried"] == summary["moved"]["queries"] < summary["facts"]["queries"]


def test_a_published_split_that_leaks_is_stopped(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        for part in ("train", "test"):
            query = f"question {i}" if i < 30 else f"{part} question {i} {'of another kind' * (part == 'test')}"
            rows.append({"query": query, "split": part, "correct": {"a": i % 2, "b": (i // 2) % 2}})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = evaluate.Config(trials=str(tmp_path / "t.jsonl"), proxies="constant", choice="neighbours", published=True)
    with Run.open(tmp_path / "run", {}, 0) as run, pytest.raises(ValueError, match="of the 60 held-out queries repeat"):
        evaluate.main(cfg, run)


def judged_log(
    folder: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str, str]:
    """What evaluate says of a log: its summary, what it printed, and its page."""
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = evaluate.Config(trials=str(folder / "t.jsonl"), proxies="constant", choice="logistic", folds=3)
    with Run.open(folder / "run", {}, 0) as run:
        evaluate.main(cfg, run)
    summary = json.loads((folder / "run/summary.json").read_text())
    return summary, capsys.readouterr().out, (folder / "run/report.html").read_text()


def test_a_log_with_answers_says_what_asking_all_would_earn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three prompts; the second is surest where it is wrong, and the third says what the first says."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        for p, right in enumerate((rng.random() < 0.6, rng.random() < 0.3)):
            said = i if right else 1000 + i
            trial = {"query": f"What is {i} + 0?", "prompt_id": "ab"[p], "response": str(said), "reward": float(right)}
            rows.append({**trial, "confidence": -0.1 if p and not right else -0.5})
        rows.append({**rows[-2], "prompt_id": "c"})
    summary, said, page = judged_log(tmp_path, rows, capsys)
    assert summary["choices"]["vote"]["calls"] == 3
    assert summary["choices"]["vote"]["reward"]["mean"] == pytest.approx(
        np.mean([row["reward"] for row in rows if row["prompt_id"] == "a"])
    )
    assert summary["choices"]["confidence"]["reward"]["mean"] < summary["choices"]["vote"]["reward"]["mean"]
    assert "confidence" in said
    assert "vote" in page


def test_estimates_come_with_what_the_log_is_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        p = int(rng.random() < 0.5)
        word = ("cat", "saw")[i % 2]
        reward = float(rng.random() < (0.8 if p == i % 2 else 0.2))
        rows.append({"query": f"the {word} number {i}", "prompt_id": "ab"[p], "reward": reward, "propensity": 0.5})
    summary, said, page = judged_log(tmp_path, rows, capsys)
    worth = summary["choices"]["logistic"]["overlap"]
    assert 150 < worth["effective"] < 250
    assert worth["trials"] == 400
    # Each query met one prompt, so of no query is it known what another would have done; kinds are estimated, too.
    assert summary["moved"]["queries"] > 100
    assert summary["moved"]["both_tried"] == 0
    assert summary["changed"] == []
    assert "on 0 of these the log tried both" in page
    gains = [row["over_constant"] for row in summary["by_cluster"] if "over_constant" in row]
    assert any(gain["low"] > 0 for gain in gains)
    assert "worth, questions" in said
    assert "largest weight" in page


def test_what_the_log_does_not_tell_is_no_figure_on_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"query": f"number {i}", "prompt_id": "ab"[i % 2], "reward": float(rng.random() < 0.5), "propensity": 1.0}
        for i in rng.permutation(400).tolist()
    ]
    summary, said, page = judged_log(tmp_path, rows, capsys)
    rows_of = summary["choices"]
    assert summary["verdict"] == f"Nothing can be told: {rows_of[summary['choice']]['untold']}."
    assert "the propensities are too large" in said
    assert "the log does not say" in page
    assert "Not shown, for the log does not tell what they earn: random, best constant (train)" in page
    assert "mean weight" in said
    assert all("[" not in line for line in said.splitlines() if line.startswith(("│ random", "│ logistic")))


def test_a_constant_that_differs_between_folds_is_named_with_its_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts that are equally good: the one that was better on the other folds is the worse on its own."""
    rows = []
    for i in range(200):
        good = i // 2 % 2  # each prompt is right on half of the queries, and which half no word of the query tells
        for p, prompt in enumerate("ab"):
            rows.append({"query": f"number {i}", "prompt_id": prompt, "reward": float(p == good)})
    summary, said, _ = judged_log(tmp_path, rows, capsys)
    assert " on " in summary["best_constant"]
    assert summary["choices"]["best constant (train)"]["reward"]["mean"] < 0.5
    over = summary["over_one_constant"]
    assert over["mean"] < summary["choices"][summary["choice"]]["over_constant"]["mean"]
    assert "differs between folds" in said.replace("\n", " ")
