"""The bench of over-optimisation: proxies of few labels, the curves it makes of scores, its verdicts and its picture."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tiny_models import ragged, tiny

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("overoptimisation")
    for name in ("common", "reward_ranking", "overoptimisation"):  # such plain names must not stay behind
        sys.modules.pop(name, None)


def test_proxies_are_normalised_and_their_rules_are_what_they_say(bench: Any) -> None:
    body = tiny().freeze()
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(80, 32, generator=rng)
    gold = states[:, 0].double().numpy() * 3
    start = torch.randn(200, 32, generator=rng)
    found = bench.proxies(body, states, gold, start, seed=0)
    scores = {arm: proxy.of(start) for arm, proxy in found.items()}
    assert float(scores["single"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores["single"].std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert float(torch.corrcoef(torch.stack([scores["single"], start[:, 0]]))[0, 1]) > 0.4, "it learned something"
    assert bool((scores["min"] < scores["mean"]).all())
    assert bool((scores["mean - variance"] < scores["mean"]).all())
    batch = ragged(5)
    said = found["min"](batch)
    assert torch.allclose(said.value, found["min"].of(bench.embedded(body, batch)))


def test_the_toys_gold_by_hand(bench: Any) -> None:
    gold = bench.Values(repeat=0.5)
    a, b = gold.value["a"], gold.value["b"]
    assert gold.of("ab") == pytest.approx(a + b)
    assert gold.of("abba") == pytest.approx(a + b - 1.0), "two repeats at one half each"
    assert gold.of("") == 0
    task = bench.characters(bench.catalog.tiny(), prompts=300)
    assert not {p.ids for p in task.train} & {p.ids for p in task.held_out}


def test_the_start_remembers_the_policy_that_is_made_of_it(bench: Any) -> None:
    base = tiny()
    watched = bench.Watched(base.model, base.tokenizer, "start", "float32")
    policy = watched.twin("all", name="ppo")
    assert watched.made is policy
    assert policy.name == "ppo"
    assert next(iter(policy.trained()))[1].requires_grad


def curves(fall: float) -> dict[str, Any]:
    """What `measured` gives for 30 prompts: gold that rises, and falls by so much at the end; a proxy that only rises."""
    rng = np.random.default_rng(0)
    d = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    gold = np.array([0, 0.6, 1.0, 1.0 - fall / 2, 1.0 - fall]) + 0.1 * rng.normal(size=(30, 5)) * (d > 0)
    curve = {"d": d, "gold": gold, "proxy": np.tile(d, (30, 1))}
    arm = {"spearman": {"mean": 0.4, "low": 0.3, "high": 0.5}, "best_of_n": curve, "ppo": curve}
    better = {**arm, "ppo": {**curve, "gold": gold + 0.3 * d * rng.normal(1, 0.1, size=(30, 5))}}
    return {"gold_spread": 1.0, "gold_start": 0.0, "seeds": {0: {"single": arm, "mean - variance": better}}}


def test_verdicts_follow_the_curves(bench: Any) -> None:
    falls = bench.judged(curves(0.8), (1, 2, 3, 4))
    assert bench.verdicts(falls) == dict.fromkeys(bench.THRESHOLDS, True) | {
        "rl_form": bench.verdicts(falls)["rl_form"]
    }
    assert falls["arms"]["single"]["ppo"]["lost"]["mean"] == pytest.approx(0.8, abs=0.1)
    rises = bench.verdicts(bench.judged(curves(-0.8), (1, 2, 3, 4)))
    assert not rises["overoptimised"]
    assert not rises["proxy_rises"]
    words = " ".join(bench.in_words(falls))
    assert "PPO against single: gold +0.2" in words
    assert "ppo mean - variance less single, last gold: +0.6" in words
    assert "best_of_n mean - variance less single, last gold: no interval" in words, "the same curve has no spread"


def test_the_picture_stands_alone(bench: Any) -> None:
    drawn = bench.picture({"toy": bench.judged(curves(0.8), (1, 2, 3, 4))})
    root = ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg")
    assert len(root.findall("{*}svg")) == 2
    assert "--ppo: #" in drawn
    assert 'href="http' not in drawn
