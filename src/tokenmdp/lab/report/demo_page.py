"""The page of the demo: key figures, five steps, frontier, training, reward model, judgement, record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tokenmdp.lab.report import captions, figures
from tokenmdp.lab.report.folder import Curve, Figures, RunFolder, number
from tokenmdp.lab.report.record import curves_of, grouped
from tokenmdp.lab.report.words import count, fine, minutes, num, percent, signed, span, trend
from tokenmdp.stats import Interval

# The curves a practitioner looks at first: candidates of a metric's name, what it is called here, its unit.
TRAINING = (
    (("objective/scores", "objective/rlhf_reward"), "Score by the proxy", "reward units"),
    (("objective/kl",), "KL to SFT", "nats a response"),
    (("policy/clipfrac_avg",), "Clipped tokens", "share"),
    (("policy/approxkl_avg",), "KL of one update", "nats a token"),
    (("loss/value_avg", "loss/value"), "Value loss", "reward units²"),
    (("val/explained_variance",), "Explained variance", "share"),
    (("objective/entropy",), "Entropy", "nats a token"),
    (("completions/mean_length",), "Response length", "tokens"),
)
STAGES = (
    ("sft", "cloning"),
    ("data", "preferences"),
    ("reward_model", "inverse RL"),
    ("ppo", "online RL"),
    ("judgement", "judgement"),
)


STEPS = (
    ("sft", "Behaviour cloning", "SFT on demonstrations: imitate the reviews. Loss on a held-out part, nats a token."),
    ("data", "Preferences", "Two responses a prefix; which is better is bought from the gold reward, with noise."),
    ("reward_model", "Inverse RL", "A reward that explains those choices. Accuracy on held-out pairs."),
    ("ppo", "Online RL", "PPO on known dynamics climbs that reward, tied to SFT by KL. Score by the proxy."),
    ("judgement", "Judgement", "The gold reward, which no gradient has seen, on held-out prefixes."),
)


def sections(run: RunFolder, summary: Figures) -> dict[str, Any]:
    """Everything the template needs besides what all pages share."""
    return {
        "tiles": tiles(summary),
        "steps": steps(run, summary),
        "frontier": frontier(summary),
        "spread": figures.spreads(summary) is not None,
        "training": training(run),
        "other_curves": curves_of(run, without=_shown(run)),
        "rm": reward_model(Figures(summary.mapping("rm"))),
        "judgement": judgement(summary),
        "timing": timing(summary),
        "ledger": ledger(summary),
        "gate": gate(summary),
        "stages": grouped(summary.mapping("stages")),
    }


def tiles(summary: Figures) -> list[dict[str, Any]]:
    """The key figures; a figure that is missing has no tile."""
    found: list[dict[str, Any]] = []
    gold = {arm: summary.interval(f"gold_{arm}") for arm in ("sft", "bon", "ppo")}
    known = [x for interval in gold.values() if interval for x in interval if math.isfinite(x)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    names = captions.names(summary)
    for arm, interval in gold.items():
        if interval:
            bar = _bar(interval, low, high)
            found.append(
                {
                    "label": f"Gold, {names[arm]}",
                    "value": num(interval.mean),
                    "under": span(interval),
                    "role": arm,
                    "bar": bar,
                }
            )
    if gain := summary.interval("ppo_minus_sft"):
        found.append(
            {
                "label": "PPO over SFT",
                "value": signed(gain.mean),
                "under": span(gain, "signed"),
                "role": "ppo",
                "bar": None,
            }
        )
    if kl := summary.interval("kl_nats.ppo"):
        found.append(_tile("KL of PPO to SFT, nats", num(kl.mean), span(kl) or "a response"))
    rm = Figures(summary.mapping("rm"))
    if (accuracy := rm.number("accuracy")) is not None:
        ends = Interval(accuracy, *(math.nan if (x := rm.number(k)) is None else x for k in ("low", "high")))
        found.append(_tile("Reward model accuracy", percent(accuracy), span(ends, "percent") or "held-out pairs"))
    if (paid := summary.number("labels.paid")) is not None:
        found.append(_tile("Labels paid", count(paid), "preferences"))
    if (total := summary.number("minutes.total")) is not None:
        found.append(_tile("Time", minutes(total), "without downloads"))
    if (peak := summary.number("peak_gb")) is not None:
        found.append(_tile("Peak memory", f"{peak:.1f} GB", "resident"))
    return found


def _tile(label: str, value: str, under: str) -> dict[str, Any]:
    return {"label": label, "value": value, "under": under, "role": "ink", "bar": None}


def _bar(interval: Interval, low: float, high: float) -> dict[str, str]:
    """Positions in percent on the scale that the three gold tiles share."""
    room = (high - low) or 1.0

    def at(x: float) -> float:
        return 4 + 92 * (x - low) / room

    ends = interval if math.isfinite(interval.low) and math.isfinite(interval.high) else Interval(*[interval.mean] * 3)
    return {
        "left": f"{at(ends.low):.1f}",
        "width": f"{at(ends.high) - at(ends.low):.1f}",
        "dot": f"{at(interval.mean):.1f}",
    }


# ------------------------------------------------------------ the five steps


def steps(run: RunFolder, summary: Figures) -> list[dict[str, Any]]:
    """Behaviour cloning, preferences, inverse RL, online RL, judgement: a figure and a number each."""
    rm = Figures(summary.mapping("rm"))
    cloning = first_curve(run, "sft", ("loss", "loss/nll", "nll", "held_out/nll"), least=2)
    scores = first_curve(run, "ppo", ("objective/scores", "objective/rlhf_reward"), least=2)
    paid, accuracy = summary.number("labels.paid"), rm.number("accuracy")
    held_out, better = summary.number("sft.held_out_nll"), summary.interval("ppo_minus_sft")
    if held_out is None and cloning:
        held_out = figures.settled(cloning)
    value = {
        "sft": f"{num(held_out)} nats" if held_out is not None else "",
        "data": f"{count(paid)} labels" if paid is not None else "",
        "reward_model": percent(accuracy) if accuracy is not None else "",
        "ppo": f"{num(figures.settled(scores))} proxy" if scores else "",
        "judgement": f"{signed(better.mean)} gold" if better else "",
    }
    chart = {
        "sft": figures.spark(cloning, "spark-sft", "sft") if cloning else None,
        "data": None,
        "reward_model": figures.accuracy(rm, "spark-rm", 200, 84) if accuracy is not None else None,
        "ppo": figures.spark(scores, "spark-ppo", "ppo") if scores else None,
        "judgement": figures.arms(summary),
    }
    return [
        {
            "title": title,
            "text": text,
            "value": value[key],
            "figure": chart[key],
            "parts": shares(summary) if key == "data" else [],
            "minutes": minutes(summary.number(f"minutes.{key}")),
        }
        for key, title, text in STEPS
    ]


def shares(summary: Figures) -> list[dict[str, str]]:
    """The ledger of labels as bars: what for, how many, and how long a bar in percent of the longest."""
    rows = [(str(row.get("what", "")), number(row.get("count"))) for row in summary.rows("labels.ledger")]
    known = [(what, x) for what, x in rows if x is not None and x > 0][:4]
    most = max((x for _, x in known), default=1.0)
    return [{"what": what, "count": count(x), "width": f"{100 * x / most:.1f}"} for what, x in known]


def first_curve(run: RunFolder, where: str, names: Sequence[str], least: int = 1) -> Curve | None:
    """The first of the named metrics that was logged at least so often."""
    logged = run.curves.get(where, {})
    return next((logged[name] for name in names if name in logged and len(logged[name].value) >= least), None)


# ------------------------------------------------------------ sections with charts


def frontier(summary: Figures) -> dict[str, Any] | None:
    """Proxy and gold against √KL, and the gains against each other; None without any curve or end point."""
    if not (summary.rows("bon_curve") or summary.rows("ppo_curve") or summary.interval("kl_nats.ppo")):
        return None
    drawn = (
        ("What we want: gold", figures.frontier(summary, "gold")),
        ("What PPO was paid by: the proxy", figures.frontier(summary, "proxy")),
        ("Promise and delivery", figures.gains(summary)),
    )
    charts = [(name, chart) for name, chart in drawn if chart is not None]
    words = [captions.drift(summary), captions.spent(summary), captions.peak(summary), captions.agreement(summary)]
    return {"charts": charts, "words": [sentence for sentence in words if sentence]} if charts else None


def training(run: RunFolder) -> list[dict[str, Any]]:
    """The curves looked at first, those of them that were logged."""
    found: list[dict[str, Any]] = []
    for names, title, unit in TRAINING:
        line = first_curve(run, "ppo", names)
        if line:
            chart = figures.curve(line, f"train-{len(found)}", "ppo")
            found.append(
                {"title": title, "unit": unit, "metric": line.name, "chart": chart, "words": trend(line.value)}
            )
    return found


def _shown(run: RunFolder) -> set[tuple[str, str]]:
    return {("ppo", line.name) for names, _, _ in TRAINING if (line := first_curve(run, "ppo", names))}


def reward_model(rm: Figures) -> dict[str, Any] | None:
    """Calibration, accuracy, length: charts for those that are known; None where none is."""
    charts = []
    bins = [
        (p, o, round(c))
        for row in rm.rows("calibration")
        if (p := number(row.get("predicted"))) is not None
        and (o := number(row.get("observed"))) is not None
        and (c := number(row.get("count"))) is not None
        and 0 <= p <= 1
        and 0 <= o <= 1
        and c >= 1
    ]
    if bins:
        charts.append(("Calibration", figures.reliability(bins), captions.calibrated(rm)))
    if rm.number("accuracy") is not None:
        charts.append(("Accuracy", figures.accuracy(rm, "rm-accuracy", 370, 124), captions.ranked(rm)))
    if (length := rm.number("length_correlation")) is not None:
        charts.append(("Length", figures.correlation(length), captions.length_bias(rm)))
    return {"charts": charts} if charts else None


# ------------------------------------------------------------ tables


def judgement(summary: Figures) -> dict[str, Any] | None:
    """One row an arm; None where no arm was judged."""
    names = captions.names(summary)
    rows = [_judged(summary, arm, names[arm]) for arm in ("sft", "bon", "ppo") if summary.interval(f"gold_{arm}")]
    if not rows:
        return None
    words = [captions.gained(summary), captions.diversity(summary)]
    return {"rows": rows, "kl_kind": summary.text("kl_kind"), "words": [sentence for sentence in words if sentence]}


def _judged(summary: Figures, arm: str, name: str) -> dict[str, Any]:
    gold, gain = summary.interval(f"gold_{arm}"), summary.interval(f"{arm}_minus_sft")
    kl = {"sft": Interval(0.0, math.nan, math.nan), "ppo": summary.interval("kl_nats.ppo")}.get(arm)
    if arm == "bon" and (analytic := summary.number("kl_nats.bon_analytic")) is not None:
        kl = Interval(analytic, math.nan, math.nan)
    return {
        "name": name,
        "role": arm,
        "gold": (num(gold.mean), span(gold)) if gold else ("–", ""),
        "gain": (signed(gain.mean), span(gain, "signed")) if gain else ("–", ""),
        "proxy": num(summary.number(f"proxy.{arm}")),
        "kl": ("≤ " if arm == "bon" and kl else "") + num(kl.mean if kl else None),
        "kl_span": span(kl) if kl else "",
        "distinct": [num(x) for x in summary.numbers(f"distinct.{arm}")[:3]],
        "clipped": percent(summary.number(f"clipped_ratio.{arm}")),
        "length": num(summary.number(f"mean_length.{arm}")),
    }


def timing(summary: Figures) -> Markup | None:
    """Minutes by stage; None where no stage was timed."""
    rows = [(name, m) for key, name in STAGES if (m := summary.number(f"minutes.{key}")) is not None]
    return figures.durations(rows) if rows else None


def ledger(summary: Figures) -> dict[str, Any] | None:
    """What labels were paid for."""
    rows = [(str(row.get("what", "")), count(number(row.get("count")))) for row in summary.rows("labels.ledger")]
    paid = summary.number("labels.paid")
    return {"rows": rows, "paid": count(paid)} if rows or paid is not None else None


def gate(summary: Figures) -> list[tuple[str, str, str]]:
    """What must hold before the first update, and by how much it did."""
    names = (
        ("ratio_first_update", "mean ratio, first update", "new and old policy are the same before the first update"),
        ("kl_reference", "KL to the reference, nats", "the policy starts as its reference"),
        (
            "sampler_learner_max_difference",
            "largest |log π difference|, nats",
            "sampler and learner agree about each chosen token",
        ),
    )
    found: Mapping[str, Any] = summary.mapping("gate")
    rows = [(name, fine(x), why) for key, name, why in names if (x := number(found.get(key))) is not None]
    if found.get("compute"):
        why = "what the model was computed in"
        if found["compute"] == "bfloat16":
            why += (
                ": it keeps 8 bits, so a token read alone and the same token read along with its row differ by some 2⁻⁸ of "
                "a logit in each block, and sampler and learner by a few hundredths of a nat; in float32 by 10⁻⁴ at most"
            )
        rows.append(("number format", str(found["compute"]), why))
    return rows
