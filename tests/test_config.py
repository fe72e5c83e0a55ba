from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import tyro

from tokenmdp import cli, config


@dataclass(frozen=True)
class Inner:
    steps: int = 3
    rate: float = 0.1


@dataclass(frozen=True)
class Config:
    steps: int = 200  # optimiser phases
    learning_rate: float = 1e-5  # per step
    clip_high: float | None = None
    width: int | float = 1
    weight: Literal["per_token", "per_sequence"] = "per_token"
    shuffle: bool = True
    layers: tuple[int, ...] = (1, 2)
    span: tuple[int, float] = (1, 2.0)
    names: list[str] = field(default_factory=list)
    weights: Mapping[str, float] = field(default_factory=dict)
    data: Path = Path("data")
    note: str = ""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; a run takes none or more")


@dataclass(frozen=True)
class Needy:
    model: str
    steps: int = 3

    def __post_init__(self) -> None:
        if not self.model.isalpha():
            raise ValueError(f"{self.model!r} is no name of a model")


def read(tmp_path: Path, text: str, name: str = "x.yaml", kind: Any = Config) -> Any:
    file = tmp_path / name
    file.write_text(text)
    return config.read(file, kind)


def parse(*argv: str, kind: Any = Config) -> tuple[Any, config.Options]:
    return config.parse(kind, argv, "tokenmdp toy", "A toy.")


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        learning_rate: 3e-4   # without a dot, which YAML takes for a string
        clip_high: 1
        layers: [4]
        span: [2, 3]
        names: [a, b]
        weights: {gold: 1, length: -0.5}
        data: /data/x.jsonl
        inner: {rate: 1}
        """,
    )
    expected = Config(
        learning_rate=3e-4,
        clip_high=1.0,
        layers=(4,),
        span=(2, 3.0),
        names=["a", "b"],
        weights={"gold": 1.0, "length": -0.5},
        data=Path("/data/x.jsonl"),
        inner=Inner(rate=1.0),
    )
    assert found == expected
    assert type(found.clip_high) is type(found.inner.rate) is float
    assert type(found.width) is int


def test_json_and_empty_files(tmp_path: Path) -> None:
    assert read(tmp_path, '{"steps": 5, "clip_high": null}', "x.json") == Config(steps=5)
    assert read(tmp_path, "# nothing yet\n") == Config()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    given = Config(
        learning_rate=2e-5, clip_high=float("inf"), note="no: 'é'", data=Path("a b"), layers=(), names=["yes"]
    )
    assert read(tmp_path, config.to_yaml(given)) == given


def test_a_runs_own_config_json_can_be_given(tmp_path: Path) -> None:
    saved = {"config": config.plain(Config(steps=9)), "seed": 0, "versions": {}, "files": []}
    assert read(tmp_path, json.dumps(saved), "config.json") == Config(steps=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown key 'learning_rte' in .*x.yaml; did you mean 'learning_rate'?"),
        ("inner: {stesp: 1}", "unknown key 'inner.stesp' in .*x.yaml; did you mean 'steps'?"),
        ("zzz: 1", "unknown key 'zzz' in .*; there are clip_high, data, "),
        ("steps: many", r"x.yaml: field 'steps' has the value 'many' \(str\); expected int"),
        ("steps: 1.5", r"field 'steps' has the value 1.5 \(float\); expected int"),
        ("steps: true", r"field 'steps' has the value True \(bool\); expected int"),
        ("steps:", r"field 'steps' has the value None \(NoneType\); expected int"),
        ("learning_rate: fast", "field 'learning_rate' has the value 'fast' .*; expected float"),
        ("learning_rate: yes", "field 'learning_rate' has the value True .*; expected float"),
        ("clip_high: wide", "expected float or null"),
        ("shuffle: 1", "field 'shuffle' has the value 1 .*; expected bool"),
        ("note: 12", "field 'note' has the value 12 .*; expected str"),
        ("weight: per_word", "field 'weight' has the value 'per_word' .*; expected one of 'per_token', 'per_sequence'"),
        ("layers: 3", r"field 'layers' has the value 3 .*; expected tuple\[int, ...\]"),
        ("layers: [1, two]", r"field 'layers\[1\]' has the value 'two' .*; expected int"),
        ("span: [1]", r"expected tuple\[int, float\]"),
        ("names: abc", r"expected list\[str\]"),
        ("weights: {a: x}", "field 'weights.a' has the value 'x' .*; expected float"),
        ("weights: 3", r"expected .*Mapping\[str, float\]"),
        ("data: 3", "expected Path"),
        ("inner: 3", "x.yaml holds 3 at inner.; expected a table of settings"),
        ("- steps", "expected a table of settings"),
        ("steps: [", "cannot be read as YAML"),
        ("steps: 1\nsteps: 2", "key steps stands twice"),
        ("steps: -1", "steps is -1; a run takes none or more"),
        ("note: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_a_missing_file_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no config file"):
        config.read(tmp_path / "none.yaml", Config)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read(tmp_path, "{", "x.json")


# Flags ----------------------------------------------------------------------------------------------------------------


def test_defaults_then_the_file_then_the_flags(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("steps: 7\nlearning_rate: 1e-3\ninner: {steps: 1, rate: 2}\n")
    file = str(tmp_path / "x.yaml")
    settings, options = parse(
        "--config", file, "--learning_rate", "0.5", "--inner.rate", "3", "--no-shuffle", "--seed=4"
    )
    assert settings == Config(steps=7, learning_rate=0.5, inner=Inner(steps=1, rate=3.0), shuffle=False)
    assert options.seed == 4
    assert parse(f"--config={file}", "--steps=8", "--layers", "5", "6")[0].layers == (5, 6)
    assert parse() == (Config(), config.Options())


def test_a_field_without_a_default_may_come_from_the_file_or_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text("steps: 7\n")
    file = str(tmp_path / "x.yaml")
    assert parse("--config", file, "--model", "tiny", kind=Needy)[0] == Needy("tiny", 7)
    assert read(tmp_path, "model: tiny", "y.yaml", Needy) == Needy("tiny")
    assert read(tmp_path, "steps: 2", "z.yaml", Needy).model is tyro.MISSING
    with pytest.raises(SystemExit):
        parse("--config", file, kind=Needy)
    assert "--model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'123' is no name of a model"):
        parse("--model", "123", kind=Needy)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rte", "3"], "unknown flag '--learning.rte'; did you mean '--learning-rate'"),
        (["--inner.stps=3"], "unknown flag '--inner.stps'; did you mean '--inner.steps'"),
        (["--resum"], "unknown flag '--resum'; did you mean '--resume'"),
        (["-q"], "unknown flag '-q'; there are --clip-high, "),
        (["7"], "'7' belongs to no flag"),
    ],
)
def test_unknown_flags_are_errors_with_a_suggestion(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_a_flag_of_the_wrong_type_is_said_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--steps", "many")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--steps" in said
    assert "'many'" in said


# Ranges ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranged:
    steps: int = 1
    warmup: int = 0
    clip: float = 0.2
    learning_rate: float = 1e-5
    head_learning_rate: float = 1e-3
    held_out: float = 0.1
    keep: float = 0.2
    top_p: float = 1.0
    temperature: float = 0.0
    prompts: str = ""  # another type than where it is a count
    margin: bool = False
    other: float = -1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Counted:
    held_out: int = 200  # rows, not a share


@pytest.mark.parametrize(
    ("flag", "value", "range_"),
    [
        ("--steps", "0", "at least 1"),
        ("--warmup", "-1", "at least 0"),
        ("--clip", "nan", "a finite number"),
        ("--clip", "-0.1", "at least 0"),
        ("--learning-rate", "0.0", "above 0"),
        ("--head-learning-rate", "-1.0", "above 0"),
        ("--held-out", "-1.0", "in (0, 1)"),
        ("--keep", "1.0", "in (0, 1)"),
        ("--top-p", "0.0", "in (0, 1]"),
        ("--temperature", "inf", "a finite number"),
        ("--other", "-inf", "a finite number"),
        ("--inner.steps", "-3", "at least 1"),
    ],
)
def test_a_number_outside_its_range_names_flag_value_and_range(flag: str, value: str, range_: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{flag} is {value}; it must be {range_}")):
        parse(f"{flag}={value}", kind=Ranged)


def test_ranges_hold_for_files_presets_options_and_tables(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("weights: {gold: .nan}\n")
    with pytest.raises(ValueError, match="--weights is nan; it must be a finite number"):
        parse("--config", str(tmp_path / "x.yaml"), kind=Ranged)
    with pytest.raises(ValueError, match="--steps is 0; it must be at least 1"):
        config.parse(Ranged, [], "tokenmdp toy", None, {"steps": 0})
    with pytest.raises(ValueError, match="--threads is -1; it must be at least 0"):
        parse("--threads=-1", kind=Ranged)
    assert parse("--config", str(tmp_path / "x.yaml"), "--weights.gold", "1", kind=Ranged)[0].weights == {"gold": 1.0}


def test_a_whole_number_of_held_out_rows_is_a_count() -> None:
    assert parse("--held-out", "7", kind=Counted)[0].held_out == 7
    with pytest.raises(ValueError, match="--held-out is 0; it must be at least 1"):
        parse("--held-out", "0", kind=Counted)


@pytest.mark.parametrize("verb", cli.find_verbs().values(), ids=lambda verb: verb.name)
def test_no_default_and_no_variant_is_refused(verb: cli.Verb) -> None:
    kind = verb.load().Config
    settings, _ = config.parse(kind, [], f"tokenmdp {verb.name}", None, verb.preset)
    assert settings == kind(**verb.preset)


def test_every_range_belongs_to_a_setting_there_is() -> None:
    kinds = [config.Options, *(verb.load().Config for verb in cli.find_verbs().values())]
    assert config.RANGES.keys() <= {f.name for kind in kinds for f in fields(kind)}


def test_a_config_that_cannot_give_flags_is_refused() -> None:
    @dataclass(frozen=True)
    class Clash:
        seed: int = 0

    with pytest.raises(ValueError, match="a field 'seed', which is a flag of every run"):
        parse(kind=Clash)
    with pytest.raises(ValueError, match="Config is not a dataclass"):
        parse(kind=dict)


def test_every_field_has_its_flag() -> None:
    assert config.flags(Inner) == ["--steps", "--rate"]
    assert "--inner.rate" in config.flags(Config)
    assert "--print-config" in config.flags(config.Options)
