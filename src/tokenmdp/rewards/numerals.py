"""Numbers in text: the numerals of a response with their exact values, and which of them is the answer.

    signs          -5, −5 (any Unicode minus), is minus 5; in `12-5` and `12 - 5` the dash is an operation, no sign
    thousands      1,234  1 234  1'234  1.234.567  1,234.5  1.234,5  1{,}234 (LaTeX)
    decimals       0.5  .5  2,5
    fractions      3/4  ½  \\frac{3}{4};   mixed numbers  1 1/2  1½  1\\frac{1}{2}  1 and 1/2
    powers of ten  1.5e3  1.5 × 10^3  1.5 x 10³  1.5 \\times 10^{3}
    units          $5, 5 kg and 5kg are 5; `x1` and `H2O` hold no number; 12% is 12 or 0.12 (see `same`)

What can be read in two ways is read in one, always the same:

- one comma before exactly three digits separates thousands (1,234 is 1234), before any other number of digits it is a
  decimal comma (2,5 is 2.5); after a leading 0 it is a decimal comma, too;
- one point is a decimal point (1.234 is 1234/1000), two or more before three digits each separate thousands;
- with both marks the last one is the decimal mark;
- a space before exactly three digits separates thousands (`5 100` is 5100);
- digits joined by marks in any other way are a list (`1,2,3` is three numbers);
- `a b/c` is a mixed number if b/c is below 1; a fraction is its value, reduced or not (6/3 is 2).

Number words are not read: there is no number in "twelve", and "2 million" is 2. Neither is 0x1F: it is no decimal.

An answer is a number that stands alone. `2\\sqrt{3}`, `2^{10}`, `3\\pi`, `12 - 5`, `5 or 6`, `not 5` and `5 6 7 8` hold
numerals, but say no number: nothing is worked out, and no part of them passes for the whole. Units, currency, percent,
degrees and words may follow: `5 kg`, `5\\text{ kg}`, `$5`, `5^\\circ`, `5 apples`.
"""

from __future__ import annotations

import math
import numbers
import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple


class Numeral(NamedTuple):
    """A number that a text says; `percent` if a percent sign or the word follows it (`value` is then what stands there)."""

    value: Fraction
    percent: bool = False


_LONGEST = 400  # characters of a numeral; a longer run of digits is noise and never an answer
_READ = 100_000  # characters of a text, from its end, in which an answer is looked for
_POWER = 1000  # the largest power of ten that is told apart from still larger ones
_SPACES = " \u00a0\u2009\u202f"
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_VULGAR = {
    c: unicodedata.normalize("NFKC", c).replace("\u2044", "/")
    for c in map(chr, [0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F), 0x2189])
}
_VULGAR_AT = re.compile(f"(\\d?)([{''.join(_VULGAR)}])")
_FRACTION = re.compile(r"(\d?)\\[cdt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)\s*(\d))")
_CODE = re.compile(r"\b(?:USD|EUR|GBP|INR|US|Rs)\.?(?=[ $]?-?\d|\$)")

_RUN = rf"(?:[1-9]\d{{0,2}}(?:[{_SPACES}']\d{{3}})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*|(?<![\w.])\.\d+)"
_TEN = r"[ ]?[x×*·][ ]?10[ ]?(?:\^|\*\*)[ ]?\{?([-+]?\d+)\}?"
_NUMERAL = re.compile(
    rf"(?<![A-Za-z_])({_RUN})"
    rf"(?:[eE]([-+]?\d+)(?!\w)|{_TEN}|[ ]{{1,2}}(?:and )?(\d+)/(\d+)(?![\d./])|[ ]?/[ ]?({_RUN})(?![ ]?/))?"
    r"[ ]?(%|per ?cent\b)?"
)
_ENGLISH = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_CONTINENTAL = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})")
_DECIMAL = re.compile(r"\d*[.,]\d+|\d+")
_PIECE = re.compile(r"\d+(?:\.\d+)?")

_MARK = re.compile(
    r"(?P<box>\\boxed\s*\{)|####|\banswer(?:\s{1,4}to\s{1,4}[^.\n]{1,60}?)?[\s*_]{0,9}"
    r"(?:\s(?:is|was|equals|will be|would be|should be|comes to)\b|[:=])",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?;](?=\s|$)")
_AT_ONCE = re.compile(r"[\W_]*(?:[^\W\d_]+[\W_]+)?\d")  # the number of a mark, after one word at most
_LITERAL = re.compile(r"(?<![A-Za-z_\d.,])0(?:[xX][0-9A-Fa-f]+|[bB][01]+|[oO][0-7]+)(?!\w)")

