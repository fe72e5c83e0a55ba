"""Sampled responses for the page: side by side for one prompt, and token by token in colour.

Colours of tokens: each number of a token (advantage, KL, reward) is put on a scale centred at 0, cut at the 98th
percentile of its absolute value so that one outlier does not bleach the page, in six steps to either side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenmdp.lab.report.folder import NUMBERS, Sample
from tokenmdp.lab.report.ink import ARMS, arm_role
from tokenmdp.lab.report.words import fine, num, signed

STEPS = 6  # shades to either side of 0
OUTLIERS = 98.0  # percentile of |value| at which the scale ends
LONGEST = 4000  # characters of a response or a prompt that are shown
UNITS = {"advantage": "reward units", "kl": "nats", "reward": "reward units"}
TITLES = {"advantage": "Advantage", "kl": "KL to SFT", "reward": "Reward"}


def side_by_side(samples: Sequence[Sample], rows: int, names: Mapping[str, str], each: int = 4) -> list[dict[str, Any]]:
    """The responses to the first `rows` prompts, in the file's order: one an arm, or up to `each` of a single arm.

    `names` are the names arms have on the page; an arm without one keeps its own.
    """
    arms = _in_order(samples)
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.row, sample.prompt), []).append(sample)
    shown = []
    for (row, prompt), found in list(groups.items())[:rows]:
        if len(arms) > 1:
            found = [next(s for s in found if s.arm == arm) for arm in arms if any(s.arm == arm for s in found)]
        cards = [_card(s, arms, names) for s in found[:each]]
        shown.append({"row": row, "prompt": _cut(prompt), "cards": cards})
    return shown


def prompts(samples: Sequence[Sample]) -> int:
    """How many prompts the samples answer."""
    return len({(sample.row, sample.prompt) for sample in samples})


def coloured(samples: Sequence[Sample], most: int, names: Mapping[str, str]) -> dict[str, Any] | None:
    """The first `most` responses that carry token numbers, PPO's before others'; None where there is none."""
    known = [s for s in samples if any(getattr(t, key) is not None for t in s.tokens for key in NUMBERS)]
    arms = _in_order(known)
    picked = [s for s in known if s.arm == "ppo"] or known
    if not picked:
        return None
    ends = {key: _end(picked[:most], key) for key in NUMBERS}
    return {
        "sheets": [{**_card(s, arms, names), **_sheet(s, ends)} for s in picked[:most]],
        "total": len(picked),
        "scales": [_scale(key, ends[key]) for key in NUMBERS if ends[key] is not None],
    }


def _in_order(samples: Sequence[Sample]) -> list[str]:
    known = list(ARMS)
    return sorted(
        dict.fromkeys(s.arm for s in samples), key=lambda arm: known.index(arm) if arm in known else len(known)
    )


def _card(sample: Sample, arms: Sequence[str], names: Mapping[str, str]) -> dict[str, Any]:
    chips = [(key, num(value)) for key in ("gold", "proxy") if (value := getattr(sample, key)) is not None]
    if sample.kl is not None:
        chips.append(("KL", f"{num(sample.kl)} nats"))
    return {
        "arm": names.get(sample.arm, sample.arm),
        "role": arm_role(sample.arm, arms.index(sample.arm)),
        "text": _cut(sample.text.lstrip(" ")),  # the space before its first word; kept where tokens are shown
        "chips": chips,
        "cut": sample.ended is False,
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def _end(samples: Sequence[Sample], key: str) -> float | None:
    """Where the colour scale of one number ends; None where no token has it."""
    sizes = [abs(value) for s in samples for t in s.tokens if (value := getattr(t, key)) is not None]
    if not sizes:
        return None
    return float(np.percentile(sizes, OUTLIERS)) or max(sizes)


def _sheet(sample: Sample, ends: Mapping[str, float | None]) -> dict[str, Any]:
    tokens = []
    for token in sample.tokens:
        numbers = [(key, getattr(token, key)) for key in NUMBERS]
        shades = [f"{key[0]}{shade}" for key, value in numbers if (shade := _shade(value, ends[key]))]
        title = " · ".join(f"{TITLES[key]} {signed(value, fine)}" for key, value in numbers if value is not None)
        cells = [signed(value, fine) for _, value in numbers]
        tokens.append({"text": token.text, "shades": " ".join(shades), "title": title, "cells": cells})
    return {"prompt": _cut(sample.prompt), "row": sample.row, "tokens": tokens}


def _shade(value: float | None, end: float | None) -> str:
    """p1 (just above 0) to p6 (at the scale's end or past it), n1 to n6 below 0; nothing within a tenth of a step."""
    if value is None or not end:
        return ""
    level = min(math.ceil(STEPS * abs(value) / end - 0.1), STEPS)
    return f"{'p' if value > 0 else 'n'}{level}" if level > 0 else ""


def _scale(key: str, end: float | None) -> dict[str, Any]:
    assert end is not None
    return {
        "key": key,
        "letter": key[0],
        "title": TITLES[key],
        "unit": UNITS[key],
        "low": fine(-end),
        "high": signed(end, fine),
    }
