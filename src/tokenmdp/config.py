"""Settings as frozen dataclasses: from their defaults, a YAML or JSON file and flags, in that order.

What a file or a command line may say is what the dataclass declares and nothing else. A key that no field answers to, a
key given twice and a value of another type are errors that name the file, the key and what was expected: a setting that
is silently ignored costs more than any crash. So is a number outside its range: `RANGES` has them by the name of the
field, which means the same in every recipe.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from dataclasses import asdict as as_dict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import tyro
import yaml

Config = TypeVar("Config")


@dataclass(frozen=True)
class Options:
    """What every run can be told."""

    config: Path | None = None  # a YAML or JSON file with settings (or a run's config.json); flags override it
    out: Path | None = None  # the run folder; runs/VERB if not given
    seed: int = 0  # every random stream follows from it
    resume: bool = False  # go on with the run in the folder, bit for bit with the same number of threads
    overwrite: bool = False  # take away what an earlier run wrote in the folder and begin anew
    threads: int = 0  # CPU threads; 0 leaves the number to torch
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # dashboards besides metrics.jsonl
    print_config: bool = False  # print the resolved settings as YAML and stop
    debug: bool = False  # show the traceback of an error


class Range(NamedTuple):
    """The numbers from `least` to `most`; `ends` says which of the two belong to them, as intervals are written."""

    least: float
    most: float = math.inf
    ends: str = "[]"

    def holds(self, value: float) -> bool:
        """Whether the value lies in the range; NaN lies in none."""
        above = value >= self.least if self.ends[0] == "[" else value > self.least
        return above and (value <= self.most if self.ends[1] == "]" else value < self.most)

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"at least {self.least:g}" if self.ends[0] == "[" else f"above {self.least:g}"
        return f"in {self.ends[0]}{self.least:g}, {self.most:g}{self.ends[1]}"


COUNT, NOT_NEGATIVE, POSITIVE = Range(1), Range(0), Range(0, ends="(]")
FRACTION, SHARE = Range(0, 1), Range(0, 1, "()")

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("steps", "rows", "prompts", "samples", "epochs", "minibatches", "pairs"), COUNT),
    **dict.fromkeys(("max_new_tokens", "max_tokens", "micro_tokens", "evaluate_every", "sync", "updates"), COUNT),
    **dict.fromkeys(("n", "k", "block", "chunk"), COUNT),
    **dict.fromkeys(("repeats", "concurrency", "calls", "finalists", "components"), COUNT),
    **dict.fromkeys(("limit", "per_minute", "price", "price_in", "price_out"), NOT_NEGATIVE),
    **dict.fromkeys(
        (
            "kl",
            "kl_target",
            "clip",
            "clip_high",
            "value_clip",
            "score_clip",
            "entropy",
            "truncation",
            "centring",
            "margin",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("desirable", "undesirable", "demo_weight", "cql", "temperature"), NOT_NEGATIVE),
    **dict.fromkeys(("warmup", "warm_steps", "futures", "rollouts", "overlong", "dynamic_sampling"), NOT_NEGATIVE),
    **dict.fromkeys(("top_k", "threads", "demonstrations", "queries", "timeout"), NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "rate", "beta", "sigma", "timeout_seconds"), POSITIVE),
    **dict.fromkeys(("gamma", "lam", "demo_decay", "mixture", "decay"), FRACTION),
    **dict.fromkeys(("target_rate", "top_p"), Range(0, 1, "(]")),
    **dict.fromkeys(("held_out", "keep", "tau"), SHARE),
    **dict.fromkeys(("folds", "inner", "check"), Range(2, math.inf, "[)")),
    "label_smoothing": Range(0, 0.5, "[)"),
    "penalty": Range(1e-9, math.inf, "[)"),  # with less of it a linear head has no solution
}
"""What a setting may be, by the name of its field. A recipe may ask for more: `samples` of at least 2."""


def allowed(name: str, value: float) -> Range | None:
    """The range of a field's value; None if any number will do.

    What ends in `learning_rate` is one. A whole number is no share: `held_out` of 200 counts rows.
    """
    found = RANGES.get("learning_rate" if name.endswith("learning_rate") else name)
    return COUNT if found == SHARE and isinstance(value, int) else found


def check(settings: Any, prefix: str = "") -> None:
    """Refuse numbers outside `RANGES`, NaN and infinity; `prefix` is the way to the settings from the top.

    Raises:
        ValueError: naming the flag, the value and the range.
    """
    for field in fields(settings):
        value, flag = getattr(settings, field.name), f"--{prefix}{field.name}".replace("_", "-")
        if is_dataclass(value):
            check(value, f"{prefix}{field.name}.")
            continue
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        for number in parts:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise ValueError(f"{flag} is {number}; it must be a finite number")
            within = allowed(field.name, number)
            if within is not None and not within.holds(number):
                raise ValueError(f"{flag} is {number}; it must be {within}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name closest to `word`, if one is close, else the names there are."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"


class _Loader(yaml.SafeLoader):
    """YAML as plain data, where a key that stands twice is an error rather than the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"key {', '.join(twice)} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(file: Path, kind: type[Config], preset: Mapping[str, Any] | None = None) -> Config:
    """The settings a YAML or JSON file asks for, then those of `preset`, the defaults for the rest.

    A run's folder or its config.json is taken too: the "config" part.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key, a value of the wrong type, or something that is not a table of settings.
    """
    file = file / "config.json" if file.is_dir() else file  # a run's folder
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.load(text, _Loader)  # a safe loader: plain data
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no config file {file}") from None
    except (yaml.YAMLError, ValueError) as fault:
        raise ValueError(f"{file} cannot be read as {'JSON' if file.suffix == '.json' else 'YAML'}: {fault}") from fault
    if isinstance(found, Mapping) and {"config", "seed", "versions"} <= found.keys():
        found = found["config"]
    found = {} if found is None else found
    return typing.cast(
        Config, build(kind, {**(preset or {}), **found} if isinstance(found, Mapping) else found, str(file))
    )


