"""Run folders: exact resume after kills, damage and full disks, and the refusals that keep a user's files.

    python tests/test_run.py VERB FOLDER

is how the tests that need a process of their own call back into this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenmdp.run import Run, RunExists
from tokenmdp.run.screen import Bar, Screen, clock


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: every checkpoint waits for the disk, and the disk may be busy."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


class Toy:
    """A line of four inputs, fitted by Adam: the smallest thing with weights, moments and a count."""

    def __init__(self, width: int = 1) -> None:
        self.net = nn.Linear(4, width)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.taken = 0

    def step(self, x: Tensor) -> float:
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.taken += 1
        return loss.item()

    def tensors(self) -> dict[str, Tensor]:
        found = dict(self.net.state_dict())
        for i, parameter in enumerate(self.net.parameters()):
            found |= {f"{i}/{name}": value for name, value in self.adam.state.get(parameter, {}).items()}
        return found

    def scalars(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.net.load_state_dict({name: tensors[name] for name in self.net.state_dict()})
        for i, parameter in enumerate(self.net.parameters()):
            own = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith(f"{i}/")}
            self.adam.state[parameter] = {name.split("/")[1]: tensor for name, tensor in own.items()}
        self.taken = scalars["taken"]


def fit(run: Run, steps: int, broken_at: int = -1, every: float = 0.0, pause: float = 0.0) -> dict[str, Any]:
    """A recipe in small. It draws from every random stream, and writes before, in and after its loop."""
    toy = Toy()
    run.append("samples.jsonl", {"before": torch.rand(1).item()})
    for step in run.steps(steps, toy, title="fit", every_seconds=every):
        loss = toy.step(torch.randn(8, 4, generator=run.rng))
        chance = {"torch": torch.rand(1).item(), "python": random.gauss(0, 1), "numpy": numpy.random.standard_normal()}
        run.log(step, {"loss": loss, "taken": toy.taken, **chance}, headline=("loss",))
        run.append("samples.jsonl", {"in": step})
        time.sleep(pause)
        if step == broken_at:
            raise InterruptedError(f"broken at {step}")
    run.append("samples.jsonl", {"after": torch.rand(1).item()})
    # From the state alone: a run resumed after its last step takes none, and has no `loss` of a last one.
    return {"taken": toy.taken, "weight": toy.net.weight.detach()}


def train(folder: Path, resume: bool = True) -> None:
    """Two stages and a loop of the run's own."""
    with Run.open(folder, {"steps": [6, 6, 20]}, seed=3, resume=resume) as run:
        for name in ("first", "second"):
            stage = run.stage(name)
            if stage.result() is None:
                stage.finish(fit(stage, 6, pause=0.008))
        if run.result() is None:  # it may have been killed between its result and its end
            run.finish(fit(run, 20, pause=0.008))


def written(folder: Path) -> dict[str, bytes]:
    """What must be equal after a broken and an unbroken run: all but the wall-clock."""
    timeless = [p for p in sorted(folder.rglob("*.jsonl")) if p.name != "times.jsonl"] + sorted(
        folder.rglob("result.json")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in timeless}


