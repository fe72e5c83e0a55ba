"""The command line: `tokenmdp VERB [--config x.yaml] [--field value ...]`.

A verb is a file. Every file in recipes/ and lab/ that has a `Config` and a `main(cfg, run)` is one, by its own name
(reward_model.py is `reward-model`), and the first sentence of its docstring is its help; one in a folder of lab/ is a
verb of two words (prompts/collect.py is `prompts collect`). `tokenmdp run FILE.py` makes a verb of a file of the user's.
Its flags are the fields of its `Config`, then those of every run (`config.Options`).

One file may be several verbs: `VARIANTS = {"rloo": {"baseline": "leave_one_out"}}` in reinforce.py makes `rloo` the verb
`reinforce` with that setting as its default. Methods that differ by a setting are told apart by it, not by a copy.

Importing a verb must be quick, for its help and its complaints come after it: `transformers` and `scipy` are imported whole,
since they load their parts when these are first named, and peft and scikit-learn inside the functions that need them.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmdp import __version__, config

HOME = Path(__file__).parent
BUILT_IN = {
    "run": "A recipe of your own: `tokenmdp run FILE.py [flags]`; the file has a Config and a main(cfg, run)",
    "report": "Write the report of a run as one self-contained page: `tokenmdp report [FOLDER]`",
}
# What is raised for input that cannot be used: one message, no traceback. Anything else is a fault of ours and shows.
BAD_INPUT = (ValueError, OSError, ImportError, FloatingPointError)


@dataclass(frozen=True)
class Verb:
    """A verb and the file that it is."""

    name: str
    file: Path
    help: str
    module: str = ""  # empty for a user's file, which no package holds
    preset: Mapping[str, Any] = field(default_factory=dict)  # settings that make it this variant of its file

    def load(self) -> ModuleType:
        """Import the file, which for a recipe brings torch in."""
        if self.module:
            return importlib.import_module(self.module)
        name = f"tokenmdp_user_{self.file.stem}"
        spec = importlib.util.spec_from_file_location(name, self.file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{self.file} is not a Python file: a recipe is one, with a Config and a main(cfg, run)")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
        sys.path.append(str(self.file.parent.resolve()))  # the file may import its neighbours; ours come first
        spec.loader.exec_module(module)
        return module


def read_verbs(file: Path, module: str = "") -> list[Verb]:
    """The verbs that a file is, found without importing it: its own, then one for every entry of its `VARIANTS`, a
    table of settings by name written out as a literal; none if it has no `Config` or no `main`.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    if not {"Config", "main"} <= names:
        return []
    paragraph = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    verb = Verb(file.stem.replace("_", "-"), file, paragraph.partition(". ")[0].removesuffix("."), module)
    made = [verb]
    for name, preset in _literal(tree, "VARIANTS").items():
        settings = ", ".join(f"{key}={value}" for key, value in preset.items())
        made.append(replace(verb, name=name, preset=preset, help=f"{verb.name} with {settings}"))
    return made


def _literal(tree: ast.Module, name: str) -> dict[str, dict[str, Any]]:
    """What the module's last assignment to a name says; empty where there is none."""
    found: dict[str, dict[str, Any]] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            found = ast.literal_eval(node.value)
    return found


def find_verbs(home: Path = HOME, package: str = "tokenmdp") -> dict[str, Verb]:
    """The verbs of a package, by name: its files in recipes/ with their variants, then those in lab/ and its folders."""
    found: dict[str, Verb] = {}
    for pattern in ("recipes/*.py", "lab/*.py", "lab/*/*.py"):
        for file in sorted(home.glob(pattern)):
            folder = file.parent.relative_to(home).parts
            group = f"{folder[1].replace('_', '-')} " if len(folder) > 1 else ""
            for verb in read_verbs(file, ".".join((package, *folder, file.stem))):
                found[group + verb.name] = replace(verb, name=group + verb.name)
    return found