def build(kind: Any, found: Any, file: str, prefix: str = "") -> Any:
    """An instance of the dataclass `kind` from a table read from `file`; `prefix` is the way to it from the top.

    Where the table leaves out fields that have no default, the instance is a form that the command line's flags fill
    in: it marks those as missing and is not validated yet.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} holds {found!r}{f' at {prefix}' if prefix else ''}; expected a table of settings")
    hints = typing.get_type_hints(kind)
    known = [field for field in fields(kind) if field.init]
    for key in found:
        if key not in {field.name for field in known}:
            raise ValueError(
                f"unknown key {prefix + str(key)!r} in {file}{did_you_mean(str(key), [f.name for f in known])}"
            )
    values = {key: convert(value, hints[key], f"{prefix}{key}", file) for key, value in found.items()}
    if all(f.name in values or f.default is not MISSING or f.default_factory is not MISSING for f in known):
        return kind(**values)
    form = object.__new__(kind)  # past __post_init__, which may look at what is missing
    for field in known:
        default = tyro.MISSING if field.default is MISSING else field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        object.__setattr__(form, field.name, values.get(field.name, default))
    return form


def convert(value: Any, hint: Any, name: str, file: str) -> Any:
    """A value as the type that a field declares; only what loses nothing is converted (a list to a tuple, 1 to 1.0).

    Raises:
        ValueError: the value is of another type; the message names field, value and the expected type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{file}: field {name!r} has the value {value!r} ({type(value).__name__}); expected {say(hint)}")
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in sorted(inner, key=lambda option: option is not type(value)):  # 1 stays an int in `int | float`
            try:
                return convert(value, option, name, file)
            except ValueError:
                continue
        raise wrong
    if origin is Literal:
        if value in inner and type(value) is type(inner[inner.index(value)]):
            return value
        raise wrong
    if is_dataclass(hint):
        return build(hint, value, file, f"{name}.")
    if origin in (tuple, list, Sequence):
        return _row(value, hint, name, file, wrong)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        return {convert(k, inner[0], name, file): convert(v, inner[1], f"{name}.{k}", file) for k, v in value.items()}
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-5 (without a dot) for a string
        except ValueError:
            raise wrong from None
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is hint or (isinstance(hint, type) and isinstance(value, hint) and not isinstance(value, bool)):
        return value
    raise wrong


def _row(value: Any, hint: Any, name: str, file: str, wrong: ValueError) -> Any:
    """A list from the file as the tuple or list that the field declares."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise wrong
    fixed = origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis)
    if fixed and len(inner) != len(value):
        raise wrong
    hints = inner if fixed else [inner[0]] * len(value)
    items = [convert(v, h, f"{name}[{i}]", file) for i, (v, h) in enumerate(zip(value, hints, strict=True))]
    return tuple(items) if origin is tuple else items


def say(hint: Any) -> str:
    """A type as a reader knows it: `float or None`, `one of 'a', 'b'`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(map(say, inner))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if is_dataclass(hint):
        return "a table of settings"
    return hint.__name__ if origin is None and isinstance(hint, type) else str(hint).replace("typing.", "")


def plain(config: Any) -> dict[str, Any]:
    """The settings as data that JSON and YAML can hold."""

    def simple(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): simple(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [simple(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {key: simple(value) for key, value in as_dict(config).items()}


def to_yaml(config: Any) -> str:
    """The settings as YAML that `read` gives back unchanged."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def flags(kind: Any, prefix: str = "") -> list[str]:
    """The flags that a settings dataclass gives rise to, nested ones as --outer.inner."""
    hints = typing.get_type_hints(kind)
    names: list[str] = []
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            names += flags(hints[field.name], f"{prefix}{field.name}.")
        else:
            names.append(f"--{prefix}{field.name}".replace("_", "-"))
    return names


def parse(
    kind: Any, argv: Sequence[str], prog: str, about: str | None, preset: Mapping[str, Any] | None = None
) -> tuple[Any, Options]:
    """The settings and the options of a run: defaults, then `preset`, the file given by --config, and the flags.

    Raises:
        ValueError: an unknown flag or key, a wrong value, a number outside its range (see `check`), or a field of `kind`
            that bears the name of an option.
        SystemExit: after --help (0), or after saying which flag's value cannot be used (2).
    """
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"{prog}: Config is not a dataclass; write `@dataclass(frozen=True)` above it")
    if taken := {field.name for field in fields(kind)} & {field.name for field in fields(Options)}:
        raise ValueError(f"{prog}: Config has a field {min(taken)!r}, which is a flag of every run; rename it")
    default = build(kind, preset or {}, prog)
    for flag, after in zip(argv, [*argv, ""][1:], strict=True):
        name, _, value = flag.partition("=")
        if name == "--config" and (value or after):
            default = read(Path(value or after), kind, preset)
    flat, single = tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff
    both: Any = tuple[Annotated[kind, flat], Annotated[Options, flat, single]]
    (settings, options), rest = tyro.cli(
        both, args=argv, prog=prog, description=about, default=(default, Options()), return_unknown_args=True
    )
    for unknown in rest:
        if unknown.startswith("-"):
            flag = unknown.partition("=")[0]
            raise ValueError(f"unknown flag {flag!r}{did_you_mean(flag, flags(kind) + flags(Options))}")
    if rest:
        raise ValueError(f"{rest[0]!r} belongs to no flag; settings are given as --field value (`{prog} --help`)")
    check(settings)
    check(options)
    return settings, options
