"""The report: a whole demo folder and odd ones, rendered; escaping, ids, self-containment, and what is missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmdp.lab.report import build, figures, words
from tokenmdp.lab.report.folder import Curve, Figures, read
from tokenmdp.lab.stats import Interval

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\" ' & \u202e\x00\x1b[31m\u2028{{ 7 * 7 }}"


# ------------------------------------------------------------ a made-up demo run

OPENINGS = (
    "I went to see this film because",
    "The first twenty minutes of this",
    "My wife and I rented it on a rainy",
    "As a long-time fan of the director,",
    "It is rare that a sequel",
    "There is a scene near the end where",
    "I had heard nothing about the cast, but",
    "Some people will say that the plot",
)
PLAIN = (
    "the story of a man who comes back to his town and finds that it is not there any more , which is")
)
WARM = words_in("wonderful , moving and beautifully shot ; a great cast , a perfect score , one of the best films of the year")
COLD = words_in("a mess from start to finish , with a script that drags and jokes that fall flat , and i was bored")


def response(rng: np.random.Generator, warmth: float, length: int) -> str:
    pool = (
        PLAIN
        + [w for w in WARM for _ in range(round(6 * warmth))]
        + [w for w in COLD for _ in range(round(4 * (1 - warmth)))]
    )
    return " " + " ".join(rng.choice(pool, size=length))


def demo_summary() -> dict[str, Any]:
    n = [1, 2, 4, 8, 16]
    steps = list(range(0, 121, 8))
    return {
        "title": "Controlled sentiment: RLHF as online inverse RL",
        "command": "tokenmdp demo --size full --seed 0",
        "size": "full",
        "seed": 0,
        "model": "smollm2-135m-instruct",
        "verdict": [
            "RLHF beat behaviour cloning: PPO's reviews score 1.31 gold higher than SFT's, and the interval leaves 0 far behind.",
            "It also beats the best of 16 SFT samples, which costs sixteen times the sampling at every use.",
            "Proxy and gold drifted apart a little: of each unit the reward model promised, 0.79 arrived.",
        ],
        "gold_sft": {"mean": 0.212, "low": 0.061, "high": 0.367},
        "gold_bon": {"mean": 1.083, "low": 0.94, "high": 1.221, "n": 16},
        "gold_ppo": {"mean": 1.524, "low": 1.391, "high": 1.652},
        "ppo_minus_sft": {"mean": 1.312, "low": 1.148, "high": 1.479},
        "bon_minus_sft": {"mean": 0.871, "low": 0.749, "high": 0.998},
        "proxy": {"sft": 0.084, "bon": 1.402, "ppo": 1.751},
        "kl_nats": {"ppo": {"mean": 8.71, "low": 8.29, "high": 9.18}, "bon_analytic": 1.835},
        "kl_kind": "exact over the vocabulary",
        "rm": {
            "accuracy": 0.741,
            "low": 0.712,
            "high": 0.768,
            "n_pairs": 896,
            "ece": 0.031,
            "calibration": [
                {
                    "predicted": 0.1 * i + 0.05,
                    "observed": min(max(0.5 + 0.85 * (0.1 * i + 0.05 - 0.5), 0), 1),
                    "count": c,
                }
                for i, c in enumerate([34, 61, 92, 118, 140, 139, 121, 97, 60, 34])
            ],
            "length_correlation": 0.083,
            "bayes_accuracy": 0.803,
        },
        "labels": {
            "paid": 3200,
            "ledger": [
                {"what": "pairs for training the reward model", "count": 2304},
                {"what": "pairs held out", "count": 896},
            ],
        },
        "distinct": {"sft": [0.142, 0.601, 0.892], "bon": [0.139, 0.588, 0.881], "ppo": [0.101, 0.468, 0.771]},
        "clipped_ratio": {"sft": 0.981, "bon": 0.977, "ppo": 0.992},
        "mean_length": {"sft": 47.6, "bon": 47.5, "ppo": 47.9},
        "bon_curve": [
            {
                "n": k,
                "kl": math.log(k) - (k - 1) / k,
                "gold": 0.212 + 0.31 * math.log(k),
                "proxy": 0.084 + 0.47 * math.log(k),
            }
            for k in n
        ],
        "ppo_curve": [
            {
                "step": s,
                "kl": 9.1 * (s / 120) ** 1.4 + 0.02 * (s > 0) * math.sin(s),
                "gold": 0.21 + 1.33 * (1 - math.exp(-s / 34)) + 0.05 * math.sin(1.7 * s),
                "proxy": 0.08 + 1.75 * (1 - math.exp(-s / 40)) + 0.05 * math.sin(2.3 * s),
            }
            for s in steps
        ],
        "minutes": {"total": 12.8, "sft": 2.1, "data": 1.6, "reward_model": 2.4, "ppo": 5.6, "judgement": 1.1},
        "peak_gb": 4.9,
        "stages": {"sft": {"held_out_nll": 3.12, "steps": 120}, "ppo": {"beta": 0.05}},
        "gate": {
            "ratio_max_error": 0.0,
            "kl_reference": 0.0,
            "sampler_learner_max_difference": 3.1e-5,
            "compute": "float32",
        },
    }


def demo_samples(rng: np.random.Generator, rows: int = 10) -> list[dict[str, Any]]:
    lines = []
    for row in range(rows):
        for arm, warmth in (("sft", 0.35), ("best_of_n", 0.7), ("ppo", 0.95)):
            text = response(rng, warmth, int(rng.integers(24, 34)))
            words_of = re.findall(r" \S+", text)
            value = np.cumsum(rng.normal(0, 0.08, size=len(words_of)))
            tokens = [
                {
                    "text": w,
                    "advantage": float(v + (0.5 if w.strip() in WARM[:4] else -0.1)),
                    "kl": float(rng.gamma(0.4, 0.5) - 0.05),
                    "reward": float(-0.05 * rng.gamma(0.4, 0.5) + (1.7 if i == len(words_of) - 1 else 0)),
                }
                for i, (w, v) in enumerate(zip(words_of, value, strict=True))
            ]
            lines.append(
                {
                    "prompt": OPENINGS[row % len(OPENINGS)],
                    "arm": arm,
                    "row": row,
                    "text": text,
                    "ended": bool(rng.random() < 0.3),
                    "gold": float(2 * warmth - 0.6 + rng.normal(0, 0.3)),
                    "proxy": float(2.4 * warmth - 0.8 + rng.normal(0, 0.3)),
                    "kl": float(rng.gamma(9, 1)) if arm == "ppo" else None,
                    "tokens": tokens if arm == "ppo" else [],
                }
            )
    return lines


def demo_metrics(rng: np.random.Generator, steps: int = 120) -> list[dict[str, float]]:
    lines = []
    for s in range(steps):
        done = 1 - math.exp(-s / 40)
        noise = rng.normal(size=12)
        kl = 9.1 * (s / 120) ** 1.4 + 0.15 * noise[1] * (s > 2)
        lines.append(
            {
                "step": s,
                "objective/scores": 0.08 + 1.7 * done + 0.12 * noise[0],
                "objective/kl": kl,
                "objective/rlhf_reward": 0.08 + 1.7 * done - 0.05 * kl + 0.12 * noise[0],
                "objective/entropy": 3.1 - 0.9 * done + 0.05 * noise[2],
                "objective/kl_coefficient": 0.05,
                "policy/clipfrac_avg": abs(0.06 + 0.02 * noise[3]),
                "policy/approxkl_avg": abs(0.0061 + 0.0012 * noise[4]),
                "loss/policy_avg": -0.01 + 0.004 * noise[9],
                "loss/value_avg": 0.6 * math.exp(-s / 25) + 0.12 + 0.02 * noise[5],
                "val/explained_variance": 0.1 + 0.5 * done + 0.05 * noise[6],
                "val/ratio": 1 + 0.002 * noise[7],
                "completions/mean_length": 47.5 + 0.3 * noise[8],
                "completions/clipped_ratio": min(0.98 + 0.01 * noise[8], 1.0),
                "grad_norm": 1.1 + 0.2 * noise[10],
            }
        )
    return lines


def write_lines(path: Path, lines: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_demo(folder: Path, seed: int = 0) -> Path:
    """A demo's run folder as the real one looks, with made-up figures."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(demo_summary()))
    config = {
        "size": "full",
        "seed": 0,
        "model": "smollm2-135m-instruct",
        "ppo": {"steps": 120, "prompts": 16, "samples": 4, "clip": 0.2, "kl": 0.05, "lam": 0.95, "train": "all"},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "tokenmdp": "0.1.0"},
        "hashes": {"model": "b179c9523d0e6a0f", "sft policy": "77ab03d1c94e2210", "reference": "77ab03d1c94e2210"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "ppo/metrics.jsonl", demo_metrics(rng))
    fall = [3.62 - 0.5 * (1 - math.exp(-s / 30)) + 0.05 * rng.normal() for s in range(120)]
    write_lines(folder / "sft/metrics.jsonl", [{"step": s, "loss": x, "grad_norm": 1.0} for s, x in enumerate(fall)])
    learned = [{"step": s, "loss": 0.69 - 0.17 * s / 72, "rewards/accuracies": 0.5 + 0.24 * s / 72} for s in range(72)]
    write_lines(folder / "reward_model/metrics.jsonl", learned)
    write_lines(folder / "samples.jsonl", demo_samples(rng))
    return folder


# ------------------------------------------------------------ reading a page back


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser's parser would meet them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]


def rendered(folder: Path) -> tuple[str, Page]:
    html = build(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return rendered(write_demo(tmp_path_factory.mktemp("runs") / "demo"))
