"""What the documents say is there: links, commands, targets, files, names in the code, logged metrics."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from tokenmdp import cli, mdp

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SOURCE = ROOT / "src" / "tokenmdp"
DOCUMENTS = sorted(path for path in [README, *(ROOT / "docs").rglob("*.md")] if path.exists())
DICTIONARY = (ROOT / "docs" / "dictionary.md").read_text(encoding="utf-8")
MADE_BY_RUNS = ("runs/", ".venv/")  # paths a document may name that a fresh clone has not

_FENCE = re.compile(r"^( *)(```+|~~~+)[^\n]*\n(.*?)^\1\2[ ]*$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def blocks(text: str) -> list[str]:
    """The fenced code blocks."""
    return [match[3] for match in _FENCE.finditer(text)]


def spans(text: str) -> list[str]:
    """The inline code, outside code blocks."""
    return _SPAN.findall(_FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """What `#name` may point to: headings, as GitHub spells them."""
    headings = re.findall(r"^#+ +(.+?) *#*$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str, program: str) -> set[str]:
    """The first argument of `program` wherever a document shows it as code, at the start of a line or of a span; of a verb
    of two words both.
    """
    groups = {verb.partition(" ")[0] for verb in cli.find_verbs() if " " in verb}
    shown = [line.removeprefix("$ ") for block in blocks(text) for line in map(str.strip, block.splitlines())]
    pattern = re.compile(rf"(?:\.venv/bin/)?{program} +([a-zA-Z][\w-]*)\b(?!=)(?: +([a-zA-Z][\w-]*))?")
    found = [match for line in shown + spans(text) if (match := pattern.match(line))]
    return {f"{match[1]} {match[2]}" if match[1] in groups else match[1] for match in found}


def tree_entries(block: str) -> list[str]:
    """The paths a file map lists: its names joined with the folders above them, by indentation."""
    found: list[str] = []
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        entry = re.match(r"^([\s│├└─|]*)([\w.\-/]+/|[\w.\-/]*\.\w+|[\w/]*(?:Makefile|LICENSE))(?=,?\s|$)", line)
        if entry is None:
            continue
        depth, name = len(entry[1]), entry[2]
        above = [(d, folder) for d, folder in above if d < depth]
        path = "".join(folder for _, folder in above) + name
        found.append(path)
        if name.endswith("/"):
            above.append((depth, name))
    return found


def is_file_map(block: str) -> bool:
    """Whether a code block lists files: it has folders, and something indented below the first."""
    lines = [line for line in block.splitlines() if line.strip()]
    return len(lines) > 2 and re.match(r"^[\w.\-/]+/(\s|$)", lines[0]) is not None and lines[1][0] in " │├└|"


def links(document: Path) -> list[tuple[str, Path, str]]:
    """Relative links: as written, the file they lead to, and the heading there."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    found += re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    parts = [(link, *link.partition("#")[::2]) for link in found if not re.match(r"[a-z][a-z+.-]*:", link)]
    return [(link, (document.parent / path).resolve() if path else document, anchor) for link, path, anchor in parts]


def broken_links(document: Path) -> list[str]:
    """Relative links that lead nowhere."""
    faults = []
    for link, target, anchor in links(document):
        if not target.exists():
            faults.append(f"{document.name}: {link} leads to no file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            faults.append(f"{document.name}: {link}: {target.name} has no such heading")
    return faults


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path):
    assert not broken_links(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    verbs = {*cli.find_verbs(), *cli.BUILT_IN, "VERB"}
    assert commands(text, "make") - {"PYTHON"} <= targets
    assert commands(text, "tokenmdp") <= verbs


def test_the_readme_shows_the_two_commands_and_maps_every_folder():
    assert README.exists(), "pyproject.toml shows README.md on the package's page, but there is none"
    text = README.read_text(encoding="utf-8")
    assert {"demo", "test"} <= commands(text, "make")
    entries = [entry for block in blocks(text) if is_file_map(block) for entry in tree_entries(block)]
    assert [entry for entry in entries if not entry.startswith(MADE_BY_RUNS) and not (ROOT / entry).exists()] == []
    mapped = {target for _, target, _ in links(README)} | {(ROOT / entry).resolve() for entry in entries}
    package = ROOT / "src" / "tokenmdp"
    assert {path.parent.name for path in package.glob("*/__init__.py") if path.parent not in mapped} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path):
    named = [
        s for s in spans(document.read_text(encoding="utf-8")) if re.fullmatch(r"(src|docs|bench|tests)/[\w./-]+", s)
    ]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_dictionarys_names_are_in_the_code():
    top = "|".join(sorted({path.stem for path in (ROOT / "src" / "tokenmdp").iterdir() if path.stem[0] != "_"}))
    names = {span for span in spans(DICTIONARY) if re.fullmatch(rf"({top})(\.\w+)+", span)}
    assert len(names) > 30
    assert [name for name in sorted(names) if not resolves(name)] == []


def resolves(name: str) -> bool:
    """Whether tokenmdp.NAME is a module, or something in one; a dataclass's fields count."""
    parts = ["tokenmdp", *name.split(".")]
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_the_dictionary_has_the_problem_settings():
    assert mdp.settings_table() in DICTIONARY


def test_every_metric_a_recipe_logs_is_in_the_dictionary_and_none_besides():
    is_metric = re.compile(r"[a-z_]+(/[a-z_]+)+")
    logged = {
        node.value
        for path in [*(SOURCE / "recipes").glob("*.py"), SOURCE / "functional" / "measures.py"]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_metric.fullmatch(node.value)
    }
    section = DICTIONARY.partition("## Logged names")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    described = {span for row in rows for span in _SPAN.findall(row)}
    assert logged - described == set(), "logged, but docs/dictionary.md does not say what it is"
    assert {name for name in described if is_metric.fullmatch(name)} - logged == set(), (
        "described, but no recipe logs it"
    )


def test_these_checks_see_what_is_wrong(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, with `code`\n[good](#a-title-with-code) [bad](#none) ![bad](gone.png) [web](https://x.y/z)\n"
        "```sh\n$ make demo SIZE=tiny\nmake PYTHON=x lint\n.venv/bin/tokenmdp ppo --seed 1\n[no](link.md)\n```\n"
        "To make sure, `tokenmdp fly` and `make tea`.\n"
        "```\nsrc/tokenmdp/   the package\n  types.py      things\n                and words\n"
        "  models/\n    policy.py\ndocs/\n  none.md\n```\n"
    )
    text = page.read_text()
    assert broken_links(page) == [
        "page.md: #none: page.md has no such heading",
        "page.md: gone.png leads to no file",
    ]
    assert commands(text, "make") == {"demo", "tea"}
    assert commands(text, "tokenmdp") == {"ppo", "fly"}
    assert [is_file_map(block) for block in blocks(text)] == [False, True]
    assert tree_entries(blocks(text)[1]) == [
        "src/tokenmdp/",
        "src/tokenmdp/types.py",
        "src/tokenmdp/models/",
        "src/tokenmdp/models/policy.py",
        "docs/",
        "docs/none.md",
    ]