def user_verb(file: Path) -> Verb:
    """The verb that a user's own file is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not Python, or lacks `Config` or `main`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: `tokenmdp run FILE.py` takes a recipe of your own")
    try:
        verbs = read_verbs(file)
    except (SyntaxError, UnicodeDecodeError) as fault:
        raise ValueError(f"{file} is not Python that can be read: {fault}") from fault
    if not verbs:
        raise ValueError(
            f"{file} is not a recipe: it needs `@dataclass(frozen=True) class Config` and `def main(cfg, run)` at its "
            "top level; copy one of the files in tokenmdp/recipes and change it"
        )
    return verbs[0]


def execute(verb: Verb, argv: Sequence[str]) -> int:
    """Run a verb in its folder; print what came of it."""
    module = verb.load()
    about = f"{verb.help}.\n\nHow it works: {verb.file}"
    settings, options = config.parse(module.Config, argv, f"tokenmdp {verb.name}", about, verb.preset)
    if options.print_config:
        print(config.to_yaml(settings), end="")
        return 0
    import torch
    from transformers.utils import logging

    from tokenmdp.run import Run

    logging.disable_progress_bar()  # what takes long has a bar of its own

    if options.threads > 0:
        torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        folder = options.out or Path("runs") / verb.name.replace(" ", "-")
        # A verb with SCRATCH = True is a tool, not an experiment: it leaves no folder behind unless one is asked for.
        scratch = bool(getattr(module, "SCRATCH", False)) and options.out is None
        if scratch:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / verb.name
        # A verb with AGAIN = True keeps what it made elsewhere and goes on there by itself: its folder is about the last time.
        again = bool(getattr(module, "AGAIN", False))
        which = (options.resume and not again, options.overwrite or again, options.log)
        run = stack.enter_context(Run.open(folder, config.plain(settings), options.seed, *which))
        result = run.result()
        if result is None:
            result = run.finish(module.main(settings, run))
        else:
            run.note(f"{folder} is finished already: this is its result")
    if not scratch:
        show(result, folder)
    return 0


def show(result: Mapping[str, Any], folder: Path) -> None:
    """The result as a table, and where the rest is."""

    def rows(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
        for key, value in part.items():
            if isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys():
                yield prefix + key, "{mean:.4g}  [{low:.4g}, {high:.4g}]".format(**value)
            elif isinstance(value, Mapping):
                yield from rows(value, f"{prefix}{key}.")
            elif isinstance(value, float):
                yield prefix + key, f"{value:.4g}"
            else:
                long = isinstance(value, list) and (len(value) > 6 or any(isinstance(v, Mapping) for v in value))
                yield prefix + key, f"{len(value)} entries" if long else str(value)

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, text in rows(result):
        table.add_row(Text(key), Text(text))
    console = Console()
    console.print(table)
    console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)


def report(argv: Sequence[str]) -> int:
    """Build the report of a run's folder."""

    def folder(folder: tyro.conf.Positional[Path] = Path("runs/demo")) -> Path:
        return folder

    chosen = tyro.cli(folder, args=argv, prog="tokenmdp report", description=BUILT_IN["report"])
    if not chosen.is_dir():
        raise FileNotFoundError(f"there is no run folder {chosen}: `tokenmdp demo` makes runs/demo")
    print(importlib.import_module("tokenmdp.lab.report").build(chosen))
    return 0


def overview(verbs: Mapping[str, Verb]) -> str:
    """What `tokenmdp --help` prints."""
    lines = {**{verb.name: verb.help for verb in verbs.values()}, **BUILT_IN}
    width = max(map(len, lines))
    return "\n".join(
        [
            f"tokenmdp {__version__}: language models aligned as policies on a known Markov decision process",
            "",
            "usage: tokenmdp VERB [--config x.yaml] [--field value ...]",
            "",
            *(f"  {name:{width}}  {text}" for name, text in lines.items()),
            "",
            "`tokenmdp VERB --help` lists the flags of a verb.",
        ]
    )


def dispatch(argv: Sequence[str]) -> int:
    """Find the verb and run it."""
    verbs = find_verbs()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(verbs))
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name == "report":
        return report(rest)
    if name == "run":
        if not rest or rest[0].startswith("-"):
            print(
                f"{BUILT_IN['run']}.\n\nusage: tokenmdp run FILE.py [--config x.yaml] [--field value ...]\n\n"
                f"Begin with a copy of one in {HOME / 'recipes'}:\n  cp {HOME / 'recipes/ppo.py'} my_ppo.py\n"
                "  tokenmdp run my_ppo.py --help      its flags are the fields of its Config\n"
                "  tokenmdp run my_ppo.py --steps 5   writes to runs/my-ppo"
            )
            return 0 if rest and rest[0] in ("-h", "--help") else 2
        return execute(user_verb(Path(rest[0])), rest[1:])
    if rest and f"{name} {rest[0]}" in verbs:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in verbs:
        group = [verb for verb in verbs if verb.startswith(f"{name} ")]
        if group:
            raise ValueError(f"`tokenmdp {name}` is followed by one of: {', '.join(verb.split()[1] for verb in group)}")
        hint = f"; did you mean `tokenmdp run {name}`?" if name.endswith(".py") else ""
        raise ValueError(f"unknown verb {name!r}{hint or config.did_you_mean(name, [*verbs, *BUILT_IN])}")
    return execute(verbs[name], rest)


def main(argv: Sequence[str] | None = None) -> int:
    """The `tokenmdp` command; returns its exit code: 0 done, 2 input that cannot be used, 130 stopped by Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(argv)
    except SystemExit as stop:  # raised by tyro, which has said why
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        again = [arg for arg in argv if arg not in ("--resume", "--overwrite")]
        print(f"\nstopped; go on with: {shlex.join(['tokenmdp', *again, '--resume'])}", file=sys.stderr)
        return 130
    except BAD_INPUT as fault:
        if "--debug" in argv:
            raise
        print(f"tokenmdp {argv[0]}: {fault}\n(--debug shows where this came from)", file=sys.stderr)
        return 2
