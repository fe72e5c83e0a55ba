"""One self-contained page for a run: its curves, its responses, and for the demo its verdict.

    build("runs/demo")          # writes runs/demo/report.html and returns its path

The page needs no network, no fonts and no scripts: charts are inline SVG, switches are plain CSS, and a content
security policy in the page itself forbids everything else. Whatever a model, a user or a data set wrote is escaped, and
characters that could hide or reorder text are made visible.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tokenmdp.lab.report import captions, compare_page, demo_page, prompts_page, record, responses, reward_page
from tokenmdp.lab.report.folder import Figures, RunFolder, read
from tokenmdp.lab.report.words import marked, visible

HERE = Path(__file__).parent
SIDE_BY_SIDE, FIRST = 24, 6  # prompts on the page, and how many of them are open at once
SHEETS = 12  # token-coloured responses


def build(folder: str | Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        folder: any run folder. With a summary.json in it the page is the demo's, or that of a comparison; else it shows
            config, results, curves, responses and the end of the log. What is missing is said in a sentence, what is
            broken in a note.

    Returns:
        The path of the page; it appears there whole or not at all.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when the folder holds nothing a report could show.
    """
    run = read(folder)
    target = Path(folder) / "report.html"
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(render(run), encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def render(run: RunFolder) -> str:
    """The page as text; the same folder gives the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["marked"] = marked
    summary = run.summary or Figures({})
    names = captions.names(summary)
    context: dict[str, Any] = {
        "style": Markup((HERE / "style.css").read_text(encoding="utf-8")),  # ours, without a reader's text in it
        "run": run,
        "summary": summary,
        "title": summary.text("title") or run.name,
        "verdict": _sentences(summary.get("verdict")),
        "config": record.grouped(run.config),
        "result": record.grouped(run.result),
        "compared": responses.side_by_side(run.samples, SIDE_BY_SIDE, names),
        "first": FIRST,
        "prompts": responses.prompts(run.samples),
        "coloured": responses.coloured(run.samples, SHEETS, names),
        "log": record.log_table(run),
    }
    if summary.text("kind") == "compare":
        return environment.get_template("compare.html.jinja").render(**context, **compare_page.sections(run, summary))
    if summary.text("kind") == "reward-eval":
        return environment.get_template("reward.html.jinja").render(**context, **reward_page.sections(summary))
    if summary.text("kind") == "prompts":
        return environment.get_template("prompts.html.jinja").render(**context, **prompts_page.sections(summary))
    if run.summary is not None:
        return environment.get_template("demo.html.jinja").render(**context, **demo_page.sections(run, summary))
    context |= {"tiles": record.key_results(run.result), "curves": record.curves_of(run)}
    return environment.get_template("run.html.jinja").render(**context)


def _sentences(value: Any) -> list[str]:
    return (
        [str(sentence) for sentence in value] if isinstance(value, list) else [value] if isinstance(value, str) else []
    )


def _shown(value: Any) -> Any:
    """Every expression of a template passes here: text loses its invisible characters, our own markup stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