def aside(*command: str, before: tuple[str, ...] = ()) -> str:
    """Run a verb of this file in a process of its own; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*before, sys.executable, __file__, *command]
    done = subprocess.run(whole, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Kill -9 --------------------------------------------------------------------------------------------------------------


def killed_often(folder: Path) -> None:
    """Begin the same run again and again, each time killed a random number of lines later, until it ends by itself."""
    train(folder.with_name("whole"))  # never killed; and what it imports, its forks need not import again

    def lines() -> int:
        files = [folder / part / "metrics.jsonl" for part in ("first", "second", "")]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    chance, kills, working = random.Random(0), 0, True
    while working:
        goal = lines() + chance.randrange(6)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(folder)
                code = 0
            finally:
                os._exit(code)
        while (working := (ended := os.waitpid(child, os.WNOHANG)) == (0, 0)) and lines() < goal:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.02))  # anywhere in a step, in a checkpoint, in what comes before the loop
        if working:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    assert ended == (child, 0), "the run failed"
    print(kills)


def test_a_run_killed_at_random_moments_ends_as_one_never_killed(tmp_path: Path) -> None:
    kills = int(aside("killed_often", str(tmp_path / "killed")))
    assert kills >= 3
    assert written(tmp_path / "killed") == written(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    for name in ("step-000020.safetensors", "step-000019.safetensors"):
        ours, theirs = (load_file(tmp_path / which / "checkpoints" / name) for which in ("whole", "killed"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# Damage ---------------------------------------------------------------------------------------------------------------


def flip(newest: Path) -> None:
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)


def cut(newest: Path) -> None:
    os.truncate(newest, newest.stat().st_size // 2)


def unseal(newest: Path) -> None:
    newest.with_suffix(".sha256").unlink()


def scrawl(newest: Path) -> None:
    newest.with_suffix(".sha256").write_bytes(b"\xff\xfe\x00")


def box(newest: Path) -> None:
    """A folder in the place of the seal, with something in it."""
    unseal(newest)
    newest.with_suffix(".sha256").mkdir()
    (newest.with_suffix(".sha256") / "mine").write_text("mine")


def seal(newest: Path) -> None:
    newest.with_suffix(".sha256").write_text(hashlib.sha256(newest.read_bytes()).hexdigest())


def garble(newest: Path) -> None:
    newest.write_bytes(b"no tensors here")
    seal(newest)


def bare(newest: Path) -> None:
    """An ordinary safetensors file that no run wrote."""
    save_file({"a": torch.zeros(1)}, newest)
    seal(newest)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "do not match"),
        (cut, "half written"),
        (unseal, "is missing"),
        (scrawl, "do not match"),
        (box, "is a folder where a checkpoint's file belongs"),
        (garble, "is no checkpoint: SafetensorError"),
        (bare, "is no checkpoint: KeyError"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, damage: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run.open(tmp_path / "whole", {}, seed=1) as run:
        run.finish(fit(run, 9))
    with pytest.raises(InterruptedError), Run.open(tmp_path / "broken", {}, seed=1) as run:
        fit(run, 9, broken_at=6)
    damage(tmp_path / "broken/checkpoints/step-000006.safetensors")
    capsys.readouterr()
    with Run.open(tmp_path / "broken", {}, seed=1, resume=True) as run:
        run.finish(fit(run, 9))
    told = capsys.readouterr().err
    assert "step-000006.safetensors is skipped" in told
    assert said in told
    assert "goes on after 5 steps" in told
    assert written(tmp_path / "broken") == written(tmp_path / "whole")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_checkpoints_is_refused_before_anything_is_done(
    tmp_path: Path, overwrite: bool
) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        run.log(0, {"loss": 1.0})
    (tmp_path / "checkpoints").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunExists, match=r"checkpoints is a file, .*: move it away"):
        Run.open(tmp_path, {}, seed=1, resume=not overwrite, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", [b'{"taken": 5, "wei', b"\xff", b"[]"])
def test_a_half_written_result_does_not_finish_a_run(tmp_path: Path, text: bytes) -> None:
    for name in ("whole", "broken"):
        with Run.open(tmp_path / name, {}, seed=1) as run:
            run.finish(fit(run, 5))
    (tmp_path / "broken/result.json").write_bytes(text)
    with Run.open(tmp_path / "broken", {}, seed=1, resume=True) as run:
        assert run.result() is None
        run.finish(fit(run, 5))
    assert "result.json was half written" in (tmp_path / "broken/log.txt").read_text()
    assert written(tmp_path / "broken") == written(tmp_path / "whole")


@pytest.mark.parametrize("choice", [{}, {"resume": True}, {"overwrite": True}])
def test_a_damaged_config_json_is_named(tmp_path: Path, choice: dict[str, Any]) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        run.log(0, {"loss": 1.0})
    os.truncate(tmp_path / "config.json", 40)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunExists, match=r"config\.json is cut off or damaged: .* Put back a whole config\.json"):
        Run.open(tmp_path, {}, seed=1, **choice)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_stage_with_a_damaged_config_json_is_not_mixed_with_a_second_attempt(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        run.stage("sft").log(0, {"loss": 1.0})
    os.truncate(tmp_path / "sft/config.json", 40)
    with Run.open(tmp_path, {}, seed=1, resume=True) as run:
        with pytest.raises(RunExists, match=r"config\.json is cut off or damaged: .* then the stage begins anew"):
            run.stage("sft")
        shutil.rmtree(tmp_path / "sft")
        run.stage("sft").log(0, {"loss": 1.0})


def test_without_a_whole_checkpoint_the_run_begins_at_the_start_and_says_so(tmp_path: Path) -> None:
    with Run.open(tmp_path / "whole", {}, seed=1) as run:
        run.finish(fit(run, 5))
    with pytest.raises(InterruptedError), Run.open(tmp_path / "broken", {}, seed=1) as run:
        fit(run, 5, broken_at=3)
    for path in (tmp_path / "broken/checkpoints").glob("*.safetensors"):
        cut(path)
    with Run.open(tmp_path / "broken", {}, seed=1, resume=True) as run:
        run.finish(fit(run, 5))
    assert "no whole checkpoint" in (tmp_path / "broken/log.txt").read_text()
    assert written(tmp_path / "broken") == written(tmp_path / "whole")


def test_metrics_that_lost_lines_disqualify_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), Run.open(tmp_path, {}, seed=1) as run:
        fit(run, 5, broken_at=3)
    os.truncate(tmp_path / "metrics.jsonl", 10)
    with Run.open(tmp_path, {}, seed=1, resume=True) as run:
        assert fit(run, 5)["taken"] == 5
    assert "metrics.jsonl is shorter" in (tmp_path / "log.txt").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_an_exception_leaves_the_last_checkpoint_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), Run.open(tmp_path, {}, seed=1) as run:
        fit(run, 9, broken_at=4)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("*.safetensors"))] == [
        "step-000003.safetensors",
        "step-000004.safetensors",
    ]
    assert "broken at 4" in (tmp_path / "log.txt").read_text()  # with the traceback, for whoever asks later


# A full disk ----------------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    """Train a toy that fits on the disk, then one that does not."""

    class Swelling(Toy):
        def tensors(self) -> dict[str, Tensor]:
            return {**super().tensors(), "ballast": torch.zeros(100_000 if self.taken > 2 else 10)}

    toy = Swelling()
    run = Run.open(folder, {}, seed=1)
    try:
        for step in run.steps(5, toy, title="swell", every_seconds=0):
            run.log(step, {"loss": toy.step(torch.randn(8, 4, generator=run.rng))})
    except OSError as fault:
        print(fault)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.suffix != ".sha256")
    print(*names)
    run.close()
    with Run.open(folder, {}, seed=1, resume=True) as again:
        print(*again.steps(2, Toy(), title="swell"), "no steps left of two")


def limited(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    fill(folder)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A disk of 300 kB where one can be mounted, elsewhere a limit on the size of files."""
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    mount = f"mount -t tmpfs -o size=300k tmpfs {tmp_path}"
    if shutil.which("unshare") and not subprocess.run([*namespace, "sh", "-c", mount], check=False).returncode:
        told = aside("fill", str(tmp_path / "run"), before=(*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh"))
    else:
        told = aside("limited", str(tmp_path / "run"))
    message, names, steps = told.splitlines()
    assert f"cannot write step-000003.safetensors in {tmp_path / 'run/checkpoints'}" in message
    assert "It needs 0.4" in message
    assert "MB are free there" in message
    assert "step-000002.safetensors, is kept" in message
    assert names == "step-000001.safetensors step-000002.safetensors"  # and nothing half written
    assert steps == "no steps left of two"


# The checkpoint file --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_one_ordinary_safetensors_file_and_its_hash(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        fit(run, 4, every=3600.0)  # the last step is saved whatever the clock says
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in files] == ["step-000004.safetensors", "step-000004.sha256"]
    assert files[1].read_text() == f"{hashlib.sha256(files[0].read_bytes()).hexdigest()}  step-000004.safetensors\n"
    with safe_open(files[0], framework="pt") as file:
        about = file.metadata()
    assert about["step"] == "4"
    assert json.loads(about["scalars"])[0] == {"taken": 4}
    assert json.loads(about["files"])["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
    assert {"0/weight", "0/bias", "0/0/exp_avg", "1/run", "1/torch"} <= load_file(files[0]).keys()


def test_views_of_one_storage_can_be_saved(tmp_path: Path) -> None:
    class Views(Toy):
        flat = torch.arange(6.0)

        def tensors(self) -> dict[str, Tensor]:
            return {"a": self.flat[:3], "b": self.flat[3:], "t": self.flat.view(2, 3).T, "none": torch.zeros(0)}

    with Run.open(tmp_path, {}, seed=1) as run:
        assert list(run.steps(1, Views(), title="views")) == [0]
    found = load_file(tmp_path / "checkpoints/step-000001.safetensors")
    assert found["0/b"].tolist() == [3, 4, 5]
    assert found["0/t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_another_recipes_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), Run.open(tmp_path, {}, seed=1) as run:
        fit(run, 5, broken_at=3)
    with pytest.raises(ValueError, match="holds 1 states and fit has 2"), Run.open(tmp_path, {}, 1, resume=True) as run:
        next(run.steps(5, Toy(), Toy(), title="fit"))


def test_a_run_has_one_loop(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        fit(run, 1)
        with pytest.raises(ValueError, match=r"give a second one its own folder by run\.stage"):
            next(run.steps(1, title="again"))


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_taken_by_another(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        run.log(0, {"loss": 1.0})
    with pytest.raises(RunExists, match=r"already holds a run: --resume .*, --overwrite .*, --out"):
        Run.open(tmp_path, {}, seed=1)
    with pytest.raises(ValueError, match="contradict"):
        Run.open(tmp_path, {}, seed=1, resume=True, overwrite=True)


@pytest.mark.parametrize("choice", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "{", "[]"])
def test_a_folder_that_is_not_a_runs_is_never_touched(tmp_path: Path, choice: dict[str, Any], text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    with pytest.raises(RunExists, match="is not a run's folder"):
        Run.open(tmp_path, {}, seed=1, **choice)
    assert (tmp_path / "config.json").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl"]
    with pytest.raises(RunExists, match="is not a run's folder"):
        Run.open(tmp_path / "config.json", {}, seed=1, **choice)


def test_overwrite_takes_away_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "train.jsonl").write_text("mine\n")
    (tmp_path / "first/checkpoints/step-best.safetensors").write_text("mine")
    Run.open(tmp_path, {"other": 1}, seed=4, overwrite=True).close()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".lock", "config.json", "first/checkpoints/step-best.safetensors", "notes.md", "train.jsonl"]
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"other": 1}


def save(folder: Path) -> None:
    """The names of what a model is saved as."""
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_overwrite_takes_away_the_models_of_the_run_and_its_stages_and_no_others(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {}, seed=1) as run:
        save(run.stage("sft").folder / "model")
        save(run.folder / "model")
        save(run.folder / "models")
        save(run.folder / "mine/model")
        (run.folder / "model/notes.md").write_text("mine")
        (run.stage("rm").folder / "model").mkdir()
        (run.stage("rm").folder / "model/tokenizer.json").write_text("mine")  # no config.json: no model was saved here
        save(tmp_path / "elsewhere")
        (run.stage("ppo").folder / "model").symlink_to(tmp_path / "elsewhere")
    kept = [f"run/{name}" for name in files(tmp_path / "run") if name.startswith(("mine", "models"))]
    kept += ["run/.lock", "run/config.json", "run/log.txt", "run/model/notes.md", "run/rm/model/tokenizer.json"]
    kept += [f"elsewhere/{name}" for name in files(tmp_path / "elsewhere")]
    with Run.open(tmp_path / "run", {}, seed=1, overwrite=True) as run:
        run.note("begun anew")
        assert files(tmp_path) == sorted(kept)


@pytest.mark.parametrize("name", ["", "model", "model/config.json", "sft", "samples.jsonl"])
def test_overwrite_does_not_take_away_what_the_new_run_starts_from(tmp_path: Path, name: str) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        save(run.stage("sft").folder / "model")
        save(run.folder / "model")
        run.append("samples.jsonl", {})
    (tmp_path / "mine.jsonl").write_text("mine\n")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="which --overwrite would take away"):
        Run.open(tmp_path, {"inner": {"start": str(tmp_path / name)}}, seed=1, overwrite=True)
    assert files(tmp_path) == before
    with Run.open(tmp_path, {"data": str(tmp_path / "mine.jsonl")}, seed=1, overwrite=True) as run:
        assert not (run.folder / "model").exists()


@pytest.mark.parametrize("choice", [{"resume": True}, {"overwrite": True}])
def test_a_list_of_files_that_reaches_out_of_the_folder_is_not_followed(tmp_path: Path, choice: dict[str, Any]) -> None:
    names = ["../victim.txt", "../victim.jsonl", "inner/a.jsonl", "notes.md", "..", str(tmp_path / "victim.jsonl"), 3]
    for name in ("victim.txt", "victim.jsonl", "run/inner/a.jsonl", "run/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "run/metrics.jsonl").write_text("ours")
    header = {"config": {}, "seed": 1, "stage": "", "files": [*names, "metrics.jsonl"]}
    (tmp_path / "run/config.json").write_text(json.dumps(header))
    with Run.open(tmp_path / "run", {}, seed=1, **choice) as run:
        run.note("opened")
    for name in ("victim.txt", "victim.jsonl", "run/inner/a.jsonl", "run/notes.md"):
        assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_bytes()


def test_resume_where_there_is_nothing_begins_a_run(tmp_path: Path) -> None:
    with Run.open(tmp_path / "new/run", {}, seed=1, resume=True) as run:
        run.finish(fit(run, 1))
    assert "nothing to go on with" in (tmp_path / "new/run/log.txt").read_text()


def test_resume_with_other_settings_names_each_of_them(tmp_path: Path) -> None:
    with Run.open(tmp_path, {"rate": 1e-5, "inner": {"steps": 3, "kept": 1}, "path": Path("a")}, seed=1) as run:
        run.log(0, {"loss": 1.0})
    with pytest.raises(ValueError, match="made with other settings") as error:
        Run.open(tmp_path, {"rate": 2e-5, "inner": {"steps": 4, "kept": 1}, "path": "a"}, seed=2, resume=True)
    assert str(error.value).splitlines()[1:] == [
        "  rate: 1e-05 there, 2e-05 now",
        "  inner.steps: 3 there, 4 now",
        "  seed: 1 there, 2 now",
    ]


def test_resume_on_changed_files_names_each_with_both_hashes(tmp_path: Path) -> None:
    data, more, code, other = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "judge.py", "other"))
    for path in (data, more, code):
        path.write_text("before")
    other.mkdir()
    config = {
        "data": str(data),
        "inner": {"list": [str(more), "x" * 5000, "\0"]},
        "reward": f"{code}:brief:timeout_seconds=2",
        "model": str(other),
        "none": [str(tmp_path / "absent"), "", None, 3],
    }
    with pytest.raises(InterruptedError), Run.open(tmp_path / "run", config, seed=1) as run:
        fit(run.stage("sft", config), 5, broken_at=2)
    then, now = (hashlib.sha256(text).hexdigest() for text in (b"before", b"after"))
    header = json.loads((tmp_path / "run/config.json").read_text())
    assert header["inputs"] == {str(path): then for path in (data, more, code)}
    assert "inputs" not in json.loads((tmp_path / "run/sft/config.json").read_text())
    code.write_text("after")
    more.unlink()
    kept = written(tmp_path / "run")
    with pytest.raises(ValueError, match="put them back to go on, or begin it anew with --overwrite") as error:
        Run.open(tmp_path / "run", config, seed=1, resume=True)
    assert str(error.value).splitlines()[1:] == [
        f"  {more}: {then!r} there, 'no file' now",
        f"  {code}: {then!r} there, {now!r} now",
    ]
    assert written(tmp_path / "run") == kept
    code.write_text("before")
    more.write_text("before")
    with Run.open(tmp_path / "run", config, seed=1, resume=True) as run:
        assert fit(run.stage("sft", config), 5)["taken"] == 5


