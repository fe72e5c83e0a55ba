"""A run folder: everything a run leaves behind, and exact resume.

    config.json     the resolved config, the seed, versions, threads, the command line, hashes of the files it names
    metrics.jsonl   one object a step; follows from config, seed and threads alone, so two runs compare byte by byte
    times.jsonl     the wall-clock that belongs to each line of metrics.jsonl
    samples.jsonl   and whatever else `Run.append` wrote: no_verdict.jsonl, the responses a reward could not judge
    checkpoints/    step-000040.safetensors (40 steps done) with its step-000040.sha256, the newest few
    log.txt         what the run said, with the time of day
    result.json     written last: a run is finished when it is there
    NAME/           a stage of the run: the same again

Why resume is exact: a run is a program that follows from its seed, so on resume it simply starts again. What comes
before `Run.steps` is repeated with the same outcome, and the lines it appends are dropped because the files hold them
already; then `Run.steps` puts back the states, every random stream and the length of every file as they were at the
newest whole checkpoint, and goes on. A run killed at any moment loses the steps since then, and takes them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import sys
import time
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenmdp import __version__, mdp, monitors
from tokenmdp.run.dashboards import Sink, check_dashboards, open_dashboard
from tokenmdp.run.files import (
    Chance,
    belongings,
    checkpoint_files,
    checkpoints,
    clear,
    find_fault,
    hashes,
    header_fault,
    named_paths,
    number_of,
    read_about,
    read_header,
    read_lines,
    seed_the_global_streams,
    settle,
    sha256,
    temporary,
    to_json,
    write,
    writing,
)
from tokenmdp.run.screen import Bar, Screen, clock
from tokenmdp.types import Batch, Score

__all__ = ["Bar", "Run", "RunExists", "Stateful"]


# The folders that runs of this process hold. The system's lock keeps only other processes out, and it is gone as soon as
# this process closes any handle on the file: a second one must never be opened here.
_held: weakref.WeakValueDictionary[str, TextIOWrapper] = weakref.WeakValueDictionary()


class RunExists(FileExistsError):
    """The folder already holds something that a new run must not silently destroy."""


class Stateful(Protocol):
    """What `Run.steps` can save and put back: a learner, a controller, a cursor into the data."""

    def tensors(self) -> Mapping[str, Tensor]: ...
    def scalars(self) -> Mapping[str, Any]: ...
    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None: ...


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configs differ, each with both values."""
    found = []
    for key in [*then, *(k for k in now if k not in then)]:
        a, b = then.get(key, "absent"), now.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"  {prefix}{key}: {a!r} there, {b!r} now")
    return found


