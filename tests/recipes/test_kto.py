"""KTO: the reference point is of the whole batch and of mismatched responses; it learns from labels alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS, batch, prompt
from tiny_preferences import build_kto, judged
from tiny_recipes import policy as fresh
from tokenmdp import stats
from tokenmdp.models import catalog
from tokenmdp.recipes import kto
from tokenmdp.run import Run
from tokenmdp.types import Batch


def run_it(
    folder: Path, data: tuple[Batch, torch.Tensor], **changes: Any
) -> tuple[Any, dict[str, Any], list[Any], str]:
    cfg, (start, *_) = build_kto(**{"steps": 20, "rows": 16, "evaluate_every": 10, "micro_tokens": 4000, **changes})
    with Run.open(folder, config={}, seed=0) as run:
        policy, figures = kto.train(cfg, start, *data, run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return policy, figures, lines, (folder / "log.txt").read_text()


def test_it_learns_from_labels_alone(tmp_path: Path) -> None:
    policy, figures, lines, said = run_it(tmp_path / "run", judged(160))
    # At the start r̂ = z = 0: 1 − σ(0) whatever the label.
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert figures["accuracy"] > 0.8
    assert figures["low"] < figures["accuracy"] <= figures["high"]
    assert figures["logp_chosen"] > figures["logp_chosen_before"]
    assert figures["logp_rejected"] < figures["logp_rejected_before"]
    assert lines[-1]["held_out/accuracies"] == figures["accuracy"]
    assert lines[-1]["rewards/chosen"] > 0 > lines[-1]["rewards/rejected"]
    reference = fresh().fingerprint()
    assert figures["reference"] == reference
    assert f"reference llama {reference}" in said
    assert policy.fingerprint() != reference


def test_responses_to_one_prompt_are_one_cluster() -> None:
    """Forty responses to forty prompts have Wilson's interval; each there five times, they are no more than they were."""
    cfg, (b, good) = kto.Config(), judged(40)
    b = replace(b, prompts=tuple(prompt(1 + i % 8, 1 + i // 8) for i in range(40)))
    now, before = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    once = kto.judge(cfg, b, before, now, good, now - before)
    assert (once["low"], once["high"]) == pytest.approx(stats.wilson(40 * once["accuracy"], 40)[1:])
    copies = [i for i in range(40) for _ in range(5)]
    often = kto.judge(cfg, b.select(copies), *(x[copies] for x in (before, now, good, now - before)))
    assert often["high"] - often["low"] == pytest.approx(once["high"] - once["low"], rel=0.1)


def test_means_are_over_the_rows_of_one_label(tmp_path: Path) -> None:
    """Every learned row is in the one step, and nothing moves: learned and held-out sums make up the whole data's."""
    both, label = judged(8)
    rows = [0, 2, 4, 1, 3]  # three good ones and two bad ones
    data = both.select(rows), label[rows]
    _, figures, lines, _ = run_it(tmp_path / "run", data, steps=1, rows=99, held_out=0.4, learning_rate=1e-12)
    total = kto.totals(fresh(), data[0])
    n_learned = 5 - figures["n_rows"]
    n_good = round(lines[0]["desirable_share"] * n_learned)
    for name, which, n in (("chosen", data[1], n_good), ("rejected", ~data[1], n_learned - n_good)):
        kept = figures.get(f"logp_{name}", 0.0) * (int(which.sum()) - n)  # none held out: no figure
        assert lines[0][f"logps/{name}"] * n + kept == pytest.approx(float(total[which].sum()), rel=1e-5)


def test_prompts_get_a_response_to_another_prompt() -> None:
    b = batch([([1], [5, EOS]), ([1], [6, EOS]), ([2], [7, 8, EOS]), ([3], [9, EOS])])
    wrong = kto.mismatched(b, context=64)
    said = [wrong.tokens[i][wrong.action[i]].tolist() for i in range(4)]
    # rows 0 and 1 share a prompt: row 0 takes row 2's response, not row 1's; the last row takes the first one's
    assert said == [[7, 8, EOS], [7, 8, EOS], [9, EOS], [5, EOS]]
    assert wrong.prompts == b.prompts
    # all prompts one: the next row's response, at least another draw
    one = kto.mismatched(b.select([0, 1]), context=64)
    assert [one.tokens[i][one.action[i]].tolist() for i in range(2)] == [[6, EOS], [5, EOS]]
    # what does not fit the context is cut
    cut = kto.mismatched(b, context=3)
    assert int(cut.length.max()) == 3


def test_the_reference_point_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    found = [run_it(tmp_path / str(n), judged(40), steps=3, micro_tokens=n)[2] for n in (1, 4000)]
    for one, other in zip(*found, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_an_unbalanced_choice_of_weights_is_said(tmp_path: Path) -> None:
    _, figures, _, said = run_it(tmp_path / "a", judged(40), steps=1, undesirable=4.0)
    assert figures["balance"] == pytest.approx(0.25, abs=0.1)
    assert f"1 to 1.33 is advised: set desirable={1 / figures['balance']:.3g}" in said
    assert "is advised" not in run_it(tmp_path / "b", judged(40), steps=1, desirable=1.2)[3]


def test_from_a_file_of_labels_to_a_saved_policy(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"say {i % 7}:", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(21)
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    cfg = kto.Config(model="tiny", data=str(tmp_path / "labels.jsonl"), steps=2, rows=4)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        figures = kto.main(cfg, run)
    assert catalog.load(str(figures["model"])).fingerprint() == figures["fingerprint"] != figures["reference"]
    assert figures["n_rows"] == 3, "a tenth of seven prompts is one, with three responses"


def test_labels_of_the_wrong_kind_or_number_are_errors(tmp_path: Path) -> None:
    b, label = judged(8)
    for wrong, words in (
        (label.long(), "labels of type torch.int64"),
        (label[:5], r"shape \(5,\) for 8 responses"),
        (torch.ones(8, dtype=torch.bool), "all 8 responses are labelled good"),
        (torch.zeros(8, dtype=torch.bool), "all 8 responses are labelled bad"),
    ):
        with pytest.raises(ValueError, match=words):
            run_it(tmp_path / "run", (b, wrong))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"undesirable": -1.0}, "the weights at least 0"),
        ({"rows": 1}, "needs at least 2"),
    ],
)
def test_settings_outside_their_range_are_errors(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kto.Config(**changes)


def test_a_weight_of_zero_is_a_choice(tmp_path: Path) -> None:
    _, figures, _, _ = run_it(tmp_path / "run", judged(8), steps=1, rows=4, desirable=0.0)
    assert figures["balance"] == 0


def test_one_response_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="one response alone"):
        kto.mismatched(batch([([1], [5, EOS])]), context=64)