@pytest.mark.parametrize(
    "spelled", ["min({0}, {1})", "0.5*{0} + {1}", "log_ratio:{0},{1}", "mean-0.5*variance({1},{0})", "{1}+novelty:{0}"]
)
def test_resume_looks_into_folders_and_into_what_a_longer_name_is_made_of(tmp_path: Path, spelled: str) -> None:
    model, code = tmp_path / "rm", tmp_path / "judge.py"
    (model / "model").mkdir(parents=True)
    (model / "model/model.safetensors").write_text("weights")
    (model / "config.json").write_text(json.dumps({"config": {}, "seed": 0, "stage": "", "files": []}))
    (model / "metrics.jsonl").write_text("nobody reads this")
    code.write_text("before")
    config = {"reward": spelled.format(model, f"{code}:f")}
    with pytest.raises(InterruptedError), Run.open(tmp_path / "run", config, seed=1) as run:
        fit(run, 5, broken_at=2)
    (model / "metrics.jsonl").write_text("else")
    (model / "model/model.safetensors").write_text("others")
    code.write_text("after")
    with pytest.raises(ValueError, match="put them back") as error:
        Run.open(tmp_path / "run", config, seed=1, resume=True)
    named = "\n".join(str(error.value).splitlines()[1:])
    assert str(model / "model/model.safetensors") in named
    assert str(code) in named
    assert "metrics" not in named


