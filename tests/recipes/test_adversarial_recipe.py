"""Adversarial imitation: its parts by hand, that it imitates on an enumerated task, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_inverse import H, build_adversarial
from tiny_models import EOS, batch, prompt, tiny
from tiny_recipes import LIKED, policy, responses
from tokenmdp.functional import adversarial as equations
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import adversarial
from tokenmdp.run import Run
from tokenmdp.testing.exact import Exact


def run_of(tmp_path: Path, **changes: Any) -> tuple[Policy, list[dict[str, float]], str]:
    cfg, pieces = build_adversarial(**changes)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        trained, _ = adversarial.train(cfg, *pieces, run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    log = tmp_path / "run" / "log.txt"
    return trained, lines, log.read_text() if log.exists() else ""


def test_the_discriminator_reads_the_token_it_judges() -> None:
    """Two rows that differ in their last token only differ there, and nowhere before; a critic would see nothing."""
    start = policy()
    found = adversarial.Discriminator(start.backbone.twin("all"), torch.ones(32))
    b = batch([([1, 2], [3, 4]), ([1, 2], [3, 5])])
    logit = found.logit(b).detach()
    assert float((logit[0, 2] - logit[1, 2]).abs()) < 1e-5
    assert float((logit[0, 3] - logit[1, 3]).abs()) > 1e-3
    assert not logit[:, :2].any()


def test_an_indifferent_discriminator_tells_nothing_apart() -> None:
    b = responses(6, 0.5, 1)
    theirs = torch.arange(6) < 2
    said = adversarial.told_apart(torch.zeros(b.tokens.shape), b, theirs, 5.0)
    assert said["discriminator/accuracies"] == 0.5
    sure = torch.where(theirs[:, None], 9.0, -9.0).expand(b.tokens.shape)
    said = adversarial.told_apart(sure, b, theirs, 5.0)
    assert said["discriminator/accuracies"] == 1.0
    assert said["discriminator/clipped_ratio"] == 1.0


def test_the_policy_comes_to_say_what_the_demonstrator_says(tmp_path: Path) -> None:
    """The discriminator learns faster than the policy; the other way round the policy runs in circles."""
    rates = {"learning_rate": 3e-3, "discriminator_learning_rate": 1e-2, "kl": 0.0, "entropy": 0.0}
    trained, lines, _ = run_of(tmp_path, steps=20, prompts=12, samples=4, minibatches=1, micro_tokens=4096, **rates)
    prompts = responses(8, 0.5, 3).prompts
    said = trained.sample(prompts, 16, Sampling(max_new_tokens=H), torch.Generator().manual_seed(0))
    assert float((said.tokens[said.action] == LIKED).float().mean()) > 0.3  # at the start 1/12; the demonstrator 0.7
    assert lines[-1]["sampling/sampling_logp_difference/max"] < 1e-3


def test_a_discriminator_that_is_sure_gives_finite_rewards(tmp_path: Path) -> None:
    """A head so large that every logit is far out: rewards are those of the bound, and the share is reported."""
    cfg, pieces = build_adversarial(reward="fairl", bound=2.0, discriminator_learning_rate=1e-6)
    with torch.no_grad():
        pieces[1].head.bias.fill_(-1e4)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        adversarial.train(cfg, *pieces, run)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["discriminator/clipped_ratio"] == 1.0
    least, most = (float(equations.fairl(torch.tensor(-2.0))) * slots for slots in (1, H))
    assert least - 1e-5 <= line["objective/scores"] <= most + 1e-5


def test_a_start_that_is_the_demonstrator_leaves_nothing_to_tell(tmp_path: Path) -> None:
    cfg, (start, discriminator, *_) = build_adversarial(
        steps=1, prompts=60, samples=2, discriminator_learning_rate=1e-6
    )
    prompts = [prompt(1 + i % 5, 2, row=i) for i in range(120)]
    own = start.sample(prompts, 1, Sampling(max_new_tokens=H), torch.Generator().manual_seed(3))
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        adversarial.train(cfg, start, discriminator, own.select(range(100)), own.select(range(100, 120)), run)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert abs(line["discriminator/logits_demonstrated"] - line["discriminator/logits_sampled"]) < 1e-2


def test_longer_demonstrations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"7 tokens .* at most 5.*max_new_tokens"):
        run_of(tmp_path, max_new_tokens=5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("reward", "wgan"), ("samples", 1), ("bound", 0.0), ("kl", -0.1), ("epochs", 0), ("clip", 0.0)],
)
def test_a_setting_outside_its_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{setting}.*{value}|{value}.*{setting}|{setting}"):
        build_adversarial(**{setting: value})


@pytest.mark.parametrize("reward", ["airl", "forward"])
def test_the_exact_divergence_falls_on_an_enumerated_task(reward: str, tmp_path: Path) -> None:
    """Every response of up to 3 of 4 words; the demonstrator repeats one of two words. Both KLs are sums over all."""
    words, horizon = 4, 3
    world = Exact((1,), words, horizon, eos=EOS)
    p = torch.full((len(world),), 0.1 / len(world), dtype=torch.float64)
    for word in (2, 3):
        p[world.responses.index((word,) * horizon)] += 0.45
    demonstrator = world.conditional(p)
    drawn = torch.multinomial(p, 300, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    shown = batch([([1], list(world.responses[i])) for i in drawn])
    start = tiny("llama", vocabulary=words, spread=0.15).freeze()
    judge = adversarial.Discriminator(tiny("llama", vocabulary=words, spread=0.15, seed=4).backbone.twin("all"))

    def divergence(model: Policy) -> float:
        with torch.no_grad():
            logp = model.evaluate(world.batch)["logp"].double()
        return float(world.kl(logp, demonstrator) if reward == "airl" else world.kl(demonstrator, logp))

    cfg = adversarial.Config(
        reward=reward, steps=18, prompts=24, samples=4, max_new_tokens=horizon, learning_rate=3e-3,
        discriminator_learning_rate=1e-2, discriminator_updates=3, micro_tokens=4096,
    )  # fmt: skip
    before = divergence(start)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        trained, _ = adversarial.train(cfg, start, judge, shown, shown.select(range(50)), run)
    assert divergence(trained) < 0.75 * before
