"""Monitors: each fires on curves that show its signature, at the step where they do, and on nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tokenmdp import monitors
from tokenmdp.lab import monitor, report
from tokenmdp.run import Run

W = monitors.WINDOW
HEALTHY = {
    "objective/scores": lambda t, e: 0.4 + 0.01 * t + 0.03 * e,
    "objective/gold": lambda t, e: 0.4 + 0.01 * t + 0.03 * e,
    "objective/kl": lambda t, e: 0.1 * t,
    "completions/distinct_across": lambda t, e: 0.8 - 0.005 * t + 0.02 * e,
    "completions/mean_length": lambda t, e: 20 + 0.2 * t + e,
    "completions/clipped_ratio": lambda t, e: 0.2 + 0.02 * abs(e),
    "frac_reward_zero_std": lambda t, e: min(0.85, 0.3 + 0.01 * t + 0.05 * abs(e)),
    "no_verdict": lambda t, e: int(abs(e) > 2),
    "num_tokens": lambda t, e: 64 * (20 + 0.2 * t + e),
    "policy/approxkl_avg": lambda t, e: 0.01 * (1 + 0.3 * abs(e)),
    "held_out/nll": lambda t, e: 3.0 - 0.01 * t,
}
# What goes wrong from step 20 on.
PLANTED = {
    "hacking": {"objective/gold": lambda t, e: 0.4 - 0.01 * (t - 20) + 0.03 * e},
    "collapse": {"completions/distinct_across": lambda t, e: 0.1},
    "length": {"completions/mean_length": lambda t, e: 80 + e, "num_tokens": lambda t, e: 64 * (80 + e)},
    "cut": {"completions/clipped_ratio": lambda t, e: 0.9},
    "alike": {"frac_reward_zero_std": lambda t, e: 0.97},
    "unjudged": {"no_verdict": lambda t, e: 20},
    "falling": {"objective/scores": lambda t, e: 0.6 - 0.04 * (t - 20) + 0.03 * e},
    "leap": {"policy/approxkl_avg": lambda t, e: 0.01 if t != 25 else 0.5},
    "overfitting": {"held_out/nll": lambda t, e: 2.8 + 0.05 * (t - 20)},
}


def lines(planted: str = "", seed: int = 0, steps: int = 40) -> list[dict[str, float]]:
    draw, out = random.Random(seed), []
    for t in range(steps):
        curves = HEALTHY | (PLANTED[planted] if planted and t >= 20 else {})
        out.append({"step": t, **{name: curve(t, draw.gauss(0, 1)) for name, curve in curves.items()}})
    return out


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_is_left_alone(seed: int) -> None:
    assert monitors.watched(lines(seed=seed)).given == {}


@pytest.mark.parametrize("name", list(monitors.MONITORS))
def test_each_fires_on_its_own_failure_after_it_began(name: str) -> None:
    found = monitors.watched(lines(name)).given
    assert list(found) == [name]
    assert 20 < found[name].step < 40
    assert PLANTED.keys() == monitors.MONITORS.keys()


def test_deviations_are_those_of_the_noise_and_not_of_the_drift() -> None:
    # Differences of 1 from phase to phase: s² = 1/2. Ends 2 and 12 apart by 10, so 10 / (√½ · √(2/5)) = 22.36.
    rise = [float(t) for t in range(15)]
    assert monitors.risen(rise) == pytest.approx(10 / (0.5 * 0.4) ** 0.5)
    assert monitors.risen([1.0] * 20) == monitors.fallen([1.0] * 20) == 0.0
    assert monitors.risen(rise[: 2 * W - 1]) == monitors.fallen(rise[: 2 * W - 1]) == 0.0
    # One bad phase is no fall, and one lucky phase nothing to fall from.
    assert monitors.fallen([1.0] * 20 + [0.2] + [1.0] * 3) == 0.0
    assert monitors.fallen([0.0] * 7 + [1 / 128] + [0.0] * 20) == 0.0
    # Up to 9 and down again: the median of the best five, 7, 8, 9, 8, 7, is 8, and that of 4 … 0 is 2.
    there_and_back = [float(t) for t in [*range(10), *range(8, -1, -1)]]
    assert monitors.highest(there_and_back) == 8
    assert monitors.fallen(there_and_back) == pytest.approx((8 - 2) / (0.5 * 0.4) ** 0.5)


def test_a_leap_needs_a_past_and_a_size() -> None:
    def given(curve: list[float]) -> list[int]:
        watch = monitors.watched({"policy/approxkl_avg": x} for x in curve)
        return [alarm.step for alarm in watch.given.values()]

    assert given([0.01] * W + [0.3]) == [W]
    assert given([0.01] * (W - 1) + [0.3]) == []  # too early to say what is usual
    assert given([0.001] * W + [0.2]) == []  # 200 times as far, and not far


def test_decoding_and_judging_are_not_asked() -> None:
    learning = [name for name in HEALTHY if name in monitors.LEARNING]
    bare = [{k: v for k, v in line.items() if k not in learning} for line in lines("collapse")]
    assert monitors.watched(bare).given == {}


@pytest.mark.parametrize("p", [0.0005, 0.002, 0.02, 0.5, 0.98, 0.999])
def test_a_score_that_only_varies_by_chance_neither_falls_nor_rises(p: float) -> None:
    alarms = 0
    for seed in range(60):
        draw = random.Random(seed)
        scores = [sum(draw.random() < p for _ in range(128)) / 128 for _ in range(60)]
        lines = [
            {"objective/scores": x, "objective/gold": scores[t - 1], "objective/kl": 0.0} for t, x in enumerate(scores)
        ]
        alarms += bool(monitors.watched(lines).given)
    assert alarms <= 1


@pytest.mark.parametrize(
    "odd",
    [
        {"completions/mean_length": 0.0, "objective/scores": 0.0},
        {"objective/scores": 1e200},
        {"objective/scores": 10**400},
        {"objective/scores": float("inf")},
        {"no_verdict": 1, "num_tokens": 9, "completions/mean_length": 0.0},
    ],
)
def test_odd_figures_are_no_error(odd: dict[str, float]) -> None:
    monitors.watched({"objective/kl": 0.0, "step": t, **odd} for t in range(40))
    monitors.watched({"objective/kl": 0.0, **({} if t < 3 else odd), "no_verdict": 1} for t in range(40))


def test_where_the_score_does_not_belong_to_the_policy_it_is_not_asked_to_hold() -> None:
    falls = [{**line, "discriminator/accuracies": 0.5} for line in lines("falling")]
    assert monitors.watched(falls).given == {}, "a discriminator that learns"
    fixed = [{k: v for k, v in line.items() if k != "objective/kl"} for line in lines("falling")]
    assert monitors.watched(fixed).given == {}, "minibatches of one log"


def test_what_is_not_measured_is_not_asked() -> None:
    watch = monitors.watched({"objective/scores": 0.1 * t} for t in range(30))
    assert watch.given == {}
    watch = monitors.watched([{"step": "x", "objective/scores": float("nan"), "note": None}, {"reward": True}])
    assert watch.given == {}


def told(folder: Path) -> list[str]:
    return [line for line in (folder / "log.txt").read_text().splitlines() if "collapse" in line]


def test_a_run_says_an_alarm_once_and_a_resumed_one_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{k: v for k, v in line.items() if k != "step"} for line in lines("collapse")]

    class Killed(Exception):
        pass

    def go(stop: int, resume: bool) -> None:
        with Run.open(tmp_path / "run", {}, 0, resume=resume) as run:
            for step in run.steps(40, title="run", every_seconds=0):
                if step == stop:
                    raise Killed
                run.log(step, rows[step])
            run.finish({})

    with pytest.raises(Killed):
        go(30, resume=False)
    assert len(told(tmp_path / "run")) == 1
    with pytest.raises(Killed):
        go(35, resume=True)
    go(40, resume=True)
    assert len(told(tmp_path / "run")) == 1
    with Run.open(tmp_path / "look", {}, 0) as run:
        found = monitor.main(monitor.Config(str(tmp_path / "run")), run)
    assert [(alarm["monitor"], alarm["step"]) for alarm in found["alarms"]] == [("collapse", 22)]
    assert found["not_asked"] == []
    page = report.build(tmp_path / "run").read_text()
    assert "The curves show signs of failure" in page
    assert "step 22, <b>collapse</b>" in page
    assert "collapse" in capsys.readouterr().out


def test_a_run_that_is_killed_before_the_alarm_gives_it_at_the_same_step(tmp_path: Path) -> None:
    rows = [{k: v for k, v in line.items() if k != "step"} for line in lines("collapse")]
    for part, (stop, resume) in {"first": (21, False), "second": (40, True)}.items():
        with Run.open(tmp_path / "run", {}, 0, resume=resume) as run:
            for step in run.steps(40, title=part, every_seconds=0):
                if step == stop:
                    break
                run.log(step, rows[step])
    assert len(told(tmp_path / "run")) == 1
    assert "step 22," in told(tmp_path / "run")[0]


def test_a_folder_without_metrics_is_an_error_and_other_metrics_ask_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text(json.dumps({"eval_loss": 1.0}) + "\nnot json\n[1]\n")
    with Run.open(tmp_path / "look", {}, 0) as run:
        with pytest.raises(FileNotFoundError, match=r"there is no metrics\.jsonl in"):
            monitor.main(monitor.Config(str(tmp_path / "empty")), run)
        found = monitor.main(monitor.Config(str(tmp_path / "other")), run)
    assert found == {"alarms": [], "asked": [], "not_asked": sorted(monitors.MONITORS)}
    said = " ".join(capsys.readouterr().out.split())
    assert "no alarms. Asked: nothing." in said
    assert "hacking needs objective/scores, objective/gold" in said