@pytest.mark.parametrize("spelled", ["min({0}, other)", "0.5*{0} + 1", "log_ratio:other,{0}"])
def test_overwriting_leaves_a_model_that_a_longer_name_is_made_of(tmp_path: Path, spelled: str) -> None:
    with Run.open(tmp_path / "run", {}, seed=1) as run:
        (tmp_path / "run/model").mkdir()
        (tmp_path / "run/model/config.json").write_text("{}")
        run.finish(fit(run, 1))
    kept = written(tmp_path / "run")
    with pytest.raises(ValueError, match="which --overwrite would take away"):
        Run.open(tmp_path / "run", {"reward": spelled.format(tmp_path / "run")}, seed=1, overwrite=True)
    assert written(tmp_path / "run") == kept


def test_a_run_from_before_files_were_hashed_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("before")
    config = {"data": str(tmp_path / "a.jsonl")}
    with pytest.raises(InterruptedError), Run.open(tmp_path / "run", config, seed=1) as run:
        fit(run, 5, broken_at=2)
    header = json.loads((tmp_path / "run/config.json").read_text())
    del header["inputs"]
    (tmp_path / "run/config.json").write_text(json.dumps(header))
    (tmp_path / "a.jsonl").write_text("after")
    with Run.open(tmp_path / "run", config, seed=1, resume=True) as run:
        assert fit(run, 5)["taken"] == 5


