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
from tokenmdp.stats import Interval

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
PLAIN = [
    "the story of",
    "a man who",
    "comes back",
    "to his town",
    ", and finds",
    "that it",
    "is not there",
    ", which is",
]
WARM = ["wonderful", "moving and", "beautifully shot", ", a great cast", "a perfect score", "one of the best"]
COLD = ["a mess", "from start to finish", ", with a script", "that drags", "jokes that fall flat", "and i was bored"]


def response(rng: np.random.Generator, warmth: float, phrases: int) -> str:
    pool = PLAIN + WARM * round(5 * warmth) + COLD * round(3 * (1 - warmth))
    return " " + " ".join(rng.choice(pool, size=phrases))


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
            "RLHF beat behaviour cloning: PPO scores 1.31 gold above SFT, and the interval leaves 0 far behind.",
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
                {"what": "comparisons the reward model was trained on", "count": 2304},
                {"what": "comparisons held out to judge it", "count": 896},
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
        "gold_spread_sft": 0.9,
        "proxy_spread_sft": 1.1,
        "gold_proxy_correlation": {
            "sft": {"mean": 0.71, "low": 0.68, "high": 0.74},
            "ppo": {"mean": 0.52, "low": 0.45, "high": 0.58},
        },
        "sft": {"held_out_nll_before": 3.55, "held_out_nll": 3.12},
        "stages": {"sft": {"held_out_nll": 3.12, "steps": 120}, "ppo": {"beta": 0.05}},
        "gate": {
            "ratio_first_update": 1.0,
            "kl_reference": 0.0,
            "sampler_learner_max_difference": 3.1e-5,
            "compute": "float32",
        },
    }


def demo_samples(rng: np.random.Generator, rows: int = 10) -> list[dict[str, Any]]:
    lines = []
    for row in range(rows):
        for arm, warmth in (("sft", 0.35), ("best_of_n", 0.7), ("ppo", 0.95)):
            text = response(rng, warmth, int(rng.integers(9, 14)))
            words_of = re.findall(r" \S+", text)
            value = np.cumsum(rng.normal(0, 0.08, size=len(words_of)))
            tokens = [
                {
                    "text": w,
                    "advantage": float(v + (0.5 if w.strip() in ("wonderful", "perfect", "best", "great") else -0.1)),
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def demo(folder: Path) -> tuple[str, Page]:
    return rendered(folder)


def test_the_demo_page_has_every_section_and_misses_nothing(demo):
    html, page = demo
    ids = page.attributes("id")
    for section in ("steps", "frontier", "training", "reward-model", "judgement", "responses", "tokens", "record"):
        assert section in ids
    assert not [attrs for _, attrs in page.tags if "absent" in (attrs.get("class") or "").split()]
    for sentence in demo_summary()["verdict"]:
        assert sentence in page.text
    assert "tokenmdp demo --size full --seed 0" in page.text
    assert len(html.encode()) < 1_500_000


def test_figures_and_their_words_are_on_the_page(demo):
    _, page = demo
    text = " ".join(page.text.split())
    assert "1.39 to 1.65" in text  # gold of PPO
    assert "PPO scores 1.31 gold above SFT (difference +1.15 to +1.48, 0 is outside)" in text
    # proxy (1.751 - 0.084) / 1.1 = 1.515, gold 1.312 / 0.9 = 1.458, 1.458 / 1.515 = 0.962
    assert "PPO gained +1.52 standard deviations by the proxy and +1.46 by gold, 0.96 of gold for each of proxy" in text
    assert "SFT's responses alike with a rank correlation of 0.71 (0.68 to 0.74), PPO's with 0.52" in text
    assert "PPO ends 8.71 nats a response from SFT (8.29 to 9.18), exact over the vocabulary" in text
    assert "best of 16 is 1.83 nats away at most" in text
    assert "ranks 74 % of 896 held-out pairs as they were labelled (71 % to 77 %)" in text
    assert "gold reward itself would agree with 80 % of these noisy labels" in text
    assert "PPO keeps 78 % of SFT's distinct-2" in text  # 0.468 / 0.601
    assert "b179c9523d0e6a0f" in text


def test_the_page_loads_nothing_and_runs_nothing(demo):
    html, page = demo
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "video", "audio", "base", "form", "image"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "src"]
    assert all(link.startswith(("#", "data:")) for link in page.attributes("href"))
    assert re.findall(r"url\((?!#)", html) == []
    assert "://" not in html
    assert "@import" not in html
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_ids_are_unique_and_every_reference_finds_its_target(demo):
    html, page = demo
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    wanted = {link[1:] for link in page.attributes("href") if link.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", html)) | set(page.attributes("for"))
    assert wanted <= set(ids)


def test_charts_are_text_in_the_pages_colours(demo):
    html, page = demo
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) > 20
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    body = html[html.index("</style>") :]
    assert "<style" not in body[8:]  # a style sheet inside a chart would reach the whole page
    assert "PPO, held out" in page.text
    assert not re.search(r"#0a[0-9a-f]{2}0f", body)  # no stand-in colour is left
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body)) <= {"#000000"}  # drawn colours follow the scheme