_QUIET = (  # LaTeX commands beside a number that leave its value alone: text, units, layout
    r"text\w*|math(?:rm|bf|it|sf|tt|normal)|mbox|fbox|boxed|operatorname|boldsymbol|underline|displaystyle|color|"
    r"left|right|big\w*|q?quad|hspace|newline|circ|degree|deg|mu|Omega|ohm|euro|pounds|cents?|"
    r"item|approx|implies|Rightarrow|therefore|because|p?mod|bmod|begin|end|square|blacksquare|checkmark"
)
_COMMAND = rf"\\(?!(?:{_QUIET})(?![A-Za-z]))[A-Za-z]+"
_ORDINAL = r"\{?\s*(?:\\(?:circ|degree|text|mathrm|mbox)(?![A-Za-z])|°|(?:st|nd|rd|th)\b)"
_GOES_ON = re.compile(  # what stands right after a numeral that is only a part of something
    rf"\}}*[^\S\n]*(?:\^(?!\s*{_ORDINAL})|[×·⋅÷√π²³⁴⁵⁶⁷⁸⁹]|\.?{_COMMAND}|\*{{1,2}}[\w\\({{]|(?<=\s)\*|[x/+-]\s*\d|[/+-]\s*{_COMMAND}"
    rf"|or\b|-?\.?\d|[,;&]\s*-?\d[\d.]*\s*(?:$|[,;&)}}\]$]|\.(?!\d)|(?:and|or)\b))",
    re.IGNORECASE,
)
_BEGAN = re.compile(  # what stands right before one
    rf"(?:\^|[√π]|{_COMMAND}|\\[cdt]?frac\s*\{{[^{{}}]*\}})[\s{{}}()\[\]+*/$-]*$|\b(?:or|not)\b[\s$*-]*$", re.IGNORECASE
)


def numerals(text: str) -> list[Numeral]:
    """Every numeral of a text, in order."""
    return list(_found(_plain(text)))


def answer(text: str) -> Numeral | None:
    """The number that a text gives as its answer, None where it gives none.

    A marked answer wins: `\\boxed{42}`, `#### 42`, `the answer is 42`, `Answer: 42`; of several marks the last. A mark in
    words that a number does not follow at once, after one word at most, yields to an earlier mark: `the answer: explained
    in 3 steps` takes nothing back. Of what is marked the first number counts, or where the sentence has an equals sign
    the first after the last of these (`the answer is 12 - 5 = 7` is 7); a mark without a number on its line, or a box
    that never closes, is no answer. Without any mark the last number of the text counts. A number that is part of an
    expression, or stands beside `or` or after `not`, is no answer. Of a longer text the last 100,000 characters are read.
    """
    if len(text) > _READ:  # from the first blank on, for what stands before it may be half a number
        text = re.sub(r"\A\S*", "", text[-_READ:])
    marks = list(_MARK.finditer(text))
    if not marks:
        return _alone(text, -1)
    inside = _marked(text, marks[-1])
    for mark in reversed(marks):
        line = _marked(text, mark)
        if mark["box"] or mark[0] == "####" or _AT_ONCE.match(_plain(line[:_LONGEST])):
            inside = line
            break
    sentence = _SENTENCE.split(inside, maxsplit=1)[0]
    after = sentence.rpartition("=")[2]
    return _alone(after if "=" in sentence and numerals(after) else inside, 0)


