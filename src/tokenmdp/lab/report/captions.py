"""What the figures say, in words: sentences made from the numbers, so that they can never disagree with them."""

from __future__ import annotations

import math

from tokenmdp.lab.report.figures import gain, path, spreads
from tokenmdp.lab.report.folder import Figures
from tokenmdp.lab.report.words import count, listed, num, percent, signed, span
from tokenmdp.stats import Interval


def gained(summary: Figures) -> str:
    """Both arms' gain in gold over SFT and whether the interval leaves 0 out."""
    parts = []
    for key, name in (("ppo_minus_sft", "PPO"), ("bon_minus_sft", best_of(summary))):
        if interval := summary.interval(key):
            side = "above" if interval.mean >= 0 else "below"
            parts.append(f"{name} scores {num(abs(interval.mean))} gold {side} SFT{_difference(interval)}")
    return f"{'; '.join(parts)}." if parts else ""


def drift(summary: Figures) -> str:
    """How much of what the proxy promised arrived, for each arm."""
    unit = " standard deviations" if spreads(summary) else ""
    parts = []
    for arm, name in (("ppo", "PPO"), ("bon", best_of(summary))):
        if found := gain(summary, arm):
            arrived = found.gold.mean
            rate = f", {num(arrived / found.proxy)} of gold for each of proxy" if found.proxy > 0.05 else ""
            parts.append(f"{name} gained {signed(found.proxy)}{unit} by the proxy and {signed(arrived)} by gold{rate}")
    return f"{'; '.join(parts)}." if parts else ""


def agreement(summary: Figures) -> str:
    """How well the proxy orders the responses of the policy it was trained on, and of the one it trained."""
    before, after = (summary.interval(f"gold_proxy_correlation.{arm}") for arm in ("sft", "ppo"))
    if before is None or after is None:
        return ""
    return (
        "Proxy and gold order SFT's responses alike with a rank correlation of "
        f"{num(before.mean)}{_in_brackets(before)}, PPO's with {num(after.mean)}{_in_brackets(after)}."
    )


def peak(summary: Figures) -> str:
    """Did gold turn down during training while the proxy went on?"""
    gold, proxy = path(summary, "ppo_curve", "gold", "step"), path(summary, "ppo_curve", "proxy", "step")
    if len(gold.score) < 4:
        return ""
    best = max(range(len(gold.score)), key=gold.score.__getitem__)
    fall, rise = gold.score[best] - gold.score[-1], max(gold.score) - min(gold.score)
    if fall <= 0.15 * rise:
        return "In training gold ended near its highest value: no sign that PPO optimised past what the proxy knows."
    on = " while the proxy ended at or near its own" if len(proxy.score) == len(gold.score) and (
        max(proxy.score) - proxy.score[-1] <= 0.15 * (max(proxy.score) - min(proxy.score))
    ) else ""  # fmt: skip
    return f"During training gold was highest at step {gold.name[best]} and ended {num(fall)} below that{on}."


def spent(summary: Figures) -> str:
    """The KL each method spends."""
    ppo, best = summary.interval("kl_nats.ppo"), summary.number("kl_nats.bon_analytic")
    kind = f", {summary.text('kl_kind')}" if summary.text("kl_kind") else ""
    parts = []
    if ppo:
        parts.append(f"PPO ends {num(ppo.mean)} nats a response from SFT{_in_brackets(ppo)}{kind}")
    if best is not None:
        parts.append(f"{best_of(summary)} is {num(best)} nats away at most (log n − (n−1)/n)")
    return f"{'; '.join(parts)}." if parts else ""


def ranked(rm: Figures) -> str:
    """The reward model's accuracy beside chance and beside what noisy labels allow."""
    value = rm.number("accuracy")
    if value is None:
        return ""
    interval = Interval(value, *(math.nan if (x := rm.number(k)) is None else x for k in ("low", "high")))
    pairs, ceiling = rm.number("n_pairs"), rm.number("bayes_accuracy")
    text = f"It ranks {percent(value)} of {count(pairs)} held-out pairs as they were labelled" if pairs else (
        f"It ranks {percent(value)} of held-out pairs as they were labelled"
    )  # fmt: skip
    text += f"{_in_brackets(interval, 'percent')}; chance is 50 %"
    if ceiling is not None:
        text += f", and the gold reward itself would agree with {percent(ceiling)} of these noisy labels"
    return f"{text}."


def calibrated(rm: Figures) -> str:
    """The expected calibration error in words."""
    error = rm.number("ece")
    if error is None:
        return ""
    return (
        f"On average its stated probability is {percent(error)} away from what happened (expected calibration error)."
    )


def length_bias(rm: Figures) -> str:
    """The correlation with length in words."""
    value = rm.number("length_correlation")
    if value is None:
        return ""
    size = abs(value)
    if size < 0.1:
        return f"Length hardly matters to its score (correlation {signed(value)})."
    strength = "a little" if size < 0.3 else "clearly" if size < 0.6 else "strongly"
    return f"It {strength} prefers {'longer' if value > 0 else 'shorter'} responses (correlation {signed(value)})."


def diversity(summary: Figures) -> str:
    """What optimisation cost in variety and in length."""
    parts = []
    sft, ppo = (summary.numbers(f"distinct.{arm}") for arm in ("sft", "ppo"))
    if len(sft) > 1 and len(ppo) > 1 and sft[1] and ppo[1] is not None:
        parts.append(f"PPO keeps {percent(ppo[1] / sft[1])} of SFT's distinct-2")
    lengths = [summary.number(f"mean_length.{arm}") for arm in ("sft", "ppo")]
    if lengths[0] is not None and lengths[1] is not None:
        parts.append(f"its responses are {num(lengths[1])} tokens long on average against {num(lengths[0])}")
    return f"{listed(parts)}." if parts else ""


def names(summary: Figures) -> dict[str, str]:
    """What the arms are called on the page, by their name in samples.jsonl and in the summary."""
    best = best_of(summary).capitalize()
    return {"sft": "SFT", "best_of_n": best, "bon": best, "ppo": "PPO"}


def best_of(summary: Figures) -> str:
    """ "best of 16", or "best-of-n" where n is not known."""
    n = summary.number("gold_bon.n")
    return f"best of {count(n)}" if n else "best-of-n"


def _in_brackets(interval: Interval, show: str = "num") -> str:
    inside = span(interval, show)
    return f" ({inside})" if inside else ""


def _difference(interval: Interval) -> str:
    inside = span(interval, "signed")
    if not inside:
        return ""
    chance = "0 is inside: it could be chance" if interval.low <= 0 <= interval.high else "0 is outside"
    return f" (difference {inside}, {chance})"