class Run:
    """A run, or one stage of it, and its folder. Use it in a `with` block, which closes what is open.

    Attributes:
        folder: where everything goes.
        rng: the random stream of this run or stage; draw everything from it that should not depend on anything else.
        seed, config: what the run follows from.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], seed: int, stage: str, parent: Run | None) -> None:
        self.folder, self.seed, self.config = folder, seed, json.loads(to_json(config, finite=False))
        self.rng = torch.Generator().manual_seed(number_of(seed, stage))
        self._name, self._prefix, self._parent = stage, f"{stage}/" if stage else "", parent
        self._screen: Screen = parent._screen if parent else Screen()
        self._boards: list[tuple[Sink, Callable[[], None]]] = parent._boards if parent else []
        self._stages: dict[str, Run] = {}
        self._guard: TextIOWrapper | None = None
        self._bar: Bar | None = None
        self._watch: monitors.Watch | None = None
        self._whole: list[Path] = []  # the checkpoints to trust, newest first
        self._repeating = self._stepping = False
        self._logged = time.monotonic()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: Mapping[str, Any],
        seed: int,
        resume: bool = False,
        overwrite: bool = False,
        log: tuple[str, ...] = (),
    ) -> Run:
        """Open a folder for a new run, or to go on with the one it holds.

        Args:
            folder: created where it does not exist.
            config: the resolved config; must go into JSON.
            seed: every random stream follows from it; the global ones of torch, numpy and Python are seeded too.
            resume: go on with the run in the folder; where there is none, begin one.
            overwrite: take away what an earlier run wrote there (and nothing else) and begin anew.
            log: dashboards besides the files: "tensorboard", "wandb" (offline unless WANDB_MODE says so), "trackio".

        Raises:
            RunExists: the folder holds a run and neither `resume` nor `overwrite` is given, or this or another process
                is writing it, or it holds files that are no run's.
            ValueError: the config, the seed or a file that the config names differs from that of the run to go on with;
                or the config names what `overwrite` would take away.
        """
        if resume and overwrite:
            raise ValueError("resume and overwrite contradict each other: go on with the run, or begin it anew")
        check_dashboards(log)
        run = cls(Path(folder), config, seed, "", None)
        old = read_header(run.folder)
        if old is None and run.folder.exists():
            if not run.folder.is_dir() or any(not p.name.startswith(".") for p in run.folder.iterdir()):
                if why := header_fault(run.folder):
                    raise RunExists(
                        f"{folder} is not a run's folder that can be read: {why}. Put back a whole config.json, or move "
                        "the folder away, or choose another by --out"
                    )
                raise RunExists(f"{folder} exists and is not a run's folder: choose another by --out")
        elif old is not None and not (resume or overwrite):
            raise RunExists(
                f"{folder} already holds a run: --resume goes on with it, --overwrite begins it anew, "
                "--out DIR puts this one elsewhere"
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        run._lock()
        try:
            run._make_way()
            if old is not None and overwrite:
                run._check_not_needed(old)
                clear(run.folder, old)
                old = None
            run._begin(old)
        except BaseException:
            run._unlock()
            raise
        if resume and old is None:
            run.note(f"nothing to go on with in {folder}: this run begins at the start")
        elif resume and not run._whole and run.result() is None:
            run.note(
                f"{folder} has no checkpoint yet (one is written once a minute or less): its steps begin at the start"
            )
        try:
            run._boards += [open_dashboard(name, run.folder, run._header["id"], run.config) for name in log]
        except BaseException:
            run.__exit__(*sys.exc_info())
            raise
        return run

    def _lock(self) -> None:
        """Keep everyone else out of the folder for as long as this run is open, however it ends."""
        place = os.path.realpath(self.folder)
        if (held := _held.get(place)) is not None and not held.closed:
            raise RunExists(
                f"a run of this process is still writing {self.folder}: close it (leave its `with` block), or use --out"
            )
        self._guard = (self.folder / ".lock").open("w")
        try:
            fcntl.lockf(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as fault:
            self._unlock()
            raise RunExists(
                f"another process is still writing {self.folder}: wait for it, stop it, or use --out"
            ) from fault
        _held[place] = self._guard

    def _unlock(self) -> None:
        if self._guard is not None:
            self._guard.close()

    def _make_way(self) -> None:
        """Find out before anything is taken away or trained whether checkpoints can be written."""
        place = self.folder / "checkpoints"
        if place.exists() and not place.is_dir():
            raise RunExists(f"{place} is a file, and the checkpoints go into a folder of that name: move it away")
        for path in checkpoint_files(self.folder, folders=True):
            aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.folder")
            path.rename(aside)
            self.note(f"{path} is a folder where a checkpoint's file belongs: it is called {aside.name} now")

    def _check_not_needed(self, old: Mapping[str, Any]) -> None:
        """A run may start from the model or the lines that an earlier one left: these must not go first."""
        gone = {Path(os.path.realpath(p.parent)) / p.name for p in belongings(self.folder, old)}
        models = {path.parent for path in gone if path.name == "config.json" and read_header(path.parent) is None}
        for name in named_paths(self.config):
            path = Path(os.path.realpath(os.path.expanduser(name)))
            if path in gone or {path, path / "model", path.parent} & models:
                raise ValueError(
                    f"the config names {name!r}, which --overwrite would take away from {self.folder} before it is "
                    "read: use another --out, or move it elsewhere first"
                )

    def _begin(self, old: dict[str, Any] | None) -> None:
        """Write config.json, or compare with it and cut the files back to the newest whole checkpoint."""
        versions = {"tokenmdp": __version__, "python": sys.version.split()[0]}
        versions |= {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
        new: dict[str, Any] = {"config": self.config, "seed": self.seed, "stage": self._name}
        new |= {"threads": torch.get_num_threads(), "versions": versions, "command": sys.argv}
        new |= {"id": uuid.uuid4().hex[:8], "files": ["metrics.jsonl", "times.jsonl"]}
        self._header = new if old is None else old
        seed_the_global_streams(self.seed, self._name)
        if old is None:
            if self._parent is None:  # a run answers for its stages: their files are among those it names
                new["inputs"] = hashes(named_paths(self.config), but=self.folder)
            write(self.folder / "config.json", to_json(new, finite=False))
            return
        if wrong := _differences({**old["config"], "seed": old["seed"]}, {**self.config, "seed": self.seed}):
            raise ValueError(
                f"the run in {self.folder} was made with other settings; use its own, or another --out:\n"
                + "\n".join(wrong)
            )
        then = old.get("inputs", {})  # earlier versions kept no hashes
        if changed := _differences(then, dict.fromkeys(then, "no file") | hashes(then)):
            raise ValueError(
                f"files that the run in {self.folder} reads are not what they were (SHA-256): put them back to go on, "
                "or begin it anew with --overwrite:\n" + "\n".join(changed)
            )
        same = ("threads", "versions")
        if shifts := _differences({k: old[k] for k in same if k in old}, {k: new[k] for k in same}):
            self.note(
                "warning: the metrics may differ in their last bits from an unbroken run's:\n" + "\n".join(shifts)
            )
        if self.result() is None:
            if (torn := self.folder / "result.json").exists():
                torn.unlink()
                self.note(f"{torn} was half written and is gone: the run counts as not finished, and goes on")
            self._roll_back()

    def _roll_back(self) -> None:
        """Cut every file to its length at the newest whole checkpoint, or to nothing where there is none."""
        found = checkpoints(self.folder)
        while found and (why := find_fault(found[0])):
            self.note(f"checkpoint {found.pop(0)} is skipped: {why}")
            if not found:
                self.note(f"no whole checkpoint in {self.folder}: it begins at the start")
        self._whole, self._repeating = found, bool(found)
        for path in checkpoint_files(self.folder):
            if path.suffix == ".tmp":
                path.unlink()
        sizes = json.loads(read_about(found[0])["files"]) if found else {}
        for name in self._header["files"]:
            if (self.folder / name).exists():
                os.truncate(self.folder / name, sizes.get(name, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_down()
        try:
            if fault is not None:
                self._remember(fault)
        finally:
            self._unlock()

    def _remember(self, fault: BaseException) -> None:
        """Keep the traceback in log.txt, or nothing at all where nothing was done yet."""
        with contextlib.suppress(OSError):  # a full disk must not hide the fault itself
            if {path.name for path in self.folder.iterdir()} <= {"config.json", "log.txt", ".lock"}:
                clear(self.folder, self._header)  # it broke before it wrote anything: the next attempt finds no run
            else:
                self._scribble("".join(traceback.format_exception(fault)))

    def close(self) -> None:
        """Take down the display, close the dashboards, and let others into the folder."""
        self._take_down()
        self._unlock()

    def _take_down(self) -> None:
        if self._parent is None:
            self._screen.close()
            while self._boards:
                self._boards.pop()[1]()

    def stage(self, name: str, config: Mapping[str, Any] | None = None) -> Run:
        """A part of the run with its own folder, random stream, metrics, checkpoints and result.

            warm = run.stage("sft")
            done = warm.result() or warm.finish(sft.main(cfg.sft, warm))

        On resume a stage that was finished answers by `result()` and need not be taken again; one that was broken off
        goes on. Asking twice for a stage gives the same one.
        """
        if not re.fullmatch(r"\w[\w.-]*", name) or name in ("checkpoints", "tensorboard", "wandb"):
            raise ValueError(f"a stage cannot be called {name!r}: use letters, digits, '_', '-' and '.'")
        if name not in self._stages:
            stage = Run(self.folder / name, config or {}, self.seed, self._prefix + name, self)
            stage.folder.mkdir(exist_ok=True)
            old = read_header(stage.folder)
            if old is None and (why := header_fault(stage.folder)):  # to begin anew here would mix two attempts' lines
                raise RunExists(
                    f"the stage in {stage.folder} cannot go on: {why}. Put back a whole config.json, or take the folder "
                    "away: then the stage begins anew"
                )
            stage._make_way()
            stage._begin(old)
            if stage.result() is not None:
                seed_the_global_streams(self.seed, stage._prefix + "finished")
            self._stages[name] = stage
        return self._stages[name]

    def steps(
        self,
        n: int,
        *state: Stateful,
        title: str,
        every_seconds: float = 60.0,
        keep: int = 2,
        setting: str | None = None,
    ) -> Iterator[int]:
        """The steps 0 … n−1 that are still to be taken, under a bar with the time left.

        Puts `state` back from the newest whole checkpoint; writes one after a step once `every_seconds` have passed
        since the last, and after step n−1. An exception in the loop leaves the last checkpoint as it is. What follows
        the loop must live on `state` alone: a run that was killed after its last step has none left to take.

        Args:
            n: how many steps there are in all.
            state: everything that a step changes and the next step reads, besides the random streams. What its `warning`
                says at the end, if it has one, is passed on.
            title: names the bar.
            every_seconds: the least time between two checkpoints; 0 writes one after every step. Where writing is slow
                they come further apart, so that no more than about a twentieth of the time goes into them.
            keep: how many checkpoints stay.
            setting: a row of `mdp.SETTINGS`, which the body of the loop is held to; None holds it to nothing.

        Raises:
            mdp.OutOfSetting: in the body, where it touches what the setting does not have.
            ValueError: no such setting; or called twice on one run: give the second loop a stage of its own.
            OSError: a checkpoint cannot be written; the one before is kept.
        """
        if self._stepping:
            raise ValueError(f"{title}: this run has had its loop; give a second one its own folder by run.stage(NAME)")
        self._stepping = True
        parts = (*state, Chance(self.rng))
        start = self._load(self._whole[0], parts, title) if self._whole else 0
        self._repeating = False
        saved = self._logged = born = time.monotonic()
        wait = every_seconds
        with Bar(self._screen, n, title, "steps", start) as self._bar:
            for step in range(start, n):
                with mdp.within(setting) if setting is not None else contextlib.nullcontext():
                    yield step
                self._bar.advance()
                begun = time.monotonic()
                if step == n - 1 or begun - saved >= wait:
                    self._save(step + 1, parts, keep)
                    saved = time.monotonic()
                    wait = max(every_seconds, 20 * (saved - begun)) if every_seconds else 0.0
        self.note(f"{title}: {n} steps done, {n - start} of them in {clock(time.monotonic() - born)}")
        for warning in filter(None, (getattr(part, "warning", "") for part in state)):
            self.note(f"warning: {title}: {warning}")

    def _load(self, path: Path, parts: Sequence[Stateful], title: str) -> int:
        about = read_about(path)
        scalars = json.loads(about["scalars"])
        if len(scalars) != len(parts):
            raise ValueError(
                f"{path} holds {len(scalars) - 1} states and {title} has {len(parts) - 1}: not the same recipe"
            )
        tensors = load_file(path)
        for i, part in enumerate(parts):
            mine = f"{i}/"
            part.restore({n.removeprefix(mine): t for n, t in tensors.items() if n.startswith(mine)}, scalars[i])
        self.note(f"{title}: goes on after {about['step']} steps, from {path}")
        return int(about["step"])

    def _save(self, step: int, parts: Sequence[Stateful], keep: int) -> None:
        """One file for the whole state, whole or not at all; then the checkpoints beyond the newest `keep` go."""
        path = self.folder / "checkpoints" / f"step-{step:06}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tensors, storages = {}, set()
        for i, part in enumerate(parts):
            for name, tensor in part.tensors().items():
                own = tensor.detach().cpu().contiguous()
                if own.untyped_storage().data_ptr() in storages:  # the format refuses two views of one storage
                    own = own.clone()
                storages.add(own.untyped_storage().data_ptr())
                tensors[f"{i}/{name}"] = own
        files = [self.folder / name for name in self._header["files"]]
        sizes = {file.name: file.stat().st_size for file in files if file.exists()}
        about = {
            "step": str(step),
            "files": json.dumps(sizes),
            "scalars": json.dumps([part.scalars() for part in parts]),
        }
        self._seal(path, tensors, about)
        self._whole = [path, *(p for p in self._whole if p != path)][: max(1, keep)]
        kept = {whole.stem for whole in self._whole}
        for stale in checkpoint_files(self.folder):
            if stale.stem not in kept:
                stale.unlink()

    def _seal(self, path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        """Bytes and hash first, then the name of the hash, then the name of the bytes: what bears it has been whole."""
        kept = f"The checkpoint before it, {self._whole[0].name}, is kept. " if self._whole else ""
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) + sum(map(len, about.values()))
        temp, seal = temporary(path), temporary(path.with_suffix(".sha256"))
        with writing(path, needed, kept):
            try:
                save_file(tensors, temp, metadata=about)
                seal.write_text(f"{sha256(temp)}  {path.name}\n")
                settle(seal, temp)
            finally:
                temp.unlink(missing_ok=True)
                seal.unlink(missing_ok=True)

    def log(self, step: int, metrics: Mapping[str, float], headline: Sequence[str] = ()) -> None:
        """Append one line to metrics.jsonl, and its wall-clock to times.jsonl; say where the curves show a failure.

        Args:
            step: as `steps` counts, from 0.
            metrics: finite numbers (floats, ints, tensors of one element).
            headline: the names to show beside the bar.

        Raises:
            ValueError: a metric is not finite.
        """
        line = {name: v if type(v) is int else float(v) for name, v in metrics.items()}
        for name, value in line.items():
            if not math.isfinite(value) or name == "step":
                raise ValueError(
                    f"metric {name!r} of step {step} is {value}: only finite numbers, and no second 'step'"
                )
        now = time.monotonic()
        if self._watch is None and not self._repeating:
            self._watch = monitors.watched(read_lines(self.folder / "metrics.jsonl"))  # of a run that goes on
        self.append("metrics.jsonl", {"step": int(step), **line})
        self.append(
            "times.jsonl", {"step": int(step), "seconds": round(now - self._logged, 4), "at": round(time.time(), 3)}
        )
        self._logged = now
        if self._bar is not None:
            self._bar.headline = "  ".join(
                f"{name.split('/')[-1]} {line[name]:.4g}" for name in headline if name in line
            )
        for send, _ in () if self._repeating else self._boards:
            send(self._prefix, int(step), line)
        for alarm in self._watch.see(int(step), line) if self._watch else ():
            self.note(f"warning: step {step}, {alarm}")

    def append(self, name: str, obj: Mapping[str, Any]) -> None:
        """Append a JSON line to a file of the folder, such as samples.jsonl; resume cuts it as it cuts the metrics."""
        if self._repeating:
            return  # the file already holds this line: see the head of this module
        if self.result() is not None:
            raise ValueError(f"the run in {self.folder} is finished: {name} takes no more lines")
        path = self.folder / name
        if name not in self._header["files"]:
            if path.exists() or path.name != name or path.suffix != ".jsonl":
                raise ValueError(f"cannot begin {path}: it must be a new file in the run's folder, called *.jsonl")
            self._header["files"].append(name)
            write(self.folder / "config.json", to_json(self._header, finite=False))
        data = to_json(obj, indent=None)
        with writing(path, len(data)), open(path, "ab") as file:
            file.write(data)

    def sample(self, batch: Batch, row: int, arm: str, **figures: Any) -> None:
        """Append a response to samples.jsonl under the name of who answered, with figures that belong to it."""
        p = batch.prompts[row]
        line = {"prompt": p.text, "arm": arm, "row": p.row, "text": batch.texts[row], "ended": bool(batch.ended[row])}
        self.append("samples.jsonl", line | figures)

    def missing(self, step: int, batch: Batch, score: Score, most: int = 20) -> None:
        """Keep the first responses of a step that got no verdict, and why, in no_verdict.jsonl."""
        for row in (~score.verdict).nonzero()[:most, 0].tolist():
            p = batch.prompts[row]
            why = score.reasons.get(row, "the reward gave no finite number")
            self.append(
                "no_verdict.jsonl",
                {"step": step, "row": p.row, "why": why, "prompt": p.text, "text": batch.texts[row]},
            )

    def progress(self, total: int, title: str, unit: str = "") -> Bar:
        """A bar for work inside a step or beside the steps: `with run.progress(64, "sampling", "rows") as bar: ...`."""
        return Bar(self._screen, total, title, unit)

    def note(self, text: str) -> None:
        """Say a line on the screen, and keep it in log.txt: which path ran, a hash, a warning."""
        self._screen.say(text)
        self._scribble(text + "\n")

    def _scribble(self, text: str) -> None:
        path = self.folder / "log.txt"
        with writing(path, len(text)), open(path, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write result.json, which makes the run finished; gives back what `result()` will say."""
        write(self.folder / "result.json", to_json(result))
        if self._parent is not None:  # what follows must not depend on whether this stage ran now or before
            seed_the_global_streams(self.seed, self._prefix + "finished")
        return dict(json.loads(to_json(result)))

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, None before; a file that is half written says nothing."""
        try:
            found = json.loads((self.folder / "result.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None