def test_the_same_folder_gives_the_same_bytes(folder, demo):
    assert build(str(folder)).read_bytes().decode() == demo[0]
    assert sorted(p.name for p in folder.glob("*report*")) == ["report.html"]  # no draft is left behind


# ------------------------------------------------------------ what others wrote


def poison(value: Any) -> Any:
    """The same structure with something evil before every text and in every free key."""
    if isinstance(value, dict):
        return {key: poison(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return EVIL + value if isinstance(value, str) else value


def assert_harmless(html: str, page: Page) -> None:
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "<script>alert('x')</script>" in page.text  # it is there, as text
    for hidden in ("\u202e", "\x00", "\x1b", "\u2028"):
        assert hidden not in html
    assert "⟨U+202E⟩" in html
    assert "␛[31m" in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_script_in_every_text_of_a_demo_stays_text(tmp_path):
    folder = write_demo(tmp_path / "demo")
    (folder / "summary.json").write_text(json.dumps(poison(demo_summary()) | {"stages": {EVIL: {EVIL: EVIL}}}))
    (folder / "config.json").write_text(json.dumps({EVIL: EVIL, "nested": {EVIL: [EVIL, {"a": EVIL}]}}))
    (folder / "result.json").write_text(json.dumps({EVIL: {EVIL: 1.0}}))
    samples = demo_samples(np.random.default_rng(0), rows=2)
    for sample in samples[:3]:
        sample |= {"text": EVIL, "prompt": EVIL, "arm": EVIL}
        sample["tokens"] = [{"text": EVIL, "advantage": 1.0, "kl": EVIL, "reward": None}]
    for sample in samples[3:]:
        sample["tokens"] = [t | {"text": EVIL} for t in sample["tokens"]]
    write_lines(folder / "samples.jsonl", samples)
    write_lines(folder / "ppo/metrics.jsonl", [{"step": s, EVIL: s, "objective/scores": 1} for s in range(5)])
    write_lines(folder / "<img src=x onerror=alert(1)>/metrics.jsonl", [{"step": 0, "x": 1}])
    html, page = rendered(folder)
    assert_harmless(html, page)
    assert "<img src=x onerror=alert(1)>" in page.text


def test_script_in_every_text_of_a_plain_run_stays_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({EVIL: EVIL}))
    (tmp_path / "result.json").write_text(json.dumps({EVIL: 3, "words": EVIL}))
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, EVIL: s} for s in range(4)])
    (tmp_path / "log.txt").write_text(f"a line\n{EVIL}\n")
    write_lines(tmp_path / "samples.jsonl", [{"prompt": EVIL, "arm": EVIL, "row": EVIL, "text": EVIL, "ended": EVIL}])
    assert_harmless(*rendered(tmp_path))


@pytest.mark.parametrize("name", ["cost $5 and $6", r"$\frac{$", "$x_{$"])
def test_a_dollar_in_a_label_is_a_dollar(name):
    half = Interval(0.5, 0.4, 0.6)
    assert figures.ladder([(name, half, "accent")], "x", name, unit=True).count(f">{name}</text>") == 2
    assert f">{name}</text>" in figures.durations([(name, 1.0)])


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"prompt": "a", "arm": "sft", "row": 0, "text": "x\\ud800y"}\n')
    assert "x⟨U+D800⟩y" in rendered(tmp_path)[1].text


# ------------------------------------------------------------ what is missing or broken

MISSING = {  # keys that are left out, a sentence that then appears, words that then must not
    "words": (
        ["verdict", "command", "gate", "stages", "minutes"],
        "No verdict here",
        "Checked before the first update",
    ),
    "model": (["rm"], "No reward model here", "Reward model accuracy"),
    "curves": (["bon_curve", "ppo_curve", "kl_nats"], "No frontier here", "What we want: gold"),
    "gold": (["gold_sft", "gold_bon", "gold_ppo"], "No judgement here", "Gold, PPO"),
    "start": (["gold_sft", "proxy", "distinct"], "How it was run", "Promise and delivery"),
    "labels": (["labels", "clipped_ratio", "mean_length"], "No responses here", "Labels paid"),
}