def known(value: Any) -> Numeral | None:
    """The right answer as a data set writes it: a number, or text such as `18`, `1,234`, `3/4` or `... #### 18`.

    A floating-point number is taken as the decimal it is written as. None where there is no number to be read.
    """
    if isinstance(value, str | Decimal):
        return answer(str(value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Rational):
        return Numeral(Fraction(int(value.numerator), int(value.denominator)))
    return Numeral(Fraction(repr(float(value)))) if math.isfinite(float(value)) else None


def same(said: Numeral, right: Numeral, tolerance: float = 0.0) -> bool:
    """Whether |said − right| ≤ tolerance · |right|, in exact rational arithmetic.

    If one of the two has a percent sign, 12% passes for 12 and for 0.12: data sets write both.
    """
    pairs = [(said.value, right.value)]
    if said.percent and not right.percent:
        pairs.append((said.value / 100, right.value))
    elif right.percent and not said.percent:
        pairs.append((said.value, right.value / 100))
    return any(abs(a - b) <= Fraction(tolerance) * abs(b) for a, b in pairs)


def written(value: Fraction, decimals: int = 4) -> str:
    """A number in its shortest plain form: `7`, `2.5`, or `11/6` where no decimal of so many digits is exact."""
    scaled = value * 10**decimals
    if scaled.denominator != 1:
        return str(value)
    sign, digits = ("-" if value < 0 else ""), str(abs(int(scaled))).rjust(decimals + 1, "0")
    whole, rest = digits[: len(digits) - decimals], digits[len(digits) - decimals :].rstrip("0")
    return f"{sign}{whole}.{rest}" if rest else f"{sign}{whole}"


def _alone(text: str, which: int) -> Numeral | None:
    """The first (0) or the last (-1) numeral of a text, None if it is part of an expression or of a list."""
    plain = _plain(text)
    found = [m for m in _NUMERAL.finditer(plain) if len(m[0]) <= _LONGEST]
    if not found:
        return None
    m = found[which]
    said = list(_numbers(m, plain))
    before = plain[max(0, m.start() - _LONGEST) : m.start()]
    return None if len(said) != 1 or _GOES_ON.match(plain, m.end()) or _BEGAN.search(before) else said[0]


def _plain(text: str) -> str:
    """The text with one way to write each sign: ASCII dashes, `a/b` for every fraction, `10^n`, no LaTeX spacing."""
    text = text.translate(_DASHES).replace("\u2044", "/")
    text = text.replace("{,}", ",").replace("\\times", "×").replace("\\cdot", "×")
    text = re.sub(r"\\[,;:! ]", "\u2009", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    text = _FRACTION.sub(lambda m: f"{m[1]}{' ' * bool(m[1])}{m[2] or m[4]}/{m[3] or m[5]}", text)
    text = _VULGAR_AT.sub(lambda m: f"{m[1]}{' ' * bool(m[1])}{_VULGAR[m[2]]}", text)
    text = re.sub(r"(?<=10)[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m[0].translate(_RAISED), text)
    text = _LITERAL.sub("a literal", text)
    return _CODE.sub("$", text)


def _found(plain: str) -> Iterator[Numeral]:
    for m in _NUMERAL.finditer(plain):
        if len(m[0]) <= _LONGEST:
            yield from _numbers(m, plain)


def _numbers(m: re.Match[str], plain: str) -> Iterator[Numeral]:
    """What one match says: a number, or several, or none."""
    run, exponent, top, bottom, divisor = m[1], m[2] or m[3], m[4], m[5], m[6]
    sign, percent, value = _sign(plain[max(0, m.start() - 16) : m.start()]), bool(m[7]), _value(run)
    if value is None:  # a list: only its first number can bear the sign, only its last the rest
        pieces = [Fraction(piece) for piece in _PIECE.findall(run)]
        yield from (Numeral(piece * (sign if i == 0 else 1)) for i, piece in enumerate(pieces))
        return
    if exponent:
        value *= Fraction(10) ** max(-_POWER, min(_POWER, int(exponent)))
    elif top:
        part = Fraction(int(top), int(bottom)) if int(bottom) else Fraction(1)
        if not (value.denominator == 1 and part < 1):  # `5 12/4` is no mixed number: two numerals
            yield Numeral(sign * value)
            sign, value = 1, Fraction(int(top), int(bottom) or 1)
        else:
            value += part
    elif divisor:
        below = _value(divisor)
        if not below:  # a division by zero, or by a list, has no value
            return
        value /= below
    yield Numeral(sign * value, percent)


def _value(run: str) -> Fraction | None:
    """A run of digits and marks as one number, None if it is a list."""
    run = re.sub(rf"[{_SPACES}']", "", run) if (spaced := re.search(rf"[{_SPACES}']", run)) else run
    if _ENGLISH.fullmatch(run) and not spaced:
        return Fraction(run.replace(",", ""))
    if _CONTINENTAL.fullmatch(run):
        return Fraction(run.replace(".", "").replace(",", "."))
    return Fraction(run.replace(",", ".")) if _DECIMAL.fullmatch(run) else None


def _sign(before: str) -> int:
    """−1 where what stands before a numeral makes it negative."""
    head = before.rstrip("$€£¥ ") if re.search(r"[$€£¥] ?$", before) else before
    bare = head.rstrip(" ")
    if re.search(r"(?:(?:^|\b(?:is|was|to|of|at)|[=:(])\s*minus|\bnegative) ?$", head, re.IGNORECASE):
        return -1
    if not bare.endswith("-"):
        return 1
    ahead = bare[:-1].rstrip("$€£¥")
    if bare == head:  # `-5`: a sign unless it joins two things, as in `12-5` or `covid-19`
        return 1 if re.search(r"[\w)\]}%]$", ahead) else -1
    return (
        -1 if re.search(r"(?:^|[=:(\[{])[ ]*$", ahead) else 1
    )  # `- 5`: a sign only where nothing can be subtracted from


def _marked(text: str, mark: re.Match[str]) -> str:
    """What a mark marks: the inside of its box, or else the first line after it that is not empty."""
    rest = text[mark.end() :]
    return _inside(rest) if mark["box"] else rest.lstrip(" \t\r\n:=*_").partition("\n")[0]


def _inside(marked: str) -> str:
    """What stands before the brace that closes one already open; nothing if none does."""
    depth = 1
    for at, c in enumerate(marked):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return marked[:at]
    return ""
