from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmdp import __version__, cli

RECIPE = '''
"""A line, drawn at random.

More about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import neighbour
import torch


@dataclass(frozen=True)
class Config:
    """The settings."""

    steps: int = 3  # how many draws
    fail: str = ""  # what to raise, and where


def main(cfg, run):
    if cfg.fail == "early":
        raise ValueError("no column 'prompt': there are 'text' and 'label'")
    for step in run.steps(cfg.steps, title="draws", every_seconds=0):
        run.log(step, {"draw": torch.rand(1, generator=run.rng).item()})
        if step == 1 and cfg.fail == "late":
            raise OSError("the reward's server is gone")
        if step == 1 and cfg.fail == "stop":
            raise KeyboardInterrupt
        if step == 1 and cfg.fail == "bug":
            raise RuntimeError("a fault of ours")
    print("said on stdout")
    gain = {"mean": 0.25, "low": 0.125, "high": 0.5}
    return {"gain": gain, "draws": cfg.steps, "mean": 1 / 3, "kl": {"nats": 0.5}, "long": list(range(9)), "answer": neighbour.ANSWER}
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a recipe of their own and a module beside it."""
    (tmp_path / "my_line.py").write_text(RECIPE)
    (tmp_path / "neighbour.py").write_text("ANSWER = 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must end with exit code 2, without a traceback."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_help_lists_the_verbs_without_importing_torch() -> None:
    script = (
        "import sys; from tokenmdp.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules); print(sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    verbs = {line.split()[0] for line in lines if line.startswith("  ")}
    assert {"sft", "reward-model", "ppo", "best-of-n", "generate", "demo", "report", "run"} <= verbs


def test_flags_are_read_before_what_is_slow_to_import() -> None:
    """A mistyped flag is told in the time that torch takes, half of what all libraries together take."""
    script = (
        "import sys; from tokenmdp import cli\n"
        "for name in cli.find_verbs(): assert cli.main([*name.split(), '--print-config']) == 0, name\n"
        "slow = {'transformers.modeling_utils', 'peft', 'sklearn', 'scipy.stats', 'scipy.optimize', 'pandas', 'datasets'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_verb_has_a_line_of_help() -> None:
    for verb in cli.find_verbs().values():
        assert verb.help, f"{verb.file} needs a docstring: its first sentence is the help of `tokenmdp {verb.name}`"


def test_every_verb_takes_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """No field of a Config is a flag of every run, and each can be printed."""
    for name in cli.find_verbs():
        assert cli.main([*name.split(), "--print-config"]) == 0, name
        assert capsys.readouterr().out, name


def test_a_verb_is_a_file_with_config_and_main(tmp_path: Path) -> None:
    for name, text in {
        "recipes/reward_model.py": '"""Fit a reward,\nfor toys. Or not.\n\nMore."""\nclass Config: ...\ndef main(cfg, run): ...\n',
        "recipes/helper.py": "class Config: ...\n",
        "recipes/__init__.py": "",
        "lab/demo.py": "raise SystemExit('imported')\nclass Config: ...\ndef main(cfg, run): ...\n",
        "lab/prompts/fit.py": '"""Fit. More."""\nclass Config: ...\ndef main(cfg, run): ...\n',
        "learner.py": "class Config: ...\ndef main(cfg, run): ...\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = cli.find_verbs(tmp_path, "toys")
    assert {name: (verb.help, verb.module) for name, verb in found.items()} == {
        "reward-model": ("Fit a reward, for toys", "toys.recipes.reward_model"),
        "demo": ("", "toys.lab.demo"),
        "prompts fit": ("Fit", "toys.lab.prompts.fit"),
    }


def test_a_file_with_variants_is_several_verbs(tmp_path: Path) -> None:
    text = '"""Reinforce. More."""\nVARIANTS = {"rloo": {"baseline": "others"}}\nclass Config: ...\ndef main(cfg, run): ...\n'
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/reinforce.py").write_text(text)
    found = cli.find_verbs(tmp_path, "toys")
    assert list(found) == ["reinforce", "rloo"]
    assert found["rloo"].module == found["reinforce"].module == "toys.recipes.reinforce"
    assert (found["reinforce"].preset, found["rloo"].preset) == ({}, {"baseline": "others"})
    assert found["rloo"].help == "reinforce with baseline=others"


def test_no_verb_or_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "usage: tokenmdp VERB" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_a_users_file_runs_like_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "my_line.py", "--steps", "2", "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["said", "on", "stdout"],
        ["gain", "0.25", "[0.125,", "0.5]"],
        ["draws", "2"],
        ["mean", "0.3333"],
        ["kl.nats", "0.5"],
        ["long", "9", "entries"],
        ["answer", "42"],
        ["run", "folder:", "runs/my-line"],
    ]
    assert "draws: 2 steps done" in err
    saved = json.loads((folder / "runs/my-line/config.json").read_text())
    assert saved["config"] == {"steps": 2, "fail": ""}
    assert saved["seed"] == 5
    assert len((folder / "runs/my-line/metrics.jsonl").read_text().splitlines()) == 2
    # Again: refused; resumed, it answers at once; overwritten, it begins anew.
    assert "runs/my-line already holds a run" in failing(capsys, "run", "my_line.py", "--steps", "2")
    assert "seed: 5 there, 0 now" in failing(capsys, "run", "my_line.py", "--steps", "2", "--resume")
    assert cli.main(["run", "my_line.py", "--steps", "2", "--seed", "5", "--resume"]) == 0
    assert "is finished already" in capsys.readouterr().err
    assert cli.main(["run", "my_line.py", "--steps", "1", "--overwrite"]) == 0
    assert len((folder / "runs/my-line/metrics.jsonl").read_text().splitlines()) == 1


def test_settings_are_printed_as_yaml_that_can_be_given_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "my_line.py", "--steps", "9", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert text == "steps: 9\nfail: ''\n"
    (folder / "x.yaml").write_text(text)
    assert cli.main(["run", "my_line.py", "--config", "x.yaml", "--fail", "late", "--print-config"]) == 0
    assert capsys.readouterr().out == "steps: 9\nfail: late\n"
    assert not (folder / "runs").exists()


def test_help_of_a_verb_shows_its_docstring_and_the_comments_beside_its_fields(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "my_line.py", "--help"]) == 0
    out = capsys.readouterr().out
    for text in ("A line, drawn at random.", "--steps", "how many draws", "--resume", "--threads"):
        assert text in out
    assert cli.main(["run", "--help"]) == 0
    assert cli.main(["report", "--help"]) == 0


def test_input_that_cannot_be_used_gets_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.yaml").write_text("stpes: 3\n")
    (folder / "broken.py").write_text("def main(:\n")
    (folder / "plain.py").write_text("def main(cfg, run): ...\n")
    (folder / "data.csv").write_text("a,b\n")
    run = ("run", "my_line.py")
    for argv, message in {
        ("pppo",): "tokenmdp pppo: unknown verb 'pppo'; did you mean 'ppo'?",
        ("my_line.py",): "did you mean `tokenmdp run my_line.py`?",
        ("run", "none.py"): "there is no file none.py",
        ("run", "broken.py"): "broken.py is not Python that can be read",
        ("run", "plain.py"): "plain.py is not a recipe: it needs",
        ("run", "data.csv"): "data.csv is not",
        (*run, "--config", "x.yaml"): "unknown key 'stpes' in x.yaml; did you mean 'steps'?",
        (*run, "--config", "none.yaml"): "there is no config file none.yaml",
        (*run, "--stpes", "3"): "unknown flag '--stpes'; did you mean '--steps'?",
        (*run, "--steps", "many"): "many",
        (*run, "--out", "x.yaml"): "x.yaml exists and is not a run's folder",
        (*run, "--fail", "early"): "no column 'prompt': there are 'text' and 'label'",
        (*run, "--resume", "--overwrite"): "contradict",
        (*run, "--log", "tensorbord"): "tensorbord",
        ("report", "none"): "there is no run folder none",
    }.items():
        assert message in failing(capsys, *argv)
    assert cli.main(["run"]) == 2
    assert cli.main([*run, "--steps", "1"]) == 0  # what failed early left no run in the way


def test_a_run_that_broke_goes_on_by_the_command_it_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "my_line.py", "--out", "whole", "--fail", "stp"]) == 0
    assert "server is gone" in failing(capsys, "run", "my_line.py", "--out", "a b", "--fail", "late")
    assert "the reward's server is gone" in (folder / "a b/log.txt").read_text()
    capsys.readouterr()
    assert cli.main(["run", "my_line.py", "--out", "broken", "--fail", "stop", "--overwrite"]) == 130
    told = capsys.readouterr().err
    assert told.endswith("stopped; go on with: tokenmdp run my_line.py --out broken --fail stop --resume\n")
    # The step that raised is not in the checkpoint, so it is taken again, and raises again: the same run to the letter.
    assert cli.main(["run", "my_line.py", "--out", "broken", "--fail", "stop", "--resume"]) == 130
    steps = (folder / "broken/metrics.jsonl").read_bytes()
    assert steps == b"".join((folder / "whole/metrics.jsonl").read_bytes().splitlines(keepends=True)[:2])


def test_faults_of_ours_and_debug_show_the_traceback(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["run", "my_line.py", "--fail", "bug"])
    with pytest.raises(ValueError, match="no column"):
        cli.main(["run", "my_line.py", "--fail", "early", "--out", "b", "--debug"])


def test_a_scratch_verb_leaves_a_folder_only_where_one_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tool.py").write_text(RECIPE + "\nSCRATCH = True\n")
    for _ in range(2):
        assert cli.main(["run", "tool.py"]) == 0
        assert capsys.readouterr().out == "said on stdout\n"
    assert not (folder / "runs").exists()
    assert cli.main(["run", "tool.py", "--out", "kept"]) == 0
    assert (folder / "kept/result.json").exists()


def test_ctrl_c_ends_the_command_with_130(folder: Path) -> None:
    slow = RECIPE.replace('print("said', 'print("ready", flush=True); import time; time.sleep(600); print("said')
    (folder / "slow.py").write_text(slow)
    command = [sys.executable, "-m", "tokenmdp", "run", "slow.py", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE

    def heed_interrupts() -> (
        None
    ):  # a test run in the background may have been told to ignore them, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=heed_interrupts
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130
    assert err.endswith("stopped; go on with: tokenmdp run slow.py --threads 1 --resume\n")
    assert "Traceback" not in err