@pytest.mark.parametrize("group", MISSING)
def test_a_missing_figure_leaves_its_section_out_and_says_so(tmp_path, group):
    keys, present, absent = MISSING[group]
    summary = {key: value for key, value in demo_summary().items() if key not in keys}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = rendered(tmp_path)[1].text
    assert present in text
    assert absent not in text


@pytest.mark.parametrize("wrong", [None, "words", math.nan, [None, "x"], -1])
def test_figures_of_the_wrong_kind_count_as_missing(tmp_path, wrong):
    def spoiled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoiled(inner) for key, inner in value.items()}
        return [spoiled(inner) for inner in value] if isinstance(value, list) and value else wrong

    for summary in (spoiled(demo_summary()), dict.fromkeys(demo_summary(), wrong) | {"title": "t"}):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert "How it was run" in rendered(tmp_path)[1].text


def test_a_mean_without_an_interval_is_shown_without_one(tmp_path):
    summary = demo_summary()
    summary["gold_ppo"] = {"mean": 1.524, "low": None, "high": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = rendered(tmp_path)[1].text
    assert "1.52" in text
    assert "nan" not in text


def test_a_run_that_was_killed_while_it_wrote_has_a_report_with_a_note(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 10,')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 2.5}\n\n{"step": 1, "loss": NaN}\n[1]\n{"step": 2, "lo'
    )
    text = rendered(tmp_path)[1].text
    assert "config.json could not be read" in text
    assert "2 line(s) of metrics.jsonl could not be read (line 4, 5)" in text
    assert "has no result.json, so the run has not finished" in text
    assert read(tmp_path).curves[""]["loss"] == Curve("loss", (0.0,), (2.5,))


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_one_file_is_enough(tmp_path, name):
    (tmp_path / name).write_text('{"steps": 10, "score": 0.5}')
    assert "No curves here" in rendered(tmp_path)[1].text


def test_nothing_to_report_on_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        build(tmp_path / "absent")


def test_a_line_separator_inside_a_response_is_not_the_end_of_its_line(tmp_path):
    line = {"prompt": "p", "arm": "sft", "row": 0, "text": "one\u2028two\u0085three"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [s.text for s in read(tmp_path).samples] == ["one\u2028two\u0085three"]


# ------------------------------------------------------------ responses and tokens


def sample_line(arm: str, row: int, text: str, tokens: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"prompt": f"prefix {row}", "arm": arm, "row": row, "text": text, "ended": True, "tokens": tokens or []}


def test_arms_of_one_row_stand_side_by_side_in_one_order(tmp_path):
    lines = [sample_line(arm, row, f"{arm} {row}") for arm in ("ppo", "other", "sft", "best_of_n") for row in (0, 1)]
    write_lines(tmp_path / "samples.jsonl", lines)
    text = " ".join(rendered(tmp_path)[1].text.split())
    order = [text.index(f"{arm} {row}") for row in (0, 1) for arm in ("sft", "best_of_n", "ppo", "other")]
    assert order == sorted(order)


def test_tokens_are_coloured_around_zero_and_carry_their_numbers(tmp_path):
    # The scale ends at the 98th percentile of |advantage|; for 6, 3, 0, -6 that is 6 (interpolated: 6). Six steps of 1.
    tokens = [{"text": f"t{a}", "advantage": a, "kl": None, "reward": 0.0} for a in (6.0, 3.0, 0.0, -6.0)]
    write_lines(tmp_path / "samples.jsonl", [sample_line("ppo", 0, "x", tokens)])
    _, page = rendered(tmp_path)
    spans = [attrs for tag, attrs in page.tags if tag == "span" and (attrs.get("class") or "").split()[:1] == ["t"]]
    assert [(attrs["class"] or "").split()[1:] for attrs in spans] == [["ap6"], ["ap3"], [], ["an6"]]
    assert spans[0]["title"] == "Advantage +6.00 · Reward 0"
    cells = [attrs for tag, attrs in page.tags if tag == "td"]
    assert len(cells) >= 12  # and as a table: three numbers a token
    assert page.text.count("+6.00") >= 2  # the scale's end and the table


def test_the_switch_works_without_a_script(demo):
    html, page = demo
    radios = [attrs for tag, attrs in page.tags if tag == "input"]
    assert [attrs["id"] for attrs in radios] == ["by-advantage", "by-kl", "by-reward"]
    assert [attrs["id"] for attrs in radios if "checked" in attrs] == ["by-advantage"]
    for key in ("advantage", "kl", "reward"):
        for shade in ("p1", "p6", "n1", "n6"):
            assert f"#by-{key}:checked ~ .sheets .{key[0]}{shade} {{ background: var(--{shade}); }}" in html


# ------------------------------------------------------------ numbers, words, curves


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1.524, "1.52"),
        (-0.061, "−0.06"),
        (47.62, "47.6"),
        (128.4, "128"),
        (3200, "3,200"),
        (0.0061, "0.006"),
    ],
)
def test_numbers_for_people(value, shown):
    assert words.num(value) == shown