def test_resume_with_other_threads_warns(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with Run.open(tmp_path, {}, seed=1) as run:
        run.log(0, {"loss": 1.0})
    try:
        torch.set_num_threads(before + 1)
        with Run.open(tmp_path, {}, seed=1, resume=True):
            assert f"threads: {before} there, {before + 1} now" in (tmp_path / "log.txt").read_text()
    finally:
        torch.set_num_threads(before)


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held'); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunExists, match="another process is still writing"):
            Run.open(tmp_path, {}, seed=1)
        other.communicate(b"\n")
    with Run.open(tmp_path, {}, seed=1) as run:
        assert run.result() is None


def test_one_process_does_not_open_a_folder_twice(tmp_path: Path) -> None:
    """And the refusal leaves the lock in place: the system would drop it with the first handle that is closed."""
    (tmp_path / "link").symlink_to("run")
    attempt = "import sys; from tokenmdp.run import Run; Run.open(sys.argv[1], {}, seed=1, resume=True)"
    with Run.open(tmp_path / "run", {}, seed=1) as run:
        for name in ("run", "link"):
            with pytest.raises(RunExists, match="a run of this process is still writing"):
                Run.open(tmp_path / name, {}, seed=1, resume=True)
        command = [sys.executable, "-c", attempt, str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "another process is still writing" in done.stderr
        run.log(0, {"loss": 1.0})
    with pytest.raises(ValueError, match="made with other settings"):
        Run.open(tmp_path / "run", {}, seed=2, resume=True)
    run = Run.open(tmp_path / "run", {}, seed=1, resume=True)  # neither of the two holds it any longer
    run.close()


def test_a_run_that_broke_before_it_wrote_anything_leaves_no_run(tmp_path: Path) -> None:
    def read(run: Run) -> None:
        with run:
            run.note("reading the data")
            raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        read(Run.open(tmp_path / "run", {}, seed=1))
    with Run.open(tmp_path / "run", {}, seed=1) as run:
        assert run.finish({}) == {}


def test_config_json_says_what_the_run_follows_from(tmp_path: Path) -> None:
    with Run.open(tmp_path, {"clip": float("inf"), "file": Path("x.yaml"), "layers": (1, 2)}, seed=7) as run:
        assert run.config == {"clip": float("inf"), "file": "x.yaml", "layers": [1, 2]}
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["seed"] == 7
    assert found["threads"] == torch.get_num_threads()
    assert {"tokenmdp", "python", "torch", "transformers", "numpy"} <= found["versions"].keys()
    assert found["command"] == sys.argv


# Chance ---------------------------------------------------------------------------------------------------------------


def test_every_stage_and_seed_has_its_own_stream(tmp_path: Path) -> None:
    def draw(folder: str, seed: int, *stages: str) -> float:
        with Run.open(tmp_path / folder, {}, seed) as run:
            for name in stages:
                run = run.stage(name)
            return torch.rand(1, generator=run.rng).item()

    assert draw("a", 0, "sft") == draw("b", 0, "sft")
    assert len({draw("c", 0), draw("d", 1), draw("e", 0, "sft"), draw("f", 0, "ppo"), draw("g", 0, "ppo", "sft")}) == 5


def test_what_follows_a_stage_does_not_depend_on_whether_it_ran_now(tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        with Run.open(tmp_path, {}, seed=1, resume=True) as run:
            stage = run.stage("sft")
            assert run.stage("sft") is stage
            if stage.result() is None:
                stage.finish(fit(stage, 2))
            seen.append((stage.result(), torch.rand(1).item(), random.random(), numpy.random.random()))
    assert seen[0] == seen[1]
    assert "finished" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["", "a/b", "..", "checkpoints"])
def test_a_stage_has_a_plain_name(tmp_path: Path, name: str) -> None:
    with Run.open(tmp_path, {}, seed=1) as run, pytest.raises(ValueError, match="a stage cannot be called"):
        run.stage(name)


# Lines ----------------------------------------------------------------------------------------------------------------


def test_metrics_are_exact_and_the_clock_is_elsewhere(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        run.log(0, {"objective/kl": 0.1 + 0.2, "num_tokens": 12, "loss": torch.tensor(0.1).item()})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 0, "objective/kl": 0.30000000000000004, "num_tokens": 12, "loss": 0.10000000149011612}\n'
    assert json.loads((tmp_path / "times.jsonl").read_text()).keys() == {"step", "seconds", "at"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_a_metric_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        with pytest.raises(ValueError, match="metric 'objective/kl' of step 3 is"):
            run.log(3, {"loss": 1.0, "objective/kl": value})
        with pytest.raises(ValueError, match="second 'step'"):
            run.log(3, {"step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_append_begins_only_new_files_of_its_own(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        (tmp_path / "train.jsonl").write_text("mine\n")
        for name in ("train.jsonl", "../x.jsonl", "config.json"):
            with pytest.raises(ValueError, match="must be a new file in the run's folder"):
                run.append(name, {})
        with pytest.raises(TypeError, match="cannot be written as JSON"):
            run.append("samples.jsonl", {"text": object()})
        run.append("samples.jsonl", {"text": "naïve <b>", "kl": torch.tensor(0.5)})
    assert (tmp_path / "samples.jsonl").read_text() == '{"text": "naïve <b>", "kl": 0.5}\n'


def test_a_finished_run_answers_by_its_result_and_takes_no_more_lines(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        assert run.result() is None
        given = run.finish(fit(run, 2))
    before = written(tmp_path)
    with Run.open(tmp_path, {}, seed=1, resume=True) as run:
        assert run.result() == given
        with pytest.raises(ValueError, match="is finished"):
            run.log(2, {"loss": 0.0})
    assert written(tmp_path) == before  # what followed the last checkpoint is still there
    with pytest.raises(ValueError, match="not JSON compliant"), Run.open(tmp_path / "b", {}, seed=1) as run:
        run.finish({"loss": float("nan")})


# Dashboards -----------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_step_of_every_stage(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Run.open(tmp_path, {}, seed=1, log=("tensorboard",)) as run:
        run.stage("sft").log(0, {"loss": 2.0})
        run.log(0, {"loss": 1.0})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        "sft/loss": [2.0],
        "loss": [1.0],
    }


def test_a_dashboard_that_cannot_be_had_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no dashboard is called 'tensorbord': there are tensorboard, wandb, trackio"):
        Run.open(tmp_path / "run", {}, seed=1, log=("tensorbord",))
    monkeypatch.setattr(sys, "path", [])  # nothing is installed there
    for name in ("tensorboard", "wandb", "trackio"):
        if name not in sys.modules:
            with pytest.raises(ImportError, match=f"pip install {name}"):
                Run.open(tmp_path / "run", {}, seed=1, log=(name,))
    assert not (tmp_path / "run").exists()


# The screen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (7, "0:07"), (730.4, "12:10"), (3723, "1:02:03")])
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("terminal")
def test_bars_nest_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        for step in run.stage("sft").steps(2, Toy(), title="sft"):
            with run.progress(4, "sampling [b]", "rows") as bar:
                bar.advance(3)
                run.note("a [line] between")
                assert str(bar).startswith("3/4 rows  0:0")
            run.stage("sft").log(step, {"objective/kl": 0.25}, headline=("objective/kl", "absent"))
        alone = run.progress(2, "alone")
        alone.advance()
        alone.advance()  # a full bar goes by itself
        print("to stdout")
    out, err = capsys.readouterr()
    assert out == "to stdout\n"
    assert "a [line] between" in err
    assert "sampling [b]" in err
    assert "sft: 2 steps done" in err


def test_off_a_terminal_only_lines_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path, {}, seed=1) as run:
        fit(run, 3)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["fit: 3 steps done"]


def test_plain_lines_come_at_most_every_fifteen_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    screen = Screen()
    with Bar(screen, 40, "ppo", "steps", done=10) as bar, Bar(screen, 8, "sampling", "rows") as inner:
        for _ in range(8):
            now += 4.0
            bar.advance()
            bar.headline = "kl 0.3"
            inner.advance()
    # Lines after 16 and 32 seconds. By then 4 of 30 steps took 16 s, so the other 26 take 104 s; 3 rows took 12 s, so
    # the other 5 take 20 s, of which 4 s are gone.
    assert capsys.readouterr().err.splitlines() == [
        "ppo: 14/40 steps  1:44 left  kl 0.3 | sampling: 3/8 rows  0:16 left",
        "ppo: 18/40 steps  1:28 left  kl 0.3 | sampling: 7/8 rows  0:00 left",
    ]


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
