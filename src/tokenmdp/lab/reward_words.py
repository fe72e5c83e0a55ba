"""A reward's evaluation in words: the verdict, and the figures printed at the end.

Thresholds: an interval that leaves one half (or 0) out; a probe counts where its interval leaves 0 out and it moves the
score by at least a tenth of its spread; a length bias where the correlation's interval leaves out −0.1 to 0.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenmdp.lab.concordance import known

PROBE, LENGTH = 0.1, 0.1


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What the figures say, and what speaks against them."""
    out: list[str] = []
    if "pairs" in summary:
        out += [*_accuracy(summary["pairs"]), *_leaks(summary["pairs"]), *_length(summary["pairs"])]
        out += _probes(summary["pairs"].get("probes", {}))
    if "samples" in summary:
        out += _samples(summary["samples"])
    return [sentence.replace(" -", " −").replace("(-", "(−") for sentence in out]


def percents(found: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    if not known(found):
        return f"unknown ({found['absent']})"
    return f"{found['mean']:.0%} (95 % interval {found['low']:.0%} to {found['high']:.0%})"


def numbers(found: Mapping[str, Any]) -> str:
    """A figure with its interval."""
    if "low" not in found:
        return f"{found['mean']:+.2f}" if "mean" in found else f"unknown ({found['absent']})"
    return f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def _side(found: Mapping[str, Any], against: float) -> int:
    """Which side of a value the interval lies on; 0 for neither."""
    return int(found["low"] > against) - int(found["high"] < against) if "low" in found else 0


def _accuracy(pairs: Mapping[str, Any]) -> Iterator[str]:
    accuracy = pairs["accuracy"]
    n, ties = accuracy["n"], pairs["ties"]
    if ties == n:
        yield f"The reward gives both sides of all {n} pairs the same score: it prefers nothing."
        return
    side = _side(accuracy, 0.5)
    words = {1: "better than a coin", 0: "not significantly better than a coin", -1: "worse than a coin"}[side]
    shared = f" of {pairs['prompts']} prompts" if pairs["prompts"] < n else ""
    yield f"Right on {percents(accuracy)} of {n} pairs{shared}: {words}."
    gain = pairs["gain_over_longer"]
    rule = f"The rule “the longer one is better” is right on {pairs['longer_is_better']['mean']:.0%}"
    if "low" in gain:
        says = {1: "significantly less", 0: "no significant difference", -1: "significantly more"}[_side(gain, 0)]
        yield f"{rule}: {says}, {numbers(gain)}."
    else:
        yield f"{rule}, and a difference has no interval."
    if known(pairs["cross_prompt"]):
        yield f"A chosen response outscores a rejected one of another prompt in {percents(pairs['cross_prompt'])}."
    left = {name: count for name, count in pairs["data"].items() if name in ("unreadable", "equal_sides") and count}
    if left or pairs["no_verdict"]:
        parts = [f"{left.get('unreadable', 0)} rows that could not be read", f"{pairs['no_verdict']} without a verdict"]
        yield f"Left out: {parts[0]}, {left.get('equal_sides', 0)} pairs with two equal sides, {parts[1]}."
        if pairs.get("faults"):
            yield f"The first row that could not be read: {pairs['faults'][0]}"
    if pairs["data"]["cut"]:
        alike = pairs["data"]["cut_alike"]
        yield f"{pairs['data']['cut']} responses were cut at max_tokens; {alike} pairs are alike up to there and left out."
    if ties:
        yield f"{ties} ties count one half each."


def _leaks(pairs: Mapping[str, Any]) -> Iterator[str]:
    if twice := pairs["data"]["duplicates"]:
        yield f"{twice} of the data's pairs had stood there before, and count once."
    if against := pairs["data"]["contradicted"]:
        yield f"{against} of the data's pairs contradict another one; both count."
    if "trained_on" in pairs:
        seen = pairs["trained_on"]
        if seen["unreadable"] == seen["rows"]:
            yield f"None of the training file's {seen['rows']} rows could be read: whether training has seen these pairs is not known."
            return
        if seen["unreadable"]:
            yield f"{seen['unreadable']} of the training file's {seen['rows']} rows could not be read, and may hold more of these pairs."
        if seen["pairs"] or seen["openings"]:
            yield (
                f"Training has seen {seen['pairs']} of these pairs and the opening of {seen['openings']}; on the "
                f"{seen['accuracy_without']['n']} others it is right on {percents(seen['accuracy_without'])}."
            )
        else:
            yield "Training has seen none of these pairs and none of their openings."


def _length(pairs: Mapping[str, Any]) -> Iterator[str]:
    bias = pairs["length"]["score_length_spearman"]
    if not known(bias):
        return
    if _side(bias, LENGTH) > 0 or _side(bias, -LENGTH) < 0:
        more = "longer" if bias["mean"] > 0 else "shorter"
        yield (
            f"It favours {more} responses: rank correlation of score and length {numbers(bias)}; right on "
            f"{percents(pairs['length']['accuracy_chosen_shorter'])} where the chosen one is shorter, on "
            f"{percents(pairs['length']['accuracy_chosen_longer'])} where it is longer."
        )
    else:
        yield f"No strong length bias: rank correlation of score and length {numbers(bias)}."


def _probes(found: Mapping[str, Any]) -> Iterator[str]:
    if not found.get("probes"):
        if "absent" in found:
            yield f"No format probes: {found['absent']}."
        return
    moved = {
        name: probe["effect"]
        for name, probe in found["probes"].items()
        if "effect" in probe and _side(probe["effect"], 0) and abs(probe["effect"]["mean"]) >= PROBE
    }
    paid = sorted((name for name in moved if moved[name]["mean"] > 0), key=lambda name: -moved[name]["mean"])
    if paid:
        said = ", ".join(f"{name} {numbers(moved[name])}" for name in paid)
        yield f"It pays for form, in units of its spread: {said}."
    else:
        yield "No probe of form raises the score significantly by a tenth of its spread or more."
    if less := [name for name in moved if moved[name]["mean"] < 0]:
        yield f"It marks down: {', '.join(f'{name} {numbers(moved[name])}' for name in less)}."


def _samples(samples: Mapping[str, Any]) -> Iterator[str]:
    between = samples["spread"]["between_share"]
    asked = f"On {samples['prompts']} prompts × {samples['samples']} samples of {samples['policy']}"
    if between is None:
        yield f"{asked}; what share of the score's variance lies between prompts takes two of each to say."
    else:
        yield f"{asked}, {between:.0%} of the score's variance lies between prompts."
    gold = samples.get("gold")
    if gold is None or "absent" in gold:
        return
    same, cross = gold["pairs"]["same_prompt"], gold["pairs"]["cross_prompt"]
    yield (
        f"With {gold['name']} it agrees on {percents(same)} of pairs of one prompt and {percents(cross)} of pairs of two "
        f"prompts; rank correlation {numbers(gold['ranks']['pooled'])} in all, "
        f"{numbers(gold['ranks']['within'])} within prompts."
    )
    gap = gold["pairs"]["difference"]
    if "low" in gap:
        words = {1: "Worse across prompts than within", -1: "Better across prompts than within"}
        side = _side(gap, 0)
        yield f"{words.get(side, 'No significant difference between within and across prompts')}: {numbers(gap)}."


def headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures printed at the end, and kept in result.json."""
    out: dict[str, Any] = {"verdict": " ".join(summary["verdict"])}
    if "pairs" in summary:
        pairs = summary["pairs"]
        out |= {
            "accuracy": pairs["accuracy"],
            "the longer one": pairs["longer_is_better"],
            "chosen over rejected of other prompts": pairs["cross_prompt"],
            "ties": pairs["ties"],
            "no verdict": pairs["no_verdict"],
            "calibration error": pairs["calibration"].get("ece", pairs["calibration"].get("ece_tempered")),
            "score and length": pairs["length"]["score_length_spearman"],
        }
        out |= {name: pairs[name] for name in ("subsets", "mean_of_subsets", "margin_spearman") if name in pairs}
        out |= {name: pairs["trained_on"] for name in ("trained_on",) if name in pairs}
        probes = pairs.get("probes", {}).get("probes", {})
        out |= {f"probe: {name}": probe.get("effect", probe) for name, probe in probes.items()}
    if "samples" in summary and "pairs" in summary["samples"].get("gold", {}):
        gold = summary["samples"]["gold"]
        out |= {f"samples, {name}": gold["pairs"][name] for name in ("same_prompt", "cross_prompt")}
        out |= {f"samples, spearman {name}": gold["ranks"][name] for name in ("within", "pooled", "of_means")}
    return out
