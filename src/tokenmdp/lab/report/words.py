"""Numbers and texts as a reader should meet them.

Numbers: as many digits as carry meaning, a real minus sign, an interval beside its estimate. Texts: whatever a model or
a user wrote, with the characters made visible that would otherwise hide, reorder or break the line.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup, escape

from tokenmdp.stats import Interval

NONE = "–"  # where there is no number


def num(x: float | None) -> str:
    """A score, a size, a share: two decimals; fewer where they would say nothing, more where two would hide it."""
    if x is None or not math.isfinite(x):
        return NONE
    if abs(x) < 0.01:
        return f"{x:.3f}".replace("-", "−") if abs(x) >= 0.0005 else fine(x)
    return f"{x:,.{2 if abs(x) < 9.995 else 1 if abs(x) < 99.95 else 0}f}".replace("-", "−")


def fine(x: float | None) -> str:
    """A metric of any size, with three significant digits; in powers of ten only when it is tiny."""
    if x is None or not math.isfinite(x):
        return NONE
    if x == 0 or abs(x) >= 9.995:
        return "0" if x == 0 else num(x)
    if abs(x) < 0.001:
        return f"{x:.1e}".replace("e-0", "e-").replace("-", "−")
    return f"{x:.{2 - math.floor(math.log10(abs(x)))}f}".replace("-", "−")


def count(x: float | None) -> str:
    """A number of things."""
    return NONE if x is None or not math.isfinite(x) else f"{x:,.0f}" if float(x).is_integer() else num(x)


def signed(x: float | None, show: Callable[[float | None], str] = num) -> str:
    """A difference: with its sign, plus included."""
    text = show(x)
    return f"+{text}" if x is not None and math.isfinite(x) and x > 0 else text


def tick(x: float) -> str:
    """A number on an axis."""
    return f"{x:g}".replace("-", "−") if abs(x) < 1e4 else f"{x / 1000:g}k".replace("-", "−")


def percent(x: float | None) -> str:
    """A share as a percentage."""
    if x is None or not math.isfinite(x):
        return NONE
    return f"{100 * x:.0f} %" if abs(x) >= 0.1 or x == 0 else f"{100 * x:.1f} %".replace("-", "−")


def span(interval: Interval, show: str = "num") -> str:
    """The ends of an interval, in the form "0.41 to 0.63"; empty where they are not known."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    form = {"num": num, "signed": signed, "percent": percent}[show]
    return f"{form(interval.low)} to {form(interval.high)}"


def minutes(x: float | None) -> str:
    """A duration given in minutes."""
    if x is None or not math.isfinite(x):
        return NONE
    return f"{x * 60:.0f} s" if x < 1 else f"{x:.1f} min"


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with its control, formatting, private and surrogate characters replaced by what names them.

    A bidirectional override, a zero-width space or a NUL cannot hide or reorder anything then. `keep` names the
    characters that stay as they are.
    """
    return "".join(_picture(c) if c not in keep and _hidden(c) else c for c in text)


def marked(text: str) -> Markup:
    """The text for a response's body: escaped, line ends shown and kept, hidden characters shown in a quiet style."""
    out: list[Markup] = []
    for c in text:
        if c == "\n":
            out.append(Markup('<span class="ctl">↵</span>\n'))
        elif _hidden(c):
            out.append(Markup('<span class="ctl">{}</span>').format(_picture(c)))
        else:
            out.append(escape(c))
    return Markup("").join(out)


def _hidden(c: str) -> bool:
    return c not in " \u00a0" and unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _picture(c: str) -> str:
    code = ord(c)
    if c == "\n":
        return "↵"
    if c == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def trend(values: Sequence[float]) -> str:
    """How a curve moves, from the mean of its first to the mean of its last fifth, set against its own scatter."""
    x = np.asarray([v for v in values if math.isfinite(v)], dtype=np.float64)
    if len(x) == 0:
        return "no value"
    if len(x) < 3:
        return fine(float(x[0])) if len(x) == 1 else f"from {_pair(float(x[0]), float(x[-1]))}"
    part = max(1, len(x) // 5)
    first, last = float(x[:part].mean()), float(x[-part:].mean())
    scatter = float(np.abs(np.diff(x)).mean()) / math.sqrt(part)
    if abs(last - first) <= max(3 * scatter, 1e-12):
        return f"stays near {fine(float(x.mean()))}"
    return f"{'rises' if last > first else 'falls'} from {_pair(first, last)}"


def _pair(first: float, last: float) -> str:
    """Two values of one metric with the same decimals: those of the greater one."""
    size = max(abs(first), abs(last))
    if size >= 9.995 or size < 0.001 or min(abs(first), abs(last)) < size / 100:
        return f"{fine(first)} to {fine(last)}"
    decimals = 2 - math.floor(math.log10(size))
    return f"{first:.{decimals}f} to {last:.{decimals}f}".replace("-", "−")


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