def test_gains_stay_in_the_rewards_own_units_where_no_spread_is_known():
    known = {"gold_sft": {"mean": 1.0}, "gold_ppo": {"mean": 1.5}, "proxy": {"sft": 0.0, "ppo": 2.0}}
    found = figures.gain(Figures(known), "ppo")
    assert found is not None
    assert (found.proxy, found.gold.mean) == (2.0, 0.5)
    found = figures.gain(Figures(known | {"gold_spread_sft": 0.5, "proxy_spread_sft": 4.0}), "ppo")
    assert found is not None
    assert (found.proxy, found.gold.mean) == (0.5, 1.0)


def test_small_metrics_signs_shares_and_what_is_not_a_number():
    assert words.fine(0.05861) == "0.0586"
    assert words.fine(3.1e-5) == "3.1e−5"
    assert words.fine(0.000999) == "1.0e−3"
    assert (words.signed(1.3), words.signed(-1.3), words.signed(0.0)) == ("+1.30", "−1.30", "0")
    assert (words.percent(0.741), words.percent(0.031), words.percent(0.0)) == ("74 %", "3.1 %", "0 %")
    assert words.num(None) == words.num(math.nan) == words.percent(None) == "–"
    assert words.span(Interval(1, math.nan, 2)) == ""
    assert (words.minutes(0.4), words.minutes(12.84)) == ("24 s", "12.8 min")


def test_hidden_characters_are_shown_and_visible_ones_kept():
    assert words.visible("naïve 日本 👍 a\u200bb\x07\ufeff") == "naïve 日本 👍 a⟨U+200B⟩b␇⟨U+FEFF⟩"
    assert words.visible("a\nb\tc") == "a\nb\tc"
    assert words.visible("a\nb\tc", keep="") == "a↵b⇥c"
    assert str(words.marked("<a>\n")) == '&lt;a&gt;<span class="ctl">↵</span>\n'


def test_trends_are_told_from_noise():
    rng = np.random.default_rng(0)
    assert words.trend([float(x) for x in range(10)]) == "rises from 0.50 to 8.50"
    assert words.trend([float(-x) for x in range(10)]) == "falls from −0.50 to −8.50"
    assert words.trend(list(5 + 0.1 * rng.normal(size=100))).startswith("stays near 5.0")
    assert words.trend([2.0]) == "2.00"


def test_a_long_curve_is_drawn_short_with_its_range():
    x = np.arange(10_000.0)
    y = np.sin(x / 500) + np.where(x == 7003, 9.0, 0.0)
    step, mean, low, high = figures.stretches(x, y)
    assert len(step) == figures.POINTS
    assert high.max() > 8  # one spike in ten thousand steps is still seen
    assert np.all((low <= mean) & (mean <= high))
    assert len(figures.curve(Curve("x", tuple(x), tuple(y)), "long")) < 40_000


def test_smoothing_keeps_a_constant_and_the_length():
    assert figures.smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    # window of one to either side: (1+2)/2, (1+2+6)/3, (2+6)/2
    assert figures.smooth(np.array([1.0, 2.0, 6.0])) == pytest.approx([1.5, 3.0, 4.0])


def test_the_path_along_the_kl_budget_is_in_root_nats():
    rows = [{"n": 4, "kl": 4.0, "gold": 1.0}, {"n": 8, "kl": -0.01, "gold": 2.0}, {"n": 9, "kl": 1.0, "gold": None}]
    found = figures.path(Figures({"bon_curve": rows}), "bon_curve", "gold", "n")
    assert (found.root_kl, found.score, found.name) == ([2.0, 0.0], [1.0, 2.0], ["4", "8"])


# ------------------------------------------------------------ legible in light and in dark


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2.2, 1 to 21; text asks for 4.5."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_enough_contrast_in_both_schemes():
    style = (Path(figures.__file__).parent / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\n *\}", style, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        value = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))
        pairs = [(text, ground) for text in ("ink", "soft", "muted") for ground in ("paper", "card")]
        pairs += [(arm, "card") for arm in ("sft", "ppo", "accent", "arm3", "arm4", "arm5")]
        pairs += [("ink", f"{sign}{i}") for sign in "pn" for i in range(1, 7)]
        weak = {pair: round(c, 2) for pair in pairs if (c := contrast(value[pair[0]], value[pair[1]])) < 4.5}
        assert not weak
        assert contrast(value["bon"], value["card"]) > 3.5  # amber, in bold and large type
